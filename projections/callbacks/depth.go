package callbacks

import (
	"context"
	"encoding/binary"
	"slices"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections"
)

// A Depth is how much there is to deliver, over all endpoints.
type Depth struct {
	Waiting, Parked, Held uint64
	// OldestDue is when the delivery that waits longest was due; zero when none is.
	OldestDue time.Time
	// Overdue is how long ago the oldest of what Expire would remove came to its
	// end.
	Overdue time.Duration
}

// Depth looks at how far every endpoint has come. Its cost is that of the
// endpoints, whatever they wait for.
func (v *View) Depth(ctx context.Context, now time.Time) (Depth, error) {
	var d Depth
	err := v.view(ctx, func(r projections.Reader) error {
		if err := d.overdue(r, v, now); err != nil {
			return err
		}
		var waiting [][]byte // endpoints, as keys have them
		c := r.Iterate([]byte{tableEndpoints}, []byte{tableEndpoints + 1}, false)
		defer c.Close()
		for c.Next() {
			p, err := parseProgress(c.Value())
			if err != nil {
				return err
			}
			d.Waiting, d.Parked, d.Held = d.Waiting+p.Waiting, d.Parked+p.Parked, d.Held+p.Held
			if p.Waiting > 0 && len(c.Key()) == 33 {
				waiting = append(waiting, slices.Clone(c.Key()[1:]))
			}
		}
		if err := c.Close(); err != nil {
			return err
		}
		for _, ep := range waiting {
			if err := d.due(r, journal.AppID(ep[:16]), journal.EndpointID(ep[16:])); err != nil {
				return err
			}
		}
		if d.OldestDue.After(now) {
			d.OldestDue = time.Time{}
		}
		return nil
	})
	return d, err
}

func (d *Depth) due(r projections.Reader, app journal.AppID, ep journal.EndpointID) error {
	var from, to key
	c := r.Iterate(from.endpoint(tableDue, app, ep).bytes(), to.endpoint(tableDue, app, ep).number(1<<64-1).bytes(), false)
	defer c.Close()
	if !c.Next() {
		return c.Close()
	}
	k := c.Key()
	if len(k) != 49 {
		return damaged("due key", len(k))
	}
	at := time.UnixMilli(int64(binary.BigEndian.Uint64(k[33:41]))) //nolint:gosec // a time that was written
	if d.OldestDue.IsZero() || at.Before(d.OldestDue) {
		d.OldestDue = at
	}
	return nil
}

func (d *Depth) overdue(r projections.Reader, v *View, now time.Time) error {
	c := r.Iterate([]byte{tableExpiry}, binary.BigEndian.AppendUint32([]byte{tableExpiry}, v.hour(now.UnixMilli())+1), false)
	defer c.Close()
	if !c.Next() {
		return c.Close()
	}
	if len(c.Key()) < 5 {
		return damaged("expiry key", len(c.Key()))
	}
	d.Overdue = max(now.Sub(time.UnixMilli(int64(binary.BigEndian.Uint32(c.Key()[1:5]))*v.span)), 0)
	return c.Close()
}
