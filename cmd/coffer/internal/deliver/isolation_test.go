package deliver_test

import (
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/cmd/coffer/internal/deliver"
	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections/history"
)

// TestAppendBesideHangingEndpoints: appending waits for no endpoint. While each of
// them has as many requests under way as it may, and answers none, hundreds of events
// are taken and read, and not one further request is made for them.
func TestAppendBesideHangingEndpoints(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	release := make(chan struct{})
	var once sync.Once
	t.Cleanup(func() { once.Do(func() { close(release) }) })
	var asked atomic.Int64
	rc := r.receive(func(http.ResponseWriter, got) bool { asked.Add(1); <-release; return false })
	const concurrency = 3
	var eps []endpoints.Endpoint
	for range 4 {
		eps = append(eps, r.endpoint(rc.URL, func(e *endpoints.Endpoint) { e.Concurrency = concurrency }))
	}
	positions := r.append(20, "group-1")
	most := int64(len(eps) * concurrency)
	r.eventually("as many requests as may be", func() bool { return asked.Load() == most })
	for range 10 {
		positions = append(positions, r.append(30, "group-1")...)
	}
	r.eventually("the last event to be read", func() bool {
		polled, _, err := r.engine.Poll(t.Context(), &eps[0], positions[len(positions)-2], 10, time.Time{})
		return err == nil && len(polled) == 1 && polled[0].Position == positions[len(positions)-1]
	})
	if n := asked.Load(); n != most {
		t.Errorf("%d requests, %d may be under way", n, most)
	}
	once.Do(func() { close(release) })
	for _, e := range eps {
		r.eventually("every event", func() bool { return r.progress(e).Done == uint64(len(positions)) })
	}
	if n := asked.Load(); n != int64(len(eps)*len(positions)) {
		t.Errorf("%d requests for %d events at %d endpoints", n, len(positions), len(eps))
	}
}

// TestReplayAndPollBesideLive: while events come, to an endpoint that keeps the order
// of each conversation, some are sent again and all are polled. What is live comes
// once, in order, with numbers without a hole; what is replayed comes once more; what
// is polled is everything, once, in order; each event has one id in all three.
func TestReplayAndPollBesideLive(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	rc := r.receive(nil)
	e := r.endpoint(rc.URL, func(e *endpoints.Endpoint) { e.Ordered = true })
	const conversations, each = 4, 100
	old := r.append(200, "group-0")
	r.eventually("the first events", func() bool { return r.progress(e).Done == 200 })

	var writers sync.WaitGroup
	var mu sync.Mutex
	all := append([]journal.Position(nil), old...)
	for c := range conversations {
		writers.Go(func() {
			for range each / 10 {
				positions := r.append(10, "group-"+strconv.Itoa(c))
				mu.Lock()
				all = append(all, positions...)
				mu.Unlock()
			}
		})
	}
	rp := must[deliver.Replay](t)(r.engine.StartReplay(t.Context(), &e, deliver.ReplaySpec{After: old[9], Before: old[150], Rate: deliver.MaxReplayRate}))
	const total = 200 + conversations*each
	var polled []deliver.Polled
	var after journal.Position
	r.eventually("every event by polling", func() bool {
		found, next, err := r.engine.Poll(t.Context(), &e, after, 7, r.journal.Oldest(r.app, time.Now()))
		if err != nil {
			t.Fatal(err)
		}
		polled, after = append(polled, found...), next
		return len(polled) >= total
	})
	writers.Wait()
	r.eventually("the end of the replay", func() bool {
		now, err := r.engine.Replay(t.Context(), e.App, rp.IDText())
		return err == nil && now.State == deliver.ReplayDone && now.Sent == 140 && now.Failed == 0
	})
	r.eventually("every event", func() bool { return r.progress(e).Done == total })

	ids := make(map[string]string)
	last := journal.Position(0)
	for _, p := range polled {
		if p.Position <= last {
			t.Errorf("polled %s after %s", p.Position, last)
		}
		last = p.Position
		ids[p.Position.String()] = p.MessageID
	}
	if len(polled) != total || len(ids) != total {
		t.Errorf("%d events polled, %d different ones, of %d", len(polled), len(ids), total)
	}
	live, again, numbers := make(map[string]int), make(map[string]int), make(map[string]bool)
	latest := make(map[string]journal.Position)
	for _, g := range rc.all() {
		b := g.bodies[0]
		if ids[b.Position] != g.id {
			t.Errorf("the event at %s is %s, and %s when it is polled", b.Position, g.id, ids[b.Position])
		}
		if b.Number == "" {
			again[b.Position]++
			continue
		}
		live[b.Position]++
		numbers[b.Number] = true
		position := must[journal.Position](t)(journal.ParsePosition(b.Position))
		if position <= latest[b.Conversation] {
			t.Errorf("%s came after %s in %s", position, latest[b.Conversation], b.Conversation)
		}
		latest[b.Conversation] = position
	}
	for i, p := range all {
		replayed := 0
		if i >= 10 && i < 150 {
			replayed = 1
		}
		if live[p.String()] != 1 || again[p.String()] != replayed {
			t.Errorf("the event at %s came %d times, and again %d, want %d", p, live[p.String()], again[p.String()], replayed)
		}
	}
	for n := 1; n <= total; n++ {
		if !numbers[strconv.Itoa(n)] {
			t.Errorf("number %d did not come", n)
		}
	}
}

