package journal

import (
	"hash/maphash"
	"sync"
	"time"

	"github.com/cofferdb/coffer/kms"
)

// recentWithoutIndex is how many events of a stream are remembered when there
// is no index to ask.
const recentWithoutIndex = 1 << 16

// recent knows the events of one stream that are under way, or that the index
// may not know yet, by their tags. A tag is made under a key of its app, so two
// apps have none in common.
//
// Nothing in it that grows with the events holds a pointer, or the garbage
// collector would look at each of them again and again.
type recent struct {
	seed maphash.Seed

	mu    sync.Mutex // guards what follows and the slots
	slots slotTable
	// done holds the numbers of the stored slots in the order of their
	// sequences, from head.
	done []uint32
	head int
	// waits are closed when the outcome of their slot is known. Few events are
	// waited for.
	waits map[*slot]chan struct{}
}

// slot is one event: under way while seq is 0.
type slot struct {
	tag    kms.Tag
	sum    bodySum // of the canonical JSON
	millis int64   // the event's time
	seq    uint64
	number uint32 // in the table
	gen    uint16
	failed bool
	// doubtful marks one of which it is not known whether it was stored.
	doubtful bool
}

// bodySum stands for an event's canonical JSON: its hash, keyed with a secret
// of the process that never leaves memory, and its length.
type bodySum struct {
	hash uint64
	size int
}

func newRecent() *recent {
	return &recent{seed: maphash.MakeSeed(), waits: make(map[*slot]chan struct{})}
}

func (r *recent) sum(canonical []byte) bodySum {
	return bodySum{maphash.Bytes(r.seed, canonical), len(canonical)}
}

// reserve takes the tag for an event that is about to be appended. When the tag
// is taken it returns the slot that has it, and false.
func (r *recent) reserve(tag kms.Tag, sum bodySum, millis int64, gen uint16) (*slot, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s, ok := r.slots.insert(tag)
	if ok {
		s.sum, s.millis, s.gen = sum, millis, gen
	}
	return s, ok
}

// release gives up slots whose event was not stored.
func (r *recent) release(slots ...*slot) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range slots {
		r.releaseLocked(s)
	}
}

func (r *recent) releaseLocked(s *slot) {
	r.slots.remove(s)
	s.failed = true
	r.wake(s)
}

// wake tells those who wait for a slot; the lock is held.
func (r *recent) wake(s *slot) {
	if len(r.waits) == 0 {
		return
	}
	if wait, ok := r.waits[s]; ok {
		close(wait)
		delete(r.waits, s)
	}
}

// settle records what became of a commit's entries, and forgets what the index
// knows by now.
func (r *recent) settle(batch []*entry, applied uint64, indexed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range batch {
		switch {
		case e.slot == nil:
		case e.seq > 0:
			e.slot.seq, e.slot.doubtful = e.seq, false
			r.wake(e.slot)
			r.done = append(r.done, e.slot.number)
		case e.doubtful:
			// It stays taken until the stream has been looked at.
			e.slot.doubtful = true
		default:
			r.releaseLocked(e.slot)
		}
	}
	for r.head < len(r.done) {
		s := r.slots.at(r.done[r.head])
		if indexed && s.seq > applied || !indexed && len(r.done)-r.head <= recentWithoutIndex {
			break
		}
		r.slots.remove(s)
		r.head++
	}
	if r.head > len(r.done)/2 {
		r.done, r.head = r.done[:copy(r.done, r.done[r.head:])], 0
	}
}

// outcome returns what is known of a slot: a sequence, or that its event was
// not stored, or a channel that is closed when either is known.
func (r *recent) outcome(s *slot) (seq uint64, failed bool, wait <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if s.seq == 0 && !s.failed {
		if r.waits[s] == nil {
			r.waits[s] = make(chan struct{})
		}
		return 0, false, r.waits[s]
	}
	return s.seq, s.failed, nil
}

// same reports whether e is the event of the slot. When the caller gave no time
// the stored one counts. The buffer is overwritten and returned.
func (r *recent) same(s *slot, e *Event, app AppID, timed bool, buf []byte) (bool, []byte) {
	again := *e
	if !timed {
		again.Time = time.UnixMilli(s.millis).UTC()
	}
	buf = again.AppendJSON(buf[:0], app)
	return r.sum(buf) == s.sum, buf
}
