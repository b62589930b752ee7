package retry_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/internal/retry"
)

func failing(class error, times int) (fn func(context.Context) error, calls *int) {
	calls = new(int)
	return func(context.Context) error {
		*calls++
		if *calls > times {
			return nil
		}
		return &kms.Error{Op: "unwrap", Provider: "test", Class: class}
	}, calls
}

func TestRetriesWhatMayPass(t *testing.T) {
	for _, class := range kms.Classes() {
		t.Run(class.Error(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fn, calls := failing(class, 2)
				err := retry.Policy{}.Do(t.Context(), fn)
				if kms.Retryable(&kms.Error{Class: class}) {
					if err != nil || *calls != 3 {
						t.Fatalf("err %v after %d calls, want success at the third", err, *calls)
					}
				} else if !errors.Is(err, class) || *calls != 1 {
					t.Fatalf("err %v after %d calls, want %v after one", err, *calls, class)
				}
			})
		})
	}
}

func TestAttemptsAndWaitsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fn, calls := failing(kms.ErrUnavailable, 1000)
		start := time.Now()
		err := retry.Policy{}.Do(t.Context(), fn)
		if !errors.Is(err, kms.ErrUnavailable) || *calls != retry.DefaultAttempts {
			t.Fatalf("err %v after %d calls", err, *calls)
		}
		if d := time.Since(start); d < 350*time.Millisecond || d > 700*time.Millisecond {
			t.Fatalf("waited %v, want between half and the whole of 100+200+400 ms", d)
		}
	})
}

func TestAttemptHasItsOwnTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var calls int
		err := retry.Policy{Attempts: 2, Timeout: time.Second}.Do(t.Context(), func(ctx context.Context) error {
			calls++
			<-ctx.Done()
			return &kms.Error{Class: kms.ErrUnavailable}
		})
		if calls != 2 || !errors.Is(err, kms.ErrUnavailable) {
			t.Fatalf("err %v after %d calls", err, calls)
		}
	})
}

func TestStopsWithTheCaller(t *testing.T) {
	t.Run("deadline before the next attempt", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 40*time.Millisecond)
			defer cancel()
			fn, calls := failing(kms.ErrThrottled, 1000)
			start := time.Now()
			err := retry.Policy{}.Do(ctx, fn)
			if !errors.Is(err, kms.ErrThrottled) || *calls != 1 || time.Since(start) != 0 {
				t.Fatalf("err %v after %d calls and %v, want the first error at once", err, *calls, time.Since(start))
			}
		})
	})
	t.Run("cancelled while waiting", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(10*time.Millisecond, cancel)
			fn, calls := failing(kms.ErrThrottled, 1000)
			start := time.Now()
			err := retry.Policy{}.Do(ctx, fn)
			if err == nil || *calls != 1 || time.Since(start) != 10*time.Millisecond {
				t.Fatalf("err %v after %d calls and %v", err, *calls, time.Since(start))
			}
		})
	})
}
