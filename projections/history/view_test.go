package history

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A View is what the journal asks for idempotency, and what the runner wants.
var (
	_ journal.Index          = (*View)(nil)
	_ projections.Gated      = (*View)(nil)
	_ projections.Follower   = (*View)(nil)
	_ projections.Store      = (*storetest.Memory)(nil)
	_ projections.Projection = (*View)(nil)
)

const (
	sent     = journal.MessageSent
	edited   = journal.MessageEdited
	recalled = journal.MessageRecalled
)

// describe writes a replay and the page of conversation "c" as a line each.
func describe(t *testing.T, v *View, m *maker) string {
	t.Helper()
	var b strings.Builder
	if _, err := v.Replay(t.Context(), appN(1), Query{}, func(i Item) error {
		fmt.Fprintf(&b, "%d", i.Position)
		if i.Recalled {
			if len(i.Record) != journal.HeaderSize {
				t.Errorf("a tombstone of %d bytes", len(i.Record))
			}
			b.WriteString("† ")
			return nil
		}
		fmt.Fprintf(&b, ":%s ", m.text(appN(1), "u", i.Record))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	b.WriteString("|")
	p, err := v.Messages(t.Context(), appN(1), tagOf("conversation", "c"), PageQuery{})
	if err != nil {
		t.Fatal(err)
	}
	for _, msg := range p.Messages {
		fmt.Fprintf(&b, " %d", msg.Position)
		switch {
		case msg.Recalled:
			fmt.Fprintf(&b, "†%d:%s", msg.Changed, m.text(appN(1), "u", msg.Recall))
		case msg.Edit != nil:
			fmt.Fprintf(&b, ":%s→%d:%s", m.text(appN(1), "u", msg.Record), msg.Changed, m.text(appN(1), "u", msg.Edit))
		default:
			fmt.Fprintf(&b, ":%s", m.text(appN(1), "u", msg.Record))
		}
	}
	return b.String()
}

func TestFolding(t *testing.T) {
	event := func(position uint64, kind journal.Type, id, target string) spec {
		return spec{app: appN(1), position: position, kind: kind, id: id, target: target, conversation: "c", sender: "u", data: []byte(id)}
	}
	elsewhere := func(s spec) spec { s.conversation = "d"; return s }
	for _, test := range []struct {
		name   string
		events []spec // in the order in which they are applied
		want   string
	}{
		{"plain", []spec{event(1, sent, "m", ""), event(2, sent, "n", "")}, "1:m 2:n | 2:n 1:m"},
		{"edit", []spec{event(1, sent, "m", ""), event(2, edited, "e", "m")}, "1:m 2:e | 1:m→2:e"},
		{"two edits", []spec{event(1, sent, "m", ""), event(2, edited, "e", "m"), event(3, edited, "f", "m")}, "1:m 2:e 3:f | 1:m→3:f"},
		{"an older edit comes later", []spec{event(1, sent, "m", ""), event(3, edited, "f", "m"), event(2, edited, "e", "m")}, "1:m 2:e 3:f | 1:m→3:f"},
		{"recall", []spec{event(1, sent, "m", ""), event(2, recalled, "r", "m")}, "1† 2:r | 1†2:r"},
		{"edit, recall", []spec{event(1, sent, "m", ""), event(2, edited, "e", "m"), event(3, recalled, "r", "m")}, "1† 2† 3:r | 1†3:r"},
		{"two edits, recall", []spec{
			event(1, sent, "m", ""), event(2, edited, "e", "m"), event(3, edited, "f", "m"), event(4, recalled, "r", "m"),
		}, "1† 2† 3† 4:r | 1†4:r"},
		{"recall, edit", []spec{event(1, sent, "m", ""), event(2, recalled, "r", "m"), event(3, edited, "e", "m")}, "1† 2:r 3† | 1†2:r"},
		{"two recalls", []spec{event(1, sent, "m", ""), event(2, recalled, "r", "m"), event(3, recalled, "s", "m")}, "1† 2:r 3:s | 1†2:r"},
		{"an earlier recall comes later", []spec{event(1, sent, "m", ""), event(3, recalled, "s", "m"), event(2, recalled, "r", "m")}, "1† 2:r 3:s | 1†2:r"},
		{"edit before its target", []spec{event(1, edited, "e", "m"), event(2, edited, "f", "m"), event(3, sent, "m", "")}, "1:e 2:f 3:m | 3:m→2:f"},
		{"recall before its target", []spec{event(1, edited, "e", "m"), event(2, recalled, "r", "m"), event(3, sent, "m", "")}, "1† 2:r 3† | 3†2:r"},
		{"edit of another conversation", []spec{event(1, sent, "m", ""), elsewhere(event(2, edited, "e", "m"))}, "1:m 2:e | 1:m"},
		{"recall of another conversation", []spec{event(1, sent, "m", ""), elsewhere(event(2, recalled, "r", "m"))}, "1:m 2:r | 1:m"},
		{"recall of another conversation, before", []spec{elsewhere(event(1, recalled, "r", "m")), event(2, sent, "m", "")}, "1:r 2:m | 2:m"},
		{"recall of an edit", []spec{event(1, sent, "m", ""), event(2, edited, "e", "m"), event(3, recalled, "r", "e")}, "1:m 2:e 3:r | 1:m→2:e"},
		{"of itself", []spec{event(1, recalled, "r", "r")}, "1:r |"},
		{"same id again", []spec{event(1, sent, "m", ""), event(2, sent, "m", ""), event(3, recalled, "m", "m")}, "1:m | 1:m"},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, together := range []bool{true, false} {
				m := newMaker(t)
				v := newView(t, &storetest.Memory{})
				var all []journal.Sealed
				for _, s := range test.events {
					all = append(all, m.seal(s))
				}
				if together {
					apply(t, v, all...)
				} else {
					for _, s := range all {
						apply(t, v, s)
					}
				}
				if got := describe(t, v, m); got != test.want {
					t.Errorf("together %v: %s\nwant %s", together, got, test.want)
				}
			}
		})
	}
}

