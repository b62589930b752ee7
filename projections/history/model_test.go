package history

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/pebble"
)

// The model keeps every event in a list and works everything out anew for each
// question.
type model struct {
	events []modelEvent // accepted, in order of position, without what is removed
}

type modelEvent struct {
	spec
	sealed journal.Sealed
	fold   *modelFold // of a message
	buried bool
}

// A modelFold is what became of a message.
type modelFold struct {
	kind   journal.Type // 0, edited, recalled
	change spec
	sealed journal.Sealed
}

func (m *model) find(app journal.AppID, id string) *modelEvent {
	for i := range m.events {
		if e := &m.events[i]; e.app == app && e.id == id {
			return e
		}
	}
	return nil
}

func (m *model) apply(s spec, sealed journal.Sealed) {
	if m.find(s.app, s.id) != nil {
		return
	}
	m.events = append(m.events, modelEvent{spec: s, sealed: sealed})
	m.settle()
}

// settle folds everything from scratch.
func (m *model) settle() {
	for i := range m.events {
		e := &m.events[i]
		if e.kind != journal.MessageSent || e.conversation == "" {
			continue
		}
		e.fold = &modelFold{}
		for _, ch := range m.events {
			if ch.app != e.app || ch.target != e.id || ch.conversation != e.conversation {
				continue
			}
			switch {
			case ch.kind == journal.MessageRecalled && e.fold.kind != journal.MessageRecalled,
				ch.kind == journal.MessageEdited && e.fold.kind != journal.MessageRecalled:
				*e.fold = modelFold{ch.kind, ch.spec, ch.sealed}
			}
		}
		if e.fold.kind != journal.MessageRecalled {
			continue
		}
		e.buried = true
		for j := range m.events {
			if ch := &m.events[j]; ch.app == e.app && ch.target == e.id &&
				ch.conversation == e.conversation && ch.kind == journal.MessageEdited {
				ch.buried = true
			}
		}
	}
}

func (e *modelEvent) clock() time.Time {
	if e.stored.Before(e.time) {
		return e.stored
	}
	return e.time
}

// record is what the view has to return for the event.
func (e *modelEvent) record() []byte {
	if e.buried {
		return e.sealed.Record[:journal.HeaderSize]
	}
	return e.sealed.Record
}

// A want is a query in the model's terms.
type want struct {
	q                  Query
	conversation, user string
}

func (m *model) replay(app journal.AppID, w want) []modelEvent {
	var list []modelEvent
	for _, e := range m.events {
		switch {
		case e.app != app,
			e.sealed.Position <= w.q.After, w.q.Before != 0 && e.sealed.Position >= w.q.Before,
			!w.q.From.IsZero() && e.time.Before(w.q.From), !w.q.Until.IsZero() && !e.time.Before(w.q.Until),
			w.q.Conversation != nil && e.conversation != w.conversation,
			w.q.User != nil && e.sender != w.user && (e.peer != w.user || e.peer == ""),
			len(w.q.Types) > 0 && !slices.Contains(w.q.Types, e.kind),
			!w.q.Oldest.IsZero() && e.clock().Before(w.q.Oldest):
			continue
		}
		list = append(list, e)
	}
	if w.q.Reverse {
		slices.Reverse(list)
	}
	return list
}

// generator draws events.
type generator struct {
	maker  *maker
	last   uint64
	ids    []string
	events []spec
	sealed []journal.Sealed
}

func pick[T any](rt *rapid.T, name string, list ...T) T {
	return rapid.SampledFrom(list).Draw(rt, name)
}

