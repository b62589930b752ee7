package journal

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	// maxPatience bounds how long a round stays open for writers that are
	// expected.
	maxPatience = 10 * time.Millisecond

	// firstEvents is how many events are enough to begin publishing: the server
	// stores them while the other writers seal. Waiting for all of them left the
	// server idle meanwhile, and the processors afterwards, while it stored them
	// alone (measured with 1,024 writers: a round of 960 took 3 ms to gather and
	// then 6 ms to be stored).
	firstEvents = 32

	// halfFrom is how many events must be expected for a round to take half of
	// them: the writers of the other half seal meanwhile, and their round can be
	// published as soon as this one is synced. With all of them in one round the
	// processors were idle while it was stored and synced (measured with 1,024
	// writers: 1.35 of 2 were used, and the rate was a seventh lower). With 256,
	// or where a sync takes more than a third of what everything else does, the
	// second sync costs more than that.
	halfFrom  = 512
	syncShare = 3
)

// rounds commits a stream that this process syncs itself. A round publishes
// what has arrived, in chunks, as long as writers that are known to be about
// keep coming; then it awaits the acknowledgements, syncs once, and tells the
// callers. Where there are many writers it takes half of them, and the other half
// is published before the callers of the first are told: the server stores the
// one while the other seals. While a sync is under way nothing is published: writing to a file
// that is being synced makes both slow (measured; a sync took 7 ms instead of
// 4, and the rate fell by a fifth). Sealing goes on all the time.
//
// Such a stream has one writer, on one connection, and the server stores its
// publishes in their order. Acknowledging each would cost as much as a third of
// everything else, so only the last event of a chunk is acknowledged: its
// sequence must be the number of events behind what the stream ended with. When
// it is not, or does not come, the events of the round are looked for in the
// stream, and what is missing is published again one by one.
//
// Everything here belongs to the committer's goroutine.
type rounds struct {
	s       *stream
	nc      *nats.Conn
	ack     ackParser
	lost    chan nats.Status
	answers chan *nats.Msg // read by the committer itself: no goroutine in between
	sub     *nats.Subscription
	prefix  string // of the inbox; replaced when a round is given up
	// alarm looks for overdue acknowledgements. It goes on from round to round:
	// setting a timer can cost a system call, and a thread that wakes up.
	alarm *time.Timer
	armed bool
	due   *time.Timer // ends the patience with writers

	told   []*entry // room for the next batch: empty, but while callers are told
	batch  []*entry // of this round, in the order of publishing
	bytes  int
	ends   []int // the number of events up to the end of each chunk
	first  uint64
	acked  int       // events that are known to be stored
	heard  int       // chunks up to which the server has answered, whatever it said
	began  time.Time // when the first chunk was published
	sent   time.Time // when the last chunk was published
	since  time.Time // when the round was last complete but for writers to come
	waited bool

	known int           // how many events writers that are about should bring
	cost  time.Duration // of a sync, averaged
	pace  time.Duration // of an event until it is stored, averaged
}

func newRounds(s *stream, nc *nats.Conn) (*rounds, error) {
	r := &rounds{
		s: s, nc: nc, ack: newAckParser(s.info.Name), alarm: time.NewTimer(time.Hour), due: time.NewTimer(time.Hour),
		lost:    nc.StatusChanged(nats.DISCONNECTED, nats.RECONNECTING, nats.CLOSED),
		answers: make(chan *nats.Msg, 2*maxCommitEvents), // one for each chunk, at most
	}
	r.alarm.Stop()
	r.due.Stop()
	return r, r.renew()
}

// renew makes a new inbox, so that answers to a round that was given up reach
// nobody.
func (r *rounds) renew() error {
	prefix := nats.NewInbox() + "."
	sub, err := r.nc.ChanSubscribe(prefix+"*", r.answers)
	if err != nil {
		return fmt.Errorf("subscribe to acknowledgements: %w", unavailable(err))
	}
	if r.sub != nil {
		_ = r.sub.Unsubscribe() // its connection may be gone
	}
	r.prefix, r.sub = prefix, sub
	return nil
}

