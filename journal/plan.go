package journal

import (
	"fmt"
	"strconv"
	"time"

	"github.com/cofferdb/coffer/kms"
)

const day = 24 * time.Hour

// A Plan says how long events are kept and how their streams and key epochs are
// cut. The table of plans is configuration; [DefaultPlans] is its default.
type Plan struct {
	// ID names the plan in streams and subjects: lower-case letters and digits,
	// at most 16.
	ID string
	// Retention is how long an event is kept, counted from its retention clock
	// (see [Plan.Clock]).
	Retention time.Duration
	// Epoch is the length of a key epoch. An expired event's key is destroyed
	// at most this much after the event has expired.
	Epoch time.Duration
	// Shards is the number of message streams of the plan in each region; 0
	// means 1.
	Shards int

	scaled bool // see Scaled
}

// DefaultPlans returns the plans free (3 days), basic (7), pro (90) and
// enterprise (180).
func DefaultPlans() []Plan {
	return []Plan{
		{ID: "free", Retention: 3 * day, Epoch: 6 * time.Hour, Shards: 1},
		{ID: "basic", Retention: 7 * day, Epoch: 12 * time.Hour, Shards: 1},
		{ID: "pro", Retention: 90 * day, Epoch: 9 * day, Shards: 1},
		{ID: "enterprise", Retention: 180 * day, Epoch: 18 * day, Shards: 1},
	}
}

// Validate reports whether the plan can be used.
func (p Plan) Validate() error {
	switch {
	case !isName(p.ID, 16):
		return fmt.Errorf("plan id: %w: 1 to 16 lower-case letters and digits", ErrInvalid)
	case p.Shards < 0 || p.Shards > 1024:
		return fmt.Errorf("plan %s: %w: 1 to 1024 shards", p.ID, ErrInvalid)
	case p.scaled:
		return p.validateScaled()
	case p.Retention < time.Hour:
		return fmt.Errorf("plan %s: %w: a retention of less than an hour", p.ID, ErrInvalid)
	case p.Epoch < time.Minute || p.Epoch > p.Retention:
		return fmt.Errorf("plan %s: %w: the epoch must last between a minute and the retention", p.ID, ErrInvalid)
	case p.Epoch%time.Second != 0:
		return fmt.Errorf("plan %s: %w: the epoch must be whole seconds", p.ID, ErrInvalid)
	}
	return nil
}

// Clock returns the time from which an event's retention counts: its own time,
// but no later than its arrival, so that a clock that runs ahead cannot make an
// event live longer and an import cannot make an old one young again.
func (p Plan) Clock(event, arrival time.Time) time.Time {
	if arrival.Before(event) {
		return arrival
	}
	return event
}

// Admit returns [ErrExpired] for an event that the plan would hide at once.
func (p Plan) Admit(event, now time.Time) error {
	if p.Clock(event, now).Add(p.Retention).After(now) {
		return nil
	}
	return fmt.Errorf("%w (%s)", ErrExpired, p.Retention)
}

// Oldest returns the earliest retention clock that the plan still serves.
func (p Plan) Oldest(now time.Time) time.Time { return now.Add(-p.Retention) }

// EpochAt returns the key epoch of an event with the given retention clock.
// Epochs are aligned to multiples of the epoch length since 1970, so every
// process cuts them alike. The class carries the app's route generation:
// after a plan change the app has epochs of its new plan's length.
func (p Plan) EpochAt(clock time.Time, generation uint16) kms.Epoch {
	return p.epochs(generation).at(clock)
}

// epochs cuts the epochs of a plan and a generation. Its class is made once:
// the text would be an allocation for each event.
func (p Plan) epochs(generation uint16) epochs {
	return epochs{class: p.ID + "/" + strconv.Itoa(int(generation)), length: p.Epoch, retention: p.Retention}
}

type epochs struct {
	class             string
	length, retention time.Duration
}

func (e epochs) at(clock time.Time) kms.Epoch {
	seconds := int64(e.length / time.Second)
	from := time.Unix(clock.Unix()/seconds*seconds, 0).UTC()
	until := from.Add(e.length)
	return kms.Epoch{Class: e.class, From: from, Until: until, Expires: until.Add(e.retention)}
}

func (p Plan) shards() int { return max(p.Shards, 1) }