func (g *generator) draw(rt *rapid.T) (spec, journal.Sealed) {
	g.last += uint64(pick(rt, "step", 1, 1, 1, 1, 2, 300))
	s := spec{
		app: appN(pick(rt, "app", byte(1), 1, 1, 2)), position: g.last,
		kind: pick(rt, "kind", journal.MessageSent, journal.MessageSent, journal.MessageSent,
			journal.MessageEdited, journal.MessageEdited, journal.MessageRecalled, journal.ReceiptRead, journal.AppCreated),
		conversation: pick(rt, "conversation", "a", "a", "a", "b", ""),
		sender:       pick(rt, "sender", "x", "y", ""),
		peer:         pick(rt, "peer", "", "x", "z"),
		stored:       start.Add(time.Duration(g.last) * time.Minute),
	}
	// A third of the ids were used before or will be.
	s.id = fmt.Sprint("e", g.last)
	if pick(rt, "reuse", false, false, true) {
		s.id = fmt.Sprint("e", rapid.IntRange(0, 40).Draw(rt, "id"))
	}
	switch s.kind {
	case journal.MessageEdited, journal.MessageRecalled, journal.ReceiptRead:
		if len(g.ids) > 0 && pick(rt, "known", true, true, true, false) {
			s.target = g.ids[rapid.IntRange(max(0, len(g.ids)-12), len(g.ids)-1).Draw(rt, "target")]
		} else {
			s.target = fmt.Sprint("e", rapid.IntRange(0, 40).Draw(rt, "target"))
		}
	default:
	}
	// Most events are dated as they arrive, some are imported, some are early.
	switch pick(rt, "dated", 0, 0, 0, 1, 2) {
	case 0:
		s.time = s.stored
	case 1:
		s.time = s.stored.Add(-time.Duration(rapid.IntRange(1, 100*60).Draw(rt, "age")) * time.Minute)
	case 2:
		s.time = s.stored.Add(3 * time.Minute)
	}
	s.data = fmt.Appendf(nil, "%d", g.last)
	g.ids = append(g.ids, s.id)
	sealed := g.maker.seal(s)
	g.events, g.sealed = append(g.events, s), append(g.sealed, sealed)
	return s, sealed
}

// TestModel compares the view with a model: random messages, edits, recalls,
// receipts, events that are there twice, restarts and a rebuild.
func TestModel(t *testing.T) {
	maker := newMaker(t)
	rapid.Check(t, func(rt *rapid.T) {
		dir := filepath.Join(t.TempDir(), "views")
		store := openStore(t, dir)
		var fresh []*pebble.Store
		defer func() {
			for _, s := range append(fresh, store) {
				_ = s.Close()
			}
		}()
		checkSequence(t, rt, maker, store, func() projections.Store {
			if err := store.Close(); err != nil {
				rt.Fatal(err)
			}
			store = openStore(t, dir)
			return store
		}, func() projections.Store {
			s := openStore(t, filepath.Join(t.TempDir(), "rebuilt"))
			fresh = append(fresh, s)
			return s
		})
	})
}

func drawWant(rt *rapid.T, g *generator) want {
	w := want{conversation: pick(rt, "q.conversation", "a", "b", "nobody's"), user: pick(rt, "q.user", "x", "y", "z", "")}
	position := func(name string) journal.Position {
		return journal.Position(rapid.Uint64Range(0, g.last+2).Draw(rt, name))
	}
	moment := func(name string) time.Time {
		return start.Add(time.Duration(rapid.IntRange(-120*60, int(g.last)+10).Draw(rt, name)) * time.Minute)
	}
	if pick(rt, "has after", false, true) {
		w.q.After = position("after")
	}
	if pick(rt, "has before", false, false, true) {
		w.q.Before = position("before")
	}
	if pick(rt, "has from", false, false, true) {
		w.q.From = moment("from")
	}
	if pick(rt, "has until", false, false, true) {
		w.q.Until = moment("until")
	}
	if pick(rt, "has conversation", false, true) {
		c := tagOf("conversation", w.conversation)
		w.q.Conversation = &c
	}
	if pick(rt, "has user", false, false, true) {
		u := tagOf("subject", w.user)
		w.q.User = &u
	}
	if pick(rt, "has types", false, false, true) {
		w.q.Types = []journal.Type{pick(rt, "type", journal.MessageSent, journal.MessageEdited, journal.ReceiptRead), journal.MessageRecalled}
	}
	if pick(rt, "has oldest", false, false, true) {
		w.q.Oldest = moment("oldest")
	}
	w.q.Reverse = pick(rt, "reverse", false, true)
	return w
}

