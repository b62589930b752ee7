package deliver

import (
	"container/heap"
	"context"
	"errors"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

const (
	// fetch is how many events are read at once.
	fetch = 128
	// window bounds the events that have a number and no outcome on disk.
	window = 1024
	// backlog bounds the deliveries that wait or are held: while there are more,
	// no new events are begun.
	backlog = 1000
	// outage is how long a worker waits when keys or store are away; it doubles
	// up to outageMost.
	outage     = 100 * time.Millisecond
	outageMost = 10 * time.Second
)

// A worker delivers to one endpoint in one state of its settings. Everything
// here belongs to the goroutine of run.
type worker struct {
	*Engine

	ep    *endpoints.Endpoint
	ref   endpoints.Ref
	r     *running
	token uint64

	results chan result
	stored  chan storedRecord // of capacity 1

	number  uint64           // the last one given
	scanned journal.Position // events up to here have been read
	known   map[journal.Position]uint64
	trouble time.Duration // of keys or store; 0: none
	resume  time.Time     // nothing is begun before

	fresh   []*delivery // read, not begun, in order
	waiting waitHeap
	// Of an ordered endpoint: the conversations that have a delivery under way
	// or waiting, and what is behind it.
	busy map[kms.Tag]*lane
	held int

	flying  int // requests under way
	ending  bool
	breaker breaker
	pace    pace
	failing int64 // since when nothing succeeds, in milliseconds; 0: it does

	ledger ledger
}

// A lane is a conversation of an ordered endpoint.
type lane struct {
	first  *delivery // under way or waiting
	waits  bool
	behind []*delivery
}

// work delivers to an endpoint until its settings change, ctx ends, or
// something is wrong. It returns the sequence of the last record.
func (e *Engine) work(ctx context.Context, ep *endpoints.Endpoint, r *running, last uint64) (uint64, error) {
	w := &worker{
		Engine: e, ep: ep, ref: endpoints.Ref{App: ep.App, ID: ep.ID}, r: r,
		results: make(chan result, 1), stored: make(chan storedRecord, 1), busy: make(map[kms.Tag]*lane),
		breaker: breaker{scale: e.schedule.scale}, pace: newPace(ep.Rate),
	}
	var lost <-chan struct{}
	if e.Leases != nil {
		token, ok, changed := e.Leases.Holds(ep.ID)
		if !ok {
			e.pause(r, nil)
			select {
			case <-ctx.Done():
			case <-changed:
			case <-r.poke:
			}
			return last, nil
		}
		w.token, lost = token, changed
		e.wakeReplays()
	}
	if err := w.load(ctx, last); err != nil {
		return last, err
	}
	e.pause(r, nil)
	err := w.run(ctx, lost)
	return max(last, w.ledger.sequence), err
}

// run is the worker's loop.
func (w *worker) run(ctx context.Context, lost <-chan struct{}) error {
	// Requests and records end later than ctx: see drain.
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	var cut <-chan time.Time
	stop := func() {
		if !w.ending {
			w.ending, cut = true, time.After(drain)
		}
	}
	done := ctx.Done()
	poke := w.r.poke
	for {
		changed := w.Changed(w.ep.App)
		wait := w.begin(life)
		w.record(life)
		if w.ending && w.flying == 0 && w.ledger.settled() {
			return nil
		}
		var timer <-chan time.Time
		if wait >= 0 && !w.ending {
			timer = time.After(wait)
		}
		if w.ending || len(w.fresh) > 0 || w.flying >= concurrency(w.ep) {
			changed = nil // there is enough to do
		}
		select {
		case r := <-w.results:
			w.finished(life, r)
			w.collect(life)
		case s := <-w.stored:
			w.noted(s)
		case <-changed:
		case <-timer:
		case <-poke:
			if w.changed(life) {
				poke = nil
				stop()
			}
		case <-lost:
			lost = nil
			if token, ok, again := w.Leases.Holds(w.ep.ID); ok && token == w.token {
				lost = again
				continue
			}
			stop()
		case <-done:
			done = nil
			stop()
		case <-cut:
			// What is under way is cut; it is sent again by whoever goes on.
			end()
			cut = nil
			w.abandon()
			return nil
		}
	}
}

// changed reports whether the worker has to start anew.
func (w *worker) changed(ctx context.Context) bool {
	if w.r.forced.Swap(false) {
		return true
	}
	ep, err := w.Endpoints.Endpoint(ctx, w.ref.App, w.ref.ID)
	if errors.Is(err, endpoints.ErrNotFound) {
		return true
	}
	return err == nil && ep.Revision() != w.ep.Revision()
}

// collect takes the other results that are there.
func (w *worker) collect(ctx context.Context) {
	for {
		select {
		case r := <-w.results:
			w.finished(ctx, r)
		default:
			return
		}
	}
}

// abandon waits for what was cut.
func (w *worker) abandon() {
	for ; w.flying > 0; w.flying-- {
		<-w.results
	}
	if w.ledger.writing {
		s := <-w.stored
		w.ledger.sequence = max(w.ledger.sequence, s.sequence)
	}
}

// begin begins as many requests as may be. It returns how long to wait before
// looking again, -1 when only an event can bring more.
func (w *worker) begin(ctx context.Context) time.Duration {
	for !w.ending {
		now := w.now()
		if wait := w.resume.Sub(now); wait > 0 {
			return wait
		}
		room := w.breaker.room(now, concurrency(w.ep))
		if room == 0 {
			return w.breaker.until.Sub(now)
		}
		if w.flying >= room {
			return -1
		}
		if wait := w.pace.wait(now); wait > 0 {
			return wait
		}
		batch, err := w.next(ctx, now)
		if err != nil {
			w.away(now, err)
			continue
		}
		if len(batch) == 0 {
			if len(w.waiting) > 0 {
				return max(w.waiting[0].due.Sub(now), time.Millisecond)
			}
			return -1
		}
		w.pace.take(now, len(batch))
		w.flying++
		go func() { w.results <- w.attempt(ctx, w.ep, batch) }()
	}
	return -1
}

func concurrency(ep *endpoints.Endpoint) int {
	if ep.Concurrency > 0 {
		return ep.Concurrency
	}
	return endpoints.DefaultConcurrency
}

// away notes that keys or store cannot be had.
func (w *worker) away(now time.Time, err error) {
	w.trouble = min(max(2*w.trouble, outage), outageMost)
	w.resume = now.Add(jitter(w.trouble))
	w.pause(w.r, err)
}

// next takes what one request carries: first what was tried before and is due,
// then new events.
func (w *worker) next(ctx context.Context, now time.Time) ([]*delivery, error) {
	most := max(w.ep.Batch, 1)
	var batch []*delivery
	for len(w.waiting) > 0 && len(batch) < most && !w.waiting[0].due.After(now) {
		d := heap.Pop(&w.waiting).(*delivery) //nolint:errcheck,forcetypeassert // nothing else is pushed
		if w.expired(d, now) {
			w.park(d, Answer{Cause: journal.CauseExpired}, 0)
			continue
		}
		if l := w.busy[d.conversation]; l != nil && d.conversation != (kms.Tag{}) {
			l.waits = false
		}
		batch = append(batch, d)
	}
	for len(batch) < most {
		d, err := w.nextFresh(ctx, now)
		if err != nil && len(batch) == 0 {
			return nil, err
		}
		if d == nil || err != nil {
			break
		}
		batch = append(batch, d)
	}
	return batch, nil //nolint:nilerr // what there is goes out; the error comes again with the next read
}

func (w *worker) expired(d *delivery, now time.Time) bool {
	return !now.Before(w.schedule.end(time.UnixMilli(d.arrived)))
}

// nextFresh returns the next new event that may go, nil when there is none.
func (w *worker) nextFresh(ctx context.Context, now time.Time) (*delivery, error) {
	for {
		if len(w.fresh) == 0 {
			if len(w.waiting)+w.held >= backlog || w.ledger.outstanding() >= window {
				return nil, nil //nolint:nilnil // there is none
			}
			more, err := w.fill(ctx)
			if err != nil || !more && len(w.fresh) == 0 {
				return nil, err
			}
			if len(w.fresh) == 0 {
				w.record(ctx) // so that what was read makes room
				continue
			}
		}
		d := w.fresh[0]
		w.fresh = w.fresh[1:]
		if w.expired(d, now) {
			w.settle(d, journal.DeliveryParked, Answer{Cause: journal.CauseExpired}, 0)
			continue
		}
		if d.conversation == (kms.Tag{}) {
			return d, nil
		}
		l := w.busy[d.conversation]
		if l == nil {
			w.busy[d.conversation] = &lane{first: d}
			return d, nil
		}
		w.hold(l, d)
	}
}

// hold puts a delivery behind the one of its conversation that is under way or
// waits. Behind one that waits, it has an outcome, so that others go on.
func (w *worker) hold(l *lane, d *delivery) {
	d.item = nil
	l.behind = append(l.behind, d)
	w.held++
	if l.waits {
		w.settle(d, journal.DeliveryHeld, Answer{}, 0)
	}
}

// finished notes what became of a request.
func (w *worker) finished(ctx context.Context, r result) {
	w.flying--
	now := w.now()
	if r.held != nil {
		w.giveBack(now, r)
		return
	}
	if w.trouble > 0 {
		w.trouble, w.resume = 0, time.Time{}
		w.pause(w.r, nil)
	}
	for _, d := range r.sent {
		d.attempts++
	}
	if r.answer.Delivered() {
		w.breaker.succeeded()
		w.failing = 0
		for _, d := range r.sent {
			w.settle(d, journal.DeliveryDone, r.answer, r.took)
			w.release(d)
		}
		return
	}
	asked := min(r.answer.RetryAfter, w.schedule.retention)
	w.breaker.failed(now, asked)
	if w.failing == 0 {
		w.failing = now.UnixMilli()
	}
	for _, d := range r.sent {
		w.failed(d, r, now, asked)
	}
	w.judge(ctx, now, r.answer)
}

// giveBack takes deliveries back for which no request was made.
func (w *worker) giveBack(now time.Time, r result) {
	for _, d := range r.sent {
		d.due = now
		heap.Push(&w.waiting, d)
		if l := w.busy[d.conversation]; l != nil && d.conversation != (kms.Tag{}) {
			l.waits = false // it has no outcome yet, and need not have one
		}
	}
	if !errors.Is(r.held, context.Canceled) {
		w.away(now, r.held)
	}
}

// failed plans the next attempt of a delivery, or parks it.
func (w *worker) failed(d *delivery, r result, now time.Time, asked time.Duration) {
	due, ok := w.schedule.next(d.attempts, now, time.UnixMilli(d.arrived), asked)
	if !ok {
		w.park(d, r.answer, r.took)
		return
	}
	d.due = due
	w.settle(d, journal.DeliveryWaiting, r.answer, r.took)
	heap.Push(&w.waiting, d)
	l := w.busy[d.conversation]
	if l == nil || d.conversation == (kms.Tag{}) {
		return
	}
	l.waits = true
	for _, b := range l.behind {
		if !w.ledger.has(b.number) {
			w.settle(b, journal.DeliveryHeld, Answer{}, 0)
		}
	}
}

// park gives a delivery up.
func (w *worker) park(d *delivery, a Answer, took time.Duration) {
	w.settle(d, journal.DeliveryParked, a, took)
	w.release(d)
}

// release lets what is behind a delivery go.
func (w *worker) release(d *delivery) {
	l := w.busy[d.conversation]
	if l == nil || d.conversation == (kms.Tag{}) {
		return
	}
	if len(l.behind) == 0 {
		delete(w.busy, d.conversation)
		return
	}
	next := l.behind[0]
	l.behind, l.first, l.waits = l.behind[1:], next, false
	w.held--
	next.due = w.now()
	heap.Push(&w.waiting, next)
}

// judge disables an endpoint that says that it is gone, or has failed for too
// long.
func (w *worker) judge(ctx context.Context, now time.Time, a Answer) {
	reason := endpoints.ReasonGone
	if a.Status != 410 {
		if now.UnixMilli()-w.failing < (w.schedule.retention * 2 / 3).Milliseconds() {
			return
		}
		reason = endpoints.ReasonFailing
	}
	// The settings' change ends this worker.
	w.resume = now.Add(outageMost)
	w.side.Go(func() { w.disable(context.WithoutCancel(ctx), reason) })
}

func (w *worker) disable(ctx context.Context, reason endpoints.Reason) {
	ctx, cancel := context.WithTimeout(ctx, outageMost)
	defer cancel()
	revision := w.ep.Revision()
	changed := false
	_, err := w.Endpoints.Change(ctx, w.ref.App, w.ref.ID, func(e *endpoints.Endpoint) error {
		if e.Revision() != revision {
			return endpoints.ErrChanged // its owner was faster: judge it anew
		}
		e.State, e.Reason, changed = endpoints.Disabled, reason, true
		if w.Disabled != nil {
			e.Untold = &endpoints.Notice{Reason: reason, Since: w.now().UTC().Truncate(time.Millisecond)}
		}
		return nil
	})
	if err != nil || !changed {
		if err != nil && ctx.Err() == nil && !errors.Is(err, endpoints.ErrChanged) {
			w.log.Error("an endpoint could not be disabled", "endpoint", w.ep.IDText(), "error", err)
		}
		return
	}
	w.log.Warn("endpoint disabled", "app", w.ref.App.String(), "endpoint", w.ep.IDText(), "reason", string(reason))
}

// waitHeap has the delivery that is due first at its top.
type waitHeap []*delivery

func (h waitHeap) Len() int { return len(h) }

func (h waitHeap) Less(i, j int) bool {
	if h[i].due.Equal(h[j].due) {
		return h[i].number < h[j].number
	}
	return h[i].due.Before(h[j].due)
}

func (h waitHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }

// Push is part of heap.Interface.
func (h *waitHeap) Push(x any) { *h = append(*h, x.(*delivery)) } //nolint:errcheck,forcetypeassert // only deliveries are

// Pop is part of heap.Interface.
func (h *waitHeap) Pop() any {
	old := *h
	d := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	return d
}
