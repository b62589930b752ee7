package deliver_test

import (
	"bytes"
	"errors"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/cmd/coffer/internal/deliver"
	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections/callbacks"
)

// clock is the machine's, moved, until it is stopped.
type clock struct {
	mu    sync.Mutex // guards what follows
	ahead time.Duration
	stood time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.stood.IsZero() {
		return c.stood
	}
	return time.Now().Add(c.ahead)
}

// runFrom lets the clock go on from a time.
func (c *clock) runFrom(at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ahead, c.stood = time.Until(at), time.Time{}
}

// stop lets the clock stand at a time.
func (c *clock) stop(at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stood = at
}

// TestMessageEndsBeforeItsDelivery has an endpoint fail until a message's life is
// over: to its last millisecond it is sent with its content, from then on without,
// under the same webhook-id and number, and that delivery counts.
func TestMessageEndsBeforeItsDelivery(t *testing.T) {
	t.Parallel()
	clock := &clock{}
	r := newRig(t, short, func(r *rig) { r.now = clock.now })
	const text = "only while it lives"
	gone := []byte(`"gone":"expired"`)
	rc := r.receive(func(w http.ResponseWriter, g got) bool {
		if bytes.Contains(g.body, gone) {
			return false
		}
		w.WriteHeader(http.StatusServiceUnavailable)
		return true
	})
	e := r.endpoint(rc.URL, func(e *endpoints.Endpoint) { e.Mode = endpoints.Full })
	life := journal.DefaultPlans()[3].Retention
	end := time.Now().Add(time.Hour).Truncate(time.Millisecond) // an hour before callbacks are kept no longer
	results := must[[]journal.Result](t)(r.journal.Append(t.Context(), r.app.ID, journal.Event{
		Type: journal.MessageSent, Conversation: "group-1", ConversationType: journal.Group, Sender: "alice", Time: end.Add(-life),
		Data: jsontext.Value(`{"bodies":[{"type":"txt","msg":"` + text + `"}]}`),
	}))
	if results[0].Err != nil {
		t.Fatal(results[0].Err)
	}
	r.eventually("a first attempt", func() bool { return r.progress(e).Waiting == 1 })
	first := rc.requests()
	clock.stop(end) // the last moment at which it is there
	r.eventually("an attempt at its end", func() bool { return rc.requests() > first })
	if all := rc.all(); !bytes.Contains(all[len(all)-1].body, []byte(text)) {
		t.Errorf("at the last moment of its life it came as %s", all[len(all)-1].body)
	}
	clock.runFrom(end.Add(time.Millisecond))
	r.eventually("the delivery", func() bool { p := r.progress(e); return p.Done+p.Parked == 1 })
	if p := r.progress(e); p.Done != 1 {
		t.Fatalf("the delivery: %+v", p)
	}
	all := rc.all()
	for i, g := range all {
		last := i == len(all)-1
		b := g.bodies[0]
		if has := bytes.Contains(g.body, []byte(text)); has == last || bytes.Contains(g.body, gone) != last {
			t.Errorf("request %d of %d: %s", i+1, len(all), g.body)
		}
		if last && (strings.Contains(string(g.body), "alice") || strings.Contains(string(g.body), "group-1")) {
			t.Errorf("what is left of it names who and where: %s", g.body)
		}
		if g.id != all[0].id || b.Number != "1" || b.Position != results[0].Position.String() {
			t.Errorf("request %d is %s, number %s, position %s", i+1, g.id, b.Number, b.Position)
		}
	}
}

// TestDeliveryEnds: when callbacks are no longer kept a delivery is parked, and nothing
// is sent or shown any more. One whose endpoint fails to the end is given up after the
// last attempt before it, with that attempt's answer; one whose end comes while it
// waits, here for an endpoint that is disabled, without another attempt.
func TestDeliveryEnds(t *testing.T) {
	t.Parallel()
	clock := &clock{}
	r := newRig(t, short, func(r *rig) { r.now = clock.now })
	fail := func(w http.ResponseWriter, _ got) bool { w.WriteHeader(http.StatusBadGateway); return true }
	failing, waiting := r.receive(fail), r.receive(fail)
	a, b := r.endpoint(failing.URL), r.endpoint(waiting.URL)
	set := func(e endpoints.Endpoint, state endpoints.State) {
		t.Helper()
		must[endpoints.Endpoint](t)(r.endpoints.Change(t.Context(), e.App, e.ID, func(e *endpoints.Endpoint) error { e.State = state; return nil }))
	}
	enable := func(e endpoints.Endpoint) {
		if now, err := r.endpoints.Endpoint(t.Context(), e.App, e.ID); err == nil && now.State == endpoints.Disabled {
			set(e, endpoints.Enabled) // it has failed for most of the time
		}
	}
	parked := func(e endpoints.Endpoint) bool {
		enable(e)
		return r.progress(e).Parked == 1
	}
	shown := func(e endpoints.Endpoint) []deliver.Outcome {
		t.Helper()
		return must[[]deliver.Outcome](t)(r.engine.Outcomes(t.Context(), &e, callbacks.Query{Limit: 2}))
	}
	r.append(1, "group-1")
	r.eventually("three attempts", func() bool { return failing.requests() >= 3 && r.progress(b).Waiting == 1 })
	set(b, endpoints.Disabled)
	r.stopEngine() // so that nothing of b is under way
	r.again()
	end := time.UnixMilli(shown(b)[0].Arrived).Add(r.retention.Callbacks)
	clock.stop(end.Add(-time.Millisecond))
	r.eventually("the last attempt", func() bool { return parked(a) })
	if list := shown(a); len(list) != 1 || list[0].State != journal.DeliveryParked || list[0].Status != http.StatusBadGateway {
		t.Errorf("what failed to the end: %+v", list)
	}
	if list := shown(b); len(list) != 1 || list[0].State != journal.DeliveryWaiting {
		t.Errorf("what waits at the end: %+v", list)
	}
	tried, sent := failing.requests(), waiting.requests()
	clock.runFrom(end.Add(time.Millisecond))
	r.eventually("the end of what waited", func() bool { return parked(b) })
	for _, e := range []endpoints.Endpoint{a, b} {
		if list := shown(e); len(list) != 0 {
			t.Errorf("after its end: %+v", list)
		}
		// Asking for what is parked brings back nothing whose time is over.
		if n, err := r.engine.Requeue(t.Context(), &e, time.Time{}); n != 0 || !errors.Is(err, deliver.ErrNoDelivery) {
			t.Errorf("%d were taken up again, %v", n, err)
		}
	}
	if n, m := failing.requests(), waiting.requests(); n != tried || m != sent {
		t.Errorf("%d and %d requests after the end", n-tried, m-sent)
	}
}