func checkReplay(rt *rapid.T, v *View, m *model, g *generator) {
	app := appN(pick(rt, "q.app", byte(1), 2, 9))
	w := drawWant(rt, g)
	expected := m.replay(app, w)
	q := w.q
	q.Limit = pick(rt, "limit", 0, 0, 1, 3)
	parallel := pick(rt, "parallel", false, true)
	var got []Item
	for calls := 0; ; calls++ {
		n := 0
		keep := func(i Item) error {
			i.Record = bytes.Clone(i.Record)
			got = append(got, i)
			n++
			return nil
		}
		var next journal.Position
		var err error
		if parallel {
			next, err = v.ReplayOpened(context.Background(), app, q,
				func(dst []byte, i Item) ([]byte, error) { return append(dst, i.Record...), nil },
				func(i Item, opened []byte) error {
					if !bytes.Equal(opened, i.Record) {
						rt.Fatalf("another event was opened")
					}
					return keep(i)
				})
		} else {
			next, err = v.Replay(context.Background(), app, q, keep)
		}
		if trimmed, ok := errors.AsType[*TrimmedError](err); ok {
			checkTrimmed(rt, m, app, q, trimmed)
			return
		}
		if err != nil {
			rt.Fatalf("Replay %+v: %v", q, err)
		}
		if n < q.Limit || q.Limit == 0 {
			checkEnd(rt, m, app, w, next)
			break
		}
		if q.Reverse {
			q.Before = next
		} else {
			q.After = next
		}
		if calls > len(expected)+1 {
			rt.Fatalf("the replay does not end")
		}
		if q.Reverse && next == 0 {
			break
		}
	}
	if len(got) != len(expected) {
		rt.Fatalf("Replay %+v gave %d events, want %d", w, len(got), len(expected))
	}
	for i, e := range expected {
		if g := got[i]; g.Position != e.sealed.Position || !bytes.Equal(g.Record, e.record()) ||
			g.Recalled != e.buried || g.Type != e.kind || !g.Stored.Equal(e.stored) {
			rt.Fatalf("Replay %+v: event %d is %+v, want %+v", w, i, g, e.spec)
		}
	}
}

// checkEnd checks where a replay says to go on after everything.
func checkEnd(rt *rapid.T, m *model, app journal.AppID, w want, next journal.Position) {
	if w.q.Reverse {
		if next != 0 {
			rt.Fatalf("a replay in reverse ends with %d, want 0", next)
		}
		return
	}
	end := w.q.After
	for _, e := range m.replay(app, want{q: Query{After: w.q.After, Before: w.q.Before}}) {
		end = e.sealed.Position
	}
	if next != end {
		rt.Fatalf("a replay of %+v ends with %d, want %d", w.q, next, end)
	}
}

// checkTrimmed checks that a reader was sent away with reason.
func checkTrimmed(rt *rapid.T, m *model, app journal.AppID, q Query, err *TrimmedError) {
	all := m.replay(app, want{q: Query{After: q.After}})
	visible := m.replay(app, want{q: Query{Oldest: q.Oldest}})
	if q.After == 0 || q.Reverse || len(all) == 0 || !all[0].clock().Before(q.Oldest) {
		rt.Fatalf("%+v was refused: %v", q, err)
	}
	if len(visible) > 0 && err.Oldest != visible[0].sealed.Position-1 {
		rt.Fatalf("%+v: go on after %d, want %d", q, err.Oldest, visible[0].sealed.Position-1)
	}
}

