package projections_test

import (
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/storetest"
)

func TestRebuild(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newSource("s1", "s2")
		w, other := newWords("words", 'w'), newWords("other", 'o')
		var rebuilding atomic.Bool
		store := &storetest.Memory{Fail: func(call string) error {
			if call == "update" && rebuilding.Load() && w.closed() == nil {
				t.Error("the view is changed while readers are let in")
			}
			return nil
		}}
		r, stop := begin(t, src, store, w, other)
		wait(t, r, appN(1), src.append("s1", appN(1), "a", "b"))
		wait(t, r, appN(2), src.append("s2", appN(2), "x"))
		synctest.Wait()
		before := other.applied
		src.set(func() { src.records["s1"][1].Record = []byte("slow") })
		done := make(chan error)
		rebuilding.Store(true)
		go func() { done <- r.Rebuild(t.Context(), "words") }()
		synctest.Wait()
		if !errors.Is(w.closed(), projections.ErrRebuilding) || other.closed() != nil {
			t.Errorf("during the rebuild the gates are %v and %v", w.closed(), other.closed())
		}
		if !errors.Is(r.Ready(), projections.ErrRebuilding) {
			t.Errorf("Ready = %v", r.Ready())
		}
		close(w.resume)
		if err := <-done; err != nil {
			t.Errorf("Rebuild: %v", err)
		}
		synctest.Wait()
		if got := w.text(t, store); got != "a slow x" || w.closed() != nil {
			t.Errorf("the rebuilt view has %q, gate %v", got, w.closed())
		}
		if other.applied != before {
			t.Error("the other projection was rebuilt too")
		}
		if err := r.Rebuild(t.Context(), "nobody"); !errors.Is(err, projections.ErrUnknown) {
			t.Errorf("Rebuild of nobody: %v", err)
		}
		end(t, stop)
	})
}

// TestRebuildOfWhatHasExpired has the last records leave the journal before they
// are read again.
func TestRebuildOfWhatHasExpired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, store, w := newSource("s1"), &storetest.Memory{}, newWords("words", 'w')
		src.append("s1", appN(1), "a", "b")
		src.fail = func(string) error {
			time.Sleep(10 * time.Second) // the reader is slow
			return errors.New("away")
		}
		r, stop := begin(t, src, store, w)
		synctest.Wait()
		if w.closed() == nil {
			t.Error("the gate is open before the view is filled")
		}
		src.set(func() { src.records["s1"] = nil })
		done := make(chan error)
		go func() { done <- r.Wait(t.Context(), appN(1), 2) }()
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if w.closed() != nil {
			t.Errorf("the gate is %v, though nothing is left to read", w.closed())
		}
		if err := <-done; err != nil {
			t.Errorf("Wait: %v", err)
		}
		end(t, stop)
	})
}

func TestFormatChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, store, w := newSource("s1"), &storetest.Memory{}, newWords("words", 'w')
		r, stop := begin(t, src, store, w)
		wait(t, r, appN(1), src.append("s1", appN(1), "a", "b"))
		end(t, stop)
		src.set(func() { src.records["s1"] = src.records["s1"][1:] })
		w = newWords("words", 'w')
		w.format = 2
		r, stop = begin(t, src, store, w)
		wait(t, r, appN(1), 2)
		if got := w.text(t, store); got != "b" {
			t.Errorf("the view has %q, want what the journal has", got)
		}
		end(t, stop)
	})
}
