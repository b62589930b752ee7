package kms_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/kmstest"
	"github.com/cofferdb/coffer/kms/local"
)

// secondProvider returns another provider and its identity.
func secondProvider(tb testing.TB) (*kmstest.Faults, kms.Identity) {
	tb.Helper()
	p, err := local.Open(tb.Context(), local.Options{Path: filepath.Join(tb.TempDir(), "second.json"), Create: true})
	if err != nil {
		tb.Fatal(err)
	}
	return kmstest.NewFaults(p), identity(tb, p)
}

func identity(tb testing.TB, p kms.Provider) kms.Identity {
	tb.Helper()
	d, err := p.Describe(tb.Context())
	if err != nil {
		tb.Fatal(err)
	}
	return d.Identity()
}

// traffic seals and opens in the background with a process of its own, until
// stopped, and checks at the end that everything is still readable.
func traffic(tb testing.TB, w *world, edit func(*kms.Config)) (stop func()) {
	tb.Helper()
	k := w.process(tb, edit)
	var done atomic.Bool
	var wg sync.WaitGroup
	var mu sync.Mutex
	var envelopes [][]byte
	for lane := range 3 {
		wg.Go(func() {
			for i := 0; !done.Load(); i++ {
				key, err := k.Sealer(tb.Context(), app, day(i%5), subject(lane*1000+i%60))
				if err != nil {
					tb.Errorf("sealing: %v", err)
					return
				}
				env := key.Seal(nil, []byte("aad"), []byte("text"))
				if got, err := open(tb.Context(), k, env); err != nil || got != "text" {
					tb.Errorf("opening: %q, %v", got, err)
					return
				}
				if i < 300 {
					mu.Lock()
					envelopes = append(envelopes, env)
					mu.Unlock()
				}
			}
		})
	}
	return func() {
		done.Store(true)
		wg.Wait()
		fresh := w.process(tb, edit)
		for _, env := range envelopes {
			wantOpen(tb, fresh, env, "text")
		}
		if _, err := fresh.VerifyApp(tb.Context(), app); err != nil {
			tb.Error(err)
		}
	}
}

// Moving an app from one provider to another, while it is written to and read.
func TestMigrate(t *testing.T) {
	w := newWorld(t)
	second, to := secondProvider(t)
	from := identity(t, w.provider)
	both := func(c *kms.Config) { c.Others = []kms.Provider{second} }
	k := w.process(t, both)
	w.create(t, k)
	stop := traffic(t, w, both)
	ctx := t.Context()
	if _, err := k.DropWrap(ctx, app, from); !errors.Is(err, kms.ErrLastWrap) {
		t.Fatalf("the only wrap: %v", err)
	}
	if err := k.PreferWrap(ctx, app, to); !errors.Is(err, kms.ErrNotFound) {
		t.Fatalf("a wrap that is not there: %v", err)
	}
	for i, want := range []bool{true, false} {
		if added, err := k.AddWrap(ctx, app, to); err != nil || added != want {
			t.Fatalf("AddWrap, time %d: %v, %v", i, added, err)
		}
	}
	if err := k.PreferWrap(ctx, app, to); err != nil {
		t.Fatal(err)
	}
	second.Fail(kms.ErrDisabled, "unwrap")
	if _, err := k.DropWrap(ctx, app, from); !errors.Is(err, kms.ErrLastWrap) || !errors.Is(err, kms.ErrDisabled) {
		t.Fatalf("while the other does not work: %v", err)
	}
	second.Heal()
	for i, want := range []bool{true, false} {
		if dropped, err := k.DropWrap(ctx, app, from); err != nil || dropped != want {
			t.Fatalf("DropWrap, time %d: %v, %v", i, dropped, err)
		}
	}
	stop()
	keys, err := k.AppKeys(ctx, app)
	if err != nil || len(keys) != 1 || len(keys[0].Wraps) != 1 || keys[0].Wraps[0].Identity() != to {
		t.Fatalf("%v, %v", keys, err)
	}
	// The first provider is not needed any more, nor able to help.
	w.provider.Fail(kms.ErrUnavailable)
	alone := w.process(t, func(c *kms.Config) { c.Provider = second })
	if _, err := alone.Sealer(ctx, app, day(0), subject(0)); err != nil {
		t.Error(err)
	}
	w.provider.Heal()
	if _, err := w.process(t).Sealer(ctx, app, day(0), subject(0)); !errors.Is(err, kms.ErrNotFound) {
		t.Errorf("by the first provider alone: %v", err)
	}
}

