package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections/history"
)

// The past is a line of three: one goroutine reads sealed records from the view,
// one opens them into lines of JSON, and the request's own goroutine sends those.
// So reading, opening and TLS share the machine's cores, and what is in memory is
// a fixed number of batches, however long the replay: a reader that takes nothing
// stops the line, and nothing is buffered for it.
const (
	batchBytes  = 64 << 10
	batchEvents = 512
	batches     = 6 // three being worked on, three waiting
)

// A stream gives the events of one request: the past by a lineSource and then,
// when it follows, what comes. A tail that waits has its request's goroutine and
// no buffer: most tails are idle most of the time, and there are many.
type stream struct {
	s       *Server
	c       *call
	q       history.Query
	out     *streamWriter
	follow  bool
	left    int // of the limit, 0: none
	tick    <-chan time.Time
	expired <-chan time.Time
	changed <-chan struct{} // taken before the last reading
	alarmed <-chan struct{} // an app or account has changed
}

// run returns when everything has been given or, when the stream follows, when
// the reader, the token or the server ends.
func (t *stream) run(ctx context.Context) error {
	limited := t.q.Limit > 0
	t.left = t.q.Limit
	for step := t.past; ; step = t.news {
		t.changed = t.s.changed(t.c.app.ID) // before reading: nothing falls in between
		more, err := step(ctx)
		for more && err == nil {
			more, err = t.past(ctx) // it has fallen behind
		}
		switch {
		case errors.Is(err, errEnded):
			return nil
		case err != nil:
			return err
		case !t.follow || (limited && t.left == 0):
			return t.out.end(nil)
		}
		if err := t.wait(); err != nil {
			return err
		}
	}
}

// errEnded means that the trailer has been sent, or that none is needed.
var errEnded = errors.New("the stream has ended")

// ended turns what ended a stream into what run returns.
func ended(err error) error {
	if err == nil {
		return errEnded
	}
	return err
}

// wait returns nil when there is something new.
func (t *stream) wait() error {
	for {
		select {
		case <-t.changed:
			return nil
		case <-t.tick:
			if err := t.s.stands(t.c, t.c.app.ID); err != nil { // changed by another process
				return ended(t.out.end(err))
			}
			if err := t.out.alive(); err != nil {
				return err
			}
		case <-t.alarmed:
			t.alarmed = t.s.changes.next()
			if err := t.s.stands(t.c, t.c.app.ID); err != nil {
				return ended(t.out.end(err))
			}
		case <-t.out.gone():
			return errCallerGone
		case <-t.c.r.Context().Done():
			return errCallerGone
		case <-t.expired:
			return ended(t.out.end(auth.ErrExpired))
		case <-t.s.stopping:
			return ended(t.out.end(errStopping))
		}
	}
}

// past sends from the line of three up to the present end of the view.
func (t *stream) past(ctx context.Context) (more bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	source := newLineSource(t.s, t.c.who())
	source.start(ctx, t.q)
	defer source.wait()
	defer cancel()
	for {
		select {
		case batch, ok := <-source.opened:
			if !ok {
				if ctx.Err() != nil {
					return false, errCallerGone // before the end: there may be more
				}
				t.came(source.count, source.next)
				return false, nil
			}
			err := batch.err
			if writeErr := t.out.batch(batch); writeErr != nil {
				return false, writeErr
			}
			source.recycle(batch)
			if err != nil {
				return false, ended(t.out.end(err))
			}
			if t.follow && t.c.r.Method == http.MethodHead {
				return false, errEnded
			}
		case <-t.tick:
			if err := t.out.alive(); err != nil {
				return false, err
			}
		case <-t.out.gone():
			return false, errCallerGone
		case <-t.expired:
			return false, ended(t.out.end(auth.ErrExpired))
		case <-t.s.stopping:
			return false, ended(t.out.end(errStopping))
		}
	}
}

