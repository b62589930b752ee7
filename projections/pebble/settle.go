package pebble

import (
	"context"
	"fmt"
	"time"
)

// settleEvery is how often it is looked whether background work goes on.
const settleEvery = 10 * time.Millisecond

// Settle waits until no memory table is written out and nothing is compacted, and
// nothing of that is due. What is committed meanwhile may keep it waiting.
func (s *Store) Settle(ctx context.Context) error {
	tick := time.NewTicker(settleEvery)
	defer tick.Stop()
	for quiet := 0; quiet < 2; { // between two compactions there is a moment without one
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("settle view store: %w", err)
		}
		if err := s.check(); err != nil {
			return err
		}
		if m := s.db.Metrics(); m.Flush.NumInProgress == 0 && m.Compact.NumInProgress == 0 {
			quiet++
		} else {
			quiet = 0
		}
		select {
		case <-ctx.Done(): // and the error is returned
		case <-tick.C:
		}
	}
	return nil
}
