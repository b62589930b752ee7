package journal

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/kmstest"
	"github.com/cofferdb/coffer/kms/local"
)

type registryParts struct {
	*Registry
	rows   *kmstest.Rows // of the registry
	faults *kmstest.Faults
}

// newTestRegistry makes a registry of the region eu. Given another one, it
// stands for another process on the same data.
func newTestRegistry(t *testing.T, others ...registryParts) registryParts {
	t.Helper()
	region := DefaultRegions()[2]
	if len(others) > 0 {
		parts := others[0]
		parts.Registry = newRegistry(region, DefaultPlans(), parts.rows, parts.keyring, nil)
		return parts
	}
	provider, err := local.Open(t.Context(), local.Options{Path: filepath.Join(t.TempDir(), "key"), Create: true})
	if err != nil {
		t.Fatal(err)
	}
	parts := registryParts{rows: kmstest.NewRows(), faults: kmstest.NewFaults(provider)}
	keyring, err := kms.NewKeyring(kms.Config{Region: region.ID, Provider: parts.faults, Rows: kmstest.NewRows()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(keyring.Close(), provider.Close()); err != nil {
			t.Error(err)
		}
	})
	parts.Registry = newRegistry(region, DefaultPlans(), parts.rows, keyring, nil)
	return parts
}

func TestRegistryCreate(t *testing.T) {
	r := newTestRegistry(t)
	const name = "Canary Chat"
	app, err := r.Create(t.Context(), AppSpec{Name: name, Account: "acme", Plan: "pro"})
	if err != nil {
		t.Fatal(err)
	}
	if app.ID.Region() != 3 || app.Region != "eu" || app.Plan != "pro" || app.Name != name || app.Account != "acme" || len(app.Certificates) != 1 || app.Created.IsZero() {
		t.Errorf("created %+v", app)
	}
	for _, secret := range []string{name, app.Certificates[0].Reveal(), string(app.Certificates[0][:])} {
		if r.rows.Contains([]byte(secret)) {
			t.Error("the name or the certificate stands in the rows in clear")
		}
	}

	other := newTestRegistry(t, r)
	read, err := other.App(t.Context(), app.ID)
	if err != nil {
		t.Fatal(err)
	}
	if read.Name != name || read.Certificates[0] != app.Certificates[0] || !read.Created.Equal(app.Created) || read.Plan != "pro" || read.Account != "acme" {
		t.Errorf("read %+v, created %+v", read, app)
	}

	chosen := AppSpec{ID: NewAppID(3), Plan: "free", Certificate: NewCertificate()}
	if _, err := r.App(t.Context(), chosen.ID); !errors.Is(err, ErrUnknownApp) {
		t.Errorf("before it is made: %v", err)
	}
	if app, err := r.Create(t.Context(), chosen); err != nil || app.ID != chosen.ID || app.Certificates[0] != chosen.Certificate {
		t.Errorf("with an id: %+v, %v", app, err)
	}
	if _, err := r.App(t.Context(), chosen.ID); err != nil {
		t.Errorf("after it was made: %v", err)
	}
	if _, err := r.Create(t.Context(), chosen); !errors.Is(err, ErrAppExists) {
		t.Errorf("again: %v", err)
	}
	for want, spec := range map[error]AppSpec{
		ErrUnknownPlan: {Plan: "gold"},
		ErrWrongRegion: {ID: NewAppID(4), Plan: "pro"},
		ErrInvalid:     {Plan: "pro", Name: "a\u202eb"},
		ErrTooLarge:    {Plan: "pro", Name: string(make([]byte, 201))},
	} {
		if _, err := r.Create(t.Context(), spec); !errors.Is(err, want) {
			t.Errorf("%+v: %v, want %v", spec, err, want)
		}
	}
	if _, err := r.Create(t.Context(), AppSpec{Plan: "pro", Account: "a.b"}); !errors.Is(err, ErrInvalid) {
		t.Errorf("account with a full stop: %v", err)
	}
	seen := map[AppID]bool{}
	for app, err := range r.Apps(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		seen[app.ID] = true
	}
	if len(seen) != 2 || !seen[app.ID] || !seen[chosen.ID] {
		t.Errorf("listed %v", seen)
	}
}

