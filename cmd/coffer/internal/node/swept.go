package node

import (
	"maps"
	"sync"
	"time"
)

// swept notes when each sweep was last done without an error, by the machine's
// clock: nothing can be overdue for longer.
type swept struct {
	mu sync.Mutex // guards at
	at map[string]time.Time
}

func newSwept(kinds ...string) *swept {
	s := &swept{at: make(map[string]time.Time)}
	for _, kind := range kinds {
		s.at[kind] = time.Now() // of the start, until the first is done
	}
	return s
}

// done notes a sweep that began at a time.
func (s *swept) done(kind string, began time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at[kind] = began
}

func (s *swept) all() map[string]time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.at)
}
