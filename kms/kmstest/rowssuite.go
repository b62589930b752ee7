package kmstest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cofferdb/coffer/kms"
)

// RowsHarness is what RunRows needs. New is required; Again and Search may be
// nil if Cannot says why.
type RowsHarness struct {
	// New returns an empty store, and ends it with the test.
	New func(tb testing.TB) kms.Rows
	// Again returns another process's view of the same store.
	Again func(tb testing.TB, r kms.Rows) kms.Rows
	// Search reports whether the store's files hold the bytes anywhere, once
	// everything that was written has reached them.
	Search func(tb testing.TB, r kms.Rows, needle []byte) bool
	// Cannot maps the name of a hook to the reason why there is none.
	Cannot map[string]string
}

// RunRows is the suite that every kms.Rows passes.
func RunRows(t *testing.T, h RowsHarness) {
	t.Run("CompareAndSet", h.compareAndSet)
	t.Run("Values", h.values)
	t.Run("List", h.list)
	t.Run("Races", h.races)
	t.Run("Watch", h.watch)
	t.Run("Cancelled", h.cancelled)
	t.Run("Again", h.again)
	t.Run("OldBytesGone", h.oldBytesGone)
}

func (h RowsHarness) cannot(t *testing.T, hook string) {
	t.Helper()
	if reason := h.Cannot[hook]; reason != "" {
		t.Skipf("skipped: this store has no %s: %s", hook, reason)
	}
	t.Fatalf("the harness neither offers %q nor says why it cannot", hook)
}

func (h RowsHarness) compareAndSet(t *testing.T) {
	ctx, r := t.Context(), h.New(t)
	if _, err := r.Load(ctx, "app.a"); !errors.Is(err, kms.ErrRowNotFound) {
		t.Fatalf("Load of nothing: %v", err)
	}
	if err := r.Delete(ctx, "app.a", 1); !errors.Is(err, kms.ErrRowNotFound) {
		t.Errorf("Delete of nothing: %v", err)
	}
	if _, err := r.Update(ctx, "app.a", []byte("x"), 1); !errors.Is(err, kms.ErrRowConflict) {
		t.Errorf("Update of nothing: %v", err)
	}
	rev1, err := r.Create(ctx, "app.a", []byte("one"))
	if err != nil || rev1 == 0 {
		t.Fatalf("Create: revision %d, %v", rev1, err)
	}
	if _, err := r.Create(ctx, "app.a", []byte("again")); !errors.Is(err, kms.ErrRowConflict) {
		t.Errorf("Create of what exists: %v", err)
	}
	rev2, err := r.Update(ctx, "app.a", []byte("two"), rev1)
	if err != nil || rev2 <= rev1 {
		t.Fatalf("Update: revision %d after %d, %v", rev2, rev1, err)
	}
	if _, err := r.Update(ctx, "app.a", []byte("three"), rev1); !errors.Is(err, kms.ErrRowConflict) {
		t.Errorf("Update of an old revision: %v", err)
	}
	if err := r.Delete(ctx, "app.a", rev1); !errors.Is(err, kms.ErrRowConflict) {
		t.Errorf("Delete of an old revision: %v", err)
	}
	if row, err := r.Load(ctx, "app.a"); err != nil || string(row.Value) != "two" || row.Revision != rev2 {
		t.Errorf("Load: %q, revision %d, %v", row.Value, row.Revision, err)
	}
	if err := r.Delete(ctx, "app.a", rev2); err != nil {
		t.Fatalf("Delete: %v", err)
	}
	if _, err := r.Load(ctx, "app.a"); !errors.Is(err, kms.ErrRowNotFound) {
		t.Errorf("Load of what was deleted: %v", err)
	}
	if _, err := r.Update(ctx, "app.a", []byte("x"), rev2); !errors.Is(err, kms.ErrRowConflict) {
		t.Errorf("Update of what was deleted: %v", err)
	}
	if rev3, err := r.Create(ctx, "app.a", []byte("new")); err != nil || rev3 <= rev2 {
		t.Errorf("Create after Delete: revision %d after %d, %v", rev3, rev2, err)
	}
}