func (r *rounds) close() {
	r.alarm.Stop()
	r.due.Stop()
	_ = r.sub.Unsubscribe() // its connection may be gone
	r.nc.RemoveStatusListener(r.lost)
}

// run is the committer.
func (r *rounds) run() {
	s := r.s
	defer s.pub.close()
	defer r.close()
	for {
		if !r.publishMore() {
			if !s.await() {
				return
			}
			continue
		}
		if err := r.collect(); err != nil {
			r.recover(err)
			continue
		}
		r.sync()
	}
}

// publishMore publishes a chunk of what has arrived. It reports whether the
// round holds anything.
func (r *rounds) publishMore() bool {
	s := r.s
	from := len(r.batch)
	room := max(r.most()-from, 0)
	s.gather(min(room, firstEvents))
	r.batch = s.take(r.batch, room, maxCommitEvents-from)
	chunk := r.batch[from:]
	if len(chunk) == 0 {
		return from > 0
	}
	if from == 0 && (s.failing || len(s.doubt) > 0) && !r.ready() {
		return false
	}
	for _, e := range chunk {
		r.bytes += len(e.record)
		e.doubtful = true
	}
	if from == 0 {
		r.drain()
	}
	r.sent, r.waited = time.Now(), false
	if from == 0 {
		r.began = r.sent
	}
	r.ends = append(r.ends, len(r.batch))
	reply := r.prefix + strconv.FormatUint(r.first+uint64(len(r.ends)-1), 10)
	for i, e := range chunk {
		to := ""
		if i == len(chunk)-1 {
			to = reply
		}
		if sendEntry(r.nc, e, to) != nil {
			break // the connection is gone, which the status tells too
		}
	}
	return true
}

// ready reports whether the round may be published; otherwise it has failed.
func (r *rounds) ready() bool {
	ctx, cancel := context.WithTimeout(context.Background(), r.s.j.cfg.CommitTimeout)
	defer cancel()
	if r.s.readyFor(ctx, r.batch) {
		return true
	}
	r.reset()
	return false
}

// halves reports whether a round takes half of the writers.
func (r *rounds) halves() bool {
	return r.known >= halfFrom && syncShare*r.cost < time.Duration(r.known)*r.pace
}

// most returns how many events the round takes, if no call has to be split.
func (r *rounds) most() int {
	if r.halves() {
		return min(r.known/2, maxCommitEvents)
	}
	return maxCommitEvents
}

// full reports whether the round takes no more events: all but an eighth of those
// that it may expect are enough.
func (r *rounds) full() bool {
	enough := min(r.known, r.most())
	return len(r.batch) >= enough-enough/8 || r.bytes >= maxCommitBytes
}

// collect returns when everything in the round is stored, and no more is waited
// for.
func (r *rounds) collect() error {
	for {
		if !r.armed {
			r.armed = true
			r.alarm.Reset(askHealth)
		}
		more := r.s.wake
		if r.full() {
			if r.acked == len(r.batch) {
				return nil
			}
			more = nil
		} else if r.acked == len(r.batch) {
			if !r.patient() {
				return nil
			}
		}
		select {
		case m := <-r.answers:
			if err := r.receive(m); err != nil {
				return err
			}
		case <-more:
			r.publishMore()
		case <-r.lost:
			return nats.ErrDisconnected
		case <-r.due.C:
		case <-r.alarm.C:
			r.armed = false
			if err := r.overdue(); err != nil {
				return err
			}
		}
	}
}

// patient reports whether a round that is stored stays open for writers that
// are known to be about: after a sync they come back one after the other, and a
// sync that the first of them get alone makes the others wait for two. It ends
// when nobody has come for a quarter of what a sync costs, and sets the alarm.
func (r *rounds) patient() bool {
	wait := min(r.cost/4, maxPatience)
	now := time.Now()
	if !r.waited {
		r.waited, r.since = true, now
	}
	left := wait - now.Sub(r.since)
	if left <= 0 {
		return false
	}
	r.due.Reset(left)
	return true
}