// Of two wraps one is enough, whatever is wrong with the other.
func TestSecondWrapServes(t *testing.T) {
	w := newWorld(t)
	second, to := secondProvider(t)
	both := func(c *kms.Config) { c.Others = []kms.Provider{second} }
	k := w.process(t, both)
	w.create(t, k)
	if _, err := k.AddWrap(t.Context(), app, to); err != nil {
		t.Fatal(err)
	}
	for _, class := range kms.Classes() {
		w.provider.Fail(class, "unwrap")
		if _, err := w.process(t, both).Sealer(t.Context(), app, day(0), subject(0)); err != nil {
			t.Errorf("%v: %v", class, err)
		}
		w.provider.Heal()
	}
	w.provider.Fail(kms.ErrAccessDenied, "unwrap")
	second.Fail(kms.ErrUnavailable, "unwrap")
	if _, err := w.process(t, both).Sealer(t.Context(), app, day(0), subject(0)); !errors.Is(err, kms.ErrUnavailable) {
		t.Errorf("denied here, no answer there: %v", err)
	}
}

func TestCreateAppUnder(t *testing.T) {
	w := newWorld(t)
	second, id := secondProvider(t)
	k := w.process(t)
	if err := k.CreateAppUnder(t.Context(), app, id); !errors.Is(err, kms.ErrNotFound) {
		t.Fatalf("a provider that is not configured: %v", err)
	}
	if got, err := k.AddProvider(t.Context(), second); err != nil || got != id {
		t.Fatal(got, err)
	}
	if err := k.CreateAppUnder(t.Context(), app, id); err != nil {
		t.Fatal(err)
	}
	seal(t, k, day(0), subject(0), "x")
	keys, err := k.AppKeys(t.Context(), app)
	if err != nil || keys[0].Wraps[0].Identity() != id {
		t.Fatal(keys, err)
	}
}

// rotating returns a world whose provider can be rotated, and 40 apps.
func rotating(tb testing.TB) (*world, *local.Provider, *kms.Keyring, []string) {
	tb.Helper()
	p, err := local.Open(tb.Context(), local.Options{Path: filepath.Join(tb.TempDir(), "key.json"), Create: true})
	if err != nil {
		tb.Fatal(err)
	}
	w := &world{provider: kmstest.NewFaults(p), rows: kmstest.NewRows()}
	k := w.process(tb)
	apps := make([]string, 40)
	for i := range apps {
		apps[i] = fmt.Sprintf("app%02d", i)
		if err := k.CreateApp(tb.Context(), apps[i]); err != nil {
			tb.Fatal(err)
		}
	}
	return w, p, k, apps
}

func TestRewrapApps(t *testing.T) {
	w, p, k, apps := rotating(t)
	id := identity(t, p)
	version, err := p.Rotate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	listed := 0
	for name, err := range k.Apps(t.Context()) {
		if err != nil || !slices.Contains(apps, name) {
			t.Fatal(name, err)
		}
		listed++
	}
	if listed != len(apps) {
		t.Errorf("%d apps listed", listed)
	}
	asked := append(slices.Clone(apps), "noapp", "not an app")
	results, err := k.RewrapApps(t.Context(), id, asked)
	if err != nil || len(results) != len(asked) {
		t.Fatalf("%d results, %v", len(results), err)
	}
	for i, r := range results[:len(apps)] {
		if r.App != apps[i] || r.Err != nil || r.Skipped || r.Wrap.Version != version {
			t.Errorf("%+v", r)
		}
	}
	if !errors.Is(results[40].Err, kms.ErrAppUnknown) || !errors.Is(results[41].Err, kms.ErrInput) {
		t.Errorf("%v, %v", results[40].Err, results[41].Err)
	}
	if n := w.provider.Calls("rewrap"); n != 1 {
		t.Errorf("%d calls", n)
	}
	// The old version can be retired: nothing needs it.
	if err := p.Retire(t.Context(), version); err != nil {
		t.Fatal(err)
	}
	fresh := w.process(t)
	for _, name := range apps {
		if v, err := fresh.VerifyApp(t.Context(), name); err != nil || len(v.Wraps) != 1 || v.Wraps[0].Err != nil {
			t.Errorf("%+v, %v", v, err)
		}
	}
	results, err = k.RewrapApps(t.Context(), id, apps)
	for _, r := range results {
		if r.Err != nil || !r.Skipped || r.Wrap.Version != version {
			t.Errorf("again: %+v", r)
		}
	}
	if err != nil || w.provider.Calls("rewrap") != 1 {
		t.Errorf("again: %v, %d calls", err, w.provider.Calls("rewrap"))
	}
}

