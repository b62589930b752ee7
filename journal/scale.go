package journal

import (
	"fmt"
	"math"
	"time"
)

// Scaled returns the plan with a day that lasts as long as said: for tests, and
// for watching what otherwise takes months. The retention is scaled exactly, the
// epoch to whole seconds, up. Lifetimes are scaled and not the clock, because
// MaxAge counts in the NATS server's own time.
func (p Plan) Scaled(day time.Duration) Plan {
	p.Retention = scaled(p.Retention, day)
	p.Epoch = min((scaled(p.Epoch, day) + time.Second - 1).Truncate(time.Second), p.Retention)
	p.scaled = true
	return p
}

// validateScaled stands for the bounds of a plan that time flies in. A second is
// the precision of key epochs.
func (p Plan) validateScaled() error {
	switch {
	case p.Retention < time.Second:
		return fmt.Errorf("plan %s: %w: a retention of less than a second", p.ID, ErrInvalid)
	case p.Epoch < time.Second || p.Epoch > p.Retention || p.Epoch%time.Second != 0:
		return fmt.Errorf("plan %s: %w: the epoch must last whole seconds, up to the retention", p.ID, ErrInvalid)
	}
	return nil
}

// Scaled returns the lifetimes, their defaults filled in, with a day that lasts
// as long as said; see [Plan.Scaled].
func (r Retention) Scaled(day time.Duration) Retention {
	r = r.WithDefaults()
	for _, lifetime := range []*time.Duration{
		&r.Attachments, &r.Callbacks, &r.Monitoring, &r.Audit, &r.Accounts, &r.Profiles, &r.Warning, &r.Refresh, &r.Exports, &r.Tombstones,
	} {
		*lifetime = scaled(*lifetime, day)
	}
	return r
}

// scaled returns d with a day that lasts as long as to. Whole days, which most
// lifetimes are, are scaled without rounding.
func scaled(d, to time.Duration) time.Duration {
	rest := float64(d%day) / float64(day) * float64(to)
	return d/day*to + time.Duration(math.Round(rest))
}
