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
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/journal"
)

// maxReplayLine bounds a line of a replay.
const maxReplayLine = 1 << 20

// quietLimit is how long a replay may bring nothing before it is taken as cut.
const quietLimit = 60 * time.Second

// Query says which events to replay. Its zero value is all that is kept, oldest
// first.
type Query struct {
	// After is where to begin: the position of the last event that is known
	// already, in decimal, or a cursor that the server gave, or [Latest]. Empty
	// means the beginning, or the end with Descending.
	After string
	// From and Until bound the events' own time: from ≤ time < until.
	From, Until time.Time
	// Conversation, User and Types narrow the events; a user's are those that it
	// sent or received directly.
	Conversation, User string
	Types              []journal.Type
	// Descending is newest first.
	Descending bool
	// Limit ends the replay after so many events; 0 means no limit.
	Limit int
	// Follow waits at the end for what comes next, until the context ends.
	Follow bool
}

func (q Query) values() url.Values {
	v := url.Values{}
	set := func(name, value string) {
		if value != "" {
			v.Set(name, value)
		}
	}
	set("after", q.After)
	if !q.From.IsZero() {
		v.Set("from", q.From.UTC().Format(time.RFC3339Nano))
	}
	if !q.Until.IsZero() {
		v.Set("until", q.Until.UTC().Format(time.RFC3339Nano))
	}
	set("conversation", q.Conversation)
	set("user", q.User)
	names := make([]string, len(q.Types))
	for i, t := range q.Types {
		names[i] = t.String()
	}
	set("type", strings.Join(names, ","))
	if q.Descending {
		v.Set("order", "desc")
	}
	if q.Limit > 0 {
		v.Set("limit", strconv.Itoa(q.Limit))
	}
	if q.Follow {
		v.Set("follow", "true")
	}
	return v
}

// Event is an event as the server sent it.
type Event struct {
	Position journal.Position
	// JSON is the CloudEvent with its position, without a newline. In a replay it
	// is valid until the next event is asked for.
	JSON jsontext.Value
}

// CutError ends a replay that was cut and could not be taken up again. Call
// Replay again with Query.After = Next to go on; nothing was skipped.
type CutError struct {
	Next string // the position of the last event that arrived, or what After was
	Err  error
}

func (e *CutError) Error() string { return fmt.Sprintf("the replay was cut: %v", e.Err) }

// Unwrap returns why it was cut.
func (e *CutError) Unwrap() error { return e.Err }

// Replay is one reading of an app's events.
type Replay struct {
	c     *Client
	ctx   context.Context //nolint:containedctx // one replay is one call, spread over an iterator
	q     Query
	next  string
	count int
	end   jsontext.Value
}

// Replay prepares to read; nothing is sent before the first event is asked for.
func (c *Client) Replay(ctx context.Context, q Query) *Replay {
	return &Replay{c: c, ctx: ctx, q: q, next: q.After}
}

// Next is where a later replay with the same filters goes on: a cursor after the
// end has been reached, otherwise the position of the last event that was given.
func (r *Replay) Next() string { return r.next }

// Count is how many events were given.
func (r *Replay) Count() int { return r.count }

// End is the server's trailer, once it has arrived: {"end":{…}}.
func (r *Replay) End() jsontext.Value { return r.end }

// Events gives the events in order. It ends with an error, a *CutError or a
// *Problem, or with none after the trailer has arrived. It can be ranged over
// again to go on after where it stopped.
func (r *Replay) Events() iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		p := patience{limit: r.c.retryFor}
		for {
			before, started := r.count, time.Now()
			err := r.stream(yield)
			switch {
			case err == nil || errors.Is(err, errStopped):
				return
			case r.ctx.Err() != nil:
				yield(Event{}, &CutError{Next: r.next, Err: context.Cause(r.ctx)})
				return
			}
			if r.count > before || time.Since(started) > longestPause {
				p.reset() // it is getting on, or was
			}
			if err := p.wait(r.ctx, r.c.log, err); err != nil {
				if _, ok := transient(err); ok || r.ctx.Err() != nil || r.count > 0 {
					err = &CutError{Next: r.next, Err: err}
				}
				yield(Event{}, err)
				return
			}
		}
	}
}

// errStopped says that the caller wants no more.
var errStopped = errors.New("stopped by the caller")

