package deliver_test

import (
	"io"
	"net/http"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/deliver"
	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/cmd/coffer/internal/webhook"
	"github.com/cofferdb/coffer/projections/callbacks"
)

// TestDelivers follows events to an endpoint: all of them, once, signed, with
// numbers without a gap, before and after a restart.
func TestDelivers(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	rc := r.receive(nil)
	e := r.endpoint(rc.URL)
	first := r.append(200, "group-1")
	r.eventually("every event", func() bool { return r.progress(e).Done == 200 })
	r.restart()
	second := r.append(100, "group-2")
	r.eventually("every event after the restart", func() bool { return r.progress(e).Done == 300 })
	if found, again := rc.counts(append(first, second...)); found != 300 || again != 0 {
		t.Fatalf("%d of 300 events came, %d again", found, again)
	}
	secret := must[*webhook.Secret](t)(webhook.ParseSecret(string(e.Secrets[0].Key)))
	numbers, ids := make(map[string]bool), make(map[string]bool)
	for _, g := range rc.all() {
		if err := secret.Verify(g.header, g.body, time.Now()); err != nil {
			t.Fatal(err)
		}
		numbers[g.bodies[0].Number], ids[g.id] = true, true
		if b := g.bodies[0]; b.Type != "message.sent" || b.ID == "" || b.Conversation == "" {
			t.Fatalf("not an event: %s", g.body)
		}
	}
	for n := 1; n <= 300; n++ {
		if !numbers[strconv.Itoa(n)] {
			t.Errorf("number %d did not come", n)
		}
	}
	if len(ids) != 300 {
		t.Errorf("%d webhook ids for 300 events", len(ids))
	}
	if p := r.progress(e); p.Number != 300 || p.Waiting+p.Held+p.Parked != 0 {
		t.Errorf("the view says %+v", p)
	}
}

// TestRetries has an endpoint refuse each event once.
func TestRetries(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(r *rig) { r.retention.Callbacks = 2 * time.Hour }) // the first delay is then 140 ms
	seen := make(map[string]bool)
	rc := r.receive(nil)
	rc.answers(func(w http.ResponseWriter, g got) bool {
		rc.mu.Lock()
		defer rc.mu.Unlock()
		if seen[g.id] {
			return false
		}
		seen[g.id] = true
		http.Error(w, "try again", http.StatusInternalServerError)
		return true
	})
	e := r.endpoint(rc.URL)
	positions := r.append(4, "group-1")
	r.eventually("every event", func() bool { p := r.progress(e); return p.Done == 4 && p.Waiting == 0 })
	if found, again := rc.counts(positions); found != 4 || again != 4 {
		t.Errorf("%d of 4 events came, %d again; each should twice", found, again)
	}
}

// TestCutAnswer: a success that breaks off is none, whatever its status was. The event
// comes once more, under the same id, and is counted as tried twice.
func TestCutAnswer(t *testing.T) {
	t.Parallel()
	r := newRig(t, short)
	var mu sync.Mutex
	var ids []string
	rc := r.receive(func(w http.ResponseWriter, g got) bool {
		mu.Lock()
		ids = append(ids, g.id)
		first := len(ids) == 1
		mu.Unlock()
		if !first {
			return false
		}
		w.Header().Set("Content-Length", "10")
		w.WriteHeader(http.StatusOK)
		_, _ = io.WriteString(w, "thanks")
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	})
	e := r.endpoint(rc.URL)
	r.append(1, "group-1")
	r.eventually("the event", func() bool { return r.progress(e).Done == 1 })
	list := must[[]deliver.Outcome](t)(r.engine.Outcomes(t.Context(), &e, callbacks.Query{}))
	mu.Lock()
	defer mu.Unlock()
	if len(ids) != 2 || ids[0] != ids[1] || len(list) != 1 || list[0].Attempts != 2 {
		t.Errorf("it came as %q: %+v", ids, list)
	}
}

// TestFilters sends only what an endpoint asks for.
func TestFilters(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	rc := r.receive(nil)
	e := r.endpoint(rc.URL, func(e *endpoints.Endpoint) { e.Conversations = []string{"group-2", "group-3"} })
	r.append(500, "group-1") // several reads have nothing for it
	wanted := append(r.append(10, "group-2"), r.append(5, "group-3")...)
	r.eventually("the events", func() bool { return r.progress(e).Done == 15 })
	if found, _ := rc.counts(wanted); found != 15 || len(rc.all()) != 15 {
		t.Errorf("%d of 15 events, %d requests", found, len(rc.all()))
	}
}
