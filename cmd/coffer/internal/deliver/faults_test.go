package deliver_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/cmd/coffer/internal/deliver"
	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/cmd/coffer/internal/webhook"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/kmstest"
	"github.com/cofferdb/coffer/kms/local"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/callbacks"
)

// short makes delays short: three days become two hours, 5 seconds 140 ms.
func short(r *rig) { r.retention.Callbacks = 2 * time.Hour }

// quick ends attempts early.
func quick(r *rig) { r.timeout = 4 * time.Second }

// TestBadReceivers is the row of docs/reliability.md about endpoints that
// misbehave: none of them holds up the one that works, nothing is followed
// anywhere, and what they send is not taken in.
func TestBadReceivers(t *testing.T) {
	t.Parallel()
	r := newRig(t, quick)
	stop := make(chan struct{})
	t.Cleanup(func() { close(stop) })
	elsewhere := r.receive(nil)
	cases := map[string]func(w http.ResponseWriter, g got) bool{
		"hangs":  func(http.ResponseWriter, got) bool { <-stop; return true },
		"resets": func(http.ResponseWriter, got) bool { panic(http.ErrAbortHandler) },
		"fails":  func(w http.ResponseWriter, _ got) bool { w.WriteHeader(500); return true },
		"redirects": func(w http.ResponseWriter, _ got) bool {
			w.Header().Set("Location", elsewhere.URL)
			w.WriteHeader(http.StatusTemporaryRedirect)
			return true
		},
		"floods": func(w http.ResponseWriter, _ got) bool {
			w.WriteHeader(400)
			block := bytes.Repeat([]byte("x"), 64<<10)
			for range 16 << 10 { // 1 GB, if somebody reads it
				if _, err := w.Write(block); err != nil {
					return true
				}
			}
			return true
		},
		"drips": func(w http.ResponseWriter, _ got) bool {
			w.Header().Set("X-Drip", "1")
			for {
				w.WriteHeader(http.StatusEarlyHints)
				select {
				case <-stop:
					return true
				case <-time.After(50 * time.Millisecond):
				}
			}
		},
	}
	bad := make(map[string]endpoints.Endpoint)
	for name, answer := range cases {
		bad[name] = r.endpoint(r.receive(answer).URL)
	}
	rc := r.receive(nil)
	good := r.endpoint(rc.URL)
	positions := r.append(200, "group-1")
	r.eventually("every event at the endpoint that works", func() bool { return r.progress(good).Done == 200 })
	for name, e := range bad {
		r.eventually("a recorded failure of the one that "+name, func() bool { p := r.progress(e); return p.Waiting > 0 && p.Failing > 0 })
		if p := r.progress(e); p.Done != 0 {
			t.Errorf("%d deliveries to the endpoint that %s", p.Done, name)
		}
	}
	if found, again := rc.counts(positions); found != 200 || again != 0 {
		t.Errorf("%d of 200 events, %d again", found, again)
	}
	if n := len(elsewhere.all()); n != 0 {
		t.Errorf("%d redirects were followed", n)
	}
	outcomes, err := r.engine.Outcomes(t.Context(), new(bad["floods"]), callbacks.Query{State: journal.DeliveryWaiting, Limit: 1})
	if err != nil || len(outcomes) != 1 || len(outcomes[0].Answer) != 512 || outcomes[0].Attempt.Status != 400 {
		t.Errorf("what is kept of a flood: %+v, %v", outcomes, err)
	}
}

