package journal

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

// pipeline commits a stream that this process syncs itself: the committer
// publishes what has arrived without waiting, and the settler, a second
// goroutine, syncs once for all that has been acknowledged meanwhile and tells
// the callers. So sealing, storing and syncing overlap.
//
// Such a stream has one writer, on one connection, and the server stores its
// publishes in their order. Acknowledging each would cost as much as a third of
// everything else, so only the last event of a chunk is acknowledged: its
// sequence must be the number of events behind what the stream ended with. When
// it is not, or does not come, everything that is under way is looked for in
// the stream, and what is missing is published again one by one.
type pipeline struct {
	s    *stream
	nc   *nats.Conn
	ack  ackParser
	lost chan nats.Status

	answers chan *nats.Msg // read by the settler itself: no goroutine in between
	wake    chan struct{}  // of capacity 1: for the settler
	end     chan struct{}  // the settler stops

	mu      sync.Mutex // guards what follows
	prefix  string     // of the inbox; replaced when chunks are given up
	sub     *nats.Subscription
	open    []*chunk // published and not taken by the settler, oldest first
	first   uint64   // the number of open[0]
	events  int      // under way: open, or being settled
	bytes   int
	sent    uint64     // the sequence that the last chunk should end with
	settled uint64     // the sequence up to which everything is durable
	busy    bool       // the settler is at work
	hungry  bool       // the committer waits for room
	broken  error      // why the committer has to look into the stream
	late    []*entry   // stored, and could not be synced
	idle    *sync.Cond // signalled when the settler has finished, or something broke

	// The settler is patient: after a sync its writers come back, and a sync
	// that the first few of them get alone makes the others wait for two.
	waiting int           // acknowledged events in open
	since   time.Time     // when the first of them was acknowledged
	known   int           // writers that were seen at once, by their events
	cost    time.Duration // of a sync, averaged
	due     *time.Timer   // ends the patience
	timer   *time.Timer
	spare   []*chunk
}

// chunk is what was published with one acknowledgement.
type chunk struct {
	entries []*entry
	last    uint64 // the sequence of the last event
	bytes   int
	acked   bool
	sent    time.Time
}

func newPipeline(s *stream, nc *nats.Conn) (*pipeline, error) {
	p := &pipeline{
		s: s, nc: nc, ack: newAckParser(s.info.Name), wake: make(chan struct{}, 1), end: make(chan struct{}),
		answers: make(chan *nats.Msg, 2*maxCommitEvents), // one for each chunk, at most
		lost:    nc.StatusChanged(nats.DISCONNECTED, nats.RECONNECTING, nats.CLOSED),
		sent:    s.last, settled: s.last,
	}
	p.idle = sync.NewCond(&p.mu)
	p.timer = time.AfterFunc(time.Hour, p.signal)
	p.timer.Stop()
	p.due = time.AfterFunc(time.Hour, p.signal)
	p.due.Stop()
	return p, p.renew()
}

// renew makes a new inbox, so that answers to what was given up reach nobody.
func (p *pipeline) renew() error {
	prefix := nats.NewInbox() + "."
	sub, err := p.nc.ChanSubscribe(prefix+"*", p.answers)
	if err != nil {
		return fmt.Errorf("subscribe to acknowledgements: %w", unavailable(err))
	}
	p.mu.Lock()
	old := p.sub
	p.prefix, p.sub = prefix, sub
	p.mu.Unlock()
	if old != nil {
		_ = old.Unsubscribe() // its connection may be gone
	}
	return nil
}

func (p *pipeline) close() {
	close(p.end)
	p.timer.Stop()
	p.due.Stop()
	p.mu.Lock()
	sub := p.sub
	p.mu.Unlock()
	_ = sub.Unsubscribe() // its connection may be gone
	p.nc.RemoveStatusListener(p.lost)
}

func (p *pipeline) signal() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// room returns how many events may be published now, and why none may.
func (p *pipeline) room() (events int, broken error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bytes < maxCommitBytes {
		events = maxCommitEvents - p.events
	}
	p.hungry = events <= 0
	return events, p.broken
}

