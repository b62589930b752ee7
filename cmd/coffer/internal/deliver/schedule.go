package deliver

import (
	"math/rand/v2"
	"time"
)

// The schedule of a delivery, for a retention of callbacks of three days; with
// another it is scaled. The last attempts come every twelve hours, until the
// retention is over.
const (
	scheduleFor = 72 * time.Hour
	lastSteps   = 12 * time.Hour
	jitterShare = 0.2
)

// delays are the times between one attempt and the next.
func delays() []time.Duration {
	return []time.Duration{
		5 * time.Second, 30 * time.Second, 2 * time.Minute, 10 * time.Minute, 30 * time.Minute,
		time.Hour, 2 * time.Hour, 4 * time.Hour, 8 * time.Hour,
	}
}

// A schedule says when a delivery is tried again.
type schedule struct {
	retention time.Duration
	steps     []time.Duration
}

func newSchedule(retention time.Duration) schedule {
	s := schedule{retention: retention, steps: append(delays(), lastSteps)}
	for i := range s.steps {
		s.steps[i] = s.scale(s.steps[i])
	}
	return s
}

func (s schedule) scale(d time.Duration) time.Duration {
	return max(time.Duration(float64(d)*float64(s.retention)/float64(scheduleFor)), time.Millisecond)
}

// next returns when a delivery is tried again after its n-th attempt, 1 being
// the first, and false when that would be after its end.
func (s schedule) next(n int, now, arrived time.Time, asked time.Duration) (time.Time, bool) {
	step := s.steps[min(max(n, 1), len(s.steps))-1]
	due := now.Add(max(jitter(step), asked))
	end := s.end(arrived)
	if due.Before(end) {
		return due, true
	}
	// What an endpoint asks for must not be the reason why nothing is tried
	// again before the end.
	if last := end.Add(-s.scale(time.Minute)); asked > step && now.Before(last) {
		return last, true
	}
	return time.Time{}, false
}

// end is when a delivery is given up: its attempts are kept no longer.
func (s schedule) end(arrived time.Time) time.Time { return arrived.Add(s.retention) }

func jitter(d time.Duration) time.Duration {
	return time.Duration(float64(d) * (1 + jitterShare*(2*rand.Float64()-1))) //nolint:gosec // spreads load, hides nothing
}

const (
	breakerFailures = 5 // in a row, until an endpoint is left alone
	breakerFirst    = time.Second
	breakerLongest  = 5 * time.Minute
)

// A breaker leaves an endpoint alone that has failed several times in a row, for
// longer each time, and then lets one request through.
type breaker struct {
	scale    func(time.Duration) time.Duration
	failures int
	until    time.Time
}

// failed notes a failure; asked is what the endpoint wants to be left alone for.
func (b *breaker) failed(now time.Time, asked time.Duration) {
	b.failures++
	if b.failures >= breakerFailures {
		wait := breakerFirst << min(b.failures-breakerFailures, 16)
		b.until = now.Add(jitter(b.scale(min(wait, breakerLongest))))
	}
	if until := now.Add(asked); asked > 0 && until.After(b.until) {
		b.until = until
	}
}

func (b *breaker) succeeded() { b.failures, b.until = 0, time.Time{} }

// room is how many requests may be under way, at most most.
func (b *breaker) room(now time.Time, most int) int {
	switch {
	case now.Before(b.until):
		return 0
	case b.failures >= breakerFailures:
		return 1
	}
	return most
}

// pace spaces deliveries by a rate, with a burst of a tenth of a second.
type pace struct {
	interval time.Duration
	next     time.Time
}

func newPace(rate int) pace {
	if rate <= 0 {
		return pace{}
	}
	return pace{interval: time.Second / time.Duration(rate)}
}

// wait is how long until a delivery may go.
func (p *pace) wait(now time.Time) time.Duration {
	if p.interval == 0 || p.next.Before(now) {
		return 0
	}
	return max(p.next.Sub(now)-time.Second/10, 0)
}

// take notes that n deliveries go.
func (p *pace) take(now time.Time, n int) {
	if p.interval == 0 {
		return
	}
	if p.next.Before(now) {
		p.next = now
	}
	p.next = p.next.Add(time.Duration(n) * p.interval)
}