// Two that rewrap at once, one of which loses some of its writes, end with every
// app rewrapped and none broken.
func TestRewrapTogether(t *testing.T) {
	w, p, k, apps := rotating(t)
	id := identity(t, p)
	version, err := p.Rotate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var n atomic.Int64
	w.rows.Hook(func(op, _ string) {
		if op == "update" && n.Add(1)%5 == 0 {
			w.rows.FailNext(1, errors.New("away"), n.Load()%2 == 0)
		}
	})
	var wg sync.WaitGroup
	for _, k := range []*kms.Keyring{k, w.process(t)} {
		wg.Go(func() { _, _ = k.RewrapApps(t.Context(), id, apps) }) // repeated below
	}
	wg.Wait()
	w.rows.Hook(nil)
	w.rows.FailNext(0, nil, false)
	if _, err := k.RewrapApps(t.Context(), id, apps); err != nil {
		t.Fatal(err)
	}
	results, err := k.RewrapApps(t.Context(), id, apps)
	if err != nil {
		t.Fatal(err)
	}
	fresh := w.process(t)
	for _, r := range results {
		if r.Err != nil || !r.Skipped || r.Wrap.Version != version {
			t.Errorf("%+v", r)
		}
		if _, err := fresh.VerifyApp(t.Context(), r.App); err != nil {
			t.Error(err)
		}
	}
}

