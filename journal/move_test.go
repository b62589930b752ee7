package journal_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

// startMover runs a mover until the test ends.
func startMover(t *testing.T, cfg journal.MoverConfig) *journal.Mover {
	t.Helper()
	m, err := journal.NewMover(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := m.Run(ctx); err != nil {
			t.Errorf("mover: %v", err)
		}
	})
	t.Cleanup(func() { stop(); running.Wait() })
	return m
}

func awaitStep(t *testing.T, m *journal.Mover, app journal.AppID, steps ...journal.MoveStep) journal.Move {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(2 * time.Millisecond) {
		move, err := m.Move(t.Context(), app)
		if err != nil {
			t.Fatal(err)
		}
		if move.Step == journal.MoveDone || slices.Contains(steps, move.Step) {
			return move
		}
		if time.Now().After(deadline) {
			t.Fatalf("the plan change stands still: %+v", move)
		}
	}
}

// TestStaleRoute has writers that have not noticed a plan change, in the process
// that makes it and in another one: nothing of theirs gets behind the seal, and
// nothing is acknowledged. The same events are then stored on the new route, once.
func TestStaleRoute(t *testing.T) {
	t.Run("own syncs", func(t *testing.T) { testStaleRoute(t, false) })
	t.Run("sync always, two processes", func(t *testing.T) { testStaleRoute(t, true) })
}

func testStaleRoute(t *testing.T, always bool) {
	ctx := t.Context()
	w := begin(t, t.TempDir(), always, nil)
	other := w.Journal
	if always {
		var err error
		if other, err = journal.Open(ctx, w.config()); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = other.Close() })
	}
	app := newApp(t, w.Journal)
	mustAppend(t, w.Journal, app, message("before", "alice", 10))
	appendStale, err := other.StaleRoute(ctx, app)
	if err != nil {
		t.Fatal(err)
	}
	// The keys of the old route are still there when the stale writers write.
	switched, wait := make(chan struct{}), make(chan struct{})
	goOn := sync.OnceFunc(func() { close(wait) })
	var once sync.Once
	m := startMover(t, journal.MoverConfig{Journal: w.Journal, Progress: func(_ journal.AppID, move journal.Move) {
		if move.Step == journal.MoveSwitched {
			once.Do(func() { close(switched); <-wait })
		}
	}})
	if _, err := m.ChangePlan(ctx, app, "pro", "operator:test"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(goOn) // before the mover ends
	<-switched
	for _, n := range []int{1, 5, 40} { // single publishes, and an atomic batch
		var events []journal.Event
		for i := range n {
			events = append(events, message(fmt.Sprint("stale", n, "-", i), "alice", 10))
		}
		results, err := appendStale(ctx, events...)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range results {
			if !errors.Is(r.Err, journal.ErrUnavailable) || r.Position != 0 {
				t.Fatalf("an event on the old route: %+v", r)
			}
		}
		if results, err = other.Append(ctx, app, events...); err != nil {
			t.Fatal(err)
		}
		for _, r := range results {
			if r.Err != nil || r.Duplicate || r.Position.Generation() != 1 {
				t.Fatalf("the event again: %+v", r)
			}
		}
	}
	goOn()
	if move := awaitStep(t, m, app); move.Copied != 1 || move.Verified != 1 || move.Skipped != 0 {
		t.Errorf("the plan change: %+v", move)
	}
	// By now its keys are gone too.
	if results, err := appendStale(ctx, message("last", "alice", 10)); err == nil && results[0].Err == nil {
		t.Errorf("an event on the old route: %+v", results[0])
	}
	var behind []string
	sealed := false
	recordsOf(t, w.Journal, enterprise(), func(s journal.Sealed) {
		if sealed {
			behind = append(behind, s.Position.String())
		}
		sealed = sealed || s.Role == journal.RoleSeal
	})
	if !sealed || len(behind) > 0 {
		t.Errorf("seal %v, behind it %v", sealed, behind)
	}
}

// recordsOf calls fn with what a stream holds.
func recordsOf(t *testing.T, j *journal.Journal, stream string, fn func(journal.Sealed)) {
	t.Helper()
	last, err := j.Last(t.Context(), stream)
	if err != nil {
		t.Fatal(err)
	}
	done := errors.New("done")
	err = j.Read(t.Context(), stream, 0, "", func(batch []journal.Sealed) error {
		for _, s := range batch {
			fn(s)
			if s.Sequence == last {
				return done
			}
		}
		return nil
	})
	if !errors.Is(err, done) {
		t.Fatal(err)
	}
}

