package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/journal"
)

// The shortest and the longest day. The precision of key epochs and of the views'
// expiry is a second.
const (
	MinDay = time.Second
	MaxDay = wholeDay
)

const (
	wholeDay = 24 * time.Hour
	// dayName is a file in the data directory of a process whose days are not
	// whole ones. Streams, epochs and views are made for the day that it says.
	dayName = "dev.day"
)

// A clock is what a process takes time from.
type clock struct {
	now func() time.Time
	day time.Duration // how long it lasts; 0 means 24 hours
}

// checkDay refuses a data directory that was made with days of another length,
// and notes the length in one that is new. Data of a whole day would end at once
// where days are short, and the other way round it would never end in time.
func checkDay(dir string, day time.Duration) error {
	if day == 0 {
		day = wholeDay
	}
	path := filepath.Join(dir, dayName)
	made := wholeDay
	text, err := os.ReadFile(path) //nolint:gosec // in our own data directory
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if day == made {
			return nil
		}
		if used, err := holdsData(dir); err != nil || used {
			return errors.Join(err, otherDay(dir, made, day))
		}
		return writeSecret(path, []byte(day.String()+"\n"))
	case err != nil:
		return fmt.Errorf("reading %s: %w", path, err)
	}
	if made, err = time.ParseDuration(strings.TrimSpace(string(text))); err != nil {
		return fmt.Errorf("reading %s: %w", path, err)
	}
	if made != day {
		return otherDay(dir, made, day)
	}
	return nil
}

func otherDay(dir string, made, day time.Duration) error {
	return fmt.Errorf("%w: %s was made with a day of %s and cannot be used with one of %s; use another directory (days are shorter only with serve --dev --day)",
		config.ErrInvalid, dir, made, day)
}

// holdsData reports whether a region has ever been opened in the directory.
func holdsData(dir string) (bool, error) {
	found, err := filepath.Glob(filepath.Join(dir, "*", "nats"))
	if err != nil {
		return false, fmt.Errorf("looking into %s: %w", dir, err)
	}
	return len(found) > 0, nil
}

func scaledPlans(day time.Duration) []journal.Plan {
	plans := journal.DefaultPlans()
	if day != 0 {
		for i := range plans {
			plans[i] = plans[i].Scaled(day)
		}
	}
	return plans
}

// scaled is d with the process's days.
func (o *regionOptions) scaled(d time.Duration) time.Duration {
	if o.day == 0 {
		return d
	}
	return time.Duration(float64(d) * (float64(o.day) / float64(wholeDay)))
}

// every is how often something is done that is done every d on whole days.
func (o *regionOptions) every(d time.Duration) time.Duration {
	return max(o.scaled(d), min(d, fastest))
}

// hour is what an hour of the views lasts: whole seconds.
func (o *regionOptions) hour() time.Duration {
	return max(o.scaled(time.Hour).Truncate(time.Second), time.Second)
}

func (o *regionOptions) retention() journal.Retention {
	r := o.config.Retention.Journal()
	if o.day == 0 {
		return r
	}
	return r.Scaled(o.day)
}