// A provider that gives back wraps which do not unwrap to the key changes no row.
func TestRewrapVerifies(t *testing.T) {
	w, p, k, apps := rotating(t)
	id := identity(t, p)
	if _, err := p.Rotate(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.provider.Lie(make([]byte, kms.KeySize))
	results, err := k.RewrapApps(t.Context(), id, apps)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range results {
		if !errors.Is(r.Err, kms.ErrMismatch) {
			t.Errorf("%+v", r)
		}
		keys, err := k.AppKeys(t.Context(), r.App)
		if err != nil || keys[0].Wraps[0].Version != "1" {
			t.Errorf("the row was changed: %v, %v", keys, err)
		}
	}
}

func TestReplaceAppKey(t *testing.T) {
	w := newWorld(t)
	second, to := secondProvider(t)
	both := func(c *kms.Config) { c.Others = []kms.Provider{second} }
	k := w.process(t, both)
	k.SetPageLimit(2000)
	w.create(t, k)
	if _, err := k.AddWrap(t.Context(), app, to); err != nil {
		t.Fatal(err)
	}
	before, err := k.Tagger(t.Context(), app)
	if err != nil {
		t.Fatal(err)
	}
	blob, err := k.SealBlob(t.Context(), app, "certificate", []byte("secret"))
	if err != nil {
		t.Fatal(err)
	}
	env := seal(t, k, day(0), subject(5), "x")
	row, err := w.rows.Load(t.Context(), "app."+app)
	if err != nil {
		t.Fatal(err)
	}
	_, check, _ := strings.Cut(string(row.Value), `"check":"`)
	oldKey := wrappedOf(t, w, subject(5))
	stop := traffic(t, w, both)
	for generation := uint32(2); generation < 5; generation++ {
		n, err := k.ReplaceAppKey(t.Context(), app)
		if err != nil || n < 3 {
			t.Fatalf("%d keys, %v", n, err)
		}
		keys, err := k.AppKeys(t.Context(), app)
		if err != nil || len(keys) != 1 || keys[0].Generation != generation || len(keys[0].Wraps) != 2 {
			t.Fatalf("%v, %v", keys, err)
		}
	}
	stop()
	if w.rows.Contains([]byte(check[:40])) || w.rows.Contains([]byte(oldKey)) {
		t.Error("the old key, or what it wraps, is still in a row")
	}
	fresh := w.process(t, both)
	wantOpen(t, fresh, env, "x")
	after, err := fresh.Tagger(t.Context(), app)
	if err != nil || before.Tag("event", "x") != after.Tag("event", "x") {
		t.Errorf("tags have changed, %v", err)
	}
	if got, err := fresh.OpenBlob(t.Context(), app, "certificate", blob); err != nil || string(got) != "secret" {
		t.Errorf("%q, %v", got, err)
	}
}

// A replacement that fails at any write, whether or not the write happened, goes
// on where it ended, and every key is readable in between.
func TestReplaceAppKeyResumed(t *testing.T) {
	for _, lost := range []bool{false, true} {
		for at := 0; ; at++ {
			w := newWorld(t)
			k := w.process(t)
			k.SetPageLimit(1500)
			w.create(t, k)
			var envelopes [][]byte
			for i := range 15 {
				envelopes = append(envelopes, seal(t, k, day(i%2), subject(i), "x"))
			}
			var n atomic.Int64
			w.rows.Hook(func(op, _ string) {
				if (op == "create" || op == "update") && n.Add(1) == int64(at)+1 {
					w.rows.FailNext(1, errors.New("away"), lost)
				}
			})
			_, err := k.ReplaceAppKey(t.Context(), app)
			w.rows.Hook(nil)
			if n.Load() <= int64(at) {
				if err != nil || at < 5 {
					t.Fatalf("%d writes, %v", n.Load(), err)
				}
				break
			}
			if err == nil {
				t.Fatalf("write %d: no error", at)
			}
			fresh := w.process(t)
			for _, env := range envelopes {
				wantOpen(t, fresh, env, "x")
			}
			if _, err := k.ReplaceAppKey(t.Context(), app); err != nil {
				t.Fatalf("write %d, repeated: %v", at, err)
			}
			v, err := w.process(t).VerifyApp(t.Context(), app)
			if err != nil || v.Subjects != 15 || v.Epochs != 2 || len(v.Wraps) != 1 {
				t.Fatalf("write %d: %+v, %v", at, v, err)
			}
			for _, env := range envelopes {
				wantOpen(t, fresh, env, "x")
				wantOpen(t, k, env, "x")
			}
		}
	}
}

// deaf is a store of rows whose changes one process is not told of.
type deaf struct{ kms.Rows }

func (deaf) Watch(ctx context.Context, _ string) (<-chan string, error) {
	c := make(chan string)
	context.AfterFunc(ctx, func() { close(c) })
	return c, nil
}

// A process that does not know that the app key was replaced cannot leave
// behind a subject key, or an epoch, under the old one.
func TestReplaceAppKeyUnnoticed(t *testing.T) {
	for _, fill := range []int{0, 1, 30} { // no page, one page, split pages
		w := newWorld(t)
		k := w.process(t)
		k.SetPageLimit(1500)
		w.create(t, k)
		late := w.process(t, func(c *kms.Config) { c.Rows = deaf{w.rows} })
		late.SetPageLimit(1500)
		if _, err := late.Tagger(t.Context(), app); err != nil {
			t.Fatal(err)
		}
		var envelopes [][]byte
		for i := range fill {
			envelopes = append(envelopes, seal(t, late, day(0), subject(i), "x"))
		}
		// Once between its reading and its writing, and then again.
		var replaced atomic.Bool
		replace := func() {
			if _, err := k.ReplaceAppKey(t.Context(), app); err != nil {
				t.Error(err)
			}
		}
		w.rows.Hook(func(op, name string) {
			if (op == "create" || op == "update") && strings.HasPrefix(name, "sub.") && !replaced.Swap(true) {
				replace()
			}
		})
		envelopes = append(envelopes, seal(t, late, day(0), subject(100), "x"))
		if !replaced.Load() {
			t.Error("not replaced")
		}
		w.rows.Hook(nil)
		replace()
		for i := range 40 {
			envelopes = append(envelopes, seal(t, late, day(i%3), subject(200+i), "x"))
		}
		replace()
		envelopes = append(envelopes, seal(t, late, day(7), subject(100), "x")) // of a subject in memory
		fresh := w.process(t)
		for _, env := range envelopes {
			wantOpen(t, fresh, env, "x")
		}
		if v, err := fresh.VerifyApp(t.Context(), app); err != nil || v.Subjects != fill+41 {
			t.Errorf("%+v, %v", v, err)
		}
	}
}

func TestVerifyApp(t *testing.T) {
	w := newWorld(t)
	k := w.process(t)
	w.create(t, k)
	for i := range 5 {
		seal(t, k, day(i%2), subject(i), "x")
	}
	if err := k.EraseSubject(t.Context(), app, subject(0)); err != nil {
		t.Fatal(err)
	}
	v, err := k.VerifyApp(t.Context(), app)
	if err != nil || v.Epochs != 2 || v.Subjects != 4 || v.Erased != 1 || len(v.Wraps) != 1 || v.Wraps[0].Err != nil {
		t.Fatalf("%+v, %v", v, err)
	}
	key := wrappedOf(t, w, subject(1))
	row, err := w.rows.Load(t.Context(), "sub."+app+"._")
	if err != nil {
		t.Fatal(err)
	}
	bad := strings.Replace(string(row.Value), key, strings.Repeat("A", len(key)-4)+key[len(key)-4:], 1)
	damaged := *w
	damaged.rows = w.rows.Clone("sub."+app+"._", []byte(bad))
	if _, err := damaged.process(t).VerifyApp(t.Context(), app); !errors.Is(err, kms.ErrKeyringCorrupt) {
		t.Errorf("a damaged subject key: %v", err)
	}
	w.provider.Fail(kms.ErrDisabled)
	if _, err := w.process(t).VerifyApp(t.Context(), app); !errors.Is(err, kms.ErrDisabled) {
		t.Errorf("a disabled KEK: %v", err)
	}
}
