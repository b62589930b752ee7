package history

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections"
)

// A replay reads a chunk at a time, each from a snapshot of its own: a snapshot
// that a slow reader held would keep what has been replaced since from being
// freed, and a recall takes effect on a replay that is under way.
const (
	chunkEvents = 1024
	chunkBytes  = 4 << 20
)

// Replay calls fn with the selected events in the app's order, or in reverse.
//
// It returns where to go on: with next as [Query.After], or in reverse as
// [Query.Before], a second call continues without a gap or a repetition. After
// everything selected has been given, next is the last position of the app, also
// when the last events were not selected; in reverse it is 0. If fn fails,
// Replay returns its error, and next is the position before the event that fn
// refused.
//
// It fails with a [*TrimmedError] when events after [Query.After] have expired.
// A reader from the very beginning, After 0, is not told: it has missed nothing
// that it could have seen.
func (v *View) Replay(ctx context.Context, app journal.AppID, q Query, fn func(Item) error) (next journal.Position, err error) {
	p := replay{hours: v.hours, app: app, q: q, fn: fn, low: q.After, high: q.Before, left: q.Limit}
	p.next = q.After
	if q.Reverse {
		p.next = q.Before
	}
	if q.Limit <= 0 {
		p.left = int(^uint(0) >> 1)
	}
	if !q.Oldest.IsZero() {
		p.oldest, p.hides = q.Oldest.UnixMilli(), true
	}
	if p.from = -1 << 63; !q.From.IsZero() {
		p.from = ceilMillis(q.From)
	}
	if p.until = 1<<63 - 1; !q.Until.IsZero() {
		p.until = ceilMillis(q.Until)
	}
	for _, t := range q.Types {
		if t.Known() {
			p.types[t/64] |= 1 << (t % 64)
		}
	}
	for first := true; !p.done; first = false {
		if err := v.open(); err != nil {
			return p.next, err
		}
		if err := ctx.Err(); err != nil {
			return p.next, err
		}
		err := v.store.View(func(r projections.Reader) error {
			p.r = r
			var err error
			if p.rules, err = loadRules(r, app); err != nil {
				return err
			}
			if first {
				if err := p.begin(); err != nil {
					return err
				}
			}
			return p.chunk()
		})
		if p.refused != nil {
			return p.next, p.refused // as it is: it is the caller's
		}
		if err != nil {
			return p.next, fmt.Errorf("history: replay: %w", err)
		}
	}
	return p.next, nil
}

// ceilMillis rounds up: an event's time is in milliseconds, and one that lies
// before t must not count as at t.
func ceilMillis(t time.Time) int64 {
	ms := t.UnixMilli()
	if t.Sub(time.UnixMilli(ms)) > 0 {
		ms++
	}
	return ms
}

// A replay is the state of one call of Replay.
type replay struct {
	hours       hours
	app         journal.AppID
	q           Query
	fn          func(Item) error
	low, high   journal.Position // exclusive; high 0 is the end
	left        int              // of the limit
	oldest      int64
	hides       bool
	skipped     bool  // what lies before the retention has been skipped
	from, until int64 // event times, milliseconds
	types       [4]uint64
	next        journal.Position
	done        bool
	refused     error // what fn returned

	r      projections.Reader
	rules  moveRules          // of r
	events projections.Cursor // of r, for a chunk of an index read forward
	value  []byte             // scratch
}

// begin narrows the positions by time, and tells a reader that is too far behind.
func (p *replay) begin() error {
	through, err := loadTrimmed(p.r, p.app)
	if err != nil {
		return err
	}
	if p.q.After > 0 && !p.q.Reverse {
		if err := p.trimmed(through); err != nil {
			return err
		}
	}
	// What has been removed leaves marks until it is compacted; they are not
	// walked over.
	p.low = max(p.low, through)
	if p.q.From.IsZero() && p.q.Until.IsZero() {
		return nil
	}
	t, err := p.span(p.hours.of(p.from), p.hours.of(p.until-1))
	if err != nil {
		return err
	}
	p.narrow(t)
	return nil
}