// TestRecalledIsGone looks for the recalled content in everything the store has.
func TestRecalledIsGone(t *testing.T) {
	m, store := newMaker(t), &storetest.Memory{}
	v := newView(t, store)
	msg := m.seal(spec{app: appN(1), position: 1, id: "m", conversation: "c", sender: "u"})
	edit := m.seal(spec{app: appN(1), position: 2, kind: edited, id: "e", target: "m", conversation: "c", sender: "u"})
	apply(t, v, msg, edit)
	has := func(s journal.Sealed) bool {
		return strings.Contains(strings.Join(dump(t, store), "\n"), fmt.Sprintf("%x", s.Record[len(s.Record)-20:]))
	}
	if !has(msg) || !has(edit) {
		t.Fatal("the content is not where the test looks for it")
	}
	apply(t, v, m.seal(spec{app: appN(1), position: 3, kind: recalled, id: "r", target: "m", conversation: "c", sender: "u"}))
	if has(msg) || has(edit) {
		t.Error("the content of a recalled message is still in the view")
	}
	record, pos, ok, err := v.Lookup(t.Context(), appN(1), tagOf("event", "m"))
	if err != nil || !ok || pos != 1 || !bytes.Equal(record, msg.Record[:journal.HeaderSize]) {
		t.Errorf("Lookup = %d bytes at %d, %v, %v; want the header at 1", len(record), pos, ok, err)
	}
}

func TestApplyRefuses(t *testing.T) {
	m := newMaker(t)
	good := m.seal(spec{app: appN(1), position: 7, id: "m", conversation: "c", sender: "u"})
	for name, change := range map[string]func(*journal.Sealed){
		"short":            func(s *journal.Sealed) { s.Record = s.Record[:70] },
		"no envelope":      func(s *journal.Sealed) { s.Record = s.Record[:80] },
		"not a record":     func(s *journal.Sealed) { s.Record[0] = 0 },
		"later version":    func(s *journal.Sealed) { s.Record[1] = 2 },
		"unknown type":     func(s *journal.Sealed) { s.Record[2] = 99 },
		"unknown envelope": func(s *journal.Sealed) { s.Record[journal.HeaderSize+1] = 9 },
		"unknown plan":     func(s *journal.Sealed) { s.Plan = "gold" },
	} {
		v := newView(t, &storetest.Memory{})
		bad := good
		bad.Record = bytes.Clone(good.Record)
		change(&bad)
		err := v.store.Update(func(txn projections.Txn) error {
			return v.Apply(t.Context(), txn, "stream", []journal.Sealed{bad})
		})
		var record *projections.RecordError
		if !errors.As(err, &record) || record.Position != 7 || record.Stream != "stream" {
			t.Errorf("%s: %v, want a RecordError at 7", name, err)
		}
	}
}

