package history

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/journal/journaltest"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/local"
	"github.com/cofferdb/coffer/projections"
)

// moveRig is a journal with its view and a mover, all running.
type moveRig struct {
	*journal.Journal

	view   *View
	store  projections.Store
	runner *projections.Runner
	mover  *journal.Mover
}

func newMoveRig(t *testing.T, dir string, store projections.Store, opts embedded.Options, mover journal.MoverConfig) *moveRig {
	t.Helper()
	ctx := t.Context()
	opts.StoreDir = filepath.Join(dir, "nats")
	server, conn := journaltest.Start(t, opts)
	provider, err := local.Open(ctx, local.Options{Path: filepath.Join(dir, "key.json"), Create: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = provider.Close() })
	rig := &moveRig{view: newView(t, store), store: store}
	cfg := journal.Config{Region: journal.DefaultRegions()[2], Conn: conn, KMS: provider, Index: rig.view, Health: server.Check}
	if s := server.Syncer(); s != nil {
		cfg.Sync = s
	}
	if rig.Journal, err = journal.Open(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := rig.Close(); err != nil {
			t.Errorf("close the journal: %v", err)
		}
	})
	if rig.runner, err = projections.NewRunner(projections.RunnerConfig{
		Journal: rig.Journal, Store: store, Projections: []projections.Projection{rig.view},
	}); err != nil {
		t.Fatal(err)
	}
	mover.Journal, mover.Views = rig.Journal, rig.runner
	if rig.mover, err = journal.NewMover(mover); err != nil {
		t.Fatal(err)
	}
	runCtx, stop := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() {
		if err := rig.runner.Run(runCtx); err != nil {
			t.Errorf("runner: %v", err)
		}
	})
	running.Go(func() {
		if err := rig.mover.Run(runCtx); err != nil {
			t.Errorf("mover: %v", err)
		}
	})
	t.Cleanup(func() { stop(); running.Wait() })
	return rig
}

// await waits for the end of an app's plan change.
func (r *moveRig) await(t *testing.T, app journal.AppID) journal.Move {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Minute); ; time.Sleep(5 * time.Millisecond) {
		m, err := r.mover.Move(t.Context(), app)
		if err != nil {
			t.Fatal(err)
		}
		if m.Step == journal.MoveDone {
			return m
		}
		if time.Now().After(deadline) {
			t.Fatalf("the plan change does not end: %+v", m)
		}
	}
}

// A movedEvent is what the model knows about an event that was acknowledged.
type movedEvent struct {
	id       string
	position journal.Position
	clock    time.Time
}

const day = 24 * time.Hour

// movingApp is an app under load, and what is known of it.
type movingApp struct {
	id journal.AppID

	mu     sync.Mutex // guards events
	events []movedEvent

	tail    []journal.Position // as a live reader saw them
	seen    seenMark
	writers sync.WaitGroup
	stop    func()
}

// seenMark is how far a live reader has come.
type seenMark struct{ atomic.Uint64 }

func (m *seenMark) wait(ctx context.Context, t *testing.T, p journal.Position) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); m.Load() < uint64(p); time.Sleep(time.Millisecond) {
		if ctx.Err() != nil || time.Now().After(deadline) {
			t.Fatalf("a tail has come to %d, not to %s", m.Load(), p)
		}
	}
}

func movedMessage(id string, at time.Time) journal.Event {
	return journal.Event{
		ID: id, Type: journal.MessageSent, Conversation: "g" + id[len(id)-1:], ConversationType: journal.Group,
		Sender: "u" + id[len(id)-1:], Time: at, Data: jsontext.Value(`{"bodies":[{"type":"txt","msg":"` + id + `"}]}`),
	}
}