// overdue says why acknowledgements are not waited for any longer.
func (r *rounds) overdue() error {
	age := time.Since(r.sent)
	if r.acked == len(r.batch) || age < askHealth {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), r.s.j.cfg.CommitTimeout)
	defer cancel()
	if err := r.s.health(ctx); err != nil {
		return err
	}
	if age > r.s.j.cfg.CommitTimeout {
		return context.DeadlineExceeded
	}
	return nil
}

// receive takes the acknowledgement of a chunk. That of a later one stands for
// the earlier ones too.
func (r *rounds) receive(m *nats.Msg) error {
	if len(m.Subject) <= len(r.prefix) || m.Subject[:len(r.prefix)] != r.prefix {
		return nil // of an earlier inbox
	}
	number, err := strconv.ParseUint(m.Subject[len(r.prefix):], 10, 64)
	if err != nil || number < r.first || number >= r.first+uint64(len(r.ends)) {
		return nil //nolint:nilerr // an answer to nothing that is under way
	}
	r.heard = max(r.heard, int(number-r.first)+1) //nolint:gosec // at most the chunks of a round
	end := r.ends[number-r.first]
	ack, err := r.ack.parse(m.Data)
	switch {
	case err != nil:
		return fmt.Errorf("%w: %w", errRefused, err)
	case ack.Seq != r.s.last+uint64(end):
		return fmt.Errorf("%w: it ends at %d, expected %d", errRefused, ack.Seq, r.s.last+uint64(end))
	}
	r.acked = max(r.acked, end)
	return nil
}

// errRefused marks a chunk whose acknowledgement was not as expected.
var errRefused = errors.New("a chunk was not stored as a whole") //nolint:gochecknoglobals // a sentinel

// sync makes the round durable and tells the callers.
func (r *rounds) sync() {
	s := r.s
	start := time.Now()
	r.pace = (7*r.pace + start.Sub(r.began)/time.Duration(len(r.batch))) / 8
	err := s.j.cfg.Sync.Sync(s.info.Name)
	r.cost = (7*r.cost + time.Since(start)) / 8
	if err != nil {
		s.unsynced(r.batch, err)
		s.finish(r.batch)
		r.reset()
		return
	}
	for i, e := range r.batch {
		e.seq, e.doubtful = s.last+1+uint64(i), false
	}
	s.last += uint64(len(r.batch))
	waiting := s.queued()
	r.known = len(r.batch) + waiting
	s.note(r.batch)
	stored := r.batch
	r.batch, r.told = r.told, nil
	r.reset()
	if waiting >= firstEvents && r.halves() {
		r.publishMore() // the server stores these while the callers are told, and seal again
	}
	s.tell(stored)
	clear(stored)
	r.told = stored[:0]
}

// recover looks for the round's events in the stream, publishes what is missing
// again, and tells the callers.
func (r *rounds) recover(cause error) {
	if errors.Is(cause, errRefused) {
		r.hear()
	}
	r.s.complete(r.batch, cause)
	r.reset()
	r.known = 0
	if err := r.renew(); err != nil {
		r.s.j.log.Warn("no inbox for acknowledgements", "stream", r.s.info.Name, "error", err)
	}
}

// hear waits until the server has answered the last chunk, and so has dealt with
// everything before it. An event that is still on its way would not be found in
// the stream: it would be published again and acknowledged at the position of its
// second copy, while views keep the first.
func (r *rounds) hear() {
	late := time.NewTimer(r.s.j.cfg.CommitTimeout / answerShare)
	defer late.Stop()
	for r.heard < len(r.ends) {
		select {
		case m := <-r.answers:
			_ = r.receive(m) // whatever it says, the stream is looked at
		case <-r.lost:
			return
		case <-late.C:
			return
		}
	}
}

func (r *rounds) reset() {
	clear(r.batch)
	r.first += uint64(len(r.ends))
	r.batch, r.ends, r.bytes, r.acked, r.heard, r.waited = r.batch[:0], r.ends[:0], 0, 0, 0, false
}

// drain forgets losses of the connection that have been dealt with.
func (r *rounds) drain() {
	for {
		select {
		case <-r.lost:
		default:
			return
		}
	}
}
