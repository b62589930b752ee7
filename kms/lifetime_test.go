package kms_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cofferdb/coffer/kms"
)

// used asks for a key, as traffic does.
func used(ctx context.Context, k *kms.Keyring) error {
	_, err := k.Sealer(ctx, app, day(0), subject(0))
	return err
}

// Revalidation comes 15 minutes after the load, give or take a fifth, however
// often the key is used, and one day of use costs about a hundred calls.
func TestRevalidation(t *testing.T) {
	w := newWorld(t)
	synctest.Test(t, func(t *testing.T) {
		k := w.process(t)
		w.create(t, k)
		if err := used(t.Context(), k); err != nil {
			t.Fatal(err)
		}
		before := w.provider.Calls("unwrap")
		start, last := time.Now(), time.Now()
		calls := 0
		for time.Since(start) < 24*time.Hour {
			time.Sleep(30 * time.Second)
			synctest.Wait()
			if n := w.provider.Calls("unwrap") - before; n > calls {
				if gap := time.Since(last); calls > 0 && (gap < 11*time.Minute+30*time.Second || gap > 18*time.Minute+30*time.Second) {
					t.Errorf("revalidated after %v", gap)
				}
				calls, last = n, time.Now()
			}
			if err := used(t.Context(), k); err != nil {
				t.Fatal(err)
			}
		}
		if calls < 80 || calls > 120 {
			t.Errorf("%d calls in a day", calls)
		}
	})
}

// An app that nobody uses is dropped, and costs no call.
func TestIdleAppDropped(t *testing.T) {
	w := newWorld(t)
	synctest.Test(t, func(t *testing.T) {
		k := w.process(t)
		w.create(t, k)
		if err := used(t.Context(), k); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Minute) // revalidated: it was used
		before := w.provider.Calls()
		time.Sleep(20 * time.Minute)
		synctest.Wait()
		if s := k.Status(); s.Apps != 0 || w.provider.Calls() != before {
			t.Errorf("%+v, %d calls", s, w.provider.Calls()-before)
		}
	})
}

// An outage is bridged from memory until the hard limit, and then fails closed;
// the keyring says so meanwhile, and recovers by itself.
func TestOutage(t *testing.T) {
	for _, class := range []error{kms.ErrUnavailable, kms.ErrThrottled, kms.ErrQuota} {
		t.Run(class.Error(), func(t *testing.T) {
			w := newWorld(t)
			synctest.Test(t, func(t *testing.T) {
				k := w.process(t)
				w.create(t, k)
				if err := used(t.Context(), k); err != nil {
					t.Fatal(err)
				}
				loaded := time.Now()
				w.provider.Fail(class)
				for time.Since(loaded) < 4*time.Hour-time.Minute {
					if err := used(t.Context(), k); err != nil {
						t.Fatalf("after %v: %v", time.Since(loaded), err)
					}
					// New subjects and epochs need no provider either.
					time.Sleep(time.Minute)
				}
				if _, err := k.Sealer(t.Context(), app, day(1), subject(7)); err != nil {
					t.Errorf("a new epoch and subject in the outage: %v", err)
				}
				if s := k.Status(); s.Degraded != 1 || !errors.Is(s.Err, class) || s.Since.Sub(loaded) > 18*time.Minute {
					t.Errorf("status %+v", s)
				}
				if n := w.provider.Calls("unwrap"); n > 120 {
					t.Errorf("%d calls in an outage of 4 h", n)
				}
				time.Sleep(2 * time.Minute)
				synctest.Wait()
				if err := used(t.Context(), k); !errors.Is(err, class) {
					t.Errorf("after the hard limit: %v, want %v", err, class)
				}
				w.provider.Heal()
				time.Sleep(31 * time.Second) // the negative entry
				if err := used(t.Context(), k); err != nil {
					t.Errorf("after the outage: %v", err)
				}
			})
		})
	}
}

// A hanging provider is an outage too.
func TestHangingProvider(t *testing.T) {
	w := newWorld(t)
	synctest.Test(t, func(t *testing.T) {
		k := w.process(t)
		w.create(t, k)
		if err := used(t.Context(), k); err != nil {
			t.Fatal(err)
		}
		w.provider.Hang()
		time.Sleep(time.Hour)
		synctest.Wait()
		if err := used(t.Context(), k); err != nil {
			t.Errorf("from memory: %v", err)
		}
		k.Evict(app)
		start := time.Now()
		if err := used(t.Context(), k); !errors.Is(err, kms.ErrUnavailable) || time.Since(start) > 11*time.Second {
			t.Errorf("not in memory: %v after %v", err, time.Since(start))
		}
		w.provider.Heal()
	})
}