// fill appends events of every age that the plan keeps, with edits and recalls.
func (a *movingApp) fill(t *testing.T, r *moveRig, retention time.Duration, n int) {
	t.Helper()
	now := time.Now().Truncate(time.Millisecond)
	ages := []time.Duration{time.Minute, 2 * day, 4 * day, 6 * day, 8 * day, 50 * day, 89 * day, 91 * day, 179 * day}
	ages = slices.DeleteFunc(ages, func(d time.Duration) bool { return d >= retention })
	var events []journal.Event
	for i := range n {
		e := movedMessage(fmt.Sprint("old", i), now.Add(-ages[i%len(ages)]).Add(time.Duration(i)*time.Millisecond))
		if i > 20 {
			switch i % 11 {
			case 5:
				e.Type, e.Target, e.Conversation = journal.MessageEdited, events[i-10].ID, events[i-10].Conversation
			case 8:
				e.Type, e.Target, e.Conversation, e.Data = journal.MessageRecalled, events[i-10].ID, events[i-10].Conversation, nil
			}
		}
		events = append(events, e)
	}
	a.append(t, r, events...)
}

func (a *movingApp) append(t *testing.T, r *moveRig, events ...journal.Event) {
	t.Helper()
	before := time.Now()
	results, err := r.Append(t.Context(), a.id, events...)
	if err != nil {
		t.Errorf("append: %v", err)
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for i, res := range results {
		if res.Err != nil || res.Duplicate {
			t.Errorf("event %s: %+v", events[i].ID, res)
			continue
		}
		clock := res.Time
		if before.Before(clock) {
			clock = before
		}
		a.events = append(a.events, movedEvent{id: res.ID, position: res.Position, clock: clock})
	}
}

// newest returns the position of the event that was appended last.
func (a *movingApp) newest() journal.Position {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.events[len(a.events)-1].position
}

// again appends an event of the past again.
func (a *movingApp) again(t *testing.T, r *moveRig, e journal.Event, position journal.Position) {
	t.Helper()
	results, err := r.Append(t.Context(), a.id, e)
	if err != nil || results[0].Err != nil || !results[0].Duplicate || results[0].Position != position {
		t.Errorf("event %s again: %+v, %v; it is at %s", e.ID, results, err, position)
	}
}

// load writes until stop is closed, and lets a reader follow.
func (a *movingApp) load(t *testing.T, r *moveRig, writers int) {
	stop := make(chan struct{})
	a.stop = sync.OnceFunc(func() { close(stop) })
	t.Cleanup(func() { a.stop(); a.writers.Wait() }) // before the journal closes
	for w := range writers {
		a.writers.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 7))
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				e := movedMessage(fmt.Sprintf("w%d-%d", w, i), time.Now())
				a.append(t, r, e)
				// It reads what it wrote, which also keeps a slow machine from
				// drowning in writes.
				if err := r.runner.Wait(t.Context(), a.id, a.newest()); err != nil && t.Context().Err() == nil {
					t.Errorf("wait for what was written: %v", err)
					return
				}
				if rng.IntN(3) == 0 {
					a.mu.Lock()
					at := slices.IndexFunc(a.events, func(m movedEvent) bool { return m.id == e.ID })
					var position journal.Position
					if at >= 0 {
						position = a.events[at].position
					}
					a.mu.Unlock()
					a.again(t, r, e, position)
				}
			}
		})
	}
}

