package history

import (
	"context"
	"fmt"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections"
)

// Lookup returns the record of an event and its position. It is part of
// [journal.Index], and cheap when the event is not there. Of a recalled message,
// or an edit of one, the record is no more than the clear header
// ([journal.HeaderSize] bytes). An expired event is found until [View.Expire]
// has removed it.
func (v *View) Lookup(ctx context.Context, app journal.AppID, id kms.Tag) (record []byte, pos journal.Position, ok bool, err error) { //nolint:revive // declared by journal.Index
	if err := v.open(); err != nil {
		return nil, 0, false, err
	}
	if err := ctx.Err(); err != nil {
		return nil, 0, false, err
	}
	err = v.store.View(func(r projections.Reader) error {
		var k key
		var room [placeSize]byte
		b, found, err := r.Get(room[:0], k.id(app, id))
		if err != nil || !found {
			return err
		}
		p, err := parsePlace(b)
		if err != nil || p.kind == 0 {
			return err
		}
		b, found, err = r.Get(nil, k.event(app, p.position))
		if err != nil {
			return err
		}
		if !found {
			return damaged("missing event", 0)
		}
		e, err := parseEvent(b)
		if err != nil {
			return err
		}
		record, pos, ok = e.record, p.position, true
		return nil
	})
	if err != nil {
		return nil, 0, false, fmt.Errorf("history: look up an event: %w", err)
	}
	return record, pos, ok, nil
}

// Event returns one event by its tag, as [View.Replay] would give it, with a
// record of its own. ok is false if it is not there, or lies before oldest.
func (v *View) Event(ctx context.Context, app journal.AppID, id kms.Tag, oldest time.Time) (item Item, ok bool, err error) {
	record, pos, ok, err := v.Lookup(ctx, app, id)
	if err != nil || !ok {
		return Item{}, false, err
	}
	_, err = v.Replay(ctx, app, Query{After: pos - 1, Before: pos + 1, Reverse: true, Oldest: oldest}, func(i Item) error {
		item = i
		item.Record = append(record[:0], i.Record...)
		return nil
	})
	if err != nil {
		return Item{}, false, err
	}
	return item, item.Position == pos, nil
}
