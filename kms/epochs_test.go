package kms_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cofferdb/coffer/kms"
)

// Processes that race for an epoch agree on one, and ids have no gap.
func TestEpochRace(t *testing.T) {
	w := newWorld(t)
	const processes, days = 4, 12
	keyrings := make([]*kms.Keyring, processes)
	for i := range keyrings {
		keyrings[i] = w.process(t)
	}
	w.create(t, keyrings[0])
	var mu sync.Mutex
	ids := map[int]map[uint32]bool{}
	var wg sync.WaitGroup
	for _, k := range keyrings {
		wg.Go(func() {
			for d := range days {
				key, err := k.Sealer(t.Context(), app, day(d), subject(0))
				if err != nil {
					t.Errorf("day %d: %v", d, err)
					return
				}
				mu.Lock()
				if ids[d] == nil {
					ids[d] = map[uint32]bool{}
				}
				ids[d][key.Header().Epoch] = true
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	all := map[uint32]bool{}
	for d, of := range ids {
		if len(of) != 1 {
			t.Errorf("day %d has epochs %v", d, of)
		}
		for id := range of {
			all[id] = true
			if id < 1 || id > days {
				t.Errorf("epoch %d of %d days", id, days)
			}
		}
	}
	if len(all) != days {
		t.Errorf("%d epochs for %d days", len(all), days)
	}
}

func TestDestroyEpochs(t *testing.T) {
	w := newWorld(t)
	a, b := w.process(t), w.process(t)
	w.create(t, a)
	old, kept := seal(t, a, day(0), subject(0), "old"), seal(t, a, day(5), subject(0), "kept")
	wantOpen(t, b, old, "old")
	wantOpen(t, b, kept, "kept")
	blob := wrappedIn(t, w, "app."+app, "epochs", 0)
	if n, err := a.DestroyEpochs(t.Context(), app, day(0).Expires.Add(-time.Second)); n != 0 || err != nil {
		t.Fatalf("too early: %d, %v", n, err)
	}
	wantOpen(t, a, old, "old")
	if n, err := a.DestroyEpochs(t.Context(), app, day(0).Expires); n != 1 || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	if n, err := a.DestroyEpochs(t.Context(), app, day(0).Expires); n != 0 || err != nil {
		t.Fatalf("again: %d, %v", n, err)
	}
	if w.rows.Contains([]byte(blob)) {
		t.Error("the wrapped key is still in a row")
	}
	gone := func(k *kms.Keyring) bool {
		_, err := open(t.Context(), k, old)
		return errors.Is(err, kms.ErrEpochDestroyed)
	}
	if !gone(a) || !gone(w.process(t)) {
		t.Error("the epoch is still readable")
	}
	eventually(t, "another process notices", func() bool { return gone(b) })
	wantOpen(t, a, kept, "kept")
	wantOpen(t, b, kept, "kept")
	for _, k := range []*kms.Keyring{a, b} {
		if _, err := k.Sealer(t.Context(), app, day(0), subject(0)); !errors.Is(err, kms.ErrEpochDestroyed) {
			t.Errorf("sealing into it: %v", err)
		}
	}
	// Long after, the row no longer tells when; that it was follows from the id.
	if n, err := a.DestroyEpochs(t.Context(), app, day(0).Expires.AddDate(0, 2, 0)); n != 1 || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	if !gone(a) || !gone(w.process(t)) {
		t.Error("the epoch is known no more, instead of destroyed")
	}
	after := w.process(t, func(c *kms.Config) { c.Now = func() time.Time { return day(0).Expires.AddDate(0, 2, 0) } })
	if _, err := after.Sealer(t.Context(), app, day(0), subject(0)); !errors.Is(err, kms.ErrEpochDestroyed) {
		t.Errorf("sealing into a forgotten one: %v", err)
	}
}

// An epoch lives as long as the longest that anybody asked for.
func TestEpochExpiryExtended(t *testing.T) {
	w := newWorld(t)
	a, b := w.process(t), w.process(t)
	w.create(t, a)
	env := seal(t, a, day(0), subject(0), "x")
	longer := day(0)
	longer.Expires = longer.Expires.AddDate(0, 0, 10)
	if _, err := b.Sealer(t.Context(), app, longer, subject(0)); err != nil {
		t.Fatal(err)
	}
	if n, err := a.DestroyEpochs(t.Context(), app, day(0).Expires); n != 0 || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	wantOpen(t, a, env, "x")
	if n, err := a.DestroyEpochs(t.Context(), app, longer.Expires); n != 1 || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
}

// A data key that is used up is followed by another epoch of the same time.
func TestDataKeyUsedUp(t *testing.T) {
	w := newWorld(t)
	k := w.process(t, func(c *kms.Config) { c.MaxSeals = 10 })
	w.create(t, k)
	seen := map[uint32]int{}
	var envelopes [][]byte
	for i := range 35 {
		env := seal(t, k, day(0), subject(0), fmt.Sprint(i))
		h, err := kms.ParseHeader(env)
		if err != nil {
			t.Fatal(err)
		}
		seen[h.Epoch]++
		envelopes = append(envelopes, env)
	}
	if len(seen) != 4 || seen[1] != 10 || seen[2] != 10 || seen[3] != 10 || seen[4] != 5 {
		t.Errorf("envelopes by epoch: %v", seen)
	}
	for i, env := range envelopes {
		wantOpen(t, k, env, fmt.Sprint(i))
	}
}

func TestDestroyApp(t *testing.T) {
	w := newWorld(t)
	a, b := w.process(t), w.process(t)
	w.create(t, a)
	env := seal(t, a, day(0), subject(0), "x")
	wantOpen(t, b, env, "x")
	other := "otherapp"
	if err := a.CreateApp(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Sealer(t.Context(), other, day(0), subject(0)); err != nil {
		t.Fatal(err)
	}
	w.provider.Fail(kms.ErrUnavailable) // which does not matter
	w.rows.FailNext(1, errors.New("away"), false)
	if err := a.DestroyApp(t.Context(), app); err == nil {
		t.Fatal("no error")
	}
	for range 2 {
		if err := a.DestroyApp(t.Context(), app); err != nil {
			t.Fatal(err)
		}
	}
	w.provider.Heal()
	if names := strings.Join(w.rows.Names(), " "); strings.Contains(names, "sub."+app) || !strings.Contains(names, "sub."+other) {
		t.Errorf("rows %s", names)
	}
	gone := func(k *kms.Keyring) bool {
		_, err := open(t.Context(), k, env)
		return errors.Is(err, kms.ErrAppDestroyed)
	}
	if !gone(a) || !gone(w.process(t)) {
		t.Error("the app is still readable")
	}
	eventually(t, "another process notices", func() bool { return gone(b) })
	if err := a.CreateApp(t.Context(), app); !errors.Is(err, kms.ErrAppDestroyed) {
		t.Errorf("made again: %v", err)
	}
	if _, err := b.Sealer(t.Context(), other, day(0), subject(0)); err != nil {
		t.Errorf("another app: %v", err)
	}
}

// eventually waits for what another goroutine is told to do.
func eventually(tb testing.TB, what string, done func() bool) {
	tb.Helper()
	for range 2000 {
		if done() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	tb.Fatalf("not within 10 s: %s", what)
}

// A key derived from what was destroyed meanwhile is neither kept nor returned.
func TestDestroyedDuringDerivation(t *testing.T) {
	synctest.Test(t, destroyedDuringDerivation)
}

func destroyedDuringDerivation(t *testing.T) {
	w := newWorld(t)
	a, b := w.process(t), w.process(t)
	w.create(t, a)
	env, other := seal(t, a, day(0), subject(0), "x"), seal(t, a, day(0), subject(1), "y")
	synctest.Wait() // it has followed the rows so far
	wantOpen(t, b, other, "y")
	b.DropPages(app)
	var done atomic.Bool
	w.rows.Hook(func(op, name string) {
		if op != "load" || !strings.HasPrefix(name, "sub.") || done.Swap(true) {
			return
		}
		if _, err := a.DestroyEpochs(t.Context(), app, day(0).Expires); err != nil {
			t.Error(err)
		}
		eventually(t, "the other process notices", func() bool {
			_, err := open(t.Context(), b, other)
			return errors.Is(err, kms.ErrEpochDestroyed)
		})
	})
	if got, err := open(t.Context(), b, env); !errors.Is(err, kms.ErrEpochDestroyed) {
		t.Errorf("opened %q, %v", got, err)
	}
	if !done.Load() {
		t.Error("the page was not loaded")
	}
}

// Destroying the keys of epochs costs one row of the app, however many users have keys
// below them, and a write only when one goes.
func TestDestroyingCostsOneRow(t *testing.T) {
	type cost struct{ loads, writes int }
	costs := func(users int) (all [2]cost) {
		w := newWorld(t)
		before, err := kms.NewKeyring(kms.Config{Region: "eu", Provider: w.provider, Rows: w.rows})
		if err != nil {
			t.Fatal(err)
		}
		w.create(t, before)
		for n := range users {
			if _, err := before.Sealer(t.Context(), app, day(0), subject(n)); err != nil {
				t.Fatal(err)
			}
		}
		if err := before.Close(); err != nil { // what it does beside would be counted
			t.Fatal(err)
		}
		k := w.process(t)
		for i, step := range []struct {
			now  time.Time
			gone int
		}{{day(0).Expires.Add(-time.Second), 0}, {day(0).Expires, 1}} {
			loads, writes := w.rows.Loads(), w.rows.Writes()
			if n, err := k.DestroyEpochs(t.Context(), app, step.now); n != step.gone || err != nil {
				t.Fatalf("%d were destroyed, %v", n, err)
			}
			all[i] = cost{w.rows.Loads() - loads, w.rows.Writes() - writes}
		}
		return all
	}
	want := [2]cost{{loads: 1}, {loads: 1, writes: 1}}
	most := 10_000
	if testing.Short() {
		most = 1000
	}
	for _, users := range []int{100, most} {
		if got := costs(users); got != want {
			t.Errorf("with %d users: %+v, want %+v", users, got, want)
		}
	}
}
