package server

import (
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"os"
	"strings"
	"time"
)

// media types of bodies.
const (
	typeJSON       = "application/json"
	typeEvent      = "application/cloudevents+json"
	typeEventBatch = "application/cloudevents-batch+json"
	typeNDJSON     = "application/x-ndjson"
	typeNDJSON2    = "application/ndjson"
)

// form is the shape that a Content-Type announces.
type form int

const (
	formJSON   form = iota // an object or, where the route says so, an array
	formObject             // one CloudEvent
	formArray              // CloudEvents JSON batch
	formLines              // an object on each line
)

// bodyForm checks Content-Type and its parameters. JSON is UTF-8 (RFC 8259
// section 8.1), so a missing charset means UTF-8 and any other is refused.
func (s *Server) bodyForm(r *http.Request, allowed []string) (form, error) {
	values := r.Header.Values("Content-Type")
	if len(values) != 1 {
		return 0, s.invalidHeader(s.kinds.unsupportedType, "Content-Type", "one Content-Type is needed: "+strings.Join(allowed, ", "))
	}
	media, parameters, err := mime.ParseMediaType(values[0])
	if err != nil {
		return 0, s.invalidHeader(s.kinds.unsupportedType, "Content-Type", "the Content-Type cannot be read")
	}
	for name, value := range parameters {
		if name != "charset" {
			return 0, s.invalidHeader(s.kinds.unsupportedType, "Content-Type", "the Content-Type has an unknown parameter")
		}
		if !strings.EqualFold(value, "utf-8") {
			return 0, s.invalidHeader(s.kinds.unsupportedType, "Content-Type", "the charset must be utf-8")
		}
	}
	for _, a := range allowed {
		if a != media {
			continue
		}
		switch media {
		case typeEvent:
			return formObject, nil
		case typeEventBatch:
			return formArray, nil
		case typeNDJSON, typeNDJSON2:
			return formLines, nil
		}
		return formJSON, nil
	}
	return 0, s.invalidHeader(s.kinds.unsupportedType, "Content-Type", "the Content-Type must be one of "+strings.Join(allowed, ", "))
}

// readBody reads the whole body, at most limit bytes of it after decoding, and
// returns a function that gives the memory back. All bodies that are in memory
// at a time share one budget, so that many large ones are refused instead of
// ending the process.
func (s *Server) readBody(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, func(), error) {
	if r.ContentLength > limit {
		return nil, nil, s.kinds.payloadTooLarge.problem(fmt.Sprintf("the body is over %d bytes", limit))
	}
	packed, err := s.bodyEncoding(r)
	if err != nil {
		return nil, nil, err
	}
	in := io.Reader(http.MaxBytesReader(w, r.Body, limit))
	expect := r.ContentLength
	if packed {
		unpacked, err := gzip.NewReader(in)
		if err != nil {
			return nil, nil, s.bodyError(err, limit)
		}
		in, expect = unpacked, -1
	}
	body, release, err := s.collect(in, expect, limit)
	if err != nil {
		return nil, nil, s.bodyError(err, limit)
	}
	// The deadline was the body's; the answer has its own.
	_ = http.NewResponseController(w).SetReadDeadline(time.Time{})
	if len(body) == 0 {
		release()
		return nil, nil, s.invalidBody("", "the body is empty")
	}
	return body, release, nil
}

// bodyDeadline gives the whole body of a request its time, also when it is
// refused and only drained: a chunked body may drip and never end.
func (s *Server) bodyDeadline(c *call) {
	if c.r.ContentLength == 0 {
		return
	}
	err := http.NewResponseController(c.w).SetReadDeadline(time.Now().Add(s.limits.BodyTimeout))
	if err != nil && !errors.Is(err, http.ErrNotSupported) {
		s.log.Debug("read deadline not set", "request_id", c.id, "err", err)
	}
}

// bodyEncoding reports whether the body is declared to be gzip.
func (s *Server) bodyEncoding(r *http.Request) (bool, error) {
	values := r.Header.Values("Content-Encoding")
	if len(values) == 0 || (len(values) == 1 && strings.EqualFold(values[0], "identity")) {
		return false, nil
	}
	if len(values) == 1 && strings.EqualFold(values[0], "gzip") {
		return true, nil
	}
	return false, s.invalidHeader(s.kinds.unsupportedType, "Content-Encoding", "the only Content-Encoding that is taken is gzip, once")
}

var (
	errBodyLimit  = errors.New("the decoded body is over the limit")
	errBodyBudget = errors.New("too many request bodies at once")
)

// collect reads all of in. It grows as bytes arrive: a Content-Length reserves
// nothing by itself.
func (s *Server) collect(in io.Reader, expect, limit int64) ([]byte, func(), error) {
	const first = 16 << 10
	var held int64
	release := func() { s.bodies.Release(held); held = 0 }
	grow := func(n int64) bool {
		if !s.bodies.TryAcquire(n) {
			return false
		}
		held += n
		return true
	}
	size := int64(first)
	if expect >= 0 && expect < first {
		size = max(expect, 1)
	}
	if !grow(size) {
		return nil, nil, errBodyBudget
	}
	body := make([]byte, 0, size)
	for {
		if len(body) == cap(body) {
			// The old and the new buffer are both there for a moment.
			next := min(2*int64(cap(body)), limit+1)
			if expect >= 0 && expect > int64(len(body)) {
				next = min(next, max(expect, int64(len(body))+1))
			}
			if next <= int64(cap(body)) {
				next = int64(cap(body)) + 1
			}
			if !grow(next - int64(cap(body))) {
				release()
				return nil, nil, errBodyBudget
			}
			body = append(make([]byte, 0, next), body...)
		}
		n, err := in.Read(body[len(body):cap(body)])
		body = body[:len(body)+n]
		if int64(len(body)) > limit {
			release()
			return nil, nil, errBodyLimit
		}
		if errors.Is(err, io.EOF) {
			return body, release, nil
		}
		if err != nil {
			release()
			return nil, nil, err
		}
	}
}

func (s *Server) bodyError(err error, limit int64) error {
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge), errors.Is(err, errBodyLimit):
		return s.kinds.payloadTooLarge.problem(fmt.Sprintf("the body is over %d bytes", limit))
	case errors.Is(err, errBodyBudget):
		return s.kinds.overloaded.problem("too many request bodies are being received; try again")
	case errors.Is(err, os.ErrDeadlineExceeded):
		return s.kinds.requestTimeout.problem(fmt.Sprintf("the body did not arrive within %s", s.limits.BodyTimeout))
	case errors.Is(err, gzip.ErrHeader), errors.Is(err, gzip.ErrChecksum), errors.Is(err, io.ErrUnexpectedEOF):
		return s.invalidBody("", "the body ends early or is not what its encoding says")
	}
	return s.invalidBody("", "the body cannot be read")
}