// TestGone has an endpoint answer 410: it is disabled, and gets the event when it
// is enabled again.
func TestGone(t *testing.T) {
	t.Parallel()
	r := newRig(t, short)
	rc := r.receive(func(w http.ResponseWriter, _ got) bool { w.WriteHeader(http.StatusGone); return true })
	e := r.endpoint(rc.URL, func(e *endpoints.Endpoint) { e.Concurrency = 1 })
	positions := r.append(3, "group-1")
	r.eventually("the end", func() bool {
		now, err := r.endpoints.Endpoint(t.Context(), e.App, e.ID)
		return err == nil && now.State == endpoints.Disabled && now.Reason == endpoints.ReasonGone
	})
	r.eventually("the word of it", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return len(r.disabled) == 1
	})
	rc.answers(nil)
	if _, err := r.endpoints.Change(t.Context(), e.App, e.ID, func(e *endpoints.Endpoint) error {
		e.State, e.Reason = endpoints.Enabled, ""
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	r.eventually("every event", func() bool { return r.progress(e).Done == 3 })
	if found, _ := rc.counts(positions); found != 3 {
		t.Errorf("%d of 3 events", found)
	}
}

// TestToldLater: a process that ends when it has disabled an endpoint, and has told
// nobody, leaves that to the next one; an endpoint that is enabled meanwhile is not
// forgotten.
func TestToldLater(t *testing.T) {
	t.Parallel()
	r := newRig(t, short, func(r *rig) { r.deaf = true })
	rc := r.receive(func(w http.ResponseWriter, _ got) bool { w.WriteHeader(http.StatusGone); return true })
	e := r.endpoint(rc.URL)
	r.append(1, "group-1")
	r.eventually("an attempt to tell", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.turnedAway > 0
	})
	r.stopEngine()
	stored := must[endpoints.Endpoint](t)(r.endpoints.Endpoint(t.Context(), e.App, e.ID))
	if stored.State != endpoints.Disabled || stored.Untold == nil || stored.Untold.Reason != endpoints.ReasonGone || stored.Untold.Since.IsZero() {
		t.Fatalf("stored %+v", stored)
	}
	rc.answers(nil)
	must[endpoints.Endpoint](t)(r.endpoints.Change(t.Context(), e.App, e.ID, func(e *endpoints.Endpoint) error {
		e.State, e.Reason = endpoints.Enabled, ""
		return nil
	}))
	r.mu.Lock()
	if len(r.disabled) != 0 {
		t.Errorf("told of %v", r.disabled)
	}
	r.deaf = false
	r.mu.Unlock()
	r.again()
	r.eventually("the event that was kept for it", func() bool { return r.progress(e).Done == 1 })
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.disabled) != 1 || *r.disabled[0].Untold != *stored.Untold {
		t.Errorf("told of %+v, not of %+v", r.disabled, stored.Untold)
	}
	if now := must[endpoints.Endpoint](t)(r.endpoints.Endpoint(t.Context(), e.App, e.ID)); now.Untold != nil || now.State != endpoints.Enabled {
		t.Errorf("noted as %+v", now)
	}
}

// TestParksAndReplays gives deliveries up at the end of their time, and sends
// them again when asked to.
func TestParksAndReplays(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(r *rig) { r.retention.Callbacks = 5 * time.Second })
	rc := r.receive(func(w http.ResponseWriter, _ got) bool { w.WriteHeader(500); return true })
	e := r.endpoint(rc.URL)
	positions := r.append(5, "group-1")
	var ids []string
	r.eventually("five parked deliveries", func() bool {
		now, err := r.endpoints.Endpoint(t.Context(), e.App, e.ID)
		if err == nil && now.State == endpoints.Disabled { // it fails for most of the time
			_, _ = r.endpoints.Change(t.Context(), e.App, e.ID, func(e *endpoints.Endpoint) error { e.State = endpoints.Enabled; return nil })
		}
		return r.progress(e).Parked == 5
	})
	for _, g := range rc.all() {
		if !slices.Contains(ids, g.id) {
			ids = append(ids, g.id)
		}
	}
	rc.answers(nil)
	if _, err := r.endpoints.Change(t.Context(), e.App, e.ID, func(e *endpoints.Endpoint) error { e.State = endpoints.Enabled; return nil }); err != nil {
		t.Fatal(err)
	}
	if n, err := r.engine.Requeue(t.Context(), &e, time.Time{}); n != 5 || err != nil {
		t.Fatalf("%d deliveries, %v", n, err)
	}
	r.eventually("all of them", func() bool { p := r.progress(e); return p.Done == 5 && p.Parked == 0 })
	if found, _ := rc.counts(positions); found != 5 {
		t.Errorf("%d of 5 events", found)
	}
	for _, g := range rc.all() {
		if !slices.Contains(ids, g.id) {
			t.Errorf("the id %s is new", g.id)
		}
	}
}

