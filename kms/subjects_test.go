package kms_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/kms"
)

// wrappedIn returns the base64 of the i-th wrapped key in a list of a row.
func wrappedIn(tb testing.TB, w *world, row, list string, i int) string {
	tb.Helper()
	r, err := w.rows.Load(tb.Context(), row)
	if err != nil {
		tb.Fatal(err)
	}
	var v map[string]any
	if err := json.Unmarshal(r.Value, &v); err != nil {
		tb.Fatal(err)
	}
	return v[list].([]any)[i].(map[string]any)["key"].(string)
}

// wrappedOf returns the base64 of a subject's wrapped key, wherever it is.
func wrappedOf(tb testing.TB, w *world, s kms.Tag) string {
	tb.Helper()
	for _, name := range w.rows.Names() {
		r, err := w.rows.Load(tb.Context(), name)
		if err != nil {
			tb.Fatal(err)
		}
		_, after, ok := strings.Cut(string(r.Value), `"tag":"`+s.String()+`","key":"`)
		if ok {
			key, _, _ := strings.Cut(after, `"`)
			return key
		}
	}
	tb.Fatalf("no row has subject %s", s)
	return ""
}

// Many subjects, pages that split several times, and every key still there.
func TestPagesSplit(t *testing.T) {
	w := newWorld(t)
	k := w.process(t)
	w.create(t, k)
	const subjects = 3000
	tags := make([]kms.Tag, subjects)
	for i := range tags {
		tags[i] = subject(i)
	}
	envelopes := make([][]byte, subjects)
	for i := range 200 { // one at a time: the first page fills and splits
		envelopes[i] = seal(t, k, day(0), tags[i], fmt.Sprint(i))
	}
	if err := k.Prepare(t.Context(), app, day(0), tags); err != nil {
		t.Fatal(err)
	}
	writes := w.rows.Writes()
	for i := 200; i < subjects; i++ {
		envelopes[i] = seal(t, k, day(0), tags[i], fmt.Sprint(i))
	}
	if w.rows.Writes() != writes {
		t.Error("Prepare left something to be made")
	}
	pages := 0
	for _, name := range w.rows.Names() {
		r, err := w.rows.Load(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(name, "sub.") {
			pages++
			if len(r.Value) > 16<<10 {
				t.Errorf("%s has %d bytes", name, len(r.Value))
			}
		}
	}
	if pages < 17 || pages > 17+256 {
		t.Errorf("%d pages", pages)
	}
	fresh := w.process(t)
	for i, env := range envelopes {
		wantOpen(t, fresh, env, fmt.Sprint(i))
	}
}

// Processes that make subjects at the same time, while pages split under them,
// never make two keys of one subject, nor lose one.
func TestPageRaces(t *testing.T) {
	w := newWorld(t)
	const processes, subjects = 4, 150
	var keyrings []*kms.Keyring
	for range processes {
		k := w.process(t)
		k.SetPageLimit(700)
		keyrings = append(keyrings, k)
	}
	w.create(t, keyrings[0])
	envelopes := make([][][]byte, processes)
	var wg sync.WaitGroup
	for p, k := range keyrings {
		envelopes[p] = make([][]byte, subjects)
		for lane := range 3 {
			wg.Go(func() {
				for i := lane; i < subjects; i += 3 {
					key, err := k.Sealer(t.Context(), app, day(0), subject(i))
					if err != nil {
						t.Errorf("subject %d: %v", i, err)
						return
					}
					envelopes[p][i] = key.Seal(nil, []byte("aad"), fmt.Append(nil, i))
				}
			})
		}
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	fresh := w.process(t)
	for p := range envelopes {
		for i, env := range envelopes[p] {
			wantOpen(t, fresh, env, fmt.Sprint(i))
		}
	}
}

// Subjects that are made at the same time go into few writes.
func TestCreationGrouped(t *testing.T) {
	w := newWorld(t)
	k := w.process(t)
	w.create(t, k)
	seal(t, k, day(0), subject(1000), "x")
	before := w.rows.Writes()
	started := make(chan struct{})
	var once sync.Once
	release := make(chan struct{})
	w.rows.Hook(func(op, _ string) {
		if op == "update" {
			once.Do(func() { close(started); <-release })
		}
	})
	var wg sync.WaitGroup
	make1 := func(i int) {
		wg.Go(func() {
			if _, err := k.Sealer(t.Context(), app, day(0), subject(i)); err != nil {
				t.Error(err)
			}
		})
	}
	make1(0)
	<-started
	for i := range 60 {
		make1(1 + i)
	}
	eventually(t, "all wait", func() bool { return k.Waiting(app) == 60 })
	close(release)
	wg.Wait()
	if n := w.rows.Writes() - before; n != 2 {
		t.Errorf("61 subjects took %d writes", n)
	}
}

func TestEraseSubject(t *testing.T) {
	w := newWorld(t)
	a, b := w.process(t), w.process(t)
	w.create(t, a)
	env, other := seal(t, a, day(0), subject(0), "gone"), seal(t, a, day(0), subject(1), "kept")
	wantOpen(t, b, env, "gone")
	wantOpen(t, b, other, "kept")
	key := wrappedOf(t, w, subject(0))
	w.provider.Fail(kms.ErrUnavailable) // which does not matter
	for range 2 {
		if err := a.EraseSubject(t.Context(), app, subject(0)); err != nil {
			t.Fatal(err)
		}
	}
	w.provider.Heal()
	if w.rows.Contains([]byte(key)) {
		t.Error("the wrapped key is still in a row")
	}
	gone := func(k *kms.Keyring) bool {
		_, err := open(t.Context(), k, env)
		return errors.Is(err, kms.ErrSubjectErased)
	}
	if !gone(a) || !gone(w.process(t)) {
		t.Error("the subject is still readable")
	}
	eventually(t, "another process notices", func() bool { return gone(b) })
	for _, k := range []*kms.Keyring{a, b, w.process(t)} {
		if _, err := k.Sealer(t.Context(), app, day(0), subject(0)); !errors.Is(err, kms.ErrSubjectErased) {
			t.Errorf("sealing by the subject: %v", err)
		}
		if _, err := k.Sealer(t.Context(), app, day(1), subject(0)); !errors.Is(err, kms.ErrSubjectErased) {
			t.Errorf("sealing by the subject in another epoch: %v", err)
		}
		if err := k.Prepare(t.Context(), app, day(1), []kms.Tag{subject(0), subject(2)}); err != nil {
			t.Errorf("preparing: %v", err)
		}
		wantOpen(t, k, other, "kept")
	}
	// One who has no key yet can be erased too.
	if err := a.EraseSubject(t.Context(), app, subject(77)); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Sealer(t.Context(), app, day(0), subject(77)); !errors.Is(err, kms.ErrSubjectErased) {
		t.Errorf("sealing: %v", err)
	}
	if err := a.EraseSubject(t.Context(), "noapp", subject(0)); !errors.Is(err, kms.ErrAppUnknown) {
		t.Errorf("in an unknown app: %v", err)
	}
}

// A split that was under way, or crashed, leaves no copy of an erased key.
// It is stopped before each of its writes in turn, erased around, and then
// either goes on or not.
func TestEraseDuringSplit(t *testing.T) {
	for _, goesOn := range []bool{true, false} {
		tries := 0
		for stop := 0; ; stop++ {
			w := newWorld(t)
			k := w.process(t)
			w.create(t, k)
			k.SetPageLimit(1500)
			var tags []kms.Tag
			for i := range 11 {
				tags = append(tags, subject(i))
			}
			if err := k.Prepare(t.Context(), app, day(0), tags[:10]); err != nil {
				t.Fatal(err)
			}
			if w.rows.Contains([]byte(`"split":true`)) {
				t.Fatal("it has split before")
			}
			erased := tags[3]
			key := wrappedOf(t, w, erased)
			eraser := w.process(t)
			if err := eraser.CreateApp(t.Context(), app); err != nil {
				t.Fatal(err)
			}
			crash := errors.New("crashed")
			var n atomic.Int64
			var hit atomic.Bool
			w.rows.Hook(func(op, name string) {
				if op != "create" && op != "update" || hit.Load() || !strings.HasPrefix(name, "sub.") {
					return
				}
				if n.Add(1) <= int64(stop) || hit.Swap(true) {
					return
				}
				if err := eraser.EraseSubject(t.Context(), app, erased); err != nil {
					t.Error(err)
				}
				if !goesOn {
					w.rows.FailNext(1, crash, false)
				}
			})
			_, err := k.Sealer(t.Context(), app, day(0), tags[10])
			if !goesOn && hit.Load() && !errors.Is(err, crash) {
				// Another call has met the failure, of who follows the rows: again.
				if tries++; tries > 50 {
					t.Fatalf("stop %d: %v", stop, err)
				}
				stop--
				continue
			}
			if goesOn && err != nil {
				t.Fatalf("stop %d: %v", stop, err)
			}
			w.rows.Hook(nil)
			if !hit.Load() { // the split has fewer writes
				if stop < 5 {
					t.Fatalf("the split was %d writes", stop)
				}
				break
			}
			if w.rows.Contains([]byte(key)) {
				t.Fatalf("goes on %v, stop %d: the erased key is still in a row", goesOn, stop)
			}
			fresh := w.process(t)
			fresh.SetPageLimit(1500)
			for _, s := range tags {
				_, err := fresh.Sealer(t.Context(), app, day(0), s)
				if s == erased && !errors.Is(err, kms.ErrSubjectErased) || s != erased && err != nil {
					t.Fatalf("stop %d: subject %s: %v", stop, s, err)
				}
			}
			if w.rows.Contains([]byte(key)) {
				t.Fatalf("stop %d: the erased key came back", stop)
			}
		}
	}
}

// An erasure that fails at any write, whether or not the write happened, is
// complete once it was repeated.
func TestEraseRepeated(t *testing.T) {
	for _, lost := range []bool{true, false} {
		for at := range 4 {
			w := newWorld(t)
			k := w.process(t)
			w.create(t, k)
			env := seal(t, k, day(0), subject(0), "gone")
			key := wrappedOf(t, w, subject(0))
			var n atomic.Int64
			away := errors.New("away")
			w.rows.Hook(func(op, _ string) {
				if (op == "create" || op == "update") && n.Add(1) == int64(at)+1 {
					w.rows.FailNext(1, away, lost)
				}
			})
			err := k.EraseSubject(t.Context(), app, subject(0))
			if n.Load() > int64(at) && !errors.Is(err, away) {
				t.Fatalf("write %d: %v", at, err)
			}
			w.rows.Hook(nil)
			if err := k.EraseSubject(t.Context(), app, subject(0)); err != nil {
				t.Fatal(err)
			}
			if w.rows.Contains([]byte(key)) {
				t.Errorf("write %d: the key is still in a row", at)
			}
			if _, err := open(t.Context(), k, env); !errors.Is(err, kms.ErrSubjectErased) {
				t.Errorf("write %d: %v", at, err)
			}
		}
	}
}

// A key that was derived from what has changed meanwhile is not kept.
func TestEraseDuringDerivation(t *testing.T) {
	w := newWorld(t)
	a := w.process(t)
	w.create(t, a)
	env := seal(t, a, day(0), subject(0), "gone")
	var wg sync.WaitGroup
	readers := make([]*kms.Keyring, 8)
	for i := range readers {
		readers[i] = w.process(t)
	}
	begin := make(chan struct{})
	for _, k := range readers {
		wg.Go(func() {
			<-begin
			for range 50 {
				k.Evict(app)
				if _, err := open(t.Context(), k, env); err != nil && !errors.Is(err, kms.ErrSubjectErased) {
					t.Errorf("%v", err)
				}
			}
		})
	}
	close(begin)
	if err := a.EraseSubject(t.Context(), app, subject(0)); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	for _, k := range append(readers, a) {
		eventually(t, "it fails closed", func() bool { _, err := open(t.Context(), k, env); return errors.Is(err, kms.ErrSubjectErased) })
	}
}

// When a watch was lost, what it may have missed is found out by itself.
func TestWatchLost(t *testing.T) {
	w := newWorld(t)
	a, b := w.process(t), w.process(t)
	w.create(t, a)
	env := seal(t, a, day(0), subject(0), "gone")
	wantOpen(t, b, env, "gone")
	calls := w.provider.Calls("unwrap")
	w.rows.Disconnect()
	if err := a.EraseSubject(t.Context(), app, subject(0)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the other process notices", func() bool {
		_, err := open(t.Context(), b, env)
		return errors.Is(err, kms.ErrSubjectErased)
	})
	if n := w.provider.Calls("unwrap"); n != calls {
		t.Errorf("%d calls of the provider for it", n-calls)
	}
}

// A split that was overtaken by another, from a later revision of the page,
// does not put its older pages in the place of the newer ones.
func TestLateSplit(t *testing.T) {
	for stop := range 4 { // before the load and the write of each of two pages
		w := newWorld(t)
		quiet := func(c *kms.Config) { c.Rows = deaf{w.rows} } // so that nothing reads rows in the background
		late, early := w.process(t, quiet), w.process(t, quiet)
		w.create(t, late)
		var tags []kms.Tag
		for i := range 11 {
			s := subject(i)
			s[0] = byte(i%2) << 4
			tags = append(tags, s)
		}
		if err := late.Prepare(t.Context(), app, day(0), tags[:9]); err != nil {
			t.Fatal(err)
		}
		late.SetPageLimit(1300)
		early.SetPageLimit(1450)
		var envelopes [][]byte
		var n atomic.Int64
		var hit atomic.Bool
		w.rows.Hook(func(op, name string) {
			if hit.Load() || op != "load" && op != "create" || name == "app."+app || name == "sub."+app+"._" {
				return
			}
			if n.Add(1) <= int64(stop) || hit.Swap(true) {
				return
			}
			for i, s := range tags[9:] { // the first fits, the second splits the page
				envelopes = append(envelopes, seal(t, early, day(0), s, fmt.Sprint(i)))
			}
		})
		// A subject of its own, or it would find the others' and not split.
		if _, err := late.Sealer(t.Context(), app, day(0), subject(99)); err != nil {
			t.Fatal(err)
		}
		w.rows.Hook(nil)
		if !hit.Load() || !w.rows.Contains([]byte(`"split":true`)) {
			t.Fatal("it was not overtaken")
		}
		fresh := w.process(t)
		for i, env := range envelopes {
			wantOpen(t, fresh, env, fmt.Sprint(i))
		}
	}
}
