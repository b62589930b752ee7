package deliver_test

import (
	"net/http"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/deliver"
	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/journal"
)

// TestAskedOfTheOtherProcess: what is asked of a process that an endpoint does not
// belong to is done by the one it belongs to: deliveries sent again at once, a replay
// begun, and one cancelled. A replay goes on when its process ends.
func TestAskedOfTheOtherProcess(t *testing.T) {
	t.Parallel()
	x := startExternal(t)
	lease := func(r *rig) { r.external, r.beat = x, 150*time.Millisecond }
	a := newRig(t, lease)
	b := newRig(t, lease, func(r *rig) { r.provider, r.app, r.roots = a.own, a.app, a.roots })
	rc := a.receive(func(w http.ResponseWriter, _ got) bool {
		w.Header().Set("Retry-After", "86400")
		w.WriteHeader(http.StatusServiceUnavailable)
		return true
	})
	id := endpoints.NewID()
	a.eventually("a part of the other's", func() bool {
		if _, ok, _ := b.leases.Holds(id); ok {
			return true
		}
		id = endpoints.NewID()
		return false
	})
	e := a.endpoint(rc.URL, func(e *endpoints.Endpoint) { e.ID, e.Ordered = id, true })
	positions := a.append(40, "group-1")
	a.eventually("a failure", func() bool { return a.progress(e).Waiting > 0 })
	rc.answers(nil)
	token, _, _ := b.leases.Holds(e.ID)
	// The endpoint has asked for a day.
	if n, err := a.engine.RetryFailed(t.Context(), &e, time.Time{}, time.Now().Add(time.Hour)); n == 0 || err != nil {
		t.Fatalf("%d deliveries, %v", n, err)
	}
	if now, held, _ := b.leases.Holds(e.ID); held && now == token {
		if now := must[endpoints.Endpoint](t)(a.endpoints.Endpoint(t.Context(), e.App, e.ID)); now.Revision() == e.Revision() {
			t.Error("the other process is not told")
		}
	}
	a.eventually("every event", func() bool { return a.progress(e).Done == 40 })

	token, _, _ = b.leases.Holds(e.ID)
	cancelled := must[deliver.Replay](t)(a.engine.StartReplay(t.Context(), &e, deliver.ReplaySpec{Rate: 4}))
	replayed := func(r *rig, id [16]byte) journal.DeliveryState {
		p, _, err := r.view.Replay(t.Context(), e.App, e.ID, id)
		if err != nil {
			t.Fatal(err)
		}
		return p.State
	}
	a.eventually("the beginning of a replay", func() bool { return replayed(a, cancelled.ID) == journal.DeliveryWaiting })
	if now, err := a.engine.CancelReplay(t.Context(), e.App, cancelled.IDText()); err != nil || now.State != deliver.ReplayCancelled {
		t.Fatalf("%+v, %v", now, err)
	}
	// Whoever runs it notes that, unless the endpoint moved on meanwhile: who gets it
	// then does not begin.
	a.eventually("its end", func() bool {
		now, held, _ := b.leases.Holds(e.ID)
		return replayed(a, cancelled.ID) == journal.DeliveryParked || !held || now != token
	})

	before := rc.requests()
	moved := must[deliver.Replay](t)(a.engine.StartReplay(t.Context(), &e, deliver.ReplaySpec{Rate: 20}))
	a.eventually("some of a replay", func() bool { return rc.requests() > before+5 })
	b.stopEngine()
	b.stopLeases(true)
	a.eventually("the rest of it", func() bool {
		now, err := a.engine.Replay(t.Context(), e.App, moved.IDText())
		return err == nil && now.State == deliver.ReplayDone && now.Sent == 40
	})
	if found, _ := rc.counts(positions); found != 40 {
		t.Errorf("%d of 40 events", found)
	}
}
