package monitor

import (
	"log/slog"
	"testing"
	"time"

	"github.com/cofferdb/coffer/journal"
)

// appended counts what the server counts of one append.
func appended(m *Meter, app journal.AppID) {
	m.Appended(app, 1)
	m.Observe(app, Append, OK, 3*time.Millisecond)
}

// TestCountingAllocatesNothing: an append pays for being counted with time only, and
// not with memory, once its app has been counted in the minute.
func TestCountingAllocatesNothing(t *testing.T) {
	discard := slog.New(slog.DiscardHandler)
	m := NewMeter(&shelf{records: make(map[journal.AppID][]Record)}, NewMetrics("eu", discard), discard, time.Now)
	for _, op := range []Operation{Append, Replay, Tail, Event, Messages, Conversations, Inbox, Profile, Attachment, Endpoints, Export, Reading, Erasure, Deliver, Admin, Other} {
		for _, outcome := range []Outcome{OK, Refused, Failed} {
			app := journal.AppID{1}
			m.Observe(app, op, outcome, time.Millisecond)
			if n := testing.AllocsPerRun(100, func() { m.Observe(app, op, outcome, time.Millisecond) }); n != 0 {
				t.Errorf("counting %s, %s, allocates %g times", op, outcome, n)
			}
		}
	}
	if n := testing.AllocsPerRun(100, func() { appended(m, journal.AppID{1}) }); n != 0 {
		t.Errorf("counting an append allocates %g times", n)
	}
}

// BenchmarkAppended is what one append pays for being counted, in the metrics of the
// region and in the minute of its app: beside others who count too, and with as many
// apps as a busy region has in a minute.
func BenchmarkAppended(b *testing.B) {
	discard := slog.New(slog.DiscardHandler)
	meter := func() *Meter {
		m := NewMeter(&shelf{}, NewMetrics("eu", discard), discard, time.Now)
		for i := range 10_000 {
			appended(m, journal.AppID{byte(i), byte(i >> 8)})
		}
		return m
	}
	b.Run("alone", func(b *testing.B) {
		m := meter()
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			appended(m, journal.AppID{byte(i), byte(i >> 8 % 39)})
		}
	})
	b.Run("parallel", func(b *testing.B) {
		m := meter()
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for i := 0; pb.Next(); i++ {
				appended(m, journal.AppID{byte(i), byte(i >> 8 % 39)})
			}
		})
	})
}
