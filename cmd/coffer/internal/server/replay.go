package server

import (
	"context"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections/history"
)

// replayEvents answers with a page of JSON or, when Accept asks for it, with
// the whole range as NDJSON.
func (s *Server) replayEvents(c *call) error {
	lines, err := s.wantsLines(c.r)
	if err != nil {
		return err
	}
	q, b, err := s.replayQuery(c)
	if err != nil {
		return err
	}
	follow, err := s.followParameter(c, lines, q)
	if err != nil {
		return err
	}
	if err := s.await(c); err != nil {
		return err
	}
	if !s.streams.TryAcquire(1) {
		return s.kinds.overloaded.problem("too many replays are under way; try again")
	}
	defer s.streams.Release(1)
	if lines {
		if q.Limit, err = s.limitParameter(c, 0, 0); err != nil {
			return err
		}
		return s.trimmed(c, s.streamEvents(c, q, b, follow))
	}
	if q.Limit, err = s.limitParameter(c, defaultPage, maxPage); err != nil {
		return err
	}
	return s.trimmed(c, s.pageEvents(c, q, b))
}

// wantsLines chooses between the two forms; JSON is the default.
func (s *Server) wantsLines(r *http.Request) (bool, error) {
	values := r.Header.Values("Accept")
	if len(values) == 0 {
		return false, nil
	}
	best, quality := "", 0.0
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
		switch media {
		case typeJSON, typeNDJSON, typeNDJSON2, "application/*", "*/*":
		default:
			continue
		}
		if q > quality {
			best, quality = media, q
		}
	}
	if best == "" {
		return false, s.invalidHeader(s.kinds.notAcceptable, "Accept", "the answer can be application/json or application/x-ndjson")
	}
	return best == typeNDJSON || best == typeNDJSON2, nil
}

func (s *Server) followParameter(c *call, lines bool, q history.Query) (bool, error) {
	switch text := c.query.Get("follow"); {
	case !c.query.Has("follow"), text == "false":
		return false, nil
	case text != "true":
		return false, s.invalidParameter("follow", "it is true or false")
	case !lines:
		return false, s.invalidParameter("follow", "only application/x-ndjson can be followed")
	case q.Reverse:
		return false, s.invalidParameter("follow", "the end cannot be followed from the newest event backwards")
	case !q.Until.IsZero():
		return false, s.invalidParameter("follow", "a replay with until has an end")
	}
	return true, nil
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

// streamEvents answers with lines and the trailer. A problem after the answer
// has begun goes into the trailer, with the cursor that goes on after it.
func (s *Server) streamEvents(c *call, q history.Query, b binding, follow bool) error {
	ctx, cancel := context.WithCancel(c.r.Context())
	defer cancel()
	out := &lineWriter{s: s, c: c, scanned: startOf(q)}
	source := newLineSource(s, c.app.ID)
	source.start(ctx, q, follow)
	tick, stop := s.keepAliveTicker(follow)
	defer stop()
	for {
		select {
		case batch, ok := <-source.opened:
			if !ok {
				return s.trailer(c, out, b, nil)
			}
			err := batch.err
			if writeErr := out.batch(batch); writeErr != nil {
				return writeErr
			}
			source.recycle(batch)
			if err != nil {
				return s.trailer(c, out, b, err)
			}
		case <-tick:
			if err := out.write([]byte(keepAlive)); err != nil {
				return err
			}
		case <-s.stopping:
			return s.trailer(c, out, b, nil)
		}
	}
}

func startOf(q history.Query) journal.Position {
	if q.Reverse {
		return q.Before
	}
	return q.After
}

// lineWriter sends a stream and knows how far it has come.
type lineWriter struct {
	s       *Server
	c       *call
	count   int
	omitted int
	scanned journal.Position
}

func (l *lineWriter) batch(b *sealedBatch) error {
	// An error before anything was sent is an ordinary problem, with its status.
	if b.err != nil && l.c.w.status == 0 && len(b.lines) == 0 {
		return b.err
	}
	l.count += b.count
	l.omitted += b.omitted
	if b.scanned != 0 {
		l.scanned = b.scanned
	}
	return l.write(b.lines)
}

func (l *lineWriter) write(b []byte) error {
	if l.c.w.status == 0 {
		l.c.w.Header().Set("Content-Type", typeNDJSON)
		l.c.w.WriteHeader(http.StatusOK)
	}
	if l.c.r.Method == http.MethodHead {
		return nil
	}
	l.s.extendDeadline(l.c)
	if _, err := l.c.w.Write(b); err != nil {
		return fmt.Errorf("%w: %w", errCallerGone, err)
	}
	if err := http.NewResponseController(l.c.w).Flush(); err != nil {
		return fmt.Errorf("%w: %w", errCallerGone, err)
	}
	return nil
}

// errCallerGone means that nobody takes the answer any more.
var errCallerGone = errors.New("the caller has gone")

type trailer struct {
	Count      int      `json:"count"`
	Omitted    int      `json:"omitted"`
	Next       string   `json:"next"`
	Checkpoint *string  `json:"checkpoint"` // of the ledger; none yet
	Problem    *problem `json:"problem,omitempty"`
}

func (s *Server) trailer(c *call, l *lineWriter, b binding, cause error) error {
	t := trailer{Count: l.count, Omitted: l.omitted}
	if cause != nil {
		if errors.Is(cause, context.Canceled) {
			return cause // the caller has gone
		}
		t.Problem = s.problemOf(s.trimmed(c, cause))
		t.Problem.RequestID = c.id
	}
	next, err := s.cursor(c, b, l.scanned)
	if err != nil {
		// Without a cursor there is no trailer, and the reader sees a cut.
		return err
	}
	t.Next = next
	line, err := json.Marshal(struct {
		End trailer `json:"end"`
	}{t})
	if err != nil {
		return fmt.Errorf("encoding a trailer: %w", err)
	}
	if err := l.write(append(line, '\n')); err != nil {
		return err
	}
	return cause
}
