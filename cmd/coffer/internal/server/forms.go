package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/journal"
)

// streamForm is how a stream looks on the wire.
type streamForm interface {
	// batch sends the lines of a batch. The first call begins the answer.
	batch(b *sealedBatch) error
	// alive says, while nothing happens, that the stream is still there, and how
	// far the view has been read. progress is false when that was said before.
	alive(next func() (string, error), progress bool) error
	// end sends the trailer, whose JSON is given too.
	end(t trailer, text []byte) error
	// gone is closed when the caller has left and no write would tell. It may be
	// nil.
	gone() <-chan struct{}
}

// streamWriter sends a stream and knows how far it has come.
type streamWriter struct {
	s    *Server
	c    *call
	b    binding
	form streamForm
	// guard, if it is set, refuses to go on before events up to a position are
	// sent.
	guard func(journal.Position) error

	count   int
	omitted int
	scanned journal.Position
	told    journal.Position // up to here the caller knows
}

func (w *streamWriter) gone() <-chan struct{} { return w.form.gone() }

func (w *streamWriter) batch(b *sealedBatch) error {
	// An error before anything was sent is an ordinary problem, with its status.
	if b.err != nil && w.c.w.status == 0 && len(b.lines) == 0 {
		return b.err
	}
	if b.count > 0 && w.guard != nil {
		if err := w.guard(b.positions[b.count-1]); err != nil {
			if w.c.w.status == 0 {
				return err
			}
			return ended(w.end(err))
		}
	}
	w.count += b.count
	w.omitted += b.omitted
	if b.scanned != 0 {
		w.scanned = b.scanned
	}
	if b.count > 0 {
		w.told = b.positions[b.count-1]
	}
	if w.c.r.Method == http.MethodHead && len(b.lines) > 0 {
		b.lines, b.positions, b.ends = b.lines[:0], b.positions[:0], b.ends[:0]
	}
	return w.form.batch(b)
}

func (w *streamWriter) alive() error {
	progress := w.told < w.scanned
	w.told = max(w.told, w.scanned)
	return w.form.alive(w.next, progress)
}

func (w *streamWriter) next() (string, error) { return w.s.cursor(w.c, w.b, w.scanned) }

// errCallerGone means that nobody takes the answer any more.
var errCallerGone = errors.New("the caller has gone")

// errStopping ends the streams of a server that shuts down. It is no problem:
// the trailer says where to go on.
var errStopping = errors.New("the server is shutting down")

type trailer struct {
	Count      int      `json:"count"`
	Omitted    int      `json:"omitted"`
	Next       string   `json:"next"`
	Checkpoint *string  `json:"checkpoint"` // of the ledger; none yet
	Problem    *problem `json:"problem,omitempty"`

	cause error
}

// trailerLine is the trailer as it is sent.
type trailerLine struct {
	End trailer `json:"end"`
}

// end sends the trailer and returns the cause, if that is a problem.
func (w *streamWriter) end(cause error) error {
	t := trailer{Count: w.count, Omitted: w.omitted, cause: cause}
	switch {
	case errors.Is(cause, context.Canceled):
		return cause // the caller has gone
	case cause == nil, errors.Is(cause, errStopping):
	default:
		t.Problem = w.s.problemOf(w.s.trimmed(w.c, cause))
		t.Problem.RequestID = w.c.id
	}
	var err error
	if t.Next, err = w.next(); err != nil {
		// Without a cursor there is no trailer, and the reader sees a cut.
		return err
	}
	text, err := json.Marshal(trailerLine{t})
	if err != nil {
		return fmt.Errorf("encoding a trailer: %w", err)
	}
	if w.c.r.Method != http.MethodHead {
		if err := w.form.end(t, text); err != nil {
			return err
		}
	}
	if t.Problem == nil || errors.Is(cause, auth.ErrExpired) {
		return nil
	}
	return cause
}

// plainStream writes to the body of an answer.
type plainStream struct {
	s *Server
	c *call
}

func (p *plainStream) gone() <-chan struct{} { return nil }

func (p *plainStream) write(media string, b []byte) error {
	if p.c.w.status == 0 {
		p.c.w.Header().Set("Content-Type", media)
		p.c.w.WriteHeader(http.StatusOK)
	}
	if p.c.r.Method == http.MethodHead {
		return nil
	}
	p.s.extendDeadline(p.c)
	conn := p.c.gatherer()
	conn.hold()
	_, err := p.c.w.Write(b)
	if err == nil {
		err = http.NewResponseController(p.c.w).Flush()
	}
	if err = cmp.Or(err, conn.send()); err != nil {
		return fmt.Errorf("%w: %w", errCallerGone, err)
	}
	return nil
}

// lineStream is NDJSON: an event on each line, and the trailer on the last.
type lineStream struct{ plainStream }

// keepAlive is what followed lines have while nothing happens: white space
// before the next line, which every reader of JSON skips and no reader of lines
// takes for one.
const keepAlive = " "

func (l *lineStream) batch(b *sealedBatch) error {
	return l.write(typeNDJSON, b.lines)
}

func (l *lineStream) alive(func() (string, error), bool) error {
	return l.write(typeNDJSON, []byte(keepAlive))
}

func (l *lineStream) end(_ trailer, text []byte) error {
	return l.write(typeNDJSON, append(text, '\n'))
}