func TestOutageRecovers(t *testing.T) {
	w := newWorld(t)
	synctest.Test(t, func(t *testing.T) {
		k := w.process(t)
		w.create(t, k)
		w.provider.Heal()
		if err := used(t.Context(), k); err != nil {
			t.Fatal(err)
		}
		w.provider.Fail(kms.ErrUnavailable)
		time.Sleep(time.Hour)
		w.provider.Heal()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if s := k.Status(); s.Degraded != 0 || s.Apps != 1 {
			t.Errorf("%+v", s)
		}
		for range 500 { // and it lives past the first hard limit
			time.Sleep(time.Minute)
			if err := used(t.Context(), k); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// A provider that answers no is believed at once, and not asked again for 30 s.
func TestRevocation(t *testing.T) {
	for _, class := range []error{
		kms.ErrNotFound, kms.ErrAccessDenied, kms.ErrUnauthenticated, kms.ErrDisabled,
		kms.ErrPendingDeletion, kms.ErrVersionRetired, kms.ErrMismatch,
	} {
		t.Run(class.Error(), func(t *testing.T) {
			w := newWorld(t)
			synctest.Test(t, func(t *testing.T) {
				k := w.process(t)
				w.create(t, k)
				if err := used(t.Context(), k); err != nil {
					t.Fatal(err)
				}
				w.provider.Fail(class)
				time.Sleep(18*time.Minute + time.Second)
				synctest.Wait()
				if err := used(t.Context(), k); !errors.Is(err, class) {
					t.Fatalf("%v, want %v", err, class)
				}
				time.Sleep(30 * time.Second)
				calls := w.provider.Calls("unwrap")
				for range 100 {
					if err := used(t.Context(), k); !errors.Is(err, class) {
						t.Fatalf("%v, want %v", err, class)
					}
				}
				if n := w.provider.Calls("unwrap") - calls; n > 1 {
					t.Errorf("asked %d times", n)
				}
				w.provider.Heal()
				if err := used(t.Context(), k); !errors.Is(err, class) {
					t.Errorf("within 30 s: %v", err)
				}
				time.Sleep(31 * time.Second)
				if err := used(t.Context(), k); err != nil {
					t.Errorf("when undone: %v", err)
				}
			})
		})
	}
}

// While the rows cannot be read, what is in memory serves; nothing is made up.
func TestRowsAway(t *testing.T) {
	w := newWorld(t)
	synctest.Test(t, func(t *testing.T) {
		k := w.process(t)
		w.create(t, k)
		synctest.Wait() // it follows the rows by now, which begins with an empty memory
		if err := used(t.Context(), k); err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // it has followed its own writes
		away := errors.New("rows away")
		w.rows.FailNext(1<<30, away, false)
		time.Sleep(time.Hour)
		synctest.Wait()
		if err := used(t.Context(), k); err != nil {
			t.Errorf("from memory: %v", err)
		}
		if _, err := k.Sealer(t.Context(), app, day(0), subject(1)); !errors.Is(err, away) {
			t.Errorf("a new subject: %v", err)
		}
		if _, err := k.Sealer(t.Context(), app, day(1), subject(0)); !errors.Is(err, away) {
			t.Errorf("a new epoch: %v", err)
		}
		if s := k.Status(); s.Degraded != 1 {
			t.Errorf("%+v", s)
		}
		w.rows.FailNext(0, nil, false)
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if s := k.Status(); s.Degraded != 0 {
			t.Errorf("%+v", s)
		}
		if _, err := k.Sealer(t.Context(), app, day(1), subject(1)); err != nil {
			t.Errorf("afterwards: %v", err)
		}
	})
}

// The next epoch is there before the present one ends.
func TestNextEpochAhead(t *testing.T) {
	w := newWorld(t)
	synctest.Test(t, func(t *testing.T) {
		k := w.process(t)
		w.create(t, k)
		now := time.Now().UTC().Truncate(time.Hour)
		e := kms.Epoch{Class: "free/0", From: now, Until: now.Add(6 * time.Hour), Expires: now.Add(78 * time.Hour)}
		for time.Now().Before(e.Until.Add(-time.Hour)) {
			if _, err := k.Sealer(t.Context(), app, e, subject(0)); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Minute)
		}
		writes := w.rows.Writes()
		for range 50 { // less than a tenth of 6 h is left
			time.Sleep(time.Minute)
			if _, err := k.Sealer(t.Context(), app, e, subject(0)); err != nil {
				t.Fatal(err)
			}
		}
		if n := w.rows.Writes() - writes; n != 1 {
			t.Fatalf("%d writes ahead of the next epoch", n)
		}
		time.Sleep(11 * time.Minute)
		writes = w.rows.Writes()
		next := kms.Epoch{Class: e.Class, From: e.Until, Until: e.Until.Add(6 * time.Hour), Expires: e.Expires.Add(6 * time.Hour)}
		key, err := k.Sealer(t.Context(), app, next, subject(0))
		if err != nil || key.Header().Epoch != 2 {
			t.Fatalf("epoch %d, %v", key.Header().Epoch, err)
		}
		if w.rows.Writes() != writes {
			t.Error("the epoch was made again")
		}
	})
}

// Epochs of the past, as an import has them, make no next ones.
func TestNoEpochAheadOfThePast(t *testing.T) {
	w := newWorld(t)
	synctest.Test(t, func(t *testing.T) {
		k := w.process(t)
		w.create(t, k)
		now := time.Now().UTC().Truncate(time.Hour)
		e := kms.Epoch{Class: "free/0", From: now.Add(-12 * time.Hour), Until: now.Add(-6 * time.Hour), Expires: now.Add(60 * time.Hour)}
		if _, err := k.Sealer(t.Context(), app, e, subject(0)); err != nil {
			t.Fatal(err)
		}
		writes := w.rows.Writes()
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		if n := w.rows.Writes() - writes; n != 0 {
			t.Errorf("%d writes", n)
		}
	})
}
