package deliver

import (
	"context"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections/callbacks"
)

// failedStates are the states of deliveries that have failed at least once and
// not been taken since.
func failedStates() []journal.DeliveryState {
	return []journal.DeliveryState{journal.DeliveryWaiting, journal.DeliveryParked}
}

// hasFailed reports whether a delivery of one of those states has failed.
func hasFailed(d *callbacks.Delivery) bool {
	return d.State == journal.DeliveryParked || d.Attempts > 0
}

// Failed yields when the events of an endpoint's failed deliveries have arrived.
func (e *Engine) Failed(ctx context.Context, ep *endpoints.Endpoint, yield func(arrived time.Time)) error {
	for _, state := range failedStates() {
		err := e.View.Deliveries(ctx, ep.App, ep.ID, callbacks.Query{State: state, Oldest: e.oldest()}, func(d callbacks.Delivery) error {
			if hasFailed(&d) {
				yield(time.UnixMilli(d.Arrived).UTC())
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// RetryFailed sends the failed deliveries of events that have arrived from a time
// on and before another at once, and returns how many there are. [ErrNoDelivery]
// means none.
func (e *Engine) RetryFailed(ctx context.Context, ep *endpoints.Endpoint, from, before time.Time) (int, error) {
	return e.requeue(ctx, ep, failedStates(), func(d *callbacks.Delivery) bool {
		arrived := time.UnixMilli(d.Arrived)
		return hasFailed(d) && !arrived.Before(from) && arrived.Before(before)
	})
}
