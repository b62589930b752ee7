package journal_test

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

// TestDeleteApp deletes one of two apps whose messages lie between one another's:
// what is left of it is its id, and a reader of the other's sees no gap.
func TestDeleteApp(t *testing.T) {
	w := begin(t, t.TempDir(), true, nil)
	ctx := t.Context()
	stays, goes := newApp(t, w.Journal), newApp(t, w.Journal)
	var want []uint64
	for i := range 40 {
		for _, app := range []journal.AppID{goes, stays} {
			result, err := appendOne(ctx, w.Journal, app, message(fmt.Sprintf("e%d", i), "ann", 10))
			if err != nil {
				t.Fatal(err)
			}
			if app == stays {
				want = append(want, result.Position.Sequence())
			}
		}
	}
	if n, err := w.CountApp(ctx, goes); err != nil || n != 40 {
		t.Errorf("counted %d, %v", n, err)
	}
	r := w.Registry()
	if _, err := r.Deleted(ctx, goes); !errors.Is(err, journal.ErrAppExists) {
		t.Errorf("before: %v", err)
	}
	if _, err := r.EndDelete(ctx, goes); !errors.Is(err, journal.ErrInvalid) {
		t.Errorf("an end without a beginning: %v", err)
	}
	if _, err := r.BeginDelete(ctx, journal.NewAppID(1)); !errors.Is(err, journal.ErrWrongRegion) {
		t.Errorf("an app of another region: %v", err)
	}
	for range 2 { // each step can be repeated
		if left, err := r.BeginDelete(ctx, goes); err != nil || left.ID != goes || left.Begun.IsZero() || !left.Deleted.IsZero() {
			t.Fatalf("begun: %+v, %v", left, err)
		}
		if _, err := w.App(ctx, goes); !errors.Is(err, journal.ErrUnknownApp) {
			t.Errorf("being deleted: %v", err)
		}
		if _, err := r.SetDisabled(ctx, goes, false); !errors.Is(err, journal.ErrAppDeleted) || !errors.Is(err, journal.ErrUnknownApp) {
			t.Errorf("a change of an app that is being deleted: %v", err)
		}
		if err := w.Keyring().DestroyApp(ctx, goes.String()); err != nil {
			t.Fatal(err)
		}
		if _, err := appendOne(ctx, w.Journal, goes, message("late", "ann", 10)); !errors.Is(err, journal.ErrUnknownApp) {
			t.Errorf("an append to an app that is being deleted: %v", err)
		}
		if _, err := w.PurgeApp(ctx, goes, nil); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if left, err := r.EndDelete(ctx, goes); err != nil || left.Deleted.IsZero() {
			t.Fatalf("ended: %+v, %v", left, err)
		}
	}
	if n, err := w.CountApp(ctx, goes); err != nil || n != 0 {
		t.Errorf("%d messages are left, %v", n, err)
	}
	if _, err := w.CreateApp(ctx, journal.AppSpec{ID: goes, Plan: "enterprise"}); !errors.Is(err, kms.ErrAppDestroyed) {
		t.Errorf("the id again: %v", err)
	}
	var got []uint64
	reading, cancel := context.WithCancel(ctx)
	err := w.Read(reading, enterprise(), 0, "", func(batch []journal.Sealed) error {
		for _, s := range batch {
			got = append(got, s.Sequence)
		}
		if len(got) == len(want) {
			cancel()
		}
		return nil
	})
	if !errors.Is(err, context.Canceled) || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("read %v, %v, want %v", got, err, want)
	}
	for app, err := range w.Apps(ctx) {
		if err != nil || app.ID == goes {
			t.Errorf("listed: %v, %v", app.ID, err)
		}
	}
}

// TestDeleteNewest: the newest message of a stream stays, so that whoever waits
// for the stream's end comes to it.
func TestDeleteNewest(t *testing.T) {
	w := begin(t, t.TempDir(), true, nil)
	app := newApp(t, w.Journal)
	for i := range 3 {
		if _, err := appendOne(t.Context(), w.Journal, app, message(fmt.Sprintf("e%d", i), "ann", 10)); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := w.PurgeApp(t.Context(), app, nil); err != nil || n != 2 {
		t.Errorf("purged %d, %v", n, err)
	}
	last, err := w.Last(t.Context(), enterprise())
	if err != nil {
		t.Fatal(err)
	}
	reading, cancel := context.WithCancel(t.Context())
	err = w.Read(reading, enterprise(), 0, "", func(batch []journal.Sealed) error {
		if len(batch) != 1 || batch[0].Sequence != last {
			t.Errorf("read %d records, the first at %d, want %d", len(batch), batch[0].Sequence, last)
		}
		cancel()
		return nil
	})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
