package server

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections/history"
)

// A replay is a line of three: one goroutine reads sealed records from the
// view, one opens them into lines of JSON, and the request's own goroutine
// sends those. So reading, opening and TLS share the machine's cores, and what
// is in memory is a fixed number of batches, however long the replay.
const (
	batchBytes  = 128 << 10
	batchEvents = 512
	batches     = 6 // three being worked on, three waiting
)

// idleBuffer is the largest buffer that a stream keeps once it has come to the
// end of the view: most tails are idle most of the time, and there are many.
const idleBuffer = 4 << 10

// sealedBatch is what goes down the line: records copied from the view, then
// the lines made of them.
type sealedBatch struct {
	records []byte
	items   []batchItem
	// scanned is the position up to which the view has been read.
	scanned journal.Position

	// live is set on the last batch before the end of the view.
	live bool

	lines     []byte
	ends      []int // of each line in lines, with its newline
	positions []journal.Position
	count     int // lines
	omitted   int // recalled, or destroyed with their keys
	err       error
}

type batchItem struct {
	end      int // of the record in records
	position journal.Position
	recalled bool
}

func (b *sealedBatch) reset() {
	if b.live && cap(b.records)+cap(b.lines) > idleBuffer {
		*b = sealedBatch{}
		return
	}
	*b = sealedBatch{
		records: b.records[:0], items: b.items[:0], lines: b.lines[:0], ends: b.ends[:0], positions: b.positions[:0],
	}
}

// lineSource runs the first two of the three. Every batch received must be
// given back with recycle, or the line stops.
type lineSource struct {
	s      *Server
	app    journal.AppID
	free   chan *sealedBatch
	sealed chan *sealedBatch
	opened chan *sealedBatch
	work   sync.WaitGroup
}

func newLineSource(s *Server, app journal.AppID) *lineSource {
	l := &lineSource{
		s: s, app: app, free: make(chan *sealedBatch, batches),
		sealed: make(chan *sealedBatch, batches), opened: make(chan *sealedBatch, batches),
	}
	for range batches {
		l.free <- &sealedBatch{}
	}
	return l
}

// start reads until the end of the view or, when follow is set, until ctx ends.
// The channel opened is closed after the last batch; an error is in it.
func (l *lineSource) start(ctx context.Context, q history.Query, follow bool) {
	l.work.Go(func() {
		defer close(l.sealed)
		l.read(ctx, q, follow)
	})
	l.work.Go(func() {
		defer close(l.opened)
		for b := range l.sealed {
			l.open(ctx, b)
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
	live := b.live
	b.reset()
	if live {
		l.shrink()
	}
	l.free <- b
}

// shrink lets go of the buffers that are waiting.
func (l *lineSource) shrink() {
	for range len(l.free) {
		select {
		case b := <-l.free:
			if cap(b.records)+cap(b.lines) > idleBuffer {
				b = &sealedBatch{}
			}
			l.free <- b
		default:
			return
		}
	}
}

func (l *lineSource) read(ctx context.Context, q history.Query, follow bool) {
	left := q.Limit
	for {
		changed := l.s.runner.Changed(l.app) // before reading: nothing falls in between
		q.Limit = left
		n, next, err := l.pass(ctx, q)
		if err != nil || !follow || (left > 0 && n >= left) {
			return
		}
		if left > 0 {
			left -= n
		}
		q.After = next
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// pass reads to the present end of the view. A partly filled batch is passed on
// at the end, and so is one without lines: it says how far was read.
func (l *lineSource) pass(ctx context.Context, q history.Query) (int, journal.Position, error) {
	n := 0
	b, err := l.take(ctx)
	if err != nil {
		return 0, 0, err
	}
	next, err := l.s.history.Replay(ctx, l.app, q, func(item history.Item) error {
		if len(b.items) == batchEvents || (len(b.records) > 0 && len(b.records)+len(item.Record) > batchBytes) {
			l.sealed <- b // never blocks: it has room for every batch
			var err error
			if b, err = l.take(ctx); err != nil {
				return err
			}
		}
		if !item.Recalled {
			b.records = append(b.records, item.Record...)
		}
		b.items = append(b.items, batchItem{end: len(b.records), position: item.Position, recalled: item.Recalled})
		b.scanned = item.Position
		n++
		return nil
	})
	if b == nil {
		return n, 0, ctx.Err()
	}
	b.err = err
	if err == nil {
		b.scanned, b.live = next, true
	}
	l.sealed <- b
	return n, next, err
}

func (l *lineSource) take(ctx context.Context) (*sealedBatch, error) {
	select {
	case b := <-l.free:
		return b, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// open turns a batch's records into lines. It stops before the first record
// that cannot be opened; nothing is skipped but what no longer exists.
func (l *lineSource) open(ctx context.Context, b *sealedBatch) {
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
		lines, err := l.s.appendLine(ctx, b.lines, l.app, record, item.position)
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
