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

// Recalled returns the positions of a recalled message and of the edits of it that
// counted, each a tombstone. known is false while the message is not there, and
// there are no positions while no recall of it counts.
func (v *View) Recalled(ctx context.Context, app journal.AppID, id kms.Tag) (positions []journal.Position, known bool, err error) {
	err = v.recalled(ctx, app, id, func(_ projections.Reader, p place, edits []journal.Position) {
		if known = p.kind != 0; edits != nil {
			positions = edits
		}
	})
	return positions, known, err
}

// EraseRecalled lets the store write anew what held a recalled message and its
// edits, so that nothing of their sealed bytes is left in its files.
func (v *View) EraseRecalled(ctx context.Context, app journal.AppID, id kms.Tag) error {
	store, ok := v.store.(projections.Eraser)
	if !ok {
		return nil // it overwrites in place
	}
	var keys [][]byte
	err := v.recalled(ctx, app, id, func(_ projections.Reader, p place, positions []journal.Position) {
		for i, at := range positions {
			var k key
			keys = append(keys, append([]byte(nil), k.event(app, at)...))
			if i == 0 {
				keys = append(keys, append([]byte(nil), k.indexed(tableConversations, app, p.conversation, at)...))
			}
		}
	})
	if err != nil {
		return err
	}
	if err := store.Erase(ctx, keys...); err != nil {
		return fmt.Errorf("history: erase a recalled message: %w", err)
	}
	return nil
}

// recalled calls fn with where a message is and, once it was recalled, with its
// position and those of its edits.
func (v *View) recalled(ctx context.Context, app journal.AppID, id kms.Tag, fn func(projections.Reader, place, []journal.Position)) error {
	if err := v.open(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	err := v.store.View(func(r projections.Reader) error {
		var k key
		b, found, err := r.Get(nil, k.id(app, id))
		if err != nil || !found {
			return err
		}
		p, err := parsePlace(b)
		if err != nil || p.kind == 0 {
			return err
		}
		b, found, err = r.Get(nil, k.event(app, p.position))
		if err != nil || !found {
			return err
		}
		e, err := parseEvent(b)
		if err != nil {
			return err
		}
		if p.kind != journal.MessageSent || e.flags&flagRecalled == 0 {
			fn(r, p, nil)
			return nil
		}
		positions := []journal.Position{p.position}
		var prefix, from, to key
		lo, hi := spanOf(prefix.app(tableTargets, app).tag(id).bytes(), 0, 0, &from, &to)
		c := r.Iterate(lo, hi, false)
		defer c.Close()
		for c.Next() {
			at, err := lastPosition(c.Key())
			value := c.Value()
			if err == nil && len(value) != 17 {
				err = damaged("change", len(value))
			}
			if err != nil {
				return err
			}
			if journal.Type(value[0]) == journal.MessageEdited && kms.Tag(value[1:]) == p.conversation {
				positions = append(positions, at)
			}
		}
		fn(r, p, positions)
		return c.Close()
	})
	if err != nil {
		return fmt.Errorf("history: look for a recalled message: %w", err)
	}
	return nil
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