// news sends what has come since the view was last read. It is seldom much, so
// it is opened by one request's goroutine, for all tails that have come as far.
func (t *stream) news(context.Context) (more bool, err error) {
	b := t.s.news.of(t)
	err = b.err
	if writeErr := t.out.batch(b); writeErr != nil {
		return false, writeErr
	}
	if err != nil {
		return false, ended(t.out.end(err))
	}
	t.came(len(b.items), b.scanned)
	return b.more && (t.q.Limit == 0 || t.left > 0), nil
}

// errFull ends a read whose batch has no room for the next event.
var errFull = errors.New("the batch is full")

// came notes how far the stream has come.
func (t *stream) came(n int, next journal.Position) {
	t.q.After = next
	if t.q.Limit > 0 {
		t.left -= n
		t.q.Limit = t.left
	}
}

// sealedBatch is what goes down the line: records copied from the view, then
// the lines made of them.
type sealedBatch struct {
	records []byte
	items   []batchItem
	// scanned is the position up to which the view has been read.
	scanned journal.Position

	lines     []byte
	ends      []int // of each line in lines, with its newline
	positions []journal.Position
	wire      []byte // what a form makes of the lines
	count     int    // lines
	omitted   int    // recalled, or destroyed with their keys
	err       error

	// What follows is for a batch that several tails send. Nobody changes it but
	// for wire, which is made once.

	shared bool
	more   bool // there was more than fits
	wired  sync.Once
}

type batchItem struct {
	end      int // of the record in records
	position journal.Position
	recalled bool
}

func (b *sealedBatch) reset() {
	b.records, b.items, b.lines, b.ends = b.records[:0], b.items[:0], b.lines[:0], b.ends[:0]
	b.positions, b.wire = b.positions[:0], b.wire[:0]
	b.scanned, b.count, b.omitted, b.err = 0, 0, 0, nil
}

func (b *sealedBatch) full(item history.Item) bool {
	return len(b.items) == batchEvents || (len(b.records) > 0 && len(b.records)+len(item.Record) > batchBytes)
}

func (b *sealedBatch) add(item history.Item) {
	if !item.Recalled {
		b.records = append(b.records, item.Record...)
	}
	b.items = append(b.items, batchItem{end: len(b.records), position: item.Position, recalled: item.Recalled})
	b.scanned = item.Position
}

// lineSource runs the first two of the three. Every batch received must be
// given back with recycle, or the line stops.
type lineSource struct {
	s      *Server
	who    userOfApp
	free   chan *sealedBatch
	sealed chan *sealedBatch
	opened chan *sealedBatch
	work   sync.WaitGroup

	// What follows can be read when opened is closed.

	count int // events read, also those that are not given
	next  journal.Position
}

func newLineSource(s *Server, who userOfApp) *lineSource {
	l := &lineSource{
		s: s, who: who, free: make(chan *sealedBatch, batches),
		sealed: make(chan *sealedBatch, batches), opened: make(chan *sealedBatch, batches),
	}
	for range batches {
		l.free <- &sealedBatch{}
	}
	return l
}

// start reads until the end of the view. The channel opened is closed after the
// last batch; an error is in it.
func (l *lineSource) start(ctx context.Context, q history.Query) {
	l.work.Go(func() {
		defer close(l.sealed)
		l.read(ctx, q)
	})
	l.work.Go(func() {
		defer close(l.opened)
		for b := range l.sealed {
			done, err := l.s.turns.take(ctx, l.who)
			if err != nil {
				return
			}
			l.s.openBatch(ctx, l.who.app, b)
			done()
			select {
			case l.opened <- b:
			case <-ctx.Done():
				return
			}
		}
	})
}

// wait returns when both goroutines have ended, which they do soon after their
// context: nobody may read the view when a request is over.
func (l *lineSource) wait() { l.work.Wait() }

func (l *lineSource) recycle(b *sealedBatch) {
	b.reset()
	l.free <- b
}

