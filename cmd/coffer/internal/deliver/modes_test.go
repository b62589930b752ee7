package deliver_test

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/agora"
	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/cmd/coffer/internal/webhook"
	"github.com/cofferdb/coffer/journal"
)

// TestSealedDelivery: a receiver opens what it gets with its private key, the
// signature is over the ciphertext, and nothing of the event is outside of it.
func TestSealedDelivery(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	rc := r.receive(nil)
	key := must[*webhook.PrivateKey](t)(webhook.NewPrivateKey())
	public := must[[]byte](t)(key.Public())
	e := r.endpoint(rc.URL, func(e *endpoints.Endpoint) { e.Mode, e.Encryption = endpoints.Sealed, string(public) })
	batched := r.receive(nil)
	b := r.endpoint(batched.URL, func(e *endpoints.Endpoint) { e.Mode, e.Encryption, e.Batch = endpoints.Sealed, string(public), 10 })
	positions := r.append(20, "group-1")
	r.eventually("every event at both", func() bool { return r.progress(e).Done == 20 && r.progress(b).Done == 20 })
	secret := must[*webhook.Secret](t)(webhook.ParseSecret(string(e.Secrets[0].Key)))
	seen := map[string]bool{}
	for _, g := range rc.all() {
		if err := secret.Verify(g.header, g.body, time.Now()); err != nil {
			t.Fatal(err)
		}
		if got := g.header.Get("Content-Type"); !webhook.IsSealed(got) {
			t.Fatalf("a body of the type %q", got)
		}
		var event struct {
			received
			Data json.RawMessage `json:"data"`
		}
		if err := json.Unmarshal(must[[]byte](t)(key.Open(string(g.body))), &event); err != nil || event.Conversation != "group-1" || event.Data == nil {
			t.Fatalf("%+v, %v", event, err)
		}
		seen[event.Position] = true
	}
	several := map[string]bool{}
	for _, g := range batched.all() {
		first, _, _ := strings.Cut(string(g.body), ".")
		if head := must[[]byte](t)(base64.RawURLEncoding.DecodeString(first)); !strings.Contains(string(head), `"cty":"application/cloudevents-batch+json"`) {
			t.Errorf("the head of several events: %s", head)
		}
		var events []received
		if err := json.Unmarshal(must[[]byte](t)(key.Open(string(g.body))), &events); err != nil {
			t.Fatal(err)
		}
		for _, event := range events {
			several[event.Position] = true
		}
	}
	for _, p := range positions {
		if !seen[p.String()] || !several[p.String()] {
			t.Errorf("the event at %s: alone %v, with others %v", p, seen[p.String()], several[p.String()])
		}
	}
}

// TestAgoraDelivery: bodies have the form of Agora's callbacks with its own check,
// the signature beside it, and the same callId at each attempt; what that form
// has no place for is not sent.
func TestAgoraDelivery(t *testing.T) {
	t.Parallel()
	r := newRig(t, short)
	rc := r.receive(nil)
	tries := map[string]int{}
	rc.answers(func(w http.ResponseWriter, g got) bool {
		rc.mu.Lock()
		defer rc.mu.Unlock()
		if tries[g.id]++; tries[g.id] > 1 {
			return false
		}
		w.WriteHeader(http.StatusServiceUnavailable)
		return true
	})
	e := r.endpoint(rc.URL, func(e *endpoints.Endpoint) {
		e.Mode, e.Agora = endpoints.Agora, endpoints.AgoraSettings{AppKey: "acme#shop", Secret: "canary"}
	})
	if results := must[[]journal.Result](t)(r.journal.Append(t.Context(), r.app.ID, journal.Event{
		Type: journal.MemberJoined, Conversation: "group-1", ConversationType: journal.Group, Sender: "alice",
	})); results[0].Err != nil {
		t.Fatal(results[0].Err)
	}
	r.append(3, "group-1")
	r.eventually("every event", func() bool { return r.progress(e).Done == 3 })
	secret := must[*webhook.Secret](t)(webhook.ParseSecret(string(e.Secrets[0].Key)))
	calls := map[string]string{}
	for _, g := range rc.all() {
		if err := secret.Verify(g.header, g.body, time.Now()); err != nil {
			t.Fatal(err)
		}
		var call struct {
			ID       string `json:"callId"`
			Millis   int64  `json:"timestamp"`
			Security string `json:"security"`
			Kind     string `json:"chat_type"`
		}
		if err := json.Unmarshal(g.body, &call); err != nil || call.Kind != "groupchat" {
			t.Fatalf("%s, %v", g.body, err)
		}
		if want := must[string](t)(agora.Security(call.ID, "canary", call.Millis)); call.Security != want {
			t.Errorf("security %s, want %s", call.Security, want)
		}
		if before, ok := calls[g.id]; ok && before != call.ID {
			t.Errorf("one event is %s and %s", before, call.ID)
		}
		calls[g.id] = call.ID
		if event, err := agora.Parse(g.body); err != nil || event.Sender != "alice" || event.Conversation != "group-1" {
			t.Errorf("read as %+v, %v", event, err)
		}
	}
	if len(calls) != 3 || len(rc.all()) != 6 {
		t.Errorf("%d events in %d requests", len(calls), len(rc.all()))
	}
	for setting, change := range map[string]func(*endpoints.Endpoint){
		"/agora_secret": func(e *endpoints.Endpoint) { e.Agora.Secret = "" },
		"/agora_appkey": func(e *endpoints.Endpoint) { e.Agora.AppKey = "a b" },
		"/batch":        func(e *endpoints.Endpoint) { e.Batch = 2 },
		"/types":        func(e *endpoints.Endpoint) { e.Types = []journal.Type{journal.MemberJoined} },
	} {
		_, err := r.endpoints.Change(t.Context(), e.App, e.ID, func(e *endpoints.Endpoint) error { change(e); return nil })
		if err == nil || err.Error()[:len(setting)] != setting {
			t.Errorf("%s: %v", setting, err)
		}
	}
}

// TestDisabledWhenFailing: an endpoint that has taken nothing for two thirds of
// the time that callbacks are kept is disabled, and that is said.
func TestDisabledWhenFailing(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(r *rig) { r.retention.Callbacks = 3 * time.Second })
	rc := r.receive(func(w http.ResponseWriter, _ got) bool { w.WriteHeader(http.StatusInternalServerError); return true })
	e := r.endpoint(rc.URL)
	began := time.Now()
	r.eventually("the end of its patience", func() bool {
		now, err := r.endpoints.Endpoint(t.Context(), e.App, e.ID)
		if err == nil && now.State == endpoints.Disabled {
			if now.Reason != endpoints.ReasonFailing || time.Since(began) < 2*time.Second {
				t.Errorf("disabled as %s after %s", now.Reason, time.Since(began))
			}
			return true
		}
		if p := r.progress(e); p.Waiting == 0 { // an event is not tried to the last moment
			r.append(1, "group-1")
		}
		return false
	})
	r.eventually("the word of it", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return len(r.disabled) == 1 && r.disabled[0].ID == e.ID && r.disabled[0].Untold.Reason == endpoints.ReasonFailing
	})
}
