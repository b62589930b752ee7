package projections

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/cofferdb/coffer/journal"
)

// A Mover is a projection that follows plan changes: its Apply is given openings,
// copies and closings too (see [journal.Role]). Others are given events only, and
// fill their views, after a rebuild, with what the streams still have of those.
type Mover interface {
	Projection
	// FollowsMoves only marks the type.
	FollowsMoves()
}

// A first is a source that knows where its streams begin.
type first interface {
	First(ctx context.Context, stream string) (uint64, error)
}

// seals knows, of one tail, where apps were sealed: what they have behind that
// does not count. Few apps change their plan, so they are in memory.
type seals map[journal.AppID][]seal

type seal struct {
	generation uint16
	sequence   uint64
}

// void reports whether a record stands behind its app's seal.
func (s seals) void(r *journal.Sealed) bool {
	if len(s) == 0 || r.Role == journal.RoleSeal {
		return false
	}
	for _, at := range s[r.App] {
		if r.Generation <= at.generation && r.Sequence > at.sequence {
			return true
		}
	}
	return false
}

func sealKey(p Projection, stream string, app journal.AppID, generation uint16) []byte {
	key := append(runnerKey(keySeal, p.Name(), stream), 0)
	return binary.BigEndian.AppendUint16(append(key, app[:]...), generation)
}

// loadSeals reads the seals of a projection in a stream.
func loadSeals(r Reader, p Projection, stream string) (seals, error) {
	from := append(runnerKey(keySeal, p.Name(), stream), 0)
	to := append(runnerKey(keySeal, p.Name(), stream), 1)
	c := r.Iterate(from, to, false)
	defer c.Close()
	list := make(seals)
	for c.Next() {
		k, v := c.Key(), c.Value()
		if len(k) != len(from)+18 || len(v) != 8 {
			return nil, fmt.Errorf("%w: seal of %d and %d bytes", ErrCorrupt, len(k), len(v))
		}
		var app journal.AppID
		copy(app[:], k[len(from):])
		list[app] = append(list[app], seal{binary.BigEndian.Uint16(k[len(from)+16:]), binary.BigEndian.Uint64(v)})
	}
	return list, c.Close()
}

// sift returns what of a batch the projection is to apply, and the seals in it. In
// the usual batch all of it is, and nothing is copied.
func (t *tail) sift(batch []journal.Sealed) (apply []journal.Sealed, fresh []journal.Sealed) {
	_, follows := t.projection.(Mover)
	plain := len(t.seals) == 0
	for i := range batch {
		plain = plain && batch[i].Role == journal.RoleEvent
	}
	if plain {
		return batch, nil
	}
	apply = make([]journal.Sealed, 0, len(batch))
	for i := range batch {
		s := &batch[i]
		switch {
		case s.Role == journal.RoleSeal:
			if t.seals == nil {
				t.seals = make(seals)
			}
			if t.seals.has(s.App, s.Generation) {
				continue // the first one counts
			}
			t.seals[s.App] = append(t.seals[s.App], seal{s.Generation, s.Sequence})
			fresh = append(fresh, *s)
		case t.seals.void(s):
		case s.Role == journal.RoleEvent || follows:
			apply = append(apply, *s)
		}
	}
	return apply, fresh
}

func (s seals) has(app journal.AppID, generation uint16) bool {
	for _, at := range s[app] {
		if at.generation == generation {
			return true
		}
	}
	return false
}

// forget takes seals back whose transaction was not committed.
func (t *tail) forget(fresh []journal.Sealed) {
	for i := range fresh {
		list := t.seals[fresh[i].App]
		for k := range list {
			if list[k].generation == fresh[i].Generation {
				t.seals[fresh[i].App] = append(list[:k:k], list[k+1:]...)
				break
			}
		}
	}
}

// passSeal waits until the projection has passed the seal that an opening names:
// what an app wrote before its plan change comes before what it wrote after it, in
// every view. The waits form no circle: a seal is in its stream before its opening
// is in another one.
func (r *Runner) passSeal(ctx context.Context, t *tail, s journal.Sealed) error {
	o, err := s.Opening()
	if err != nil {
		return recordError(t.projection, t.stream.Name, s, err)
	}
	for _, other := range r.tails {
		if other.projection.Name() != t.projection.Name() || other.stream.Name != o.From || other == t {
			continue
		}
		for {
			wait, cancel := context.WithTimeout(ctx, time.Second)
			err := other.wait(wait, o.Sealed)
			cancel()
			switch {
			case err == nil:
				return nil
			case ctx.Err() != nil:
				return ctx.Err()
			case errors.Is(err, ErrStopped):
				return fmt.Errorf("app %s came from stream %s: %w", s.App, o.From, ErrStopped)
			}
			if r.emptyTo(ctx, o.From, o.Sealed) {
				return nil
			}
		}
	}
	return nil // the plan is not in the table any more, and its stream is gone
}

// emptyTo reports whether the stream has nothing left up to the sequence.
func (r *Runner) emptyTo(ctx context.Context, stream string, sequence uint64) bool {
	f, ok := r.source.(first)
	if !ok {
		return false
	}
	n, err := f.First(ctx, stream)
	return err == nil && n > sequence
}
