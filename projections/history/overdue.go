package history

import (
	"fmt"
	"time"

	"github.com/cofferdb/coffer/projections"
)

// Overdue returns how long ago the oldest of the events that Expire would remove
// came to its end, to the precision of [Config].Hour; 0 when there is none.
func (v *View) Overdue(now time.Time) (time.Duration, error) {
	if err := v.open(); err != nil {
		return 0, err
	}
	var overdue time.Duration
	err := v.store.View(func(r projections.Reader) error {
		var from, to key
		c := r.Iterate(from.expiry(expiryKey{}), to.expiry(expiryKey{hour: v.hours.of(now.UnixMilli()) + 1}), false)
		defer c.Close()
		if !c.Next() {
			return c.Close()
		}
		at, err := parseExpiryKey(c.Key())
		if err != nil {
			return err
		}
		overdue = max(now.Sub(time.UnixMilli(int64(at.hour)*int64(v.hours))), 0)
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("history: %w", err)
	}
	return overdue, nil
}
