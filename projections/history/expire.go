package history

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections"
)

const (
	// expireEvents bounds a transaction of Expire: applying waits for it.
	expireEvents = 4096
	// expireRun is the number of consecutive events of an app from which one
	// range deletion is better than single ones.
	expireRun = 32
)

// Expire removes the events whose retention, by the plan of the stream that they
// came from, was over before the full hour at or before now. It returns their
// number. Its cost is that of what it removes, whatever else is stored. Call it
// from time to time, every few minutes; readers are shown what has expired
// neither before nor after (see [Query.Oldest]).
func (v *View) Expire(ctx context.Context, now time.Time) (int, error) {
	hour := v.hours.of(now.UnixMilli())
	total := 0
	for {
		if err := v.open(); err != nil {
			return total, err
		}
		if err := ctx.Err(); err != nil {
			return total, err
		}
		e := expirer{hours: v.hours, hour: hour}
		err := v.store.Update(func(txn projections.Txn) error {
			// All reading comes first: a store answers a cursor faster when
			// the transaction has not written into its range.
			e.txn = txn
			if err := e.plan(); err != nil {
				return err
			}
			if len(e.slots) == 0 {
				if err := e.sweep(); err != nil {
					return err
				}
			}
			if err := e.remove(); err != nil {
				return err
			}
			e.swept()
			return nil
		})
		if err != nil {
			return total, fmt.Errorf("history: expire: %w", err)
		}
		total += e.events
		if len(e.slots) == 0 && !e.worked {
			return total, nil
		}
	}
}

// An expirer is one transaction of Expire.
type expirer struct {
	txn    projections.Txn
	hours  hours
	hour   uint32
	slots  []slot
	events int
	found  []expired
	times  map[timeKey]uint64 // how many events go from table T
	key    key
	value  []byte

	// Of the sweep.
	app    journal.AppID
	rules  moveRules
	more   bool // the sweep has not come to its end
	worked bool // there was something to sweep
}

// A slot is an entry of table X.
type slot struct {
	at   expiryKey
	lows []byte
}

// An expired is an event to be removed.
type expired struct {
	app      journal.AppID
	position journal.Position
	header   journal.Header
	sender   kms.Tag
	joined   bool // nothing that stays lies between it and the one before
}

// plan reads what is to be removed: whole entries of X, of one hour.
func (e *expirer) plan() error {
	var from, to key
	lo := from.expiry(expiryKey{})
	hi := to.expiry(expiryKey{hour: e.hour + 1})
	c := e.txn.Iterate(lo, hi, false)
	defer c.Close()
	for n := 0; n < expireEvents && c.Next(); {
		at, err := parseExpiryKey(c.Key())
		if err != nil {
			return err
		}
		if len(e.slots) > 0 && at.hour != e.slots[0].at.hour {
			break
		}
		e.slots = append(e.slots, slot{at, bytes.Clone(c.Value())})
		n += len(c.Value())
	}
	if err := c.Close(); err != nil {
		return err
	}
	for i := range e.slots {
		if err := e.collect(i); err != nil {
			return err
		}
	}
	return nil
}

// collect reads the events of a slot.
func (e *expirer) collect(i int) error {
	s := e.slots[i]
	var wanted [256]bool
	low, high := byte(255), byte(0)
	for _, b := range s.lows {
		wanted[b] = true
		low, high = min(low, b), max(high, b)
	}
	if len(s.lows) == 0 {
		return nil
	}
	base := journal.Position(s.at.block << 8)
	start := base + journal.Position(low)
	joined := false
	if n := len(e.found); n > 0 && i > 0 {
		// Neighbouring blocks are read as one, so that a run goes on.
		before := e.slots[i-1].at
		if last := e.found[n-1]; before.app == s.at.app && before.block+1 == s.at.block && last.app == s.at.app {
			start, joined = last.position+1, true
		}
	}
	var prefix, from, to key
	lo, hi := spanOf(prefix.app(tableEvents, s.at.app).bytes(), start-1, base+journal.Position(high)+1, &from, &to)
	c := e.txn.Iterate(lo, hi, false)
	defer c.Close()
	for c.Next() {
		pos, err := lastPosition(c.Key())
		if err != nil {
			return err
		}
		if pos < base || !wanted[byte(pos)] {
			joined = false
			continue
		}
		v, err := parseEvent(c.Value())
		if err != nil {
			return err
		}
		x, err := expiredOf(s.at.app, pos, &v)
		if err != nil {
			return err
		}
		x.joined = joined
		e.found = append(e.found, x)
		joined = true
	}
	return c.Close()
}