// laggingIndex is a view that has applied nothing until it is let.
type laggingIndex struct {
	fakeIndex

	asked chan struct{}
}

func (l *laggingIndex) Applied(stream string) uint64 {
	select {
	case l.asked <- struct{}{}:
	default:
	}
	return l.fakeIndex.Applied(stream)
}

// TestDuplicateOverTheSwitch appends an event, changes the plan while the view has
// not seen it, and appends it again: it is known.
func TestDuplicateOverTheSwitch(t *testing.T) {
	ctx := t.Context()
	index := &laggingIndex{fakeIndex: fakeIndex{events: map[kms.Tag]journal.Sealed{}}, asked: make(chan struct{}, 1)}
	w := begin(t, t.TempDir(), false, func(c *journal.Config) { c.Index = index })
	app := newApp(t, w.Journal)
	e := message("twice", "alice", 10)
	first := mustAppend(t, w.Journal, app, e)
	m := startMover(t, journal.MoverConfig{Journal: w.Journal})
	if _, err := m.ChangePlan(ctx, app, "pro", "operator:test"); err != nil {
		t.Fatal(err)
	}
	// The last step appends an event and waits for the view as every append does.
	awaitStep(t, m, app, journal.MoveDestroyed)
	again := make(chan journal.Result, 1)
	go func() {
		results, err := w.Append(ctx, app, e)
		if err != nil {
			results = []journal.Result{{Err: err}}
		}
		again <- results[0]
	}()
	for range 3 {
		<-index.asked
	}
	select {
	case r := <-again:
		t.Fatalf("the append did not wait for the view: %+v", r)
	default:
	}
	recordsOf(t, w.Journal, "coffer_eu_msg_pro_0", func(s journal.Sealed) { index.take(s) })
	index.mu.Lock()
	index.applied = 1 << 20
	index.mu.Unlock()
	if r := <-again; r.Err != nil || !r.Duplicate || r.Position != first.Position {
		t.Errorf("the event again: %+v; it is at %s", r, first.Position)
	}
}

// take applies a record as a view does.
func (f *fakeIndex) take(s journal.Sealed) {
	if s.Role != journal.RoleEvent && s.Role != journal.RoleCopy {
		return
	}
	h, err := journal.ParseHeader(s.Record)
	if err != nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	s.Record = append([]byte(nil), s.Record...)
	f.events[h.Event] = s
}

// TestChangePlanRefused: what makes no sense is refused, and changes nothing.
func TestChangePlanRefused(t *testing.T) {
	ctx := t.Context()
	w := begin(t, t.TempDir(), false, nil)
	app := newApp(t, w.Journal)
	m, err := journal.NewMover(journal.MoverConfig{Journal: w.Journal}) // it does not run
	if err != nil {
		t.Fatal(err)
	}
	foreign := app
	foreign[0] = 1
	for name, c := range map[string]struct {
		app  journal.AppID
		plan string
		want error
	}{
		"the plan it has":  {app, "enterprise", journal.ErrInvalid},
		"no plan":          {app, "", journal.ErrUnknownPlan},
		"unknown plan":     {app, "platinum", journal.ErrUnknownPlan},
		"unknown app":      {journal.NewAppID(region().Number), "pro", journal.ErrUnknownApp},
		"of other regions": {foreign, "pro", journal.ErrWrongRegion},
	} {
		if _, err := m.ChangePlan(ctx, c.app, c.plan, "operator:test"); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := m.Preview(ctx, c.app, c.plan); !errors.Is(err, c.want) {
			t.Errorf("preview, %s: %v", name, err)
		}
	}
	if _, err := m.Move(ctx, app); !errors.Is(err, journal.ErrUnknownMove) {
		t.Errorf("no plan change: %v", err)
	}
	if _, err := m.ChangePlan(ctx, app, "pro", "operator:test"); err != nil {
		t.Fatal(err)
	}
	if _, err := m.ChangePlan(ctx, app, "free", "operator:test"); !errors.Is(err, journal.ErrMoving) {
		t.Errorf("a second plan change: %v", err)
	}
	if a, err := w.App(ctx, app); err != nil || a.Plan != "enterprise" || a.Generation != 0 {
		t.Errorf("the app is %+v, %v", a, err)
	}
}