func TestRegistryLookup(t *testing.T) {
	r := newTestRegistry(t)
	app, err := r.Create(t.Context(), AppSpec{Plan: "pro"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.App(t.Context(), NewAppID(4)); !errors.Is(err, ErrWrongRegion) {
		t.Errorf("an app of another region: %v", err)
	}
	stranger := NewAppID(3)
	if _, err := r.App(t.Context(), stranger); !errors.Is(err, ErrUnknownApp) {
		t.Errorf("an app that nobody made: %v", err)
	}
	if _, err := r.App(t.Context(), app.ID); err != nil {
		t.Fatal(err)
	}
	loads := r.rows.Loads()
	for range 100 {
		_, _ = r.App(t.Context(), app.ID)
		_, _ = r.App(t.Context(), stranger)
	}
	if n := r.rows.Loads() - loads; n > 0 {
		t.Errorf("%d loads of apps that are in memory", n)
	}
	if n := testing.AllocsPerRun(100, func() { _, _ = r.App(t.Context(), app.ID) }); n > 0 {
		t.Errorf("%v allocations for an app in memory", n)
	}

	// A failing store is an error, not an unknown app, and is not remembered.
	r.evictAll()
	r.rows.FailNext(1, errors.New("broken"), false)
	if _, err := r.App(t.Context(), app.ID); err == nil || errors.Is(err, ErrUnknownApp) {
		t.Errorf("with a broken store: %v", err)
	}
	if _, err := r.App(t.Context(), app.ID); err != nil {
		t.Errorf("after it is whole again: %v", err)
	}

	// However many apps there are, memory holds a bounded number.
	for range maxCachedApps {
		r.apps.Store(NewAppID(3), &cachedApp{})
		r.size++
	}
	r.evict(app.ID)
	if _, err := r.App(t.Context(), app.ID); err != nil {
		t.Fatal(err)
	}
	count := 0
	r.apps.Range(func(_, _ any) bool { count++; return true })
	if count > maxCachedApps || count != r.size {
		t.Errorf("%d apps are in memory, counted as %d", count, r.size)
	}

	for range maxUnknownApps + 10 {
		_, _ = r.App(t.Context(), NewAppID(3))
	}
	if len(r.unknown) > maxUnknownApps {
		t.Errorf("%d unknown ids are remembered", len(r.unknown))
	}
}

// Callers who want the same app at once wait for one load.
func TestRegistryLoadsOnce(t *testing.T) {
	r := newTestRegistry(t)
	app, err := r.Create(t.Context(), AppSpec{Plan: "pro"})
	if err != nil {
		t.Fatal(err)
	}
	release := make(chan struct{})
	loads := r.rows.Loads()
	// The one whose load it is gives up: the others get it all the same.
	entered := make(chan struct{})
	var once sync.Once
	r.rows.Hook(func(op, _ string) {
		if op == "load" {
			once.Do(func() { close(entered) })
			<-release
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	var waiting, started sync.WaitGroup
	waiting.Go(func() {
		if _, err := r.App(ctx, app.ID); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: %v", err)
		}
	})
	<-entered
	for range 50 {
		started.Add(1)
		waiting.Go(func() {
			started.Done()
			if _, err := r.App(t.Context(), app.ID); err != nil {
				t.Error(err)
			}
		})
	}
	started.Wait()
	cancel()
	close(release)
	waiting.Wait()
	// Some may have come after the load had ended; those found it in memory.
	if n := r.rows.Loads() - loads; n != 1 {
		t.Errorf("%d loads", n)
	}
}

func TestRegistryUpdates(t *testing.T) {
	r := newTestRegistry(t)
	app, err := r.Create(t.Context(), AppSpec{Plan: "pro", Name: "n"})
	if err != nil {
		t.Fatal(err)
	}
	oldest := app.Certificates[0]
	app, err = r.RotateCertificate(t.Context(), app.ID)
	if err != nil || len(app.Certificates) != 2 || app.Certificates[1] != oldest || app.Certificates[0] == oldest {
		t.Fatalf("rotated: %+v, %v", app, err)
	}
	second := app.Certificates[0]
	if _, err := r.RotateCertificate(t.Context(), app.ID); !errors.Is(err, ErrRotating) {
		t.Fatalf("rotated again: %v", err)
	}
	app, err = r.WithdrawCertificate(t.Context(), app.ID)
	if err != nil || len(app.Certificates) != 1 || app.Certificates[0] != second {
		t.Fatalf("withdrawn: %+v, %v", app, err)
	}
	if read, err := r.App(t.Context(), app.ID); err != nil || read.Disabled {
		t.Fatalf("read %+v, %v", read, err)
	}
	if app, err = r.SetDisabled(t.Context(), app.ID, true); err != nil || !app.Disabled {
		t.Fatalf("disabled: %+v, %v", app, err)
	}
	if read, err := r.App(t.Context(), app.ID); err != nil || !read.Disabled || len(read.Certificates) != 1 || read.Name != "n" {
		t.Errorf("read %+v, %v", read, err)
	}
	if _, err := r.SetDisabled(t.Context(), NewAppID(3), true); !errors.Is(err, ErrUnknownApp) {
		t.Errorf("an app that nobody made: %v", err)
	}
	if _, err := r.SetDisabled(t.Context(), NewAppID(1), true); !errors.Is(err, ErrWrongRegion) {
		t.Errorf("an app of another region: %v", err)
	}

	// Another process changes the app in between: neither change is lost.
	other := newTestRegistry(t, r)
	first := true
	r.rows.Hook(func(op, _ string) {
		if op == "update" && first {
			first = false
			if _, err := other.SetDisabled(t.Context(), app.ID, false); err != nil {
				t.Error(err)
			}
		}
	})
	if _, err := r.RotateCertificate(t.Context(), app.ID); err != nil {
		t.Fatal(err)
	}
	if read, _, err := r.load(t.Context(), app.ID); err != nil || read.Disabled || len(read.Certificates) != 2 {
		t.Errorf("after two changes at once: %+v, %v", read, err)
	}
}

// What another process changes is seen at once through the watch, and after a
// broken watch too.
func TestRegistryWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRegistry(t)
		other := newTestRegistry(t, r)
		ctx, cancel := context.WithCancel(t.Context())
		var watching sync.WaitGroup
		watching.Go(func() { other.watch(ctx, slog.New(slog.DiscardHandler)) })
		synctest.Wait()
		app, err := r.Create(t.Context(), AppSpec{Plan: "pro"})
		if err != nil {
			t.Fatal(err)
		}
		expect := func(disabled bool) {
			t.Helper()
			if read, err := other.App(t.Context(), app.ID); err != nil || read.Disabled != disabled {
				t.Errorf("disabled is %v, %v", read.Disabled, err)
			}
		}
		expect(false)
		if _, err := r.SetDisabled(t.Context(), app.ID, true); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		expect(true)

		r.rows.Disconnect()
		if _, err := r.SetDisabled(t.Context(), app.ID, false); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		expect(false)
		if _, err := r.SetDisabled(t.Context(), app.ID, true); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		expect(true)
		cancel()
		watching.Wait()
	})
}

// Without a watch an app is still read again after a minute.
func TestRegistryFreshness(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRegistry(t)
		app, err := r.Create(t.Context(), AppSpec{Plan: "pro"})
		if err != nil {
			t.Fatal(err)
		}
		other := newTestRegistry(t, r)
		if _, err := other.App(t.Context(), app.ID); err != nil {
			t.Fatal(err)
		}
		if _, err := r.SetDisabled(t.Context(), app.ID, true); err != nil {
			t.Fatal(err)
		}
		time.Sleep(appFresh)
		synctest.Wait()
		if read, err := other.App(t.Context(), app.ID); err != nil || !read.Disabled {
			t.Errorf("after a minute: %+v, %v", read, err)
		}
	})
}