// ended waits until nothing is under way; it returns false when what is under
// way has to be looked for first.
func (p *pipeline) ended() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.events > 0 && p.broken == nil {
		p.idle.Wait()
	}
	return p.broken == nil
}

// rebase tells where the stream ends, when nothing is under way.
func (p *pipeline) rebase(last uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sent, p.settled = last, last
}

// take returns a chunk to fill.
func (p *pipeline) take() *chunk {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.spare); n > 0 {
		c := p.spare[n-1]
		p.spare = p.spare[:n-1]
		return c
	}
	return &chunk{}
}

// giveBack returns a chunk that was not sent.
func (p *pipeline) giveBack(c *chunk) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.free(c)
}

// free keeps a chunk for the next one; the lock is held.
func (p *pipeline) free(c *chunk) {
	clear(c.entries)
	*c = chunk{entries: c.entries[:0]}
	if len(p.spare) < 8 {
		p.spare = append(p.spare, c)
	}
}

// send publishes a chunk.
func (p *pipeline) send(c *chunk) {
	c.sent = time.Now()
	for _, e := range c.entries {
		c.bytes += len(e.record)
		e.doubtful = true
	}
	p.mu.Lock()
	if len(p.open) == 0 {
		p.timer.Reset(askHealth)
	}
	p.sent += uint64(len(c.entries))
	c.last = p.sent
	reply := p.prefix + strconv.FormatUint(p.first+uint64(len(p.open)), 10)
	p.open = append(p.open, c)
	p.events += len(c.entries)
	p.bytes += c.bytes
	p.mu.Unlock()
	// From here on the settler may take the chunk, once it is acknowledged,
	// which is after its last event has been sent.
	for i, n := 0, len(c.entries); i < n; i++ {
		r := ""
		if i == n-1 {
			r = reply
		}
		if err := sendEntry(p.nc, c.entries[i], r); err != nil {
			p.fail(err)
			return
		}
	}
}

// fail stops the pipeline until the committer has looked into the stream.
func (p *pipeline) fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.failLocked(err)
}

func (p *pipeline) failLocked(err error) {
	if p.broken == nil && p.events > 0 {
		p.broken = err
		p.idle.Broadcast()
		p.s.kick()
	}
}

// receive takes the acknowledgement of a chunk.
func (p *pipeline) receive(m *nats.Msg) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(m.Subject) <= len(p.prefix) || m.Subject[:len(p.prefix)] != p.prefix {
		return // of an earlier inbox
	}
	number, err := strconv.ParseUint(m.Subject[len(p.prefix):], 10, 64)
	if err != nil || number < p.first || number >= p.first+uint64(len(p.open)) {
		return
	}
	c := p.open[number-p.first]
	ack, err := p.ack.parse(m.Data)
	switch {
	case err != nil:
		p.failLocked(fmt.Errorf("%w: %w", errRefused, err))
		return
	case ack.Seq != c.last:
		p.failLocked(fmt.Errorf("%w: it ends at %d, expected %d", errRefused, ack.Seq, c.last))
		return
	}
	c.acked = true
	if p.waiting == 0 {
		p.since = time.Now()
	}
	p.waiting += len(c.entries)
}

// patience is how long the settler waits for writers it knows: a fraction of
// what a sync costs, so that waiting in vain never costs more; the lock is held.
func (p *pipeline) patience() time.Duration { return min(p.cost/4, time.Millisecond) }

// settle is the settler: it makes acknowledged chunks durable and tells their
// callers.
func (p *pipeline) settle() {
	var chunks []*chunk
	for {
		select {
		case m := <-p.answers:
			p.receive(m)
			for more := true; more; {
				select {
				case m := <-p.answers:
					p.receive(m)
				default:
					more = false
				}
			}
		case <-p.wake:
		case <-p.lost:
			p.fail(nats.ErrDisconnected)
			continue
		case <-p.end:
			return
		}
		if chunks = p.takeAcked(chunks[:0]); len(chunks) == 0 {
			p.checkAge()
			continue
		}
		start := time.Now()
		err := p.s.j.cfg.Sync.Sync(p.s.info.Name)
		took := time.Since(start)
		if err == nil {
			for _, c := range chunks {
				for i, e := range c.entries {
					e.seq, e.doubtful = c.last-uint64(len(c.entries)-1-i), false
				}
				p.s.finish(c.entries)
			}
		}
		p.release(chunks, took, err)
	}
}

