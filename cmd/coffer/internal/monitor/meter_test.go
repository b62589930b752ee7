package monitor

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/cofferdb/coffer/journal"
)

// shelf keeps what a meter appends.
type shelf struct {
	mu      sync.Mutex
	away    bool
	records map[journal.AppID][]Record
}

func (s *shelf) AppendMonitoring(_ context.Context, app journal.AppID, text []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.away {
		return journal.ErrUnavailable
	}
	r, err := ParseRecord(text)
	if err != nil {
		return err
	}
	s.records[app] = append(s.records[app], r)
	return nil
}

// TestMeter: nothing counted is lost or counted twice, also when the store is away
// for a minute.
func TestMeter(t *testing.T) {
	t.Parallel()
	store := &shelf{records: make(map[journal.AppID][]Record)}
	now := time.Unix(1_800_000_000, 0)
	m := NewMeter(store, nil, slog.New(slog.DiscardHandler), func() time.Time { return now })
	a, b := journal.AppID{1}, journal.AppID{2}
	for _, d := range []time.Duration{0, time.Millisecond, 2 * time.Millisecond, time.Minute} {
		m.Observe(a, Append, OK, d)
	}
	m.Observe(a, Append, Refused, time.Second)
	m.Observe(b, Tail, Failed, time.Hour)
	m.Observe(journal.AppID{}, Other, OK, time.Second) // nobody's
	m.Appended(a, 7)
	store.away = true
	now = now.Add(time.Minute)
	m.Flush(t.Context())
	m.Observe(a, Append, OK, time.Millisecond)
	m.Observe(a, Event, OK, time.Millisecond)
	store.away = false
	now = now.Add(time.Minute)
	m.Flush(t.Context())
	now = now.Add(time.Minute)
	m.Flush(t.Context()) // nothing
	if len(store.records) != 2 || len(store.records[a]) != 1 || len(store.records[b]) != 1 {
		t.Fatalf("stored: %+v", store.records)
	}
	r := store.records[a][0]
	want := Count{Count: 6, Refused: 1, Micros: uint64((time.Minute + time.Second + 4*time.Millisecond).Microseconds())}
	want.Buckets = [14]uint{0: 3, 1: 1, 9: 1, 13: 1}
	if got := *r.Operations[Append]; got != want || r.Events != 7 || r.Operations[Event].Count != 1 {
		t.Errorf("%+v, %d events, %+v; want %+v", got, r.Events, r.Operations[Event], want)
	}
	if !r.From.Equal(time.Unix(1_800_000_000, 0)) || !r.Until.Equal(r.From.Add(2*time.Minute)) {
		t.Errorf("from %v until %v", r.From, r.Until)
	}
	if got := *store.records[b][0].Operations[Tail]; got != (Count{Count: 1, Failed: 1}) {
		t.Errorf("a tail is timed: %+v", got)
	}
	var none *Meter
	none.Observe(a, Append, OK, 0)
	none.Appended(a, 1)
}

// TestMeterConcurrently counts from many goroutines while it is flushed.
func TestMeterConcurrently(t *testing.T) {
	t.Parallel()
	store := &shelf{records: make(map[journal.AppID][]Record)}
	m := NewMeter(store, NewMetrics("eu", slog.New(slog.DiscardHandler)), slog.New(slog.DiscardHandler), time.Now)
	ctx, cancel := context.WithCancel(t.Context())
	var run, work sync.WaitGroup
	run.Go(func() { m.Run(ctx, time.Microsecond) })
	app := journal.AppID{3}
	for range 8 {
		work.Go(func() {
			for range 500 {
				m.Observe(app, Replay, OK, time.Millisecond)
				m.Appended(app, 1)
			}
		})
	}
	work.Wait()
	cancel()
	run.Wait()
	var requests, events uint64
	for _, r := range store.records[app] {
		events += r.Events
		if c := r.Operations[Replay]; c != nil {
			requests += c.Count
		}
	}
	if requests != 4000 || events != 4000 {
		t.Errorf("%d requests and %d events were stored, 4000 were counted", requests, events)
	}
}

// FuzzParseRecord: what is accepted is written again as the same record.
func FuzzParseRecord(f *testing.F) {
	f.Add([]byte(`{"version":1,"from":"2026-01-01T00:00:00Z","until":"2026-01-01T00:01:00Z","events":3,"operations":{"append":{"count":1,"micros":20,"buckets":[1,0,0,0,0,0,0,0,0,0,0,0,0,0]}}}`))
	f.Add([]byte(`{"version":2}`))
	f.Add([]byte(`{"version":1,"user":"ann"}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		r, err := ParseRecord(text)
		if err != nil {
			if !errors.Is(err, journal.ErrCorrupt) {
				t.Errorf("%v is of no known kind", err)
			}
			return
		}
		again, err := json.Marshal(r)
		if err != nil {
			return // a time that RFC 3339 does not have
		}
		if _, err := ParseRecord(again); err != nil {
			t.Errorf("%s was read as %s: %v", text, again, err)
		}
	})
}
