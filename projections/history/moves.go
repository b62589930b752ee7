package history

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections"
)

// FollowsMoves is part of [projections.Mover].
func (v *View) FollowsMoves() {}

var _ projections.Mover = (*View)(nil)

// A moveRule says what a plan change has taken away: what stands at a position of
// an earlier generation, was not copied by this one or a later one, and whose
// retention clock lies before the floor. An opening makes it, with what had
// expired by then; a closing takes away whatever was not copied.
type moveRule struct {
	generation uint16
	floor      int64            // milliseconds
	cursor     journal.Position // up to which what the rule takes away is removed
}

// closedFloor is that of a closed plan change.
const closedFloor = math.MaxInt64

const ruleSize = 18

func (r moveRule) bound() journal.Position {
	p, _ := journal.NewPosition(r.generation, 0) // it was read from 16 bits that a position had
	return p
}

func (r moveRule) hides(p journal.Position, e *event) bool {
	return p < r.bound() && e.copied < r.generation && e.clock() < r.floor
}

// moveRules are the value of table M: few, the oldest first.
type moveRules []moveRule

func (l moveRules) hides(p journal.Position, e *event) bool {
	for _, r := range l {
		if r.hides(p, e) {
			return true
		}
	}
	return false
}

func (l moveRules) append(dst []byte) []byte {
	for _, r := range l {
		dst = binary.BigEndian.AppendUint16(dst, r.generation)
		dst = binary.BigEndian.AppendUint64(dst, uint64(r.floor))
		dst = binary.BigEndian.AppendUint64(dst, uint64(r.cursor))
	}
	return dst
}

func parseRules(v []byte) (moveRules, error) {
	if len(v)%ruleSize != 0 {
		return nil, damaged("moves", len(v))
	}
	var l moveRules
	for ; len(v) > 0; v = v[ruleSize:] {
		l = append(l, moveRule{
			generation: binary.BigEndian.Uint16(v), floor: int64(binary.BigEndian.Uint64(v[2:])),
			cursor: journal.Position(binary.BigEndian.Uint64(v[10:])),
		})
	}
	return l, nil
}

func (k *key) moves(app journal.AppID) []byte { return k.app(tableMoves, app).bytes() }

// loadRules reads the rules of an app: usually there are none.
func loadRules(r projections.Reader, app journal.AppID) (moveRules, error) {
	var k key
	var room [2 * ruleSize]byte
	v, ok, err := r.Get(room[:0], k.moves(app))
	if err != nil || !ok {
		return nil, err
	}
	return parseRules(v)
}

// opened notes what had expired when the plan changed.
func (w *writer) opened(s *journal.Sealed) error {
	o, err := s.Opening()
	if err != nil {
		return err
	}
	return w.changeRules(s.App, func(l moveRules) moveRules {
		for _, r := range l {
			if r.generation == s.Generation {
				return l
			}
		}
		return append(l, moveRule{generation: s.Generation, floor: o.Floor.UnixMilli()})
	})
}

// closed takes away what was not copied. What an earlier plan change has taken away
// was not copied either.
func (w *writer) closed(s *journal.Sealed) error {
	return w.changeRules(s.App, func(l moveRules) moveRules {
		rule := moveRule{generation: s.Generation, floor: closedFloor}
		var rest moveRules
		for _, r := range l {
			if r.generation > s.Generation {
				rest = append(rest, r)
			}
		}
		return append(moveRules{rule}, rest...)
	})
}

func (w *writer) changeRules(app journal.AppID, change func(moveRules) moveRules) error {
	l, err := loadRules(w.txn, app)
	if err != nil {
		return err
	}
	w.value = change(l).append(w.value[:0])
	w.txn.Set(w.key.moves(app), w.value)
	return nil
}

// copied replaces an event's envelope by the one of its copy, and lets it expire by
// its new plan.
func (w *writer) copied(s *journal.Sealed, before, retention time.Duration) error {
	h, err := journal.ParseHeader(s.Record)
	if err != nil {
		return err
	}
	v, ok, err := w.get(w.key.id(s.App, h.Event))
	if err != nil {
		return err
	}
	var p place
	if ok {
		if p, err = parsePlace(v); err != nil {
			return err
		}
	}
	switch {
	case p.kind == 0:
		return w.apply(s, retention) // the old stream has let go of it
	case p.position != s.Position:
		return nil // the first event with an id stands
	}
	e, ok, err := w.load(s.App, s.Position)
	if err != nil {
		return err
	}
	if !ok {
		return damaged("missing event", 0)
	}
	if e.copied >= s.Generation {
		return nil // again, after a crash
	}
	e.copied = s.Generation
	if e.flags&flagRecalled == 0 {
		e.record = s.Record
	}
	clock := e.clock()
	w.setEvent(s.App, s.Position, e)
	if err := w.reexpire(s, clock, before, retention); err != nil {
		return err
	}
	return w.recopied(s, &h)
}

