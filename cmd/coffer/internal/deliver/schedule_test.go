package deliver

import (
	"net/http"
	"testing"
	"time"

	"github.com/cofferdb/coffer/journal"
)

// TestSchedule has a delivery fail for ever: its attempts end within three days,
// and not long before.
func TestSchedule(t *testing.T) {
	t.Parallel()
	for _, retention := range []time.Duration{72 * time.Hour, time.Hour} {
		s := newSchedule(retention)
		arrived := time.Unix(1_700_000_000, 0)
		now, attempts := arrived, 1
		for {
			due, ok := s.next(attempts, now, arrived, 0)
			if !ok {
				break
			}
			if !due.After(now) {
				t.Fatalf("attempt %d is due at once", attempts)
			}
			now = due
			attempts++
		}
		if took := now.Sub(arrived); took >= retention || took < retention*3/4 || attempts < 10 || attempts > 20 {
			t.Errorf("%s: %d attempts in %s", retention, attempts, took)
		}
		if due, ok := s.next(1, arrived, arrived, 2*retention); !ok || !due.Before(s.end(arrived)) {
			t.Errorf("what an endpoint asks for gave its delivery up")
		}
	}
}

// TestBreaker leaves an endpoint alone after five failures, then lets one request
// through, and opens with a success.
func TestBreaker(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_700_000_000, 0)
	b := breaker{scale: func(d time.Duration) time.Duration { return d }}
	for range breakerFailures - 1 {
		b.failed(now, 0)
	}
	if b.room(now, 8) != 8 {
		t.Error("it closed too early")
	}
	b.failed(now, 0)
	if b.room(now, 8) != 0 || b.room(now.Add(2*time.Second), 8) != 1 {
		t.Error("it did not close, or not open for one")
	}
	b.failed(now, time.Hour)
	if b.room(now.Add(59*time.Minute), 8) != 0 {
		t.Error("it does not heed what the endpoint asked for")
	}
	b.succeeded()
	if b.room(now, 8) != 8 {
		t.Error("a success did not open it")
	}
}

// TestPace spaces deliveries.
func TestPace(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_700_000_000, 0)
	start, p := now, newPace(100)
	for range 1000 {
		now = now.Add(p.wait(now))
		p.take(now, 1)
	}
	if took := now.Sub(start); took < 9*time.Second || took > 10*time.Second {
		t.Errorf("1,000 deliveries at 100 a second took %s", took)
	}
	none := newPace(0)
	if none.wait(now) != 0 {
		t.Error("without a rate there is a wait")
	}
}

// TestAnswers: 2xx is success and nothing else is, and Retry-After is read in both of
// its forms.
func TestAnswers(t *testing.T) {
	t.Parallel()
	for status := range 1000 {
		if got, want := (Answer{Status: status}).Delivered(), status >= 200 && status < 300; got != want {
			t.Errorf("%d is delivered: %v", status, got)
		}
	}
	if (Answer{Status: 200, Cause: journal.CauseTimeout}).Delivered() {
		t.Error("an answer that was cut is delivered")
	}
	for text, want := range map[string]time.Duration{
		"": 0, "0": 0, "120": 2 * time.Minute, "-1": 0, "1.5": 0, "soon": 0, "99999999999999999999": 0, "Mon, 01 Jan 2001 00:00:00 GMT": 0,
	} {
		if got := retryAfter(text); got != want {
			t.Errorf("%q: %s, want %s", text, got, want)
		}
	}
	if got := retryAfter(time.Now().Add(time.Hour).UTC().Format(http.TimeFormat)); got < 30*time.Minute || got > time.Hour {
		t.Errorf("a time in an hour: %s", got)
	}
}
