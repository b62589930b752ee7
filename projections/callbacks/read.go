package callbacks

import (
	"context"
	"fmt"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections"
)

// Progress returns how far an endpoint has come: the zero Progress when nothing
// is known of it.
func (v *View) Progress(ctx context.Context, app journal.AppID, ep journal.EndpointID) (Progress, error) {
	var p Progress
	err := v.view(ctx, func(r projections.Reader) (err error) {
		p, err = loadProgress(r, app, ep)
		return err
	})
	return p, err
}

// Query selects deliveries of an endpoint.
type Query struct {
	// State selects one state; 0 is all.
	State journal.DeliveryState
	// After and Before bound the numbers, both exclusive; a zero Before is the
	// end.
	After, Before uint64
	// Reverse gives the newest first.
	Reverse bool
	// Limit is the number of deliveries, at most; 0 is no limit.
	Limit int
	// Oldest hides the deliveries of events that arrived before it: their
	// retention is over, whatever is still there.
	Oldest time.Time
}

// Deliveries calls fn with the selected deliveries in the order of their
// numbers. They are fn's to keep.
func (v *View) Deliveries(ctx context.Context, app journal.AppID, ep journal.EndpointID, q Query, fn func(Delivery) error) error {
	if q.After == 1<<64-1 {
		return nil
	}
	oldest := int64(0)
	if !q.Oldest.IsZero() {
		oldest = q.Oldest.UnixMilli()
	}
	return v.view(ctx, func(r projections.Reader) error {
		var from, to key
		if q.State == 0 || q.State == journal.DeliveryDone {
			from.endpoint(tableDeliveries, app, ep)
			to.endpoint(tableDeliveries, app, ep)
		} else {
			from.endpoint(tableStates, app, ep).state(q.State)
			to.endpoint(tableStates, app, ep).state(q.State)
		}
		from.number(q.After + 1)
		if q.Before > 0 {
			to.number(q.Before)
		} else {
			to.number(1<<64 - 1)
		}
		c := r.Iterate(from.bytes(), to.bytes(), q.Reverse)
		defer c.Close()
		for n := 0; c.Next(); {
			d, err := v.delivery(r, c, app, ep, q.State)
			if err != nil {
				return err
			}
			if q.State != 0 && d.State != q.State || d.Arrived < oldest {
				continue
			}
			if err := fn(d); err != nil {
				return err
			}
			if n++; n == q.Limit {
				break
			}
		}
		return c.Close()
	})
}

// delivery reads the delivery at a cursor of table j or l.
func (v *View) delivery(r projections.Reader, c projections.Cursor, app journal.AppID, ep journal.EndpointID, s journal.DeliveryState) (Delivery, error) {
	n, err := lastNumber(c.Key())
	if err != nil {
		return Delivery{}, err
	}
	value := c.Value()
	if s != 0 && s != journal.DeliveryDone {
		var k key
		var ok bool
		if value, ok, err = r.Get(nil, k.endpoint(tableDeliveries, app, ep).number(n).bytes()); err != nil {
			return Delivery{}, err
		}
		if !ok {
			return Delivery{}, damaged("missing delivery", 0)
		}
	}
	d, err := parseDelivery(value)
	d.Number = n
	return d, err
}

// Due calls fn with the deliveries that wait, those that are due first first.
func (v *View) Due(ctx context.Context, app journal.AppID, ep journal.EndpointID, limit int, fn func(Delivery) error) error {
	return v.view(ctx, func(r projections.Reader) error {
		var from, to, k key
		from.endpoint(tableDue, app, ep)
		to.endpoint(tableDue, app, ep).number(1<<64 - 1)
		c := r.Iterate(from.bytes(), to.bytes(), false)
		defer c.Close()
		for i := 0; c.Next() && (limit <= 0 || i < limit); i++ {
			n, err := lastNumber(c.Key())
			if err != nil {
				return err
			}
			value, ok, err := r.Get(nil, k.endpoint(tableDeliveries, app, ep).number(n).bytes())
			if err != nil {
				return err
			}
			if !ok {
				return damaged("missing delivery", 0)
			}
			d, err := parseDelivery(value)
			if err != nil {
				return err
			}
			d.Number = n
			if err := fn(d); err != nil {
				return err
			}
		}
		return c.Close()
	})
}

// Replay returns how far a replay has come. ok is false when it has not begun.
func (v *View) Replay(ctx context.Context, app journal.AppID, ep journal.EndpointID, id [16]byte) (rp Replay, ok bool, err error) {
	err = v.view(ctx, func(r projections.Reader) error {
		var k key
		b, found, err := r.Get(nil, k.endpoint(tableReplays, app, ep).raw(id[:]).bytes())
		if err != nil || !found {
			return err
		}
		ok = true
		rp, err = parseReplay(b)
		return err
	})
	return rp, ok, err
}

func (v *View) view(ctx context.Context, fn func(projections.Reader) error) error {
	if err := v.Ready(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := v.store.View(fn); err != nil {
		return fmt.Errorf("callbacks: %w", err)
	}
	return nil
}
