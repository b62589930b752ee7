package client

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Latest is a value of [Query.After] for ascending order: only what comes after
// the newest event there is.
const Latest = "latest"

// Tail is a live reading of an app's events by server-sent events: what is there
// already, and then what comes, until the context ends.
type Tail struct {
	c     *Client
	ctx   context.Context //nolint:containedctx // one tail is one call, spread over an iterator
	q     Query
	next  string // goes as Last-Event-ID
	count int
	pause time.Duration // before coming back after a cut, as the server asks
}

// Tail prepares to read; nothing is sent before the first event is asked for.
// [Query.Follow] is implied, [Query.Descending] and [Query.Until] are refused.
//
// With [Latest] the newest event is looked for when the tail first reaches the
// server, and not again after a cut.
func (c *Client) Tail(ctx context.Context, q Query) *Tail {
	t := &Tail{c: c, ctx: ctx, q: q, pause: -1}
	if q.After != Latest {
		t.next, t.q.After = q.After, ""
	}
	return t
}

// Next is where a later tail with the same filters goes on: the server's cursor
// after what has arrived.
func (t *Tail) Next() string { return t.next }

// Count is how many events were given.
func (t *Tail) Count() int { return t.count }

// Events gives the events in order, each once. A connection that is cut is taken
// up again after what has arrived, for as long as [Config.RetryFor] says. It
// ends with an error: a [*CutError] or a [*Problem]. With [Query.Limit] it ends
// without one after so many events.
func (t *Tail) Events() iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		p := patience{limit: t.c.retryFor}
		for {
			before, started := t.next, time.Now()
			err := t.stream(yield)
			switch {
			case err == nil || errors.Is(err, errStopped):
				return
			case t.ctx.Err() != nil:
				yield(Event{}, &CutError{Next: t.next, Err: context.Cause(t.ctx)})
				return
			}
			if progress := t.next != before; progress || time.Since(started) > longestPause {
				p.reset() // it is getting on, or was
				if err = t.rest(progress, err); err == nil {
					continue
				}
			}
			if err := p.wait(t.ctx, t.c.log, err); err != nil {
				if _, ok := transient(err); ok || t.ctx.Err() != nil || t.count > 0 {
					err = &CutError{Next: t.next, Err: err}
				}
				yield(Event{}, err)
				return
			}
		}
	}
}

// rest pauses for as long as the server's retry field asks, and returns nil when
// the tail may then be taken up. It returns err when that is for patience.
func (t *Tail) rest(progress bool, err error) error {
	if _, ok := transient(err); !ok || !progress || t.pause < 0 || t.c.retryFor < 0 {
		return err
	}
	timer := time.NewTimer(t.pause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-t.ctx.Done():
		return err
	}
}

// stream reads one answer of the server, from t.next on.
func (t *Tail) stream(yield func(Event, error) bool) error {
	q := t.q
	if q.Limit > 0 {
		if q.Limit -= t.count; q.Limit <= 0 {
			return nil
		}
	}
	if t.next != "" {
		q.After = "" // the server takes Last-Event-ID
	}
	ctx, cancel := context.WithCancelCause(t.ctx)
	defer cancel(nil)
	resp, err := t.c.send(ctx, request{
		method: http.MethodGet, path: t.c.appPath("events"), query: q.values(), accept: "text/event-stream", lastEvent: t.next,
	})
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if !strings.HasPrefix(resp.Header.Get("Content-Type"), "text/event-stream") {
		return fmt.Errorf("%w: the answer is no event stream", ErrProtocol)
	}
	quiet := time.AfterFunc(quietLimit, func() {
		cancel(&connectionError{err: fmt.Errorf("nothing arrived for %s", quietLimit)})
	})
	defer quiet.Stop()
	in := messageReader{lines: bufio.NewReaderSize(&watched{resp.Body, quiet}, 16<<10)}
	for {
		m, err := in.read()
		if err != nil {
			if cause := context.Cause(ctx); cause != nil {
				return cause
			}
			if errors.Is(err, ErrProtocol) {
				return err
			}
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return &connectionError{err: fmt.Errorf("the stream was cut: %w", err)}
		}
		if err := t.take(m, yield); err != nil {
			return err
		}
		if m.name == "end" {
			return t.end(m)
		}
	}
}

// take gives a message's event to the caller.
func (t *Tail) take(m sseMessage, yield func(Event, error) bool) error {
	if m.retry >= 0 {
		t.pause = m.retry
	}
	if len(m.data) == 0 || m.name != "" {
		if m.id != "" && m.name == "" {
			t.next = m.id // nothing was selected up to here
		}
		return nil
	}
	pos, err := position(m.data)
	if err != nil {
		return err
	}
	t.count++
	if t.next = m.id; t.next == "" {
		t.next = pos.String()
	}
	if !yield(Event{Position: pos, JSON: jsontext.Value(m.data)}, nil) {
		return errStopped
	}
	return nil
}

func (t *Tail) end(m sseMessage) error {
	var line trailer
	if err := json.Unmarshal(m.data, &line); err != nil {
		return fmt.Errorf("%w: the trailer cannot be read: %w", ErrProtocol, err)
	}
	if line.End.Next != nil && *line.End.Next != "" {
		t.next = *line.End.Next
	}
	switch {
	case line.End.Problem != nil:
		return line.End.Problem
	case t.q.Limit > 0 && t.count >= t.q.Limit:
		return nil
	}
	return &connectionError{err: errors.New("the server ended the stream")}
}

// sseMessage is what stands between two empty lines of an event stream (HTML
// standard, section 9.2.6). An incomplete one at the end of a stream does not
// count, so an event is taken whole or not at all.
type sseMessage struct {
	id, name string
	data     []byte        // valid until the next is read
	retry    time.Duration // negative when absent
}

type messageReader struct {
	lines *bufio.Reader
	long  []byte
	data  []byte
}

func (r *messageReader) read() (sseMessage, error) {
	m := sseMessage{retry: -1}
	r.data = r.data[:0]
	for {
		line, err := readLine(r.lines, &r.long)
		if err != nil {
			return m, err
		}
		line = bytes.TrimSuffix(line, []byte("\r"))
		if len(line) == 0 {
			m.data = bytes.TrimSuffix(r.data, []byte("\n"))
			return m, nil
		}
		field, value, _ := bytes.Cut(line, []byte(":"))
		value = bytes.TrimPrefix(value, []byte(" "))
		switch string(field) {
		case "id":
			m.id = string(value)
		case "event":
			m.name = string(value)
		case "retry":
			if n, err := strconv.ParseUint(string(value), 10, 31); err == nil {
				m.retry = time.Duration(n) * time.Millisecond
			}
		case "data":
			if len(r.data)+len(value) > maxReplayLine {
				return m, fmt.Errorf("%w: a message of more than %d bytes", ErrProtocol, maxReplayLine)
			}
			r.data = append(append(r.data, value...), '\n')
		}
	}
}
