package journal

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// maxCommit bounds a commit with syncs of our own. The server's queue takes
	// 10,000 messages.
	maxCommitEvents = 4096
	maxCommitBytes  = 8 << 20
	// maxBatch is the server's limit for an atomic batch.
	maxBatch = 1000

	retryPause = 20 * time.Millisecond

	// lingerStep is how often linger looks.
	lingerStep = 50 * time.Microsecond

	// maxYields bounds gather where writers never stop coming.
	maxYields = 64
)

// entry is one sealed event on its way into a stream.
type entry struct {
	subject string
	record  []byte
	gen     uint16
	slot    *slot
	call    *appending // nil for the committer's own copies
	copied  string     // the copy header's value; "" for what is none
	// fence is a subject that must be empty for the entry to be stored, "" for
	// none: the app's seal, or the entry's own subject.
	fence string

	seq uint64
	err error
	// doubtful is set when the server did not say what became of it.
	doubtful bool
}

// stream is one message stream and its committer, the one goroutine that
// publishes to it. A stream has one committer because more at once make smaller
// commits and the whole slower.
type stream struct {
	j       *Journal
	info    StreamInfo
	pub     publisher // one by one, or in atomic batches
	recent  *recent
	started uint64 // last sequence when the journal was opened
	caught  atomic.Bool

	// gated says that messages become visible to consumers before they are
	// durable, so readers wait for the durable mark.
	gated   bool
	durable mark

	wake chan struct{} // of capacity 1
	quit chan struct{}

	mu      sync.Mutex // guards what follows
	pending []*entry
	taken   []*entry // of pending, and not yet finished
	closed  bool
	looking bool // look is set
	look    *time.Timer
	sealed  map[AppID]uint16 // generations that this process has sealed here

	// Only the committer uses what follows.
	last    uint64   // what is known of the stream ends here
	doubt   []*entry // of which it is not known whether they were stored
	failing bool     // the last commit found the server not taking writes
}

// publisher hands entries to the server and gives each of them its sequence, or
// its error, or marks it doubtful. It returns an error when something is
// doubtful.
type publisher interface {
	publish(ctx context.Context, batch []*entry) error
	limit() int
	close()
}

func (j *Journal) newStream(state streamState) (*stream, error) {
	s := &stream{
		j: j, info: state.info, recent: newRecent(), started: state.last, last: state.last,
		gated: j.cfg.Sync != nil, wake: make(chan struct{}, 1), quit: make(chan struct{}),
	}
	if s.gated {
		// What a killed process left unsynced is synced before it counts.
		if err := j.cfg.Sync.Sync(state.info.Name); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		s.durable.store(state.last)
	}
	s.look = time.AfterFunc(time.Hour, s.dismiss)
	s.look.Stop()
	s.caught.Store(j.cfg.Index == nil || state.last == 0)
	var err error
	if s.pub, err = j.newPublisher(s); err != nil {
		return nil, err
	}
	if !s.gated {
		j.work.Go(s.run)
		return s, nil
	}
	r, err := newRounds(s, j.cfg.Conn)
	if err != nil {
		s.pub.close()
		return nil, err
	}
	j.work.Go(r.run)
	return s, nil
}

// enqueue hands a call's entries to the committer, which has them until each is
// settled. A route that was sealed takes none.
func (s *stream) enqueue(ctx context.Context, call *appending) error {
	call.left, call.ctx = len(call.entries), ctx
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return fmt.Errorf("%w: the journal is closed", ErrUnavailable)
	}
	if gen, sealed := s.sealed[call.app]; sealed && call.entries[0].gen <= gen {
		s.mu.Unlock()
		return errSealed
	}
	s.queueLocked(ctx, call)
	return nil
}

// enqueueSeal hands over the seal of an app's route: behind what is queued, and
// in front of nothing.
func (s *stream) enqueueSeal(ctx context.Context, call *appending) error {
	call.left, call.ctx = len(call.entries), ctx
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return fmt.Errorf("%w: the journal is closed", ErrUnavailable)
	}
	if s.sealed == nil {
		s.sealed = make(map[AppID]uint16)
	}
	s.sealed[call.app] = max(s.sealed[call.app], call.entries[0].gen)
	s.queueLocked(ctx, call)
	return nil
}

// queueLocked appends to the queue; it lets go of the lock.
func (s *stream) queueLocked(ctx context.Context, call *appending) {
	first := len(s.pending) == 0
	for i := range call.entries {
		s.pending = append(s.pending, &call.entries[i])
	}
	if !s.looking && ctx.Done() != nil {
		s.looking = true
		s.look.Reset(lookEvery)
	}
	s.mu.Unlock()
	if first {
		s.kick()
	}
}