// narrow leaves the positions of t.
func (p *replay) narrow(t span) {
	if t.count == 0 {
		p.low = maxPosition
		return
	}
	p.low = max(p.low, t.low-1)
	if t.high != maxPosition && (p.high == 0 || p.high > t.high+1) {
		p.high = t.high + 1
	}
}

// span joins the spans of table T from one hour to another, inclusive.
func (p *replay) span(first, last uint32) (span, error) {
	t := span{low: maxPosition}
	if first > last {
		return t, nil
	}
	var from, to key
	c := p.r.Iterate(from.time(p.app, first), to.time(p.app, last+1), false)
	defer c.Close()
	for c.Next() {
		s, err := parseSpan(c.Value())
		if err != nil {
			return t, err
		}
		t.low, t.high, t.count = min(t.low, s.low), max(t.high, s.high), t.count+s.count
	}
	return t, c.Close()
}

// trimmed returns a TrimmedError if what follows the reader's position has been
// removed, or is hidden as the oldest that is there.
func (p *replay) trimmed(through journal.Position) error {
	if p.q.After >= through {
		_, hidden, err := p.first(p.q.After)
		if err != nil || !hidden {
			return err
		}
		// One hidden event between visible ones is an old event that was
		// imported late; its readers have not fallen behind.
		if _, hidden, err = p.first(through); err != nil || !hidden {
			return err
		}
	}
	oldest, err := p.firstVisible(through)
	if err != nil {
		return err
	}
	return &TrimmedError{Oldest: oldest}
}

// first returns the first event after a position, 0 if there is none, and
// whether it is hidden.
func (p *replay) first(after journal.Position) (pos journal.Position, hidden bool, err error) {
	c := p.cursor(tableEvents, after, 0, false)
	defer c.Close()
	if !c.Next() {
		return 0, false, c.Close()
	}
	if pos, err = lastPosition(c.Key()); err != nil {
		return 0, false, err
	}
	e, err := parseEvent(c.Value())
	return pos, err == nil && p.isHidden(pos, &e), err
}

// firstVisible returns the position before the first visible event.
func (p *replay) firstVisible(through journal.Position) (journal.Position, error) {
	if p.hides {
		t, err := p.span(p.hours.of(p.oldest), 1<<32-2)
		if err != nil {
			return 0, err
		}
		if t.count == 0 {
			return p.last()
		}
		through = max(through, t.low-1)
	}
	c := p.cursor(tableEvents, through, 0, false)
	defer c.Close()
	for c.Next() {
		e, err := parseEvent(c.Value())
		if err != nil {
			return 0, err
		}
		pos, err := lastPosition(c.Key())
		if err != nil || !p.isHidden(pos, &e) {
			return pos - 1, err
		}
	}
	if err := c.Close(); err != nil {
		return 0, err
	}
	return p.last()
}

func loadTrimmed(r projections.Reader, app journal.AppID) (journal.Position, error) {
	var k key
	var room [8]byte
	v, ok, err := r.Get(room[:0], k.trimmed(app))
	if err != nil || !ok {
		return 0, err
	}
	if len(v) != 8 {
		return 0, damaged("trimmed position", len(v))
	}
	return lastPosition(append(make([]byte, 17, 25), v...))
}

func (p *replay) isHidden(pos journal.Position, e *event) bool {
	return p.hides && e.clock() < p.oldest || len(p.rules) > 0 && p.rules.hides(pos, e)
}

// cursor walks over the positions of a table with the app's prefix.
func (p *replay) cursor(table byte, after, before journal.Position, reverse bool) projections.Cursor {
	var prefix, from, to key
	prefix.app(table, p.app)
	switch table {
	case tableUsers:
		prefix.tag(*p.q.User)
	case tableByConv:
		prefix.tag(*p.q.Conversation)
	}
	lo, hi := spanOf(prefix.bytes(), after, before, &from, &to)
	return p.r.Iterate(lo, hi, reverse)
}

// last returns the app's last position, and no less than where the reader is.
func (p *replay) last() (journal.Position, error) {
	c := p.cursor(tableEvents, p.q.After, p.q.Before, true)
	defer c.Close()
	if !c.Next() {
		return p.q.After, c.Close()
	}
	return lastPosition(c.Key())
}