// TestFiltersOfWhatWasRecalled: what is left of a message has no sender any more; it
// is polled and sent again for its own user, and for no other.
func TestFiltersOfWhatWasRecalled(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	message := func(kind journal.Type, id, target, sender string) {
		t.Helper()
		e := journal.Event{ID: id, Type: kind, Conversation: "group-1", ConversationType: journal.Group, Sender: sender, Target: target}
		if kind == journal.MessageSent {
			e.Data = jsontext.Value(`{"bodies":[{"type":"txt","msg":"hello"}]}`)
		}
		if res := must[[]journal.Result](t)(r.journal.Append(t.Context(), r.app.ID, e)); res[0].Err != nil {
			t.Fatal(res[0].Err)
		}
	}
	message(journal.MessageSent, "m1", "", "alice")
	message(journal.MessageSent, "m2", "", "bob")
	message(journal.MessageRecalled, "", "m1", "alice")
	rc := r.receive(nil)
	filtered := func(users ...string) endpoints.Endpoint {
		return r.endpoint(rc.URL, func(e *endpoints.Endpoint) { e.Users, e.Types = users, []journal.Type{journal.MessageSent} })
	}
	alice, bob, both := filtered("alice"), filtered("bob"), filtered()
	poll := func(e endpoints.Endpoint) (text string) {
		t.Helper()
		found, _, err := r.engine.Poll(t.Context(), &e, 0, 10, time.Time{})
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range found {
			text += p.Position.String() + " "
		}
		return text
	}
	r.eventually("the recall in the view", func() bool {
		recalled := false
		_, err := r.events.Replay(t.Context(), r.app.ID, history.Query{}, func(i history.Item) error {
			recalled = recalled || i.Recalled
			return nil
		})
		return err == nil && recalled
	})
	if a, b, all := poll(alice), poll(bob), poll(both); a != "1 " || b != "2 " || all != "1 2 " {
		t.Errorf("polled for alice %q, for bob %q, for both %q", a, b, all)
	}
	rp := must[deliver.Replay](t)(r.engine.StartReplay(t.Context(), &bob, deliver.ReplaySpec{Rate: 1000}))
	r.eventually("the end of the replay", func() bool {
		now, err := r.engine.Replay(t.Context(), bob.App, rp.IDText())
		if err == nil && now.State == deliver.ReplayDone && now.Sent != 1 {
			t.Fatalf("%d events were sent again for bob", now.Sent)
		}
		return err == nil && now.State == deliver.ReplayDone
	})
}