func (s *stream) kick() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// close lets the committer finish what is waiting, and stops it.
func (s *stream) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.closed = true
		close(s.quit)
	}
}

// run commits whatever has arrived while the last commit was under way.
func (s *stream) run() {
	defer s.pub.close()
	var (
		batch []*entry
		known int           // how many events writers that are about should bring
		cost  time.Duration // of a commit, averaged
	)
	for {
		s.gather(s.pub.limit())
		s.linger(min(known, s.pub.limit()), cost)
		if batch = s.take(batch[:0], s.pub.limit(), s.pub.limit()); len(batch) > 0 {
			start := time.Now()
			s.commit(batch)
			cost = (7*cost + time.Since(start)) / 8
			known = len(batch) + s.queued()
			clear(batch)
			continue
		}
		if !s.await() {
			return
		}
	}
}

// linger waits for writers that are known to be about: after a commit they come
// back one after the other, and a commit that the first of them get alone makes
// the others wait for two. It ends when an eighth of them stays away for a
// quarter of what a commit costs.
func (s *stream) linger(known int, cost time.Duration) {
	end := time.Now().Add(min(cost/4, maxPatience))
	for n := s.queued(); n > 0 && n < known-known/8 && time.Now().Before(end); n = s.queued() {
		time.Sleep(lingerStep)
	}
}

// await waits until there is something to do, and looks after what is in doubt.
// It returns false when the stream is closed and nothing is waiting.
func (s *stream) await() bool {
	var again <-chan time.Time
	if len(s.doubt) > 0 {
		s.retryDoubt()
		again = time.After(10 * retryPause)
	}
	select {
	case <-s.wake:
	case <-again:
	case <-s.quit:
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.pending) > 0
	}
	return true
}

// queued returns how many events wait to be committed.
func (s *stream) queued() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.pending)
}

// gather lets writers that are about to append do so, before the first one of
// them is committed alone: after a commit all of its writers are runnable, and
// the first to run wakes the committer. It yields as long as that brings more,
// and never waits: a single writer is not delayed.
func (s *stream) gather(limit int) {
	s.mu.Lock()
	n := len(s.pending)
	s.mu.Unlock()
	for range maxYields {
		if n == 0 || n >= limit {
			return
		}
		runtime.Gosched()
		s.mu.Lock()
		more := len(s.pending)
		s.mu.Unlock()
		if more == n {
			return
		}
		n = more
	}
}

// take removes what one commit can hold from the queue: as many events as are
// wanted, and the rest of the last one's call while there are fewer than limit.
func (s *stream) take(dst []*entry, wanted, limit int) []*entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, size := 0, 0
	for n < len(s.pending) && n < limit {
		if n >= wanted && (n == 0 || s.pending[n].call != s.pending[n-1].call) {
			break
		}
		size += len(s.pending[n].record)
		if n > 0 && size > maxCommitBytes {
			break
		}
		n++
	}
	dst = append(dst, s.pending[:n]...)
	rest := copy(s.pending, s.pending[n:])
	clear(s.pending[rest:])
	s.pending, s.taken = s.pending[:rest], dst
	return dst
}

// commit stores a batch and tells the callers.
func (s *stream) commit(batch []*entry) {
	ctx, cancel := context.WithTimeout(context.Background(), s.j.cfg.CommitTimeout)
	defer cancel()
	if s.readyFor(ctx, batch) {
		s.store(ctx, batch, s.pub.publish(ctx, batch))
		s.finish(batch)
	}
}

// complete ends what a round began: events that were published, of which it is
// not known whether they were stored.
func (s *stream) complete(batch []*entry, cause error) {
	ctx, cancel := context.WithTimeout(context.Background(), s.j.cfg.CommitTimeout)
	defer cancel()
	before := s.last
	s.store(ctx, batch, cause)
	if err := s.j.cfg.Sync.Sync(s.info.Name); err != nil {
		s.unsynced(stored(batch), err)
		s.last = before
	}
	s.finish(batch)
}

// unsynced fails what was stored and could not be made durable. Readers do not
// see it, because the durable mark stays where it is.
func (s *stream) unsynced(batch []*entry, err error) {
	s.j.log.Error("events could not be synced", "stream", s.info.Name, "events", len(batch), "error", err)
	s.failing = true
	err = s.why(fmt.Errorf("the event may or may not be stored: %w", err))
	for _, e := range batch {
		e.seq, e.err, e.doubtful = 0, err, true
	}
}