// follow reads the app's end until ctx ends.
func (a *movingApp) follow(ctx context.Context, t *testing.T, r *moveRig, after journal.Position) {
	for {
		changed := r.runner.Changed(a.id)
		next, err := r.view.ReplayOpened(ctx, a.id, Query{After: after}, func(dst []byte, i Item) ([]byte, error) {
			if i.Recalled {
				return dst, nil
			}
			return r.OpenRecord(ctx, dst, a.id, i.Record)
		}, func(i Item, _ []byte) error {
			a.tail = append(a.tail, i.Position)
			a.seen.Store(uint64(i.Position))
			return nil
		})
		if err != nil && ctx.Err() == nil && !errors.Is(err, projections.ErrRebuilding) && !errors.Is(err, kms.ErrEpochDestroyed) {
			t.Errorf("tail: %v", err)
			return
		}
		after = max(after, next)
		select {
		case <-changed:
		case <-ctx.Done():
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// check holds the view against the model.
func (a *movingApp) check(t *testing.T, r *moveRig, oldest time.Time) {
	t.Helper()
	ctx := t.Context()
	a.mu.Lock()
	events := slices.Clone(a.events)
	a.mu.Unlock()
	slices.SortFunc(events, func(x, y movedEvent) int { return int(int64(x.position) - int64(y.position)) })
	var last journal.Position
	for _, e := range events {
		if e.position == last {
			t.Fatalf("two events at position %s", last)
		}
		last = e.position
	}
	if err := r.runner.Wait(ctx, a.id, last); err != nil {
		t.Fatal(err)
	}
	want := slices.DeleteFunc(events, func(e movedEvent) bool { return e.clock.Before(oldest) })
	n, told := 0, 0
	_, err := r.view.Replay(ctx, a.id, Query{Oldest: oldest}, func(i Item) error {
		if i.Type == journal.AppPlanChanged {
			told++
			return nil
		}
		if n == len(want) || i.Position != want[n].position {
			wanted := "none"
			if n < len(want) {
				wanted = want[n].position.String() + " (" + want[n].id + ")"
			}
			plain, err := r.OpenRecord(ctx, nil, a.id, i.Record)
			known := slices.IndexFunc(events, func(e movedEvent) bool { return e.position == i.Position })
			return fmt.Errorf("event %d of %d is at position %s, want %s; it is %s (%w), number %d of the model", n, len(want), i.Position, wanted, plain, err, known)
		}
		if !i.Recalled {
			plain, err := r.OpenRecord(ctx, nil, a.id, i.Record)
			if err != nil {
				return fmt.Errorf("event %s at %s: %w", want[n].id, i.Position, err)
			}
			e, err := journal.ParseReplayed(journal.SplicePosition(nil, plain, i.Position))
			if err != nil || e.ID != want[n].id {
				return fmt.Errorf("event at %s is %s, %w; want %s", i.Position, e.ID, err, want[n].id)
			}
		}
		n++
		return nil
	})
	if err != nil || n != len(want) {
		t.Fatalf("replayed %d of %d events, %v", n, len(want), err)
	}
	if told == 0 {
		t.Error("the app has no event of its plan change")
	}
}

// records returns the app's records in the view, by position.
func (r *moveRig) records(t *testing.T, app journal.AppID) map[journal.Position][]byte {
	t.Helper()
	list := make(map[journal.Position][]byte)
	if _, err := r.view.Replay(t.Context(), app, Query{}, func(i Item) error {
		if !i.Recalled {
			list[i.Position] = slices.Clone(i.Record)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return list
}

// TestPlanChanges moves apps in all twelve directions, while each is written to
// and read at its live end, and holds every event against a model: before and
// after a rebuild. What was there before under other keys cannot be opened.
func TestPlanChanges(t *testing.T) {
	for name, always := range map[string]bool{"own syncs": false, "sync always": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testPlanChanges(t, embedded.Options{SyncAlways: always})
		})
	}
}

func testPlanChanges(t *testing.T, opts embedded.Options) {
	ctx := t.Context()
	r := newMoveRig(t, t.TempDir(), newStore(t), opts, journal.MoverConfig{})
	type direction struct {
		*movingApp

		from, to journal.Plan
		before   map[journal.Position][]byte
	}
	var all []*direction
	for _, from := range journal.DefaultPlans() {
		for _, to := range journal.DefaultPlans() {
			if from.ID == to.ID || testing.Short() && from.ID != "free" && to.ID != "free" {
				continue
			}
			all = append(all, &direction{from: from, to: to})
		}
	}
	var prepare sync.WaitGroup
	for _, d := range all {
		prepare.Go(func() {
			app, err := r.CreateApp(ctx, journal.AppSpec{Name: "moves", Plan: d.from.ID})
			if err != nil {
				t.Errorf("create app: %v", err)
				return
			}
			d.movingApp = &movingApp{id: app.ID}
			d.fill(t, r, d.from.Retention, 90)
		})
	}
	prepare.Wait()
	if t.Failed() {
		t.FailNow()
	}
	following, stop := context.WithCancel(ctx)
	var readers sync.WaitGroup
	defer readers.Wait()
	defer stop()
	for _, d := range all {
		last := slices.MaxFunc(d.events, func(x, y movedEvent) int { return int(int64(x.position) - int64(y.position)) }).position
		if err := r.runner.Wait(ctx, d.id, last); err != nil {
			t.Fatal(err)
		}
		d.before = r.records(t, d.id)
		d.load(t, r, 1)
		readers.Go(func() { d.follow(following, t, r, last) })
	}
	for _, d := range all {
		if _, err := r.mover.ChangePlan(ctx, d.id, d.to.ID, "operator:test"); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range all {
		r.await(t, d.id)
	}
	for _, d := range all {
		d.stop()
		d.writers.Wait()
	}
	during := 0
	for _, d := range all {
		oldest := time.Now().Add(-min(d.from.Retention, d.to.Retention))
		d.check(t, r, oldest)
		live := 0
		for _, e := range d.events {
			if e.position > slices.Max(keysOf(d.before)) {
				live++
			}
		}
		t.Logf("%s to %s: %d events, %d of them during the change", d.from.ID, d.to.ID, len(d.events), live)
		during += live
		for p, record := range d.before {
			if _, err := r.OpenRecord(ctx, nil, d.id, record); !errors.Is(err, kms.ErrEpochDestroyed) {
				t.Fatalf("the old envelope at %s opens: %v", p, err)
			}
		}
	}
	if during == 0 {
		t.Error("nothing was written during the changes")
	}
	// The tails have seen each event of the load once, in order.
	for _, d := range all {
		if err := r.runner.Wait(ctx, d.id, d.last()); err != nil {
			t.Fatal(err)
		}
		d.seen.wait(ctx, t, d.last())
	}
	stop()
	readers.Wait()
	for _, d := range all {
		d.checkTail(t)
	}
	before := swept(t, r)
	if err := r.runner.Rebuild(ctx, "history"); err != nil {
		t.Fatal(err)
	}
	for _, d := range all {
		d.check(t, r, time.Now().Add(-min(d.from.Retention, d.to.Retention)))
	}
	if after := swept(t, r); !slices.Equal(before, after) {
		t.Errorf("the rebuilt view differs: %d entries, before %d", len(after), len(before))
		for i := range min(len(before), len(after)) {
			if before[i] != after[i] {
				t.Logf("first difference:\n%.200s\n%.200s", before[i], after[i])
				break
			}
		}
	}
}

func keysOf(m map[journal.Position][]byte) []journal.Position {
	list := make([]journal.Position, 0, len(m))
	for p := range m {
		list = append(list, p)
	}
	return list
}

func (a *movingApp) last() journal.Position {
	var last journal.Position
	for _, e := range a.events {
		last = max(last, e.position)
	}
	return last
}

// checkTail holds what a live reader saw against the model.
func (a *movingApp) checkTail(t *testing.T) {
	t.Helper()
	known := make(map[journal.Position]bool)
	var first journal.Position
	for _, e := range a.events {
		known[e.position] = true
		if e.id == "w0-0" {
			first = e.position
		}
	}
	for i, p := range a.tail {
		if i > 0 && p <= a.tail[i-1] {
			t.Errorf("the tail saw %s after %s", p, a.tail[i-1])
		}
		delete(known, p)
	}
	for p := range known {
		if p >= first {
			t.Errorf("the tail did not see %s", p)
		}
	}
}

// swept removes what has expired from the view, and returns what is left of the
// runner's and the view's keys.
func swept(t *testing.T, r *moveRig) []string {
	t.Helper()
	if _, err := r.view.Expire(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	return dump(t, r.store)
}