func TestGate(t *testing.T) {
	v := newView(t, &storetest.Memory{})
	v.Gate(projections.ErrRebuilding)
	ctx, tag := t.Context(), tagOf("event", "m")
	_, replay := v.Replay(ctx, appN(1), Query{}, func(Item) error { return nil })
	_, page := v.Messages(ctx, appN(1), tag, PageQuery{})
	_, _, _, lookup := v.Lookup(ctx, appN(1), tag)
	_, _, event := v.Event(ctx, appN(1), tag, time.Time{})
	_, expire := v.Expire(ctx, start)
	for _, err := range []error{replay, page, lookup, event, expire} {
		if !errors.Is(err, projections.ErrRebuilding) {
			t.Errorf("%v, want ErrRebuilding", err)
		}
	}
	v.Gate(nil)
	if _, err := v.Messages(ctx, appN(1), tag, PageQuery{}); err != nil {
		t.Errorf("after the gate has opened: %v", err)
	}
}

// TestExpireLeavesNothing applies random events, expires some of them and then
// all, and finds nothing left but how far each app was trimmed.
func TestExpireLeavesNothing(t *testing.T) {
	maker := newMaker(t)
	rapid.Check(t, func(rt *rapid.T) {
		store := &storetest.Memory{}
		unit := rapid.SampledFrom([]time.Duration{time.Second, time.Minute, time.Hour}).Draw(rt, "hour")
		v, err := New(Config{Store: store, Hour: unit})
		if err != nil {
			rt.Fatal(err)
		}
		g, m := &generator{maker: maker}, &model{}
		var batch []journal.Sealed
		for range rapid.IntRange(1, 80).Draw(rt, "events") {
			s, sealed := g.draw(rt)
			m.apply(s, sealed)
			batch = append(batch, sealed)
		}
		apply(t, v, batch...)
		retention := 180 * 24 * time.Hour
		now := start.Add(retention + time.Duration(rapid.IntRange(-100*60, int(g.last)+200).Draw(rt, "now"))*time.Minute)
		overdue, err := v.Overdue(now)
		if err != nil {
			rt.Fatal(err)
		}
		removed, err := v.Expire(t.Context(), now)
		if err != nil {
			rt.Fatal(err)
		}
		if rest, err := v.Overdue(now); err != nil || rest != 0 || removed == 0 && overdue != 0 {
			rt.Fatalf("%d were removed; overdue before that %v, after it %v, %v", removed, overdue, rest, err)
		}
		// What has expired before the last full hour is gone, the rest is there.
		hour := now.Truncate(unit)
		kept := &model{}
		for _, e := range m.events {
			if end := e.clock().Add(retention).Truncate(unit).Add(unit); end.After(hour) {
				kept.events = append(kept.events, e)
			}
		}
		if removed != len(m.events)-len(kept.events) {
			rt.Fatalf("removed %d, want %d", removed, len(m.events)-len(kept.events))
		}
		for _, app := range []byte{1, 2} {
			for _, q := range []want{{}, {q: Query{Reverse: true}}, {q: Query{From: start.Add(-40 * time.Hour), Until: start.Add(time.Hour)}}} {
				var got []journal.Position
				if _, err := v.Replay(t.Context(), appN(app), q.q, func(i Item) error { got = append(got, i.Position); return nil }); err != nil {
					rt.Fatal(err)
				}
				var want []journal.Position
				for _, e := range kept.replay(appN(app), q) {
					want = append(want, e.sealed.Position)
				}
				if fmt.Sprint(got) != fmt.Sprint(want) {
					rt.Fatalf("after Expire %+v gives %v, want %v", q.q, got, want)
				}
			}
		}
		if _, err := v.Expire(t.Context(), now.Add(1000*24*time.Hour)); err != nil {
			rt.Fatal(err)
		}
		for _, line := range dump(rt, store) {
			if !strings.HasPrefix(line, fmt.Sprintf("%02x", tableTrimmed)) {
				rt.Fatalf("left over: %s", line)
			}
		}
	})
}