// reexpire moves an event in table X.
func (w *writer) reexpire(s *journal.Sealed, clock int64, before, retention time.Duration) error {
	block, low := uint64(s.Position)>>8, byte(s.Position)
	old := expiryKey{hour: w.hours.of(clock+before.Milliseconds()) + 1, app: s.App, block: block}
	v, ok, err := w.get(w.key.expiry(old))
	if err != nil {
		return err
	}
	if i := bytes.IndexByte(v, low); ok && i >= 0 {
		if len(v) == 1 {
			w.txn.Delete(w.key.expiry(old))
		} else {
			w.value = append(append(w.value[:0], v[:i]...), v[i+1:]...)
			w.txn.Set(w.key.expiry(old), w.value)
		}
	} else if i := bytes.IndexByte(w.expiry[old], low); i >= 0 {
		w.expiry[old] = append(w.expiry[old][:i:i], w.expiry[old][i+1:]...)
	}
	x := expiryKey{hour: w.hours.of(clock+retention.Milliseconds()) + 1, app: s.App, block: block}
	w.expiry[x] = append(w.expiry[x], low)
	return nil
}

// recopied replaces the envelope in the message that has it: the event itself, or
// the one that it edits or recalls.
func (w *writer) recopied(s *journal.Sealed, h *journal.Header) error {
	if isZero(h.Conversation) {
		return nil
	}
	at := s.Position
	switch h.Type {
	case journal.MessageSent:
	case journal.MessageEdited, journal.MessageRecalled:
		v, ok, err := w.get(w.key.id(s.App, h.Target))
		if err != nil || !ok {
			return err
		}
		target, err := parsePlace(v)
		if err != nil || target.kind != journal.MessageSent || target.conversation != h.Conversation {
			return err
		}
		at = target.position
	default:
		return nil
	}
	v, ok, err := w.get(w.key.indexed(tableConversations, s.App, h.Conversation, at))
	if err != nil || !ok {
		return err
	}
	f, err := parseFolded(v)
	if err != nil {
		return err
	}
	switch {
	case h.Type != journal.MessageSent:
		if f.changed != s.Position {
			return nil
		}
		f.second = s.Record
	case f.flags&flagRecalled != 0:
		f.copied = s.Generation
	default:
		f.copied, f.first = s.Generation, s.Record
	}
	w.setFolded(s.App, h.Conversation, at, f)
	return nil
}

// sweep plans what closed plan changes have taken away, of one app.
func (e *expirer) sweep() error {
	c := e.txn.Iterate([]byte{tableMoves}, []byte{tableMoves + 1}, false)
	var app journal.AppID
	var rules moveRules
	for c.Next() {
		l, err := parseRules(c.Value())
		if err == nil && len(c.Key()) != 17 {
			err = damaged("moves key", len(c.Key()))
		}
		if err != nil {
			return errors.Join(err, c.Close())
		}
		if len(l) > 0 && l[0].floor == closedFloor {
			copy(app[:], c.Key()[1:])
			rules = l
			break
		}
	}
	if err := c.Close(); err != nil || rules == nil {
		return err
	}
	e.app, e.rules, e.worked = app, rules, true
	rule := &e.rules[0]
	var prefix, from, to key
	lo, hi := spanOf(prefix.app(tableEvents, app).bytes(), rule.cursor, rule.bound(), &from, &to)
	c = e.txn.Iterate(lo, hi, false)
	defer c.Close()
	joined := false
	for walked := 0; c.Next(); walked++ {
		if walked == sweepEvents || len(e.found) == expireEvents {
			e.more = true
			return c.Close()
		}
		pos, err := lastPosition(c.Key())
		if err != nil {
			return err
		}
		v, err := parseEvent(c.Value())
		if err != nil {
			return err
		}
		rule.cursor = pos
		if !rule.hides(pos, &v) {
			joined = false
			continue
		}
		x, err := expiredOf(app, pos, &v)
		if err != nil {
			return err
		}
		x.joined = joined
		e.found = append(e.found, x)
		joined = true
	}
	return c.Close()
}

// sweepEvents bounds how many events a transaction of the sweep looks at.
const sweepEvents = 64 << 10

// swept writes how far the sweep has come.
func (e *expirer) swept() {
	if e.rules == nil {
		return
	}
	if !e.more {
		e.rules = e.rules[1:]
	}
	if len(e.rules) == 0 {
		e.txn.Delete(e.key.moves(e.app))
		return
	}
	e.value = e.rules.append(e.value[:0])
	e.txn.Set(e.key.moves(e.app), e.value)
}

// expiredOf reads what is needed to remove an event.
func expiredOf(app journal.AppID, pos journal.Position, v *event) (expired, error) {
	x := expired{app: app, position: pos, sender: v.sender}
	var err error
	if x.header, err = journal.ParseHeader(v.record); err != nil {
		return x, fmt.Errorf("%w: %w", projections.ErrCorrupt, err)
	}
	if v.flags&flagRecalled == 0 {
		if x.sender, err = senderOf(v.record); err != nil {
			return x, fmt.Errorf("%w: %w", projections.ErrCorrupt, err)
		}
	}
	return x, nil
}