// store goes on until each entry has a sequence or an error, after a publish
// that ended with err. When the connection or the server went away, or a chunk
// was not stored as a whole, it looks into the stream for what arrived, and
// publishes only the rest again, each by itself, so that an event that the
// server refuses fails alone.
func (s *stream) store(ctx context.Context, batch []*entry, err error) {
	for todo := batch; err != nil; err = s.pub.publish(ctx, todo) {
		open := doubtful(todo)
		s.j.log.Warn("a commit was interrupted, looking for what was stored", "stream", s.info.Name, "events", len(open), "error", err)
		if err := s.resolveFor(ctx, open); err != nil {
			s.failing = true
			err = s.why(fmt.Errorf("the event may or may not be stored: %w", err))
			for _, e := range open {
				e.err = err
			}
			return
		}
		if todo = missing(open); len(todo) == 0 {
			break
		}
		cause := ctx.Err()
		if cause == nil {
			if cause = s.health(ctx); cause != nil {
				s.failing = true
			}
		}
		if cause != nil {
			// These are known not to be stored.
			for _, e := range todo {
				e.err = s.why(cause)
			}
			break
		}
	}
	for _, e := range batch {
		s.last = max(s.last, e.seq)
	}
}

func stored(batch []*entry) []*entry {
	var out []*entry
	for _, e := range batch {
		if e.seq > 0 {
			out = append(out, e)
		}
	}
	return out
}

func doubtful(batch []*entry) []*entry {
	var out []*entry
	for _, e := range batch {
		if e.doubtful {
			out = append(out, e)
		}
	}
	return out
}

func missing(batch []*entry) []*entry {
	var out []*entry
	for _, e := range batch {
		if e.seq == 0 {
			out = append(out, e)
		}
	}
	return out
}

// readyFor reports whether a batch may be published, and fails it if not.
func (s *stream) readyFor(ctx context.Context, batch []*entry) bool {
	err := s.ready(ctx)
	if err == nil {
		return true
	}
	for _, e := range batch {
		e.err = err
	}
	s.finish(batch)
	return false
}

// ready fails when nothing should be published: the server is known to be
// frozen, or what an earlier commit left open is still not known.
func (s *stream) ready(ctx context.Context) error {
	if s.failing {
		if err := s.health(ctx); err != nil {
			return s.why(err)
		}
		s.failing = false
	}
	if len(s.doubt) > 0 {
		if err := s.settleDoubt(ctx); err != nil {
			return s.why(err)
		}
	}
	return nil
}

// resolveFor looks for entries in the stream until it has an answer.
func (s *stream) resolveFor(ctx context.Context, open []*entry) error {
	for {
		err := s.resolve(ctx, open)
		if err == nil {
			return nil
		}
		if !pause(ctx, retryPause) {
			return err
		}
		if cause := s.health(ctx); cause != nil {
			return cause
		}
	}
}

// health asks why the server takes no writes.
func (s *stream) health(ctx context.Context) error {
	if s.j.cfg.Health == nil {
		return nil
	}
	if err := s.j.cfg.Health(ctx); err != nil && !errors.Is(err, syscall.EAGAIN) {
		return err
	}
	return nil
}

// why turns a failure into what the callers get.
func (s *stream) why(err error) error {
	switch {
	case errors.Is(err, ErrFull), errors.Is(err, ErrUnavailable):
		return err
	case errors.Is(err, syscall.ENOSPC):
		return fmt.Errorf("%w: %w", ErrFull, err)
	}
	return unavailable(err)
}

// finish ends a commit: it notes what became of everything that was taken, and
// tells the callers.
func (s *stream) finish(batch []*entry) {
	s.note(batch)
	s.tell(batch)
}

// note makes what was stored visible to readers, and remembers what is in doubt.
// The callers are to be told next.
func (s *stream) note(batch []*entry) {
	s.mu.Lock()
	s.taken = nil
	s.mu.Unlock()
	var applied, last uint64
	index := s.j.cfg.Index
	if index != nil {
		applied = index.Applied(s.info.Name)
	}
	for _, e := range batch {
		last = max(last, e.seq)
	}
	if s.gated {
		s.durable.store(last) // first: whoever hears of an event can read it
	}
	s.recent.settle(batch, applied, index != nil)
	for _, e := range batch {
		if e.doubtful {
			// The committer keeps a copy until it knows; the entry is the
			// caller's again.
			s.doubt = append(s.doubt, &entry{
				subject: e.subject, record: append([]byte(nil), e.record...), gen: e.gen, slot: e.slot, doubtful: true,
				copied: e.copied, fence: e.fence,
			})
		}
	}
}

// tell gives the entries back to their callers.
func (s *stream) tell(batch []*entry) {
	for _, e := range batch {
		if c := e.call; c.left > 1 {
			c.left--
		} else {
			c.end(settled)
		}
	}
}

// pause waits, and reports whether ctx is still good.
func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// unavailable classifies a failure to reach the server.
func unavailable(err error) error {
	if err == nil || errors.Is(err, ErrUnavailable) || errors.Is(err, ErrFull) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, err)
}
