package presend

import (
	"sync"
	"time"
)

const (
	breakAfter = 5 // failures in a row
	firstPause = time.Second
	mostPause  = time.Minute
)

// breaker leaves an endpoint alone that does not answer: for a second after five
// failures in a row, doubling up to a minute; then one question tries it.
type breaker struct {
	mu       sync.Mutex // guards what follows
	failures int
	pause    time.Duration
	until    time.Time // zero while it is closed
	trying   bool
}

// enter reports whether a question may be put. Whoever may must leave.
func (b *breaker) enter(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.until.IsZero() {
		return true
	}
	if now.Before(b.until) || b.trying {
		return false
	}
	b.trying = true
	return true
}

// leave says what became of a question, and reports whether the breaker has
// opened by it.
func (b *breaker) leave(now time.Time, ok bool) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if ok {
		b.failures, b.pause, b.until, b.trying = 0, 0, time.Time{}, false
		return false
	}
	b.failures++
	switch {
	case b.trying:
		b.trying, b.pause = false, min(2*b.pause, mostPause)
		b.until = now.Add(b.pause)
	case b.until.IsZero() && b.failures >= breakAfter:
		b.pause = firstPause
		b.until = now.Add(b.pause)
		return true
	}
	return false
}

// giveUp takes back that a question may be put.
func (b *breaker) giveUp() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.trying = false
}