// A load that began before a change must not put what it read over it.
func TestRegistryLateLoad(t *testing.T) {
	r := newTestRegistry(t)
	app, err := r.Create(t.Context(), AppSpec{Plan: "pro"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.loadCached(t.Context(), app.ID); err != nil {
		t.Fatal(err)
	}
	r.evictAll()
	entered, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	r.rows.Hook(func(op, _ string) {
		if op == "load" {
			once.Do(func() { close(entered); <-release })
		}
	})
	var loading sync.WaitGroup
	loading.Go(func() { _, _ = r.loadCached(t.Context(), app.ID) })
	<-entered
	r.evict(app.ID) // as the watch does when another process wrote
	close(release)
	loading.Wait()
	if r.cached(app.ID) != nil {
		t.Error("a load from before the change was kept")
	}
}

func TestRegistryRefusesDamagedRows(t *testing.T) {
	r := newTestRegistry(t)
	app, err := r.Create(t.Context(), AppSpec{Plan: "pro"})
	if err != nil {
		t.Fatal(err)
	}
	twin, err := r.Create(t.Context(), AppSpec{Plan: "pro"})
	if err != nil {
		t.Fatal(err)
	}
	name := appRow + app.ID.String()
	whole, err := r.rows.Load(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := r.rows.Load(t.Context(), appRow+twin.ID.String())
	if err != nil {
		t.Fatal(err)
	}
	revision := whole.Revision
	change := func(from, to string) string {
		if !strings.Contains(string(whole.Value), from) {
			t.Fatalf("the row has no %s: %s", from, whole.Value)
		}
		return strings.Replace(string(whole.Value), from, to, 1)
	}
	for what, value := range map[string]string{
		"no JSON":           "x",
		"unknown member":    change(`"version":1`, `"color":"red","version":1`),
		"duplicate member":  change(`"version":1`, `"version":1,"version":1`),
		"unknown version":   change(`"version":1`, `"version":2`),
		"another region":    change(`"region":"eu"`, `"region":"us"`),
		"generation":        change(`"generation":0`, `"generation":4096`),
		"shard":             change(`"shard":0`, `"shard":-1`),
		"sealed part cut":   change(`"private":"`, `"private":"AAAA`),
		"no sealed part":    `{"version":1,"region":"eu","plan":"pro","generation":0,"shard":0,"created":"2026-01-01T00:00:00Z","private":""}`,
		"of another app":    string(foreign.Value),
		"a row of an alien": `{}`,
	} {
		if revision, err = r.rows.Update(t.Context(), name, []byte(value), revision); err != nil {
			t.Fatal(err)
		}
		r.evictAll()
		if got, err := r.App(t.Context(), app.ID); err == nil {
			t.Errorf("%s: accepted as %+v", what, got)
		} else if errors.Is(err, ErrUnknownApp) {
			t.Errorf("%s: taken for an unknown app: %v", what, err)
		}
	}
	// The others of the region are still listed.
	good := 0
	for _, err := range r.Apps(t.Context()) {
		if err == nil {
			good++
		}
	}
	if good != 1 {
		t.Errorf("%d good apps are listed beside a damaged one", good)
	}
}

func BenchmarkRegistryLookup(b *testing.B) {
	r := newRegistry(DefaultRegions()[2], DefaultPlans(), nil, nil, nil)
	id := NewAppID(3)
	r.apps.Store(id, &cachedApp{app: App{ID: id}})
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := r.App(b.Context(), id); err != nil {
				b.Fatal(err)
			}
		}
	})
}