// TestFormatHoldsTheHour: keys of another hour stand for other times, so a view
// that has them is not the same view.
func TestFormatHoldsTheHour(t *testing.T) {
	t.Parallel()
	seen := make(map[uint32]time.Duration)
	for _, hour := range []time.Duration{time.Second, 2 * time.Second, time.Minute, time.Hour} {
		v, err := New(Config{Store: &storetest.Memory{}, Hour: hour})
		if err != nil {
			t.Fatal(err)
		}
		if other, ok := seen[v.Format()]; ok {
			t.Errorf("hours of %v and %v have one format", hour, other)
		}
		seen[v.Format()] = hour
	}
	if seen[format] != time.Hour || newView(t, &storetest.Memory{}).Format() != format {
		t.Error("the format of the default is not the plain one")
	}
	for _, hour := range []time.Duration{-time.Second, time.Millisecond, 1500 * time.Millisecond, 2 * time.Hour} {
		if _, err := New(Config{Store: &storetest.Memory{}, Hour: hour}); err == nil {
			t.Errorf("an hour of %v is taken", hour)
		}
	}
}

// TestExpireRuns has runs long enough for range deletions, split by what stays.
func TestExpireRuns(t *testing.T) {
	m, v := newMaker(t), newView(t, newStore(t))
	var batch []journal.Sealed
	for i := range uint64(6000) {
		s := spec{app: appN(byte(1 + i%2)), position: i + 1, id: fmt.Sprint("m", i), conversation: "c", sender: "u", time: start, stored: start}
		if i%1000 == 501 {
			s.time, s.stored = start.Add(48*time.Hour), start.Add(48*time.Hour)
		}
		batch = append(batch, m.seal(s))
	}
	apply(t, v, batch...)
	n, err := v.Expire(t.Context(), start.Add(181*24*time.Hour))
	if err != nil || n != 5994 {
		t.Fatalf("removed %d, %v; want 5994", n, err)
	}
	var got []journal.Position
	for _, app := range []byte{1, 2} {
		if _, err := v.Replay(t.Context(), appN(app), Query{}, func(i Item) error { got = append(got, i.Position); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if fmt.Sprint(got) != "[502 1502 2502 3502 4502 5502]" {
		t.Errorf("%v is left", got)
	}
}

// TestExpireCostsWhatExpires removes as much beside 100,000 events that stay as beside
// 10,000, for the same keys read and the same bytes written; a first time, and once the
// view has been thinned out.
func TestExpireCostsWhatExpires(t *testing.T) {
	type cost struct{ read, written int }
	costs := func(live int) (all []cost) {
		m, store := newMaker(t), &storetest.Tally{Store: newStore(t)}
		v := newView(t, store)
		var batch []journal.Sealed
		for i := range live + 200 {
			s := spec{
				app: appN(1), position: uint64(i + 1), id: fmt.Sprint("m", i), conversation: "c", sender: fmt.Sprint("u", i%10),
				time: start.Add(time.Duration(min(i/100, 2)) * 24 * time.Hour),
			}
			if batch = append(batch, m.seal(s)); len(batch) == 5000 {
				apply(t, v, batch...)
				batch = batch[:0]
			}
		}
		apply(t, v, batch...)
		for day := range 2 {
			store.Read, store.Written = 0, 0
			end := start.Add(time.Duration(180+day)*24*time.Hour + 3*time.Hour)
			if n, err := v.Expire(t.Context(), end); err != nil || n != 100 {
				t.Fatalf("removed %d, %v", n, err)
			}
			all = append(all, cost{store.Read, store.Written})
		}
		return all
	}
	least, most := 10_000, 100_000
	if testing.Short() {
		least, most = 1000, 5000
	}
	few, many := costs(least), costs(most)
	if !slices.Equal(few, many) {
		t.Errorf("removing 100 events beside %d costs %+v, beside %d %+v", least, few, most, many)
	}
	t.Logf("keys read and bytes written for 100 events of two days: %+v", many)
}

func TestTrimmed(t *testing.T) {
	m, v := newMaker(t), newView(t, newStore(t))
	day := 24 * time.Hour
	for i := range 10 {
		apply(t, v, m.seal(spec{
			app: appN(1), position: uint64(10 * (i + 1)), id: fmt.Sprint("m", i), conversation: "c", sender: "u",
			time: start.Add(time.Duration(i) * day),
		}))
	}
	read := func(after journal.Position, oldest time.Time) (string, error) {
		var got []journal.Position
		_, err := v.Replay(t.Context(), appN(1), Query{After: after, Oldest: oldest}, func(i Item) error {
			got = append(got, i.Position)
			return nil
		})
		return fmt.Sprint(got), err
	}
	check := func(after journal.Position, oldest time.Time, want string, through journal.Position) {
		t.Helper()
		got, err := read(after, oldest)
		var trimmed *TrimmedError
		if through > 0 {
			if !errors.Is(err, ErrTrimmed) || !errors.As(err, &trimmed) || trimmed.Oldest != through {
				t.Errorf("after %d: %v, %v; want ErrTrimmed with %d", after, got, err, through)
			}
			return
		}
		if err != nil || got != want {
			t.Errorf("after %d: %v, %v; want %s", after, got, err, want)
		}
	}
	none := time.Time{}
	// Hidden by a plan that keeps less, not removed yet.
	check(0, start.Add(7*day), "[80 90 100]", 0)
	check(10, start.Add(7*day), "", 79)
	check(69, start.Add(7*day), "", 79)
	check(70, start.Add(7*day), "[80 90 100]", 0)
	check(100, start.Add(30*day), "[]", 0)
	check(90, start.Add(30*day), "", 100) // nothing is kept: go on at the end
	if n, err := v.Expire(t.Context(), start.Add(184*day)); err != nil || n != 4 {
		t.Fatalf("removed %d, %v; want 4", n, err)
	}
	check(0, none, "[50 60 70 80 90 100]", 0)
	check(10, none, "", 49)
	check(39, none, "", 49)
	check(40, none, "[50 60 70 80 90 100]", 0)
	check(45, none, "[50 60 70 80 90 100]", 0)
	if n, err := v.Expire(t.Context(), start.Add(400*day)); err != nil || n != 6 {
		t.Fatalf("removed %d, %v; want 6", n, err)
	}
	check(0, none, "[]", 0)
	check(100, none, "[]", 0)
	if _, err := read(40, none); !errors.Is(err, ErrTrimmed) {
		t.Errorf("after everything has expired: %v, want ErrTrimmed", err)
	}
}

func TestReplayStops(t *testing.T) {
	m, v := newMaker(t), newView(t, newStore(t))
	var batch []journal.Sealed
	for i := range 5000 {
		batch = append(batch, m.seal(spec{app: appN(1), position: uint64(i + 1), id: fmt.Sprint("m", i), conversation: "c", sender: "u"}))
	}
	apply(t, v, batch...)
	refused := errors.New("of the test")
	for _, at := range []journal.Position{1, 2, 256, 257, 1024, 1025, 4999, 5000} {
		fn := func(i Item) error {
			if i.Position == at {
				return refused
			}
			return nil
		}
		if next, err := v.Replay(t.Context(), appN(1), Query{}, fn); next != at-1 || !errors.Is(err, refused) {
			t.Errorf("fn refused %d: %d, %v", at, next, err)
		}
		// The same when it is the opening that fails: nothing behind it is given.
		var last journal.Position
		next, err := v.ReplayOpened(t.Context(), appN(1), Query{},
			func(dst []byte, i Item) ([]byte, error) { return append(dst, "x"...), fn(i) },
			func(i Item, _ []byte) error { last = i.Position; return nil })
		if next != at-1 || last != at-1 || !errors.Is(err, refused) {
			t.Errorf("open refused %d: %d after %d, %v", at, next, last, err)
		}
		next, err = v.ReplayOpened(t.Context(), appN(1), Query{},
			func(dst []byte, _ Item) ([]byte, error) { return dst, nil },
			func(i Item, _ []byte) error { return fn(i) })
		if next != at-1 || !errors.Is(err, refused) {
			t.Errorf("fn of ReplayOpened refused %d: %d, %v", at, next, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	n := 0
	next, err := v.Replay(ctx, appN(1), Query{}, func(Item) error {
		n++
		cancel()
		return nil
	})
	if !errors.Is(err, context.Canceled) || next != journal.Position(n) || n > chunkEvents {
		t.Errorf("a cancelled replay gave %d events and says %d, %v", n, next, err)
	}
}

func TestReplayDoesNotAllocate(t *testing.T) {
	m, v := newMaker(t), newView(t, newStore(t))
	var batch []journal.Sealed
	for i := range 4000 {
		batch = append(batch, m.seal(spec{app: appN(1), position: uint64(i + 1), id: fmt.Sprint("m", i), conversation: "c", sender: "u"}))
	}
	apply(t, v, batch...)
	run := func(limit int) float64 {
		return testing.AllocsPerRun(5, func() {
			if _, err := v.Replay(t.Context(), appN(1), Query{Limit: limit}, func(Item) error { return nil }); err != nil {
				t.Fatal(err)
			}
		})
	}
	// A chunk allocates its cursor; an event nothing.
	if few, many := run(10), run(1000); many > few+20 && !underRace {
		t.Errorf("replaying 1,000 events allocates %v times, 10 events %v times", many, few)
	}
}