func checkPages(rt *rapid.T, v *View, m *model) {
	app := appN(pick(rt, "p.app", byte(1), 2))
	conversation := pick(rt, "p.conversation", "a", "b")
	q := PageQuery{Limit: rapid.IntRange(1, 7).Draw(rt, "p.limit")}
	if pick(rt, "p.oldest", false, true) {
		q.Oldest = start.Add(time.Duration(rapid.IntRange(-100*60, 600).Draw(rt, "p.oldest at")) * time.Minute)
	}
	var expected []modelEvent // newest first
	for _, e := range m.events {
		if e.app == app && e.kind == journal.MessageSent && e.conversation == conversation && !e.clock().Before(q.Oldest) {
			expected = append(expected, e)
		}
	}
	slices.SortFunc(expected, func(a, b modelEvent) int { return cmp.Compare(b.sealed.Position, a.sealed.Position) })
	tag := tagOf("conversation", conversation)

	var got []Message
	older := q
	for {
		p, err := v.Messages(context.Background(), app, tag, older)
		if err != nil {
			rt.Fatal(err)
		}
		if p.Newer != (len(got) > 0) || p.Older != (len(got)+len(p.Messages) < len(expected)) {
			rt.Fatalf("page %+v of %d after %d: older %v, newer %v", older, len(expected), len(got), p.Older, p.Newer)
		}
		got = append(got, p.Messages...)
		if !p.Older {
			break
		}
		older.Before = p.Messages[len(p.Messages)-1].Position
	}
	checkMessages(rt, got, expected, q)

	// And back: from the oldest to the newest.
	got = nil
	newer := q
	newer.After = 1 // before the first event, which has position 1 or more
	if len(expected) > 0 && expected[len(expected)-1].sealed.Position == 1 {
		expected = expected[:len(expected)-1]
	}
	for {
		p, err := v.Messages(context.Background(), app, tag, newer)
		if err != nil {
			rt.Fatal(err)
		}
		if len(p.Messages) == 0 {
			break
		}
		if p.Newer != (len(got)+len(p.Messages) < len(expected)) {
			rt.Fatalf("page %+v: newer %v with %d of %d", newer, p.Newer, len(got)+len(p.Messages), len(expected))
		}
		got = append(slices.Clone(p.Messages), got...)
		newer.After = p.Messages[0].Position
	}
	checkMessages(rt, got, expected, q)
}

func checkMessages(rt *rapid.T, got []Message, expected []modelEvent, q PageQuery) {
	if len(got) != len(expected) {
		rt.Fatalf("%d messages, want %d", len(got), len(expected))
	}
	for i, e := range expected {
		g := got[i]
		var edit, recall []byte
		var changed journal.Position
		if e.fold.kind != 0 && !e.fold.change.time.Before(q.Oldest) {
			changed = e.fold.sealed.Position
			if e.fold.kind == journal.MessageRecalled {
				recall = e.fold.sealed.Record
			} else {
				edit = e.fold.sealed.Record
			}
		}
		if g.Position != e.sealed.Position || g.Recalled != (e.fold.kind == journal.MessageRecalled) || g.Changed != changed ||
			!bytes.Equal(g.Record, e.record()) || !bytes.Equal(g.Edit, edit) || !bytes.Equal(g.Recall, recall) {
			rt.Fatalf("message %d is %+v, want %+v, changed at %d", i, g, e.spec, changed)
		}
	}
}

func checkLookup(rt *rapid.T, v *View, m *model, g *generator) {
	app := appN(pick(rt, "l.app", byte(1), 2))
	for i := range 41 {
		id := fmt.Sprint("e", i)
		record, pos, ok, err := v.Lookup(context.Background(), app, tagOf("event", id))
		e := m.find(app, id)
		if err != nil || ok != (e != nil) || e != nil && (pos != e.sealed.Position || !bytes.Equal(record, e.record())) {
			rt.Fatalf("Lookup(%s) = %d, %v, %v; want %v", id, pos, ok, err, e)
		}
		item, ok, err := v.Event(context.Background(), app, tagOf("event", id), time.Time{})
		if err != nil || ok != (e != nil) || e != nil && (item.Position != e.sealed.Position || !bytes.Equal(item.Record, e.record())) {
			rt.Fatalf("Event(%s) = %+v, %v, %v; want %v", id, item, ok, err, e)
		}
	}
	_ = g
}

// checkRebuilt applies the same journal to an empty store, split differently,
// and compares the stores byte by byte.
func checkRebuilt(t *testing.T, rt *rapid.T, store, fresh projections.Store, g *generator) {
	v := newView(t, fresh)
	for rest := g.sealed; len(rest) > 0; {
		n := rapid.IntRange(1, len(rest)).Draw(rt, "split")
		apply(t, v, rest[:n]...)
		rest = rest[n:]
	}
	a, b := dump(rt, store), dump(rt, fresh)
	if !slices.Equal(a, b) {
		rt.Fatalf("the rebuilt view differs:\n%v\n%v", a, b)
	}
}

type fataler interface{ Fatal(args ...any) }

func dump(t fataler, s projections.Store) []string {
	var list []string
	err := s.View(func(r projections.Reader) error {
		c := r.Iterate([]byte{1}, nil, false)
		defer c.Close()
		for c.Next() {
			list = append(list, hex.EncodeToString(c.Key())+" "+hex.EncodeToString(c.Value()))
		}
		return c.Close()
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}
