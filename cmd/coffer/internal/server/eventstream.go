package server

import (
	"fmt"
	"strconv"

	"github.com/cofferdb/coffer/projections/history"
)

const typeEventStream = "text/event-stream"

// retryMillis is how long a reader of server-sent events waits before it comes
// back (HTML standard, section 9.2.6).
const retryMillis = 1000

// eventStream is server-sent events: an event's JSON is the data of a message
// without a name, its cursor the id. The last message has the name "end" and the
// trailer as its data.
//
// An id without data moves the reader's Last-Event-ID and tells nothing else, so
// a reader whose filters let nothing through does not start from far behind.
type eventStream struct {
	plainStream

	b     binding
	begun bool
}

func (e *eventStream) batch(b *sealedBatch) error {
	var err error
	if b.shared {
		b.wired.Do(func() { b.wire, err = e.messages(nil, b) })
		if err == nil && b.wire == nil && len(b.ends) > 0 {
			err = errCallerGone // who made it could not; come back
		}
	} else {
		out := b.wire[:0]
		if !e.begun {
			e.begun = true
			// Proxies that buffer would hold back the first event.
			e.c.w.Header().Set("X-Accel-Buffering", "no")
			out = append(out, "retry: "+strconv.Itoa(retryMillis)+"\n\n"...)
		}
		b.wire, err = e.messages(out, b)
	}
	if err != nil || len(b.wire) == 0 {
		return err
	}
	return e.write(typeEventStream, b.wire)
}

// messages appends a message for each of the lines.
func (e *eventStream) messages(out []byte, b *sealedBatch) ([]byte, error) {
	start := 0
	for i, end := range b.ends {
		cursor, err := e.s.cursor(e.c, e.b, b.positions[i])
		if err != nil {
			return nil, err
		}
		out = append(out, "id: "...)
		out = append(out, cursor...)
		out = append(out, "\ndata: "...)
		out = append(out, b.lines[start:end]...) // its newline ends the field
		out = append(out, '\n')
		start = end
	}
	return out, nil
}

func (e *eventStream) alive(next func() (string, error), progress bool) error {
	if !progress {
		return e.write(typeEventStream, []byte(":\n\n"))
	}
	cursor, err := next()
	if err != nil {
		return err
	}
	return e.write(typeEventStream, []byte("id: "+cursor+"\n\n"))
}

func (e *eventStream) end(t trailer, text []byte) error {
	return e.write(typeEventStream, fmt.Appendf(nil, "event: end\nid: %s\ndata: %s\n\n", t.Next, text))
}

// lastEventID is where a reader of server-sent events goes on. It stands above
// after, because the reader repeats its first request as it was.
func (s *Server) lastEventID(c *call, form answerForm, q *history.Query, b binding) error {
	values := c.r.Header.Values("Last-Event-ID")
	if form != formEventStream || len(values) == 0 || values[0] == "" {
		return nil
	}
	if len(values) > 1 {
		return s.invalidHeader(s.kinds.invalidRequest, "Last-Event-ID", "it is given more than once")
	}
	place, err := s.parsePlace(c, values[0], b)
	if err != nil {
		return err
	}
	if place == nil {
		return s.invalidHeader(s.kinds.invalidRequest, "Last-Event-ID", "it is neither a cursor nor a position")
	}
	if q.Reverse {
		q.Before = *place
	} else {
		q.After = *place
	}
	c.query.Del("after")
	return nil
}

// latestPlace is the value of after that means the newest event there is.
const latestPlace = "latest"

// latest puts a replay that is asked to begin at the newest event there. It comes
// after the wait for min_position, which it thereby includes.
func (s *Server) latest(c *call, q *history.Query) error {
	if c.query.Get("after") != latestPlace {
		return nil
	}
	if q.Reverse {
		return s.invalidParameter("after", "latest is for ascending order")
	}
	newest := history.Query{Reverse: true, Limit: 1, Oldest: q.Oldest}
	_, err := s.history.Replay(c.r.Context(), c.app.ID, newest, func(item history.Item) error {
		q.After = item.Position
		return nil
	})
	return err
}
