package history

import (
	"context"
	"fmt"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections"
)

// Pick returns the events at some positions, in the order given, each with a
// record of its own. Those that are not there any more, or lie before oldest, are
// left out.
func (v *View) Pick(ctx context.Context, app journal.AppID, positions []journal.Position, oldest time.Time) ([]Item, error) {
	if err := v.open(); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	p := replay{hours: v.hours}
	if !oldest.IsZero() {
		p.oldest, p.hides = oldest.UnixMilli(), true
	}
	items := make([]Item, 0, len(positions))
	err := v.store.View(func(r projections.Reader) error {
		var k key
		var err error
		if p.rules, err = loadRules(r, app); err != nil {
			return err
		}
		for _, position := range positions {
			b, ok, err := r.Get(nil, k.event(app, position))
			if err != nil {
				return err
			}
			if !ok {
				continue
			}
			e, err := parseEvent(b)
			if err != nil {
				return err
			}
			if p.isHidden(position, &e) {
				continue
			}
			items = append(items, Item{
				Position: position, Stored: time.UnixMilli(e.stored).UTC(), Type: kind(e.record),
				Recalled: e.flags&flagRecalled != 0, Record: e.record,
			})
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("history: pick events: %w", err)
	}
	return items, nil
}
