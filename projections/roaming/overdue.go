package roaming

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/cofferdb/coffer/projections"
)

// Overdue returns how long ago the oldest of what Expire would remove came to its
// end; 0 when there is nothing.
func (v *View) Overdue(now time.Time) (time.Duration, error) {
	var overdue time.Duration
	err := v.store.View(func(r projections.Reader) error {
		var from, to key
		c := r.Iterate(from.table(tableExpiry).bytes(), to.table(tableExpiry).number(uint64(max(now.UnixMilli(), 0))+1).bytes(), false)
		defer c.Close()
		if !c.Next() {
			return c.Close()
		}
		k := c.Key()
		if len(k) < 9 {
			return damaged("expiry key", len(k))
		}
		overdue = max(now.Sub(time.UnixMilli(int64(binary.BigEndian.Uint64(k[1:9])))), 0) //nolint:gosec // a time that was written
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("roaming: %w", err)
	}
	return overdue, nil
}