// stream reads one answer of the server, from r.next on.
func (r *Replay) stream(yield func(Event, error) bool) error {
	q := r.q
	q.After = r.next
	if q.Limit > 0 {
		if q.Limit -= r.count; q.Limit <= 0 {
			return nil
		}
	}
	ctx, cancel := context.WithCancelCause(r.ctx)
	defer cancel(nil)
	resp, err := r.c.send(ctx, request{method: http.MethodGet, path: r.c.appPath("events"), query: q.values(), accept: "application/x-ndjson"})
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	quiet := time.AfterFunc(quietLimit, func() {
		cancel(&connectionError{err: fmt.Errorf("nothing arrived for %s", quietLimit)})
	})
	defer quiet.Stop()
	lines := bufio.NewReaderSize(&watched{resp.Body, quiet}, 256<<10)
	n := 0
	var long []byte
	for {
		line, err := readLine(lines, &long)
		if err != nil {
			if cause := context.Cause(ctx); cause != nil {
				return cause
			}
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			if errors.Is(err, ErrProtocol) {
				return err
			}
			return &connectionError{err: fmt.Errorf("the stream ended without its trailer: %w", err)}
		}
		// Spaces keep a quiet connection alive.
		if line = bytes.TrimLeft(line, " "); len(line) == 0 {
			continue
		}
		if bytes.HasPrefix(line, []byte(trailerPrefix)) {
			return r.finish(line, n)
		}
		pos, err := position(line)
		if err != nil {
			return err
		}
		n++
		r.count++
		r.next = pos.String()
		if !yield(Event{Position: pos, JSON: line}, nil) {
			return errStopped
		}
	}
}

// watched runs a timer while it waits for the server, and not while the caller
// takes its time over what has arrived.
type watched struct {
	r     io.Reader
	quiet *time.Timer
}

func (w *watched) Read(p []byte) (int, error) {
	w.quiet.Reset(quietLimit)
	defer w.quiet.Stop()
	return w.r.Read(p)
}

// trailer is the last line of a replay. A server that has to stop early says
// why in problem.
type trailer struct {
	End struct {
		Count   *int     `json:"count"`
		Omitted int      `json:"omitted"` // recalled or erased events
		Next    *string  `json:"next"`
		Problem *Problem `json:"problem"`
	} `json:"end"`
}

func (r *Replay) finish(line []byte, n int) error {
	var t trailer
	if err := json.Unmarshal(line, &t); err != nil {
		return fmt.Errorf("%w: the trailer cannot be read: %w", ErrProtocol, err)
	}
	if t.End.Count == nil || *t.End.Count != n {
		return fmt.Errorf("%w: %d events arrived and the trailer does not agree", ErrProtocol, n)
	}
	if t.End.Next != nil && *t.End.Next != "" {
		r.next = *t.End.Next
	}
	if t.End.Problem != nil {
		return t.End.Problem
	}
	r.end = bytes.Clone(line)
	if r.q.Follow && r.ctx.Err() == nil {
		return &connectionError{err: errors.New("the server ended the stream")}
	}
	return nil
}

// Lines of a replay as the server writes them: its events are canonical, with
// the position as the last member. Both are found without parsing the event.
const (
	trailerPrefix  = `{"end":`
	positionPrefix = `"position":"`
)

func position(line []byte) (journal.Position, error) {
	tail := line[max(0, len(line)-48):]
	if i := bytes.LastIndex(tail, []byte(positionPrefix)); i >= 0 {
		digits, ok := bytes.CutSuffix(tail[i+len(positionPrefix):], []byte(`"}`))
		if ok {
			if p, err := journal.ParsePosition(string(digits)); err == nil {
				return p, nil
			}
		}
	}
	// Not where it should be: something has written the JSON anew.
	var e struct {
		Position journal.Position `json:"position"`
	}
	if err := json.Unmarshal(line, &e); err != nil || e.Position == 0 {
		return 0, fmt.Errorf("%w: a line without a position", ErrProtocol)
	}
	return e.Position, nil
}

// readLine returns a line without its newline, valid until the next call. The
// last line must have its newline too: without one it was cut.
func readLine(r *bufio.Reader, long *[]byte) ([]byte, error) {
	part, err := r.ReadSlice('\n')
	if err == nil {
		return part[:len(part)-1], nil
	}
	*long = (*long)[:0]
	for errors.Is(err, bufio.ErrBufferFull) {
		if *long = append(*long, part...); len(*long) > maxReplayLine {
			return nil, fmt.Errorf("%w: a line of more than %d bytes", ErrProtocol, maxReplayLine)
		}
		part, err = r.ReadSlice('\n')
	}
	if err != nil {
		return nil, err
	}
	*long = append(*long, part...)
	return (*long)[:len(*long)-1], nil
}