// read reads to the present end of the view. A partly filled batch is passed on
// at the end, and so is one without lines: it says how far was read.
//
// The view is read from snapshots, which keep what has been replaced since from
// being freed. So a reader that takes nothing is not waited for with one open:
// it is let go, and reading begins anew where it stood.
func (l *lineSource) read(ctx context.Context, q history.Query) {
	b, err := l.take(ctx)
	if err != nil {
		return
	}
	limit := q.Limit
	for {
		next, err := l.s.history.Replay(ctx, l.who.app, q, func(item history.Item) error {
			if b.full(item) {
				l.sealed <- b // never blocks: it has room for every batch
				if b = l.takeSoon(ctx); b == nil {
					return errStalled
				}
			}
			b.add(item)
			l.count++
			return nil
		})
		if b == nil {
			if b, err = l.take(ctx); err != nil {
				return
			}
			q = goOn(q, next, limit, l.count)
			continue
		}
		if b.err = err; err == nil {
			b.scanned, l.next = next, next
		}
		l.sealed <- b
		return
	}
}

// goOn is the query for what follows a position, up to which so many of the limit
// were read.
func goOn(q history.Query, next journal.Position, limit, count int) history.Query {
	if q.Reverse {
		q.Before = next
	} else {
		q.After = next
	}
	if limit > 0 {
		q.Limit = limit - count
	}
	return q
}

// errStalled ends a reading whose batches are all on their way.
var errStalled = errors.New("the reader takes nothing")

// stalledAfter is how long a snapshot is held for a reader that takes nothing, for
// each batch of those that a snapshot gives: some twenty.
const stalledAfter = 50 * time.Millisecond

// takeSoon returns an empty batch, or nil when there is none for a while.
func (l *lineSource) takeSoon(ctx context.Context) *sealedBatch {
	select {
	case b := <-l.free:
		return b
	default:
	}
	ctx, cancel := context.WithTimeout(ctx, stalledAfter)
	defer cancel()
	b, _ := l.take(ctx)
	return b
}

func (l *lineSource) take(ctx context.Context) (*sealedBatch, error) {
	select {
	case b := <-l.free:
		return b, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// openBatch turns a batch's records into lines. It stops before the first record
// that cannot be opened; nothing is skipped but what no longer exists.
func (s *Server) openBatch(ctx context.Context, app journal.AppID, b *sealedBatch) {
	start := 0
	last := journal.Position(0)
	for _, item := range b.items {
		record := b.records[start:item.end]
		start = item.end
		if item.recalled {
			b.omitted++
			last = item.position
			continue
		}
		lines, err := s.appendLine(ctx, b.lines, app, record, item.position)
		switch {
		case err == nil:
			b.lines = append(lines, '\n')
			b.ends, b.positions = append(b.ends, len(b.lines)), append(b.positions, item.position)
			b.count++
		case gone(err):
			b.omitted++
		default:
			b.err = fmt.Errorf("opening the event at position %s: %w", item.position, err)
			b.scanned = last // zero when it is the first: nothing of this batch counts
			return
		}
		last = item.position
	}
}

// gone reports whether an event can no longer be opened because it was meant to
// be gone.
func gone(err error) bool {
	return errors.Is(err, kms.ErrSubjectErased) || errors.Is(err, kms.ErrEpochDestroyed)
}

// appendLine appends the event's JSON with its position as the last member. The
// plaintext is the event's canonical JSON, so its last byte is the brace.
func (s *Server) appendLine(ctx context.Context, dst []byte, app journal.AppID, record []byte, position journal.Position) ([]byte, error) {
	opened, err := s.journal.OpenRecord(ctx, dst, app, record)
	if errors.Is(err, kms.ErrEpochDestroyed) {
		if again := s.copyOf(ctx, app, record, position); again != nil {
			opened, err = s.journal.OpenRecord(ctx, dst, app, again)
		}
	}
	if err != nil {
		return dst, err
	}
	if len(opened) == len(dst) || opened[len(opened)-1] != '}' {
		return dst, fmt.Errorf("event without JSON: %w", journal.ErrCorrupt)
	}
	opened = append(opened[:len(opened)-1], `,"position":"`...)
	opened, _ = position.AppendText(opened)
	return append(opened, `"}`...), nil
}

func (s *Server) keepAliveTicker(follow bool) (<-chan time.Time, func()) {
	if !follow {
		return nil, func() {}
	}
	t := time.NewTicker(s.limits.KeepAlive)
	return t.C, t.Stop
}