// remove writes the deletions.
func (e *expirer) remove() error {
	e.events = len(e.found)
	e.times = make(map[timeKey]uint64)
	for i := 0; i < len(e.found); {
		n := 1
		for i+n < len(e.found) && e.found[i+n].app == e.found[i].app {
			n++
		}
		if err := e.trim(e.found[i : i+n]); err != nil {
			return err
		}
		i += n
	}
	for i := range e.found {
		if err := e.unindex(&e.found[i]); err != nil {
			return err
		}
	}
	e.removeEvents()
	for at, n := range e.times {
		if err := e.removeTimes(at, n); err != nil {
			return err
		}
	}
	for _, s := range e.slots {
		e.txn.Delete(e.key.expiry(s.at))
	}
	return nil
}

// trim moves the position through which an app has been trimmed to the last
// event that goes before the first one that stays.
func (e *expirer) trim(gone []expired) error {
	app := gone[0].app
	through, err := loadTrimmed(e.txn, app)
	if err != nil {
		return err
	}
	before := through
	var prefix, from, to key
	lo, hi := spanOf(prefix.app(tableEvents, app).bytes(), through, 0, &from, &to)
	c := e.txn.Iterate(lo, hi, false)
	defer c.Close()
	for i := 0; i < len(gone) && c.Next(); i++ {
		pos, err := lastPosition(c.Key())
		if err != nil {
			return err
		}
		if pos != gone[i].position {
			break
		}
		through = pos
	}
	if err := c.Close(); err != nil {
		return err
	}
	if through > before {
		e.value = binary.BigEndian.AppendUint64(e.value[:0], uint64(through))
		e.txn.Set(e.key.trimmed(app), e.value)
	}
	return nil
}

// unindex removes the keys that lead to an event.
func (e *expirer) unindex(x *expired) error {
	h := &x.header
	e.times[timeKey{x.app, e.hours.of(h.Millis)}]++
	e.txn.Delete(e.key.id(x.app, h.Event))
	if !isZero(h.Conversation) {
		e.txn.Delete(e.key.indexed(tableByConv, x.app, h.Conversation, x.position))
		if h.Type == journal.MessageSent {
			e.txn.Delete(e.key.indexed(tableConversations, x.app, h.Conversation, x.position))
		}
	}
	e.txn.Delete(e.key.indexed(tableUsers, x.app, x.sender, x.position))
	if !isZero(h.Peer) {
		e.txn.Delete(e.key.indexed(tableUsers, x.app, h.Peer, x.position))
	}
	if isZero(h.Target) || h.Type != journal.MessageEdited && h.Type != journal.MessageRecalled {
		return nil
	}
	e.txn.Delete(e.key.indexed(tableTargets, x.app, h.Target, x.position))
	v, ok, err := e.txn.Get(e.value[:0], e.key.id(x.app, h.Target))
	e.value = v
	if err != nil || !ok {
		return err
	}
	p, err := parsePlace(v)
	if err == nil && p.kind == 0 && p.position == x.position {
		e.txn.Delete(e.key.id(x.app, h.Target)) // its newest change awaits it no longer
	}
	return err
}

// removeEvents removes the events themselves, long runs as ranges.
func (e *expirer) removeEvents() {
	for i := 0; i < len(e.found); {
		n := 1
		for i+n < len(e.found) && e.found[i+n].joined {
			n++
		}
		run := e.found[i : i+n]
		if n >= expireRun {
			var from, to key
			e.txn.DeleteRange(from.event(run[0].app, run[0].position), to.event(run[0].app, run[n-1].position+1))
		} else {
			for _, x := range run {
				e.txn.Delete(e.key.event(x.app, x.position))
			}
		}
		i += n
	}
}

func (e *expirer) removeTimes(at timeKey, n uint64) error {
	v, ok, err := e.txn.Get(e.value[:0], e.key.time(at.app, at.hour))
	e.value = v
	if err != nil {
		return err
	}
	if !ok {
		return damaged("missing span", 0)
	}
	s, err := parseSpan(v)
	if err != nil {
		return err
	}
	if s.count <= n {
		e.txn.Delete(e.key.time(at.app, at.hour))
		return nil
	}
	s.count -= n
	e.value = s.append(e.value[:0])
	e.txn.Set(e.key.time(at.app, at.hour), e.value)
	return nil
}