// TestReplay sends a range again beside what is new, with the ids of the first
// time, and is cancelled on the way.
func TestReplay(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	rc := r.receive(nil)
	e := r.endpoint(rc.URL)
	positions := r.append(100, "group-1")
	r.eventually("every event", func() bool { return r.progress(e).Done == 100 })
	rp, err := r.engine.StartReplay(t.Context(), &e, deliver.ReplaySpec{After: positions[9], Before: positions[60], Rate: 10_000})
	if err != nil {
		t.Fatal(err)
	}
	live := r.append(50, "group-2")
	r.eventually("the end of the replay", func() bool {
		now, err := r.engine.Replay(t.Context(), e.App, rp.IDText())
		return err == nil && now.State == deliver.ReplayDone && now.Sent == 50 && now.Failed == 0
	})
	r.eventually("the new events", func() bool { return r.progress(e).Done == 150 })
	if _, again := rc.counts(positions[10:60]); again != 50 {
		t.Errorf("%d events came again, 50 should", again)
	}
	if _, again := rc.counts(append(live, append(positions[:10:10], positions[60:]...)...)); again != 0 {
		t.Errorf("%d events came again that nobody asked for", again)
	}
	ids := make(map[string]string)
	for _, g := range rc.all() {
		p := g.bodies[0].Position
		if ids[p] != "" && ids[p] != g.id {
			t.Errorf("the event at %s has two ids", p)
		}
		ids[p] = g.id
	}
	slow, err := r.engine.StartReplay(t.Context(), &e, deliver.ReplaySpec{Rate: 1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.engine.CancelReplay(t.Context(), e.App, slow.IDText()); err != nil {
		t.Fatal(err)
	}
	if now, err := r.engine.Replay(t.Context(), e.App, slow.IDText()); err != nil || now.State != deliver.ReplayCancelled || now.Sent > 20 {
		t.Errorf("a cancelled replay: %+v, %v", now, err)
	}
}

// TestOrdered keeps the order within a conversation although one of its events
// fails at first, and lets other conversations pass.
func TestOrdered(t *testing.T) {
	t.Parallel()
	r := newRig(t, short)
	var refused atomic.Int32
	rc := r.receive(nil)
	e := r.endpoint(rc.URL, func(e *endpoints.Endpoint) { e.Ordered = true })
	rc.answers(func(w http.ResponseWriter, g got) bool {
		if g.bodies[0].Number == "4" && refused.Add(1) == 1 {
			w.WriteHeader(503)
			return true
		}
		return false
	})
	first := r.append(20, "group-1")
	other := r.append(20, "group-2")
	r.eventually("every event", func() bool { return r.progress(e).Done == 40 })
	order := make(map[string][]string)
	for _, g := range rc.all() {
		b := g.bodies[0]
		if n := order[b.Conversation]; len(n) > 0 && n[len(n)-1] == b.Position {
			continue // refused before
		}
		order[b.Conversation] = append(order[b.Conversation], b.Position)
	}
	for name, want := range map[string][]journal.Position{"group-1": first, "group-2": other} {
		var text []string
		for _, p := range want {
			text = append(text, p.String())
		}
		if !slices.Equal(order[name], text) {
			t.Errorf("%s came as %v", name, order[name])
		}
	}
}

// TestBatches puts several events into a request.
func TestBatches(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	rc := r.receive(nil)
	r.stopEngine()
	e := r.endpoint(rc.URL, func(e *endpoints.Endpoint) { e.Batch = 10 })
	positions := r.append(100, "group-1")
	r.start()
	r.eventually("every event", func() bool { return r.progress(e).Done == 100 })
	if found, again := rc.counts(positions); found != 100 || again != 0 || len(rc.all()) > 20 {
		t.Errorf("%d of 100 events, %d again, in %d requests", found, again, len(rc.all()))
	}
}

// TestRotation rotates the secret under load: a receiver that changes its own
// secret at some time within the overlap refuses nothing.
func TestRotation(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	var secret atomic.Pointer[webhook.Secret]
	var refused atomic.Int32
	rc := r.receive(func(w http.ResponseWriter, g got) bool {
		if err := secret.Load().Verify(g.header, g.body, time.Now()); err != nil {
			refused.Add(1)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		return false
	})
	e := r.endpoint(rc.URL, func(e *endpoints.Endpoint) {
		parsed, err := webhook.ParseSecret(string(e.Secrets[0].Key))
		if err != nil {
			t.Error(err)
		}
		secret.Store(parsed)
	})
	total := uint64(0)
	for round := range 5 {
		r.append(100, "group-1")
		total += 100
		kind := []webhook.Kind{webhook.Symmetric, webhook.Asymmetric}[round%2]
		fresh := must[*webhook.Secret](t)(webhook.NewSecret(kind))
		if _, err := r.endpoints.Change(t.Context(), e.App, e.ID, func(e *endpoints.Endpoint) error {
			now := time.Now()
			old := e.Signing(now)
			old[0].Until = now.Add(time.Hour)
			e.Secrets = append([]endpoints.Secret{{Key: endpoints.Key(fresh.Reveal()), Created: now}}, old[:1]...)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		r.append(100, "group-1")
		total += 100
		r.eventually("every event", func() bool { return r.progress(e).Done == total })
		secret.Store(fresh)
	}
	if n := refused.Load(); n != 0 {
		t.Errorf("%d signatures were refused", n)
	}
}

// TestRebuild rebuilds the view in the middle of delivery, and starts anew from
// it: nothing is sent twice, and the view is what it was.
func TestRebuild(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	rc := r.receive(nil)
	e := r.endpoint(rc.URL)
	positions := r.append(500, "group-1")
	for range 3 {
		if err := r.outcomes.Rebuild(t.Context(), "callbacks"); err != nil {
			t.Fatal(err)
		}
		r.stopEngine()
		r.again()
		positions = append(positions, r.append(100, "group-1")...)
	}
	r.eventually("every event", func() bool { return r.progress(e).Done == uint64(len(positions)) })
	if found, again := rc.counts(positions); found != len(positions) || again != 0 {
		t.Errorf("%d of %d events, %d again", found, len(positions), again)
	}
	before := dump(t, r, e)
	if err := r.outcomes.Rebuild(t.Context(), "callbacks"); err != nil {
		t.Fatal(err)
	}
	if after := dump(t, r, e); !slices.Equal(before, after) {
		t.Error("the rebuilt view is another one")
	}
}

// TestStoppedView has a record in the callback stream that cannot be applied, so
// that the view lacks the outcomes behind it: a process that starts then sends
// nothing, rather than again what they are of.
func TestStoppedView(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	rc := r.receive(nil)
	e := r.endpoint(rc.URL)
	ref := endpoints.Ref{App: e.App, ID: e.ID}
	positions := r.append(10, "group-1")
	r.eventually("the first events", func() bool { return r.progress(e).Done == 10 })
	stream, _, err := r.journal.Callbacks().Locate(t.Context(), r.app.ID, 0)
	if err != nil {
		t.Fatal(err)
	}
	subject := strings.Replace(stream, "coffer_eu_cb_", "cb.", 1) + "." + r.app.ID.String()
	js := must[jetstream.JetStream](t)(jetstream.New(r.conn))
	if _, err := js.Publish(t.Context(), subject, []byte("no record")); err != nil {
		t.Fatal(err)
	}
	// The worker that runs knows what it has sent, and goes on. The record that
	// nobody appended is read when an outcome behind it is on disk.
	positions = append(positions, r.append(10, "group-1")...)
	r.eventually("the other events", func() bool { found, _ := rc.counts(positions); return found == 20 })
	r.eventually("the view to stop", func() bool { return errors.Is(r.outcomes.Ready(), projections.ErrStopped) })
	for range 2 {
		r.restart()
		r.eventually("the word of it", func() bool {
			_, again := rc.counts(positions)
			return r.engine.Paused(ref) == "store" || again > 0
		})
		if err := r.view.Ready(); !errors.Is(err, projections.ErrStopped) {
			t.Errorf("the view can be read: %v", err)
		}
	}
	if found, again := rc.counts(positions); found != 20 || again != 0 {
		t.Errorf("%d of 20 events, %d again", found, again)
	}
}

func dump(t *testing.T, r *rig, e endpoints.Endpoint) []string {
	t.Helper()
	out := []string{fmt.Sprintf("%+v", r.progress(e))}
	err := r.view.Deliveries(context.Background(), e.App, e.ID, callbacks.Query{}, func(d callbacks.Delivery) error {
		out = append(out, fmt.Sprintf("%+v", d))
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	return out
}

// TestForbiddenAddress has an endpoint whose address may not be called: nothing
// is sent, and the reason is kept.
func TestForbiddenAddress(t *testing.T) {
	t.Parallel()
	r := newRig(t, short)
	e := r.endpoint("https://169.254.169.254/latest/meta-data")
	r.append(1, "group-1")
	r.eventually("a refusal", func() bool { return r.progress(e).Waiting == 1 })
	outcomes, err := r.engine.Outcomes(t.Context(), &e, callbacks.Query{})
	if err != nil || len(outcomes) != 1 || outcomes[0].Cause != journal.CauseAddress {
		t.Errorf("%+v, %v", outcomes, err)
	}
}

// TestKeysAway has the key service down and no key in memory: nothing is sent,
// the endpoint says why, and when it is back every event comes, once.
func TestKeysAway(t *testing.T) {
	t.Parallel()
	own := must[*local.Provider](t)(local.Open(t.Context(), local.Options{Path: filepath.Join(t.TempDir(), "key.json"), Create: true}))
	faults := kmstest.NewFaults(own)
	r := newRig(t, func(r *rig) { r.provider = faults })
	rc := r.receive(nil)
	e := r.endpoint(rc.URL)
	positions := r.append(10, "group-1")
	r.eventually("the first events", func() bool { return r.progress(e).Done == 10 })
	faults.Fail(kms.ErrUnavailable)
	r.stopEngine()
	positions = append(positions, r.append(10, "group-1")...)
	r.journal.Keyring().Evict(r.app.ID.String())
	r.start()
	ref := endpoints.Ref{App: e.App, ID: e.ID}
	r.eventually("the word of it", func() bool { return r.engine.Paused(ref) == "keys" })
	if found, _ := rc.counts(positions); found != 10 {
		t.Errorf("%d events came, 10 of them without keys", found)
	}
	faults.Heal()
	r.eventually("every event", func() bool { return r.progress(e).Done == 20 })
	if found, again := rc.counts(positions); found != 20 || again != 0 {
		t.Errorf("%d of 20 events, %d again", found, again)
	}
	r.eventually("no word of it", func() bool { return r.engine.Paused(ref) == "" })
}
