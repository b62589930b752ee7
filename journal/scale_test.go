package journal_test

import (
	"errors"
	"testing"
	"time"

	"github.com/cofferdb/coffer/journal"
)

// TestScaled holds the defaults against what a short day makes of them.
func TestScaled(t *testing.T) {
	for _, day := range []time.Duration{time.Second, 1700 * time.Millisecond, time.Minute, 24 * time.Hour} {
		for _, p := range journal.DefaultPlans() {
			short := p.Scaled(day)
			if err := short.Validate(); err != nil {
				t.Errorf("a day of %s: %v", day, err)
			}
			if want := p.Retention / (24 * time.Hour) * day; short.Retention != want {
				t.Errorf("plan %s with a day of %s keeps %s, want %s", p.ID, day, short.Retention, want)
			}
			if short.Epoch < time.Second || short.Epoch > short.Retention {
				t.Errorf("plan %s with a day of %s has epochs of %s", p.ID, day, short.Epoch)
			}
			e := short.EpochAt(time.Unix(1_800_000_000, 5), 1)
			if e.Until.Sub(e.From) != short.Epoch || e.Expires.Sub(e.Until) != short.Retention {
				t.Errorf("plan %s with a day of %s: epoch %+v", p.ID, day, e)
			}
		}
		r := journal.Retention{Callbacks: 36 * time.Hour}.Scaled(day)
		if err := r.Validate(); err != nil {
			t.Errorf("a day of %s: %v", day, err)
		}
		if r.Attachments != 7*day || r.Callbacks != day+day/2 || r.Audit != 400*day || r.Profiles != 180*day {
			t.Errorf("a day of %s: %+v", day, r)
		}
	}
	// What is not scaled is held to the bounds of real time.
	p := journal.DefaultPlans()[0]
	p.Retention, p.Epoch = 3*time.Second, time.Second
	if err := p.Validate(); !errors.Is(err, journal.ErrInvalid) {
		t.Errorf("a plan of seconds: %v", err)
	}
	if err := journal.DefaultPlans()[0].Scaled(time.Millisecond).Validate(); !errors.Is(err, journal.ErrInvalid) {
		t.Errorf("a day of a millisecond: %v", err)
	}
}