// chunk gives some events to fn.
func (p *replay) chunk() error {
	table := byte(tableEvents)
	switch {
	case p.q.User != nil:
		table = tableUsers
	case p.q.Conversation != nil:
		table = tableByConv
	}
	c := p.cursor(table, p.low, p.high, p.q.Reverse)
	defer c.Close()
	p.events = nil
	if table != tableEvents && !p.q.Reverse {
		p.events = p.cursor(tableEvents, p.low, p.high, false)
		defer p.events.Close()
	}
	for events, size := 0, 0; c.Next(); events++ {
		if events == chunkEvents || size >= chunkBytes {
			return c.Close()
		}
		pos, err := lastPosition(c.Key())
		if err != nil {
			return err
		}
		n, again, err := p.give(table, pos, c.Value())
		if err != nil || again || p.done {
			return err
		}
		size += n
		if p.q.Reverse {
			p.high = pos
		} else {
			p.low = pos
		}
	}
	if err := c.Close(); err != nil {
		return err
	}
	p.done = true
	if p.q.Reverse {
		p.next = 0
		return nil
	}
	last, err := p.last()
	p.next = max(p.next, last)
	return err
}

// give gives one event to fn, if it is selected. It returns the event's size;
// again means that the chunk has to begin anew because the bounds have moved.
func (p *replay) give(table byte, pos journal.Position, v []byte) (size int, again bool, err error) {
	if table != tableEvents {
		if len(v) != 1 {
			return 0, false, damaged("index entry", len(v))
		}
		if !p.hasType(journal.Type(v[0])) {
			return 0, false, nil
		}
		if v, err = p.event(pos); err != nil {
			return 0, false, err
		}
	}
	e, err := parseEvent(v)
	if err != nil {
		return 0, false, err
	}
	if p.isHidden(pos, &e) {
		again, err = p.skipHidden()
		return 0, again, err
	}
	item := Item{
		Position: pos,
		Stored:   time.UnixMilli(e.stored).UTC(),
		Type:     kind(e.record),
		Recalled: e.flags&flagRecalled != 0,
		Record:   e.record,
	}
	if !p.selects(&item) {
		return len(v), false, nil
	}
	if err := p.fn(item); err != nil {
		p.refused = err
		return 0, false, err
	}
	p.next = pos
	p.left--
	p.done = p.left == 0
	return len(v), false, nil
}

// event finds the event at a position that an index has named. Forward that is a
// walk with leaps; backwards, where the store cannot go on from where it stands,
// it is a look-up.
func (p *replay) event(pos journal.Position) (v []byte, err error) {
	var k key
	want := k.event(p.app, pos)
	ok := false
	switch {
	case p.events == nil:
		p.value, ok, err = p.r.Get(p.value[:0], want)
		v = p.value
	case p.events.Seek(want):
		ok, v = bytes.Equal(p.events.Key(), want), p.events.Value()
	default:
		err = p.events.Close()
	}
	if err == nil && !ok {
		err = damaged("missing event", 0)
	}
	return v, err
}

// skipHidden moves the lower bound to where the first visible event can be,
// once: after a move to a plan that keeps less, most of an app may be hidden.
func (p *replay) skipHidden() (moved bool, err error) {
	if p.skipped || !p.hides {
		return false, nil
	}
	p.skipped = true
	t, err := p.span(p.hours.of(p.oldest), 1<<32-2)
	if err != nil {
		return false, err
	}
	before := p.low
	p.low = max(p.low, t.low-1)
	return p.low != before, nil
}

func (p *replay) hasType(t journal.Type) bool {
	return len(p.q.Types) == 0 || p.types[t/64]&(1<<(t%64)) != 0
}

// selects applies the filters that the table did not.
func (p *replay) selects(i *Item) bool {
	if !p.hasType(i.Type) {
		return false
	}
	if ms := millis(i.Record); ms < p.from || ms >= p.until {
		return false
	}
	if p.q.Conversation != nil && !slices.Equal(i.Record[28:44], p.q.Conversation[:]) {
		return false
	}
	return true
}
