package journal

import (
	"fmt"
	"time"
)

// lookEvery is how often contexts that have ended are looked for, and so how
// long a caller may wait in vain.
const lookEvery = 10 * time.Millisecond

// Outcomes of an appending.
const (
	waiting   = iota
	settled   // every entry has a sequence or an error
	dismissed // its context ended first; the entries are the committer's
)

// await waits until every entry is settled. After an error they are the
// committer's.
func (a *appending) await() error {
	<-a.done
	if a.outcome.Load() == dismissed {
		return fmt.Errorf("%w: the event may or may not have been appended: %w", ErrUnavailable, a.ctx.Err())
	}
	return nil
}

// end tells the caller how the wait ended, unless it has ended before.
func (a *appending) end(outcome uint32) {
	if a.outcome.CompareAndSwap(waiting, outcome) {
		a.done <- struct{}{}
	}
}

// dismiss ends the wait of callers whose contexts have ended. A caller waits for
// nothing but its commit: waiting for its context too, and being taken out of
// that queue again, cost as much as sealing an event (measured with 1,024
// writers). So somebody else looks after the contexts, now and then and only
// while somebody waits.
func (s *stream) dismiss() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, list := range [...][]*entry{s.taken, s.pending} {
		for _, e := range list {
			if a := e.call; a.ctx.Err() != nil {
				a.end(dismissed)
			}
		}
	}
	if s.looking = len(s.taken)+len(s.pending) > 0; s.looking {
		s.look.Reset(lookEvery)
	}
}
