package projections

import (
	"container/heap"
	"context"
	"fmt"
	"sync"

	"github.com/cofferdb/coffer/journal"
)

// A State is what a projection is doing on a stream.
type State string

// The states.
const (
	// Starting: Run has not been called, or has not reached the stream.
	Starting State = "starting"
	// Rebuilding: the view is being filled and cannot be read.
	Rebuilding State = "rebuilding"
	// CatchingUp: the view is reading what came while the process was down,
	// and cannot be read yet.
	CatchingUp State = "catching-up"
	// Following: the view follows the journal.
	Following State = "following"
	// Retrying: reading the journal failed and is tried again.
	Retrying State = "retrying"
	// Stopped: see Err. It stays so until a rebuild or a restart.
	Stopped State = "stopped"
)

// A tail is one projection reading one stream.
type tail struct {
	projection Projection
	stream     journal.StreamInfo
	gate       *gate

	// stop and done belong to the goroutine that reads; they are set and used
	// under the runner's mu.
	stop context.CancelFunc
	done chan struct{}

	seals seals // of the goroutine that reads, and before it starts

	// mu guards what follows. Only the reading goroutine changes it while that
	// runs.
	mu         sync.Mutex
	checkpoint Checkpoint
	target     uint64 // a rebuild is complete from here on; 0: none under way
	caught     uint64 // catching up is complete from here on; 0: done
	gone       uint64 // up to here nothing is left to be waited for
	opened     bool   // the view has been complete since the start or the rebuild
	state      State
	err        error // why state is Retrying or Stopped
	waiting    waiters
}

// reset sets the tail to what the store has of it.
func (t *tail) reset(cp Checkpoint, target uint64) {
	t.mu.Lock()
	t.checkpoint, t.target, t.caught = cp, target, 0
	t.gone, t.opened = 0, false
	t.state, t.err = Starting, nil
	t.waiting.release(cp.Sequence) // who came before Run had read the store
	t.mu.Unlock()
	if f, ok := t.projection.(Follower); ok {
		f.Advanced(t.stream.Name, cp.Sequence)
	}
	// Closed until the tail knows where the journal ends.
	t.gate.close(t, ErrRebuilding)
}

// halt stops the reading goroutine and waits for its end.
func (t *tail) halt() {
	if t.stop == nil {
		return
	}
	t.stop()
	<-t.done
}

// begin notes where the journal ended when the tail started.
func (t *tail) begin(last uint64) {
	t.mu.Lock()
	switch {
	case t.target > t.checkpoint.Sequence:
		t.state = Rebuilding
	case last > t.checkpoint.Sequence && !t.opened:
		t.state, t.caught = CatchingUp, last
	default:
		t.state, t.caught, t.opened = Following, 0, true
	}
	t.err = nil
	open := t.state == Following
	t.mu.Unlock()
	if open {
		t.gate.open(t)
	}
}

// advance notes a commit and wakes who waited for it. It reports whether the
// tail has just become complete.
func (t *tail) advance(cp Checkpoint) {
	t.mu.Lock()
	if t.target > 0 && cp.Sequence >= t.target {
		t.target = 0
	}
	if t.caught > 0 && cp.Sequence >= t.caught {
		t.caught = 0
	}
	open := t.target == 0 && t.caught == 0
	if open {
		t.state, t.err, t.opened = Following, nil, true
	}
	t.mu.Unlock()
	if f, ok := t.projection.(Follower); ok {
		f.Advanced(t.stream.Name, cp.Sequence)
	}
	if open {
		t.gate.open(t)
	}
	// Last: who has waited for the sequence may read the view.
	t.mu.Lock()
	t.checkpoint = cp
	t.waiting.release(cp.Sequence)
	t.mu.Unlock()
}

// incomplete returns the sequence that has to be reached before the view can be
// read, 0 if it can.
func (t *tail) incomplete() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return max(t.target, t.caught)
}

func (t *tail) at() Checkpoint {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.checkpoint
}

// fail notes why the tail does not go on.
func (t *tail) fail(state State, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.state, t.err = state, err
	switch {
	case state != Stopped:
	case t.gate.closeStopped:
		t.gate.close(t, fmt.Errorf("%w: %w", ErrStopped, err))
		t.waiting.releaseAll()
	default:
		t.waiting.releaseAll()
		if t.target == 0 && t.checkpoint.Sequence > 0 {
			// What the view has is whole, if not new. It could be read before
			// the process ended, and waiting does not make it newer.
			t.caught, t.opened = 0, true
			defer t.gate.open(t)
		}
	}
}