// takeAcked removes the acknowledged chunks from the front of those that are
// open. Nothing is taken while the pipeline is broken: the committer has them
// all then.
func (p *pipeline) takeAcked(dst []*chunk) []*chunk {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.broken != nil {
		return dst
	}
	n := 0
	for n < len(p.open) && p.open[n].acked {
		n++
	}
	if n == 0 {
		return dst
	}
	if p.waiting < p.known {
		if left := p.patience() - time.Since(p.since); left > 0 {
			p.due.Reset(left)
			return dst
		}
	}
	p.waiting = 0
	dst = append(dst, p.open[:n]...)
	rest := copy(p.open, p.open[n:])
	clear(p.open[rest:])
	p.open = p.open[:rest]
	p.first += uint64(n)
	p.busy = true
	if rest == 0 {
		p.timer.Stop()
	} else {
		p.timer.Reset(askHealth)
	}
	return dst
}

// release ends the settler's work on chunks.
func (p *pipeline) release(chunks []*chunk, took time.Duration, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.known, p.cost = p.events, (7*p.cost+took)/8
	for _, c := range chunks {
		if err != nil {
			p.late = append(p.late, c.entries...)
			continue
		}
		p.settled = c.last
		p.events -= len(c.entries)
		p.bytes -= c.bytes
		p.free(c)
	}
	if err != nil {
		p.broken = fmt.Errorf("%w: %w", errUnsynced, err)
	}
	p.busy = false
	p.idle.Broadcast()
	if p.hungry || p.broken != nil {
		p.s.kick()
	}
}

// errRefused marks a chunk whose acknowledgement was not as expected.
var errRefused = errors.New("a chunk was not stored as a whole") //nolint:gochecknoglobals // a sentinel

// errUnsynced marks events that are in the stream and could not be synced.
var errUnsynced = errors.New("the stream could not be synced") //nolint:gochecknoglobals // a sentinel

// checkAge looks at the server's health when an acknowledgement is overdue.
func (p *pipeline) checkAge() {
	p.mu.Lock()
	var age time.Duration
	if len(p.open) > 0 && p.broken == nil {
		age = time.Since(p.open[0].sent)
		p.timer.Reset(askHealth)
	}
	p.mu.Unlock()
	if age < askHealth {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), p.s.j.cfg.CommitTimeout)
	defer cancel()
	if err := p.s.health(ctx); err != nil {
		p.fail(err)
	} else if age > p.s.j.cfg.CommitTimeout {
		p.fail(context.DeadlineExceeded)
	}
}

// recover looks for everything that is under way in the stream, publishes what
// is missing again, and tells the callers. The committer calls it, so nothing
// is being sent.
func (p *pipeline) recover() {
	p.mu.Lock()
	for p.busy {
		p.idle.Wait()
	}
	cause := p.broken
	batch := append([]*entry(nil), p.late...)
	for _, c := range p.open {
		batch = append(batch, c.entries...)
	}
	p.s.last = p.settled
	p.open, p.late, p.waiting, p.known = nil, nil, 0, 0
	p.first += 1 << 20 // no answer to these finds a chunk
	p.timer.Stop()
	p.mu.Unlock()
	if err := p.renew(); err != nil {
		p.s.j.log.Warn("no inbox for acknowledgements", "stream", p.s.info.Name, "error", err)
	}
	switch {
	case errors.Is(cause, errUnsynced):
		p.s.unsynced(batch, cause)
		p.s.finish(batch)
	case len(batch) > 0:
		p.s.complete(batch, cause)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.events, p.bytes, p.broken = 0, 0, nil
	p.sent, p.settled = p.s.last, p.s.last
	p.drain()
}

// drain forgets losses of the connection that have been dealt with.
func (p *pipeline) drain() {
	for {
		select {
		case <-p.lost:
		default:
			return
		}
	}
}
