package journal_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
)

// stored is the model's event.
type stored struct {
	position journal.Position
	time     time.Time
	size     int
	sender   string
}

// TestRandomOperations holds the journal against a model: a list of what was
// stored for each app, in order. Operations: batches with new events, repeated
// ones and conflicting ones, reading from anywhere, restarts of the server, and
// closing and opening the journal.
func TestRandomOperations(t *testing.T) {
	// As many as fit in some seconds; more with -rapid.checks and a longer one.
	began := time.Now()
	rapid.Check(t, func(rt *rapid.T) {
		always := rapid.Bool().Draw(rt, "sync always")
		if time.Since(began) > 8*time.Second {
			return
		}
		w := &world{dir: t.TempDir()}
		w.kms = provider(t, w.dir)
		var err error
		open := func() {
			if w.srv, err = embedded.Start(t.Context(), embedded.Options{StoreDir: w.dir + "/nats", SyncAlways: always}); err != nil {
				rt.Fatal(err)
			}
			if w.nc, err = w.srv.Connect(); err != nil {
				rt.Fatal(err)
			}
			if w.Journal, err = journal.Open(t.Context(), w.config()); err != nil {
				rt.Fatal(err)
			}
		}
		open()
		defer func() { w.end(t) }()
		apps := []journal.AppID{newApp(t, w.Journal), newApp(t, w.Journal)}
		models := make([]map[string]stored, len(apps)) // since the journal was opened
		for i := range models {
			models[i] = map[string]stored{}
		}
		var order []string // "app/id" in the order of the stream
		next := 0

		appendSome := func(rt *rapid.T) {
			a := rapid.IntRange(0, len(apps)-1).Draw(rt, "app")
			n := rapid.IntRange(1, 40).Draw(rt, "events")
			var events []journal.Event
			var want []error
			for range n {
				kind := rapid.IntRange(0, 9).Draw(rt, "kind")
				var e journal.Event
				switch old := pick(rt, models[a]); {
				case kind == 0 && old != "":
					e = message(old, models[a][old].sender, models[a][old].size)
					want = append(want, nil)
				case kind == 1 && old != "":
					e = message(old, models[a][old].sender, models[a][old].size+1)
					want = append(want, journal.ErrConflict)
				case kind == 2:
					e = message("no*", "alice", 5)
					want = append(want, journal.ErrInvalid)
				default:
					next++
					e = message(fmt.Sprintf("e%d", next), fmt.Sprintf("user%d", next%3), rapid.IntRange(0, 3000).Draw(rt, "size"))
					want = append(want, nil)
				}
				events = append(events, e)
			}
			results, err := w.Append(t.Context(), apps[a], events...)
			if err != nil {
				rt.Fatal(err)
			}
			for i, r := range results {
				if !errors.Is(r.Err, want[i]) || want[i] == nil && r.Err != nil {
					rt.Fatalf("event %s: %v, want %v", events[i].ID, r.Err, want[i])
				}
				if r.Err != nil {
					continue
				}
				if before, ok := models[a][r.ID]; ok {
					if !r.Duplicate || r.Position != before.position || !r.Time.Equal(before.time) {
						rt.Fatalf("event %s again: %+v, first %+v", r.ID, r, before)
					}
					continue
				}
				order = append(order, apps[a].String()+"/"+r.ID)
				if r.Duplicate || r.Position.Sequence() != uint64(len(order)) {
					rt.Fatalf("event %s: %+v, expected sequence %d", r.ID, r, len(order))
				}
				size := len(events[i].Data) - len(`{"bodies":[{"type":"txt","msg":""}]}`)
				models[a][r.ID] = stored{r.Position, r.Time, size, events[i].Sender}
			}
		}
		rt.Repeat(map[string]func(*rapid.T){
			"append": appendSome,
			"restart the server": func(rt *rapid.T) {
				if err := w.srv.Restart(t.Context()); err != nil {
					rt.Fatal(err)
				}
			},
			"open again": func(*rapid.T) {
				w.end(t)
				open()
				for i := range models { // without an index, what was before is not remembered
					models[i] = map[string]stored{}
				}
			},
			"read": func(rt *rapid.T) {
				after := rapid.IntRange(0, len(order)).Draw(rt, "after")
				if after == len(order) {
					return
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				done := errors.New("done")
				at := after
				err := w.Read(ctx, enterprise(), uint64(after), "", func(batch []journal.Sealed) error {
					for _, s := range batch {
						plain, err := w.OpenRecord(ctx, nil, s.App, s.Record)
						if err != nil {
							return err
						}
						if got := s.App.String() + "/" + idOf(string(plain)); got != order[at] || s.Sequence != uint64(at+1) {
							return fmt.Errorf("sequence %d is %s, expected %s", s.Sequence, got, order[at])
						}
						at++
					}
					if at == len(order) {
						return done
					}
					return nil
				})
				if !errors.Is(err, done) {
					rt.Fatal(err)
				}
			},
		})
	})
}

// pick returns an id of the model, or none.
func pick(rt *rapid.T, model map[string]stored) string {
	if len(model) == 0 {
		return ""
	}
	// In a fixed order, so that a failure can be replayed.
	return rapid.SampledFrom(slices.Sorted(maps.Keys(model))).Draw(rt, "old")
}