// wait returns when the sequence has been applied.
func (t *tail) wait(ctx context.Context, sequence uint64) error {
	for {
		t.mu.Lock()
		if max(t.checkpoint.Sequence, t.gone) >= sequence {
			t.mu.Unlock()
			return nil
		}
		if t.state == Stopped {
			err := t.err
			t.mu.Unlock()
			return fmt.Errorf("%w: %w", ErrStopped, err)
		}
		w := &waiter{sequence: sequence, ready: make(chan struct{})}
		heap.Push(&t.waiting, w)
		t.mu.Unlock()
		select {
		case <-w.ready:
		case <-ctx.Done():
			t.mu.Lock()
			t.waiting.remove(w)
			t.mu.Unlock()
			return ctx.Err()
		}
	}
}

// A waiter waits for a sequence.
type waiter struct {
	sequence uint64
	ready    chan struct{}
	index    int // in the heap, -1 once it has left
}

// waiters is a heap, lowest sequence first, so that a commit touches only those
// it releases.
type waiters []*waiter

func (w waiters) Len() int           { return len(w) }
func (w waiters) Less(i, j int) bool { return w[i].sequence < w[j].sequence }
func (w waiters) Swap(i, j int) {
	w[i], w[j] = w[j], w[i]
	w[i].index, w[j].index = i, j
}

// Push is part of heap.Interface.
func (w *waiters) Push(x any) {
	e := x.(*waiter)
	e.index = len(*w)
	*w = append(*w, e)
}

// Pop is part of heap.Interface.
func (w *waiters) Pop() any {
	old := *w
	e := old[len(old)-1]
	old[len(old)-1] = nil
	*w = old[:len(old)-1]
	e.index = -1
	return e
}

func (w *waiters) release(sequence uint64) {
	for len(*w) > 0 && (*w)[0].sequence <= sequence {
		close(heap.Pop(w).(*waiter).ready)
	}
}

func (w *waiters) releaseAll() {
	for len(*w) > 0 {
		close(heap.Pop(w).(*waiter).ready)
	}
}

func (w *waiters) remove(e *waiter) {
	if e.index >= 0 {
		heap.Remove(w, e.index)
	}
}

// A gate keeps a projection's readers out while one of its tails is incomplete.
type gate struct {
	projection   Gated // nil if the projection does not care
	closeStopped bool

	// mu guards closed, and orders the calls of Gate.
	mu     sync.Mutex
	closed map[*tail]bool
}

func (g *gate) close(t *tail, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed == nil {
		g.closed = make(map[*tail]bool)
	}
	g.closed[t] = true
	if g.projection != nil {
		g.projection.Gate(err)
	}
}

func (g *gate) open(t *tail) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.closed[t] {
		return
	}
	delete(g.closed, t)
	if len(g.closed) == 0 && g.projection != nil {
		g.projection.Gate(nil)
	}
}

// changes wakes those who wait for something new of an app.
type changes struct {
	mu       sync.Mutex // guards channels
	channels map[journal.AppID]chan struct{}
}

func (c *changes) of(app journal.AppID) <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	ch, ok := c.channels[app]
	if !ok {
		if c.channels == nil {
			c.channels = make(map[journal.AppID]chan struct{})
		}
		ch = make(chan struct{})
		c.channels[app] = ch
	}
	return ch
}

func (c *changes) notify(batch []journal.Sealed) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range batch {
		if len(c.channels) == 0 {
			return
		}
		if i > 0 && batch[i].App == batch[i-1].App {
			continue
		}
		if ch, ok := c.channels[batch[i].App]; ok {
			close(ch)
			delete(c.channels, batch[i].App)
		}
	}
}

func (t *tail) rebuildTarget() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.target
}

// complete opens the view although the target was not reached.
func (t *tail) complete() {
	t.mu.Lock()
	// Who waits for a sequence that has left the journal waits for nothing.
	t.gone = max(t.target, t.caught)
	t.waiting.release(t.gone)
	t.target, t.caught, t.opened = 0, 0, true
	if t.state == Rebuilding || t.state == CatchingUp {
		t.state = Following
	}
	t.mu.Unlock()
	t.gate.open(t)
}