// TestPreview counts what a shorter plan would hide, and the plan change does that.
func TestPreview(t *testing.T) {
	ctx := t.Context()
	w := begin(t, t.TempDir(), false, nil)
	app := newApp(t, w.Journal)
	now := time.Now()
	for i, age := range []time.Duration{time.Hour, 50 * time.Hour, 100 * time.Hour, 1000 * time.Hour} {
		e := message(fmt.Sprint("e", i), "alice", 10)
		e.Time = now.Add(-age)
		mustAppend(t, w.Journal, app, e)
	}
	m := startMover(t, journal.MoverConfig{Journal: w.Journal})
	p, err := m.Preview(ctx, app, "free")
	if err != nil || p.Events != 4 || p.Hidden != 2 || now.Sub(p.Oldest).Round(time.Hour) != 1000*time.Hour || p.From != "enterprise" {
		t.Errorf("preview %+v, %v", p, err)
	}
	if a, err := w.App(ctx, app); err != nil || a.Plan != "enterprise" {
		t.Errorf("after the preview the app is %+v, %v", a, err)
	}
	if _, err := m.ChangePlan(ctx, app, "free", "operator:test"); err != nil {
		t.Fatal(err)
	}
	if move := awaitStep(t, m, app); move.Copied != 2 || move.Skipped != 2 {
		t.Errorf("the plan change: %+v", move)
	}
	if p, err = m.Preview(ctx, app, "enterprise"); err != nil || p.Events != 3 || p.Hidden != 0 { // and app.plan_changed
		t.Errorf("preview of the way back %+v, %v", p, err)
	}
}

// TestTwoMovers has two movers at once, with a lease that runs out all the time:
// every app gets to its plan once.
func TestTwoMovers(t *testing.T) {
	ctx := t.Context()
	w := begin(t, t.TempDir(), false, nil)
	var apps []journal.AppID
	for range 3 {
		app := newApp(t, w.Journal)
		for i := range 40 {
			mustAppend(t, w.Journal, app, message(fmt.Sprint("e", i), "alice", 10))
		}
		apps = append(apps, app)
	}
	var m *journal.Mover
	for range 2 {
		m = startMover(t, journal.MoverConfig{Journal: w.Journal, Lease: 6 * time.Millisecond})
	}
	for _, app := range apps {
		if _, err := m.ChangePlan(ctx, app, "pro", "operator:test"); err != nil {
			t.Fatal(err)
		}
	}
	for _, app := range apps {
		awaitStep(t, m, app)
		if a, err := w.App(ctx, app); err != nil || a.Plan != "pro" || a.Generation != 1 {
			t.Errorf("the app is %+v, %v", a, err)
		}
	}
	seals := map[journal.AppID]int{}
	recordsOf(t, w.Journal, enterprise(), func(s journal.Sealed) {
		if s.Role == journal.RoleSeal {
			seals[s.App]++
		}
	})
	copies := map[journal.AppID]map[journal.Position]bool{}
	marks := map[journal.Role]int{}
	recordsOf(t, w.Journal, "coffer_eu_msg_pro_0", func(s journal.Sealed) {
		marks[s.Role]++
		if s.Role == journal.RoleCopy {
			if copies[s.App] == nil {
				copies[s.App] = map[journal.Position]bool{}
			}
			copies[s.App][s.Position] = true
			if _, err := w.OpenRecord(ctx, nil, s.App, s.Record); err != nil {
				t.Errorf("copy at %s: %v", s.Position, err)
			}
		}
	})
	for _, app := range apps {
		if seals[app] != 1 || len(copies[app]) != 40 {
			t.Errorf("%d seals, %d positions copied", seals[app], len(copies[app]))
		}
	}
	if marks[journal.RoleOpen] != 3 || marks[journal.RoleClose] != 3 || marks[journal.RoleEvent] != 3 {
		t.Errorf("records by role: %v", marks)
	}
}

func mustAppend(t *testing.T, j *journal.Journal, app journal.AppID, e journal.Event) journal.Result {
	t.Helper()
	r, err := appendOne(t.Context(), j, app, e)
	if err != nil {
		t.Fatal(err)
	}
	return r
}
