package server

import (
	"fmt"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections/history"
)

// replayEvents answers with a page of JSON or, when the caller asks for it, with
// a stream: lines, server-sent events, or the messages of a WebSocket.
func (s *Server) replayEvents(c *call) error {
	form, err := s.answerForm(c.r)
	if err != nil {
		return err
	}
	q, b, err := s.replayQuery(c)
	if err != nil {
		return err
	}
	if err := s.lastEventID(c, form, &q, b); err != nil {
		return err
	}
	follow, err := s.followParameter(c, form, q)
	if err != nil {
		return err
	}
	least, most := 0, 0
	if form == formPage {
		least, most = defaultPage, maxPage
	}
	if q.Limit, err = s.limitParameter(c, least, most); err != nil {
		return err
	}
	if err := s.await(c); err != nil {
		return err
	}
	if err := s.restrict(c, q); err != nil {
		return err
	}
	if err := s.latest(c, &q); err != nil {
		return err
	}
	if err := s.holdCursors(c); err != nil {
		return err
	}
	release, err := s.holdStream(c, form)
	if err != nil {
		return err
	}
	defer release()
	if form == formPage {
		return s.trimmed(c, s.pageEvents(c, q, b))
	}
	out := &streamWriter{s: s, c: c, b: b, scanned: startOf(q), guard: s.guard(c, q)}
	switch form {
	case formEventStream:
		out.form = &eventStream{plainStream: plainStream{s: s, c: c}, b: b}
	case formSocket:
		if out.form, err = s.newSocket(c); err != nil {
			return err
		}
	default:
		out.form = &lineStream{plainStream{s: s, c: c}}
	}
	return s.trimmed(c, s.streamEvents(c, q, out, follow))
}

// answerForm is the form that the events are given in.
type answerForm int

const (
	formPage answerForm = iota
	formNDJSON
	formEventStream
	formSocket
)

// answerForm chooses the form; a page of JSON is the default.
func (s *Server) answerForm(r *http.Request) (answerForm, error) {
	if wantsSocket(r) {
		return formSocket, nil
	}
	values := r.Header.Values("Accept")
	if len(values) == 0 {
		return formPage, nil
	}
	best, quality := formPage, 0.0
	for entry := range strings.SplitSeq(strings.Join(values, ","), ",") {
		media, parameters, err := mime.ParseMediaType(entry)
		if err != nil {
			continue
		}
		q := 1.0
		if text, ok := parameters["q"]; ok {
			if q, err = strconv.ParseFloat(text, 64); err != nil {
				continue
			}
		}
		var form answerForm
		switch media {
		case typeJSON, "application/*", "*/*":
			form = formPage
		case typeNDJSON, typeNDJSON2:
			form = formNDJSON
		case typeEventStream, "text/*":
			form = formEventStream
		default:
			continue
		}
		if q > quality {
			best, quality = form, q
		}
	}
	if quality == 0 {
		return 0, s.invalidHeader(s.kinds.notAcceptable, "Accept", "the answer can be application/json, application/x-ndjson or text/event-stream")
	}
	return best, nil
}

// followParameter says whether the stream stays at the end. Server-sent events
// and WebSockets do unless follow=false.
func (s *Server) followParameter(c *call, form answerForm, q history.Query) (bool, error) {
	follow := form == formEventStream || form == formSocket
	switch text := c.query.Get("follow"); {
	case !c.query.Has("follow"):
	case text == "true":
		follow = true
	case text == "false":
		follow = false
	default:
		return false, s.invalidParameter("follow", "it is true or false")
	}
	switch {
	case !follow:
	case form == formPage:
		return false, s.invalidParameter("follow", "a page of JSON cannot be followed; accept application/x-ndjson or text/event-stream")
	case q.Reverse:
		return false, s.invalidParameter("order", "the end cannot be followed from the newest event backwards")
	case !q.Until.IsZero():
		return false, s.invalidParameter("until", "a replay with until has an end and cannot be followed; follow=false says so")
	}
	return follow, nil
}

// pageEvents answers with one page.
func (s *Server) pageEvents(c *call, q history.Query, b binding) error {
	ctx := c.r.Context()
	out := []byte(`{"data":[`)
	first := len(out)
	n := 0
	last := startOf(q)
	scanned, err := s.history.Replay(ctx, c.app.ID, q, func(item history.Item) error {
		n++
		last = item.Position
		if item.Recalled {
			return nil
		}
		if len(out) > first {
			out = append(out, ',')
		}
		before := len(out)
		var err error
		out, err = s.appendLine(ctx, out, c.app.ID, item.Record, item.Position)
		if err != nil && len(out) == before && before > first {
			out = out[:before-1] // the comma
		}
		if gone(err) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("opening the event at position %s: %w", item.Position, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if q.Reverse {
		scanned = last // at its end the view says 0, which as a bound means none
	}
	next := "null"
	if n == q.Limit {
		cursor, err := s.cursor(c, b, scanned)
		if err != nil {
			return err
		}
		next = strconv.Quote(cursor)
	}
	out = append(out, `],"next":`+next+`,"scanned_through":"`+scanned.String()+`","oldest_available":"`+
		s.oldest(c.app).UTC().Format(timeLayout)+`"}`...)
	return s.writeBody(c, http.StatusOK, typeJSON, out)
}

// streamEvents gives the events one after the other, and then the trailer. A
// problem after the answer has begun goes into the trailer, with the cursor that
// goes on after it.
func (s *Server) streamEvents(c *call, q history.Query, out *streamWriter, follow bool) error {
	tick, stop := s.keepAliveTicker(follow)
	defer stop()
	expired, stopExpiry := s.expiry(c, follow)
	defer stopExpiry()
	t := &stream{s: s, c: c, q: q, out: out, follow: follow, tick: tick, expired: expired, alarmed: s.changes.next()}
	return t.run(c.r.Context())
}

// expiry fires when the caller's token expires: a stream does not outlive the
// credential that opened it.
func (s *Server) expiry(c *call, follow bool) (<-chan time.Time, func()) {
	if !follow || c.caller.expires.IsZero() {
		return nil, func() {}
	}
	t := time.NewTimer(c.caller.expires.Sub(s.now()))
	return t.C, func() { t.Stop() }
}

func startOf(q history.Query) journal.Position {
	if q.Reverse {
		return q.Before
	}
	return q.After
}