func (h RowsHarness) values(t *testing.T) {
	ctx, r := t.Context(), h.New(t)
	for i, value := range [][]byte{nil, {0}, bytes.Repeat([]byte{0, 0xff, '\n'}, 100), bytes.Repeat([]byte("x"), 1<<20)} {
		name := fmt.Sprintf("sub.A-z_9.%d", i)
		rev, err := r.Create(ctx, name, value)
		if err != nil {
			t.Fatalf("%d bytes: %v", len(value), err)
		}
		if row, err := r.Load(ctx, name); err != nil || !bytes.Equal(row.Value, value) || row.Revision != rev {
			t.Errorf("%d bytes: %d came back, %v", len(value), len(row.Value), err)
		}
	}
}

func (h RowsHarness) list(t *testing.T) {
	ctx, r := t.Context(), h.New(t)
	names := func(prefix string) []string {
		t.Helper()
		var got []string
		for name, err := range r.List(ctx, prefix) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, name)
		}
		slices.Sort(got)
		return got
	}
	if got := names("sub."); len(got) != 0 {
		t.Errorf("an empty store lists %v", got)
	}
	for _, name := range []string{"app.a", "sub.a._", "sub.a.0", "sub.a.0f", "sub.ab._"} {
		if _, err := r.Create(ctx, name, []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	for prefix, want := range map[string][]string{
		"":        {"app.a", "sub.a.0", "sub.a.0f", "sub.a._", "sub.ab._"},
		"sub.a.":  {"sub.a.0", "sub.a.0f", "sub.a._"},
		"sub.a":   {"sub.a.0", "sub.a.0f", "sub.a._", "sub.ab._"},
		"sub.a.0": {"sub.a.0", "sub.a.0f"},
		"nothing": nil,
	} {
		if got := names(prefix); !slices.Equal(got, want) {
			t.Errorf("prefix %q: %v, want %v", prefix, got, want)
		}
	}
	for range r.List(ctx, "") {
		break // an early end must not hang
	}
	row, err := r.Load(ctx, "sub.a.0")
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Delete(ctx, "sub.a.0", row.Revision); err != nil {
		t.Fatal(err)
	}
	if got := names("sub.a.0"); !slices.Equal(got, []string{"sub.a.0f"}) {
		t.Errorf("after Delete: %v", got)
	}
}

// races: of writers that race, one wins each revision.
func (h RowsHarness) races(t *testing.T) {
	ctx, r := t.Context(), h.New(t)
	const writers, rounds = 8, 10
	var wg sync.WaitGroup
	var created sync.Map
	for i := range writers {
		wg.Go(func() {
			if _, err := r.Create(ctx, "app.n", []byte("0")); err == nil {
				created.Store(i, true)
			} else if !errors.Is(err, kms.ErrRowConflict) {
				t.Errorf("Create: %v", err)
			}
			for done := 0; done < rounds; {
				row, err := r.Load(ctx, "app.n")
				if err != nil {
					t.Errorf("Load: %v", err)
					return
				}
				var n int
				if _, err := fmt.Sscan(string(row.Value), &n); err != nil {
					t.Errorf("%q: %v", row.Value, err)
					return
				}
				switch _, err := r.Update(ctx, "app.n", fmt.Append(nil, n+1), row.Revision); {
				case err == nil:
					done++
				case !errors.Is(err, kms.ErrRowConflict):
					t.Errorf("Update: %v", err)
					return
				}
			}
		})
	}
	wg.Wait()
	winners := 0
	created.Range(func(any, any) bool { winners++; return true })
	row, err := r.Load(ctx, "app.n")
	if winners != 1 || err != nil || string(row.Value) != fmt.Sprint(writers*rounds) {
		t.Errorf("%d creators; counted to %s of %d, %v", winners, row.Value, writers*rounds, err)
	}
}

func (h RowsHarness) watch(t *testing.T) {
	r := h.New(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if _, err := r.Create(ctx, "sub.before", []byte("x")); err != nil {
		t.Fatal(err)
	}
	names, err := r.Watch(ctx, "sub.")
	if err != nil {
		t.Fatal(err)
	}
	next := func(what, want string) {
		t.Helper()
		for {
			select {
			case name, ok := <-names:
				if !ok {
					t.Fatalf("%s: the watch ended", what)
				}
				if !strings.HasPrefix(name, "sub.") {
					t.Errorf("%s: told of %s", what, name)
				}
				if name == want {
					return
				}
			case <-time.After(10 * time.Second):
				t.Fatalf("%s: nothing was told", what)
			}
		}
	}
	if _, err := r.Create(ctx, "app.a", []byte("x")); err != nil {
		t.Fatal(err)
	}
	rev, err := r.Create(ctx, "sub.a", []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	next("Create", "sub.a")
	if rev, err = r.Update(ctx, "sub.a", []byte("y"), rev); err != nil {
		t.Fatal(err)
	}
	next("Update", "sub.a")
	if err := r.Delete(ctx, "sub.a", rev); err != nil {
		t.Fatal(err)
	}
	next("Delete", "sub.a")
	cancel()
	for range names { // closed when the context ends
	}
}

func (h RowsHarness) cancelled(t *testing.T) {
	r := h.New(t)
	rev, err := r.Create(t.Context(), "app.a", []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.Load(ctx, "app.a"); !errors.Is(err, context.Canceled) {
		t.Errorf("Load: %v", err)
	}
	if _, err := r.Update(ctx, "app.a", []byte("y"), rev); !errors.Is(err, context.Canceled) {
		t.Errorf("Update: %v", err)
	}
}

func (h RowsHarness) again(t *testing.T) {
	if h.Again == nil {
		h.cannot(t, "Again")
	}
	ctx, r := t.Context(), h.New(t)
	q := h.Again(t, r)
	names, err := q.Watch(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	rev, err := r.Create(ctx, "app.a", []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	if row, err := q.Load(ctx, "app.a"); err != nil || string(row.Value) != "x" || row.Revision != rev {
		t.Errorf("another process loads %q, revision %d, %v", row.Value, row.Revision, err)
	}
	if _, err := q.Create(ctx, "app.a", []byte("y")); !errors.Is(err, kms.ErrRowConflict) {
		t.Errorf("another process creates it again: %v", err)
	}
	select {
	case name := <-names:
		if name != "app.a" {
			t.Errorf("another process is told of %q", name)
		}
	case <-time.After(10 * time.Second):
		t.Error("another process is told nothing")
	}
	if _, err := q.Update(ctx, "app.a", []byte("z"), rev); err != nil {
		t.Errorf("another process updates: %v", err)
	}
	if _, err := r.Update(ctx, "app.a", []byte("y"), rev); !errors.Is(err, kms.ErrRowConflict) {
		t.Errorf("the first updates what the other had: %v", err)
	}
}

// oldBytesGone: a store that only hides old revisions cannot erase a key.
func (h RowsHarness) oldBytesGone(t *testing.T) {
	if h.Search == nil {
		h.cannot(t, "Search")
	}
	ctx, r := t.Context(), h.New(t)
	first, second := []byte("canary-of-the-first-revision"), []byte("canary-of-the-second-revision")
	rev, err := r.Create(ctx, "app.a", first)
	if err != nil {
		t.Fatal(err)
	}
	if !h.Search(t, r, first) {
		t.Fatal("the search does not even find the present row")
	}
	if rev, err = r.Update(ctx, "app.a", second, rev); err != nil {
		t.Fatal(err)
	}
	if h.Search(t, r, first) {
		t.Error("after Update the old bytes are still there")
	}
	if err := r.Delete(ctx, "app.a", rev); err != nil {
		t.Fatal(err)
	}
	if h.Search(t, r, second) {
		t.Error("after Delete the bytes are still there")
	}
}
