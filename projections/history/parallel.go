package history

import (
	"context"
	"errors"
	"runtime"
	"sync"

	"github.com/cofferdb/coffer/journal"
)

const (
	// A portion is what one goroutine opens at a time: large enough that
	// handing it over costs nothing, small enough to stay in a core's cache.
	portionEvents = 256
	portionBytes  = 256 << 10
)

// ReplayOpened is [View.Replay] for a caller that opens each event. open appends
// what it makes of an event to dst; it is called from several goroutines at
// once. fn is called in order, from the calling goroutine; the item and what was
// opened are valid until it returns.
//
// While one portion of events is read from the store, others are opened on the
// other cores. Memory is bounded by a few portions of 256 KiB.
//
// If open fails, fn has been given everything in front of the event, next is the
// position before it, and the error is open's: nothing is skipped.
func (v *View) ReplayOpened(
	ctx context.Context, app journal.AppID, q Query,
	open func(dst []byte, item Item) ([]byte, error), fn func(item Item, opened []byte) error,
) (next journal.Position, err error) {
	if workers := runtime.GOMAXPROCS(0); workers > 1 && (q.Limit <= 0 || q.Limit > portionEvents) {
		return v.replayParallel(ctx, app, q, workers, open, fn)
	}
	var buf []byte
	return v.Replay(ctx, app, q, func(i Item) error {
		var err error
		if buf, err = open(buf[:0], i); err != nil {
			return err
		}
		return fn(i, buf)
	})
}

// A portion is a run of events with records of its own.
type portion struct {
	items  []Item
	arena  []byte // records
	opened []byte
	ends   []int // in opened, by item
	err    error // of opening items[len(ends)]
	done   chan struct{}

	// claim guards what follows. A portion may still be named in the queue of
	// the workers when the consumer, who opened it itself, has given it back
	// and it is filled anew; the round tells the two uses apart.
	claim sync.Mutex
	taken bool // someone opens it, or has
	round uint64
}

// A ticket is an order to open a portion in one of its rounds.
type ticket struct {
	portion *portion
	round   uint64
}

func (p *portion) reset() {
	p.items, p.arena, p.opened, p.ends = p.items[:0], p.arena[:0], p.opened[:0], p.ends[:0]
	p.err, p.done = nil, make(chan struct{})
	p.claim.Lock()
	defer p.claim.Unlock()
	p.taken = false
	p.round++
}

// full reports whether a record still fits: the arena must not move, the items
// point into it.
func (p *portion) full(record []byte) bool {
	return len(p.items) == portionEvents || len(p.items) > 0 && len(p.arena)+len(record) > cap(p.arena)
}

func (p *portion) add(i Item) {
	if n := len(i.Record); n > cap(p.arena) {
		p.arena = make([]byte, 0, max(n, portionBytes))
	}
	n := len(p.arena)
	p.arena = append(p.arena, i.Record...)
	i.Record = p.arena[n:len(p.arena):len(p.arena)]
	p.items = append(p.items, i)
}

// take reports whether the caller is to open the portion.
func (t ticket) take() bool {
	t.portion.claim.Lock()
	defer t.portion.claim.Unlock()
	if t.portion.taken || t.portion.round != t.round {
		return false
	}
	t.portion.taken = true
	return true
}

func (p *portion) open(open func([]byte, Item) ([]byte, error)) {
	defer close(p.done)
	for i := range p.items {
		out, err := open(p.opened, p.items[i])
		if err != nil {
			p.err = err
			return
		}
		p.opened = out
		p.ends = append(p.ends, len(out))
	}
}

// errConsumer ends the reader when the consumer has ended.
var errConsumer = errors.New("the consumer has ended")

func (v *View) replayParallel(
	ctx context.Context, app journal.AppID, q Query, workers int,
	open func([]byte, Item) ([]byte, error), fn func(Item, []byte) error,
) (next journal.Position, err error) {
	ordered := make(chan ticket, workers+1) // to the consumer, in order
	work := make(chan ticket, workers+1)    // to whoever opens
	free := make(chan *portion, workers+3)  // read and used
	quit := make(chan struct{})             // the consumer has ended
	var group sync.WaitGroup
	var end journal.Position
	var endErr error
	group.Go(func() {
		defer close(ordered)
		defer close(work)
		end, endErr = v.readPortions(ctx, app, q, ordered, work, free, quit)
	})
	for range workers - 1 {
		group.Go(func() {
			for t := range work {
				if t.take() {
					t.portion.open(open)
				}
			}
		})
	}
	next = q.After
	if q.Reverse {
		next = q.Before
	}
	for t := range ordered {
		p := t.portion
		if t.take() {
			p.open(open)
		} else {
			<-p.done
		}
		if next, err = p.deliver(next, fn); err != nil {
			break
		}
		select {
		case free <- p:
		default:
		}
	}
	close(quit)
	group.Wait()
	close(free)
	for p := range free {
		v.chunks.Put(p)
	}
	if err != nil {
		return next, err
	}
	if endErr != nil {
		return next, endErr
	}
	return end, nil
}

func (p *portion) deliver(next journal.Position, fn func(Item, []byte) error) (journal.Position, error) {
	from := 0
	for i, to := range p.ends {
		if err := fn(p.items[i], p.opened[from:to:to]); err != nil {
			return next, err
		}
		next, from = p.items[i].Position, to
	}
	return next, p.err
}

// readPortions reads the replay into portions.
func (v *View) readPortions(ctx context.Context, app journal.AppID, q Query, ordered, work chan<- ticket, free <-chan *portion, quit <-chan struct{}) (journal.Position, error) {
	p := v.portion(free)
	send := func() bool {
		t := ticket{p, p.round} // nobody else changes the round
		select {
		case ordered <- t:
		case <-quit:
			return false
		}
		select {
		case work <- t:
		default: // all are busy: the consumer opens it when it gets there
		}
		return true
	}
	next, err := v.Replay(ctx, app, q, func(i Item) error {
		if p.full(i.Record) {
			if !send() {
				return errConsumer
			}
			p = v.portion(free)
		}
		p.add(i)
		return nil
	})
	if len(p.items) > 0 {
		send()
	}
	return next, err
}

// portion returns an empty portion: one that this replay has used before, which
// the pool alone would not always find again, or one from an earlier replay.
func (v *View) portion(free <-chan *portion) *portion {
	var p *portion
	select {
	case p = <-free:
	default:
		p, _ = v.chunks.Get().(*portion)
	}
	if p == nil {
		p = &portion{arena: make([]byte, 0, portionBytes), opened: make([]byte, 0, portionBytes)}
	}
	p.reset()
	return p
}
