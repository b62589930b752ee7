package server_test

import (
	"encoding/json"
	"encoding/pem"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/node"
	"github.com/cofferdb/coffer/cmd/coffer/internal/webhook"
)

// TestEndpointDisabledEvent: an endpoint that says that it is gone is disabled, and
// another one of the app is told, once; replay has the event too.
func TestEndpointDisabledEvent(t *testing.T) {
	gone, other := newHooks(t), newHooks(t)
	gone.status.Store(http.StatusGone)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: gone.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	s := newSiteWith(t, node.DevOptions{Callbacks: config.Callbacks{Allow: []string{"127.0.0.0/8"}, CAFile: ca}})
	base := "/v1/apps/" + s.app + "/endpoints"
	register := func(h *hooks, types string) string {
		t.Helper()
		secret, err := webhook.NewSecret(webhook.Symmetric)
		if err != nil {
			t.Fatal(err)
		}
		h.secret.Store(secret)
		a := s.do(request{method: "POST", path: base, body: `{"url": "` + h.URL + `/hook", "mode": "full", "types": [` + types + `], "secret": "` + secret.Reveal() + `"}`})
		e := a.json(t)
		if a.status != http.StatusCreated || e["state"] != "enabled" {
			t.Fatalf("made: %d %s", a.status, a.body)
		}
		return e["id"].(string) //nolint:errcheck,forcetypeassert // the test ends
	}
	id := register(gone, ``)
	register(other, `"endpoint.disabled", "message.recalled"`)
	s.post(line("first", "group-1"))

	var told map[string]any
	select {
	case told = <-other.events:
	case <-time.After(time.Minute):
		t.Fatalf("nobody was told\n%s", s.log)
	}
	data, err := json.Marshal(told["data"])
	if err != nil || told["type"] != "endpoint.disabled" || string(data) != `{"endpoint":"`+id+`","reason":"gone"}` {
		t.Errorf("told %v, %v", told, err)
	}
	if name, ok := told["id"].(string); !ok || !strings.HasPrefix(name, "coffer:endpoint-disabled:"+id+":") {
		t.Errorf("its id is %v", told["id"])
	}
	if told["conversation"] != nil || told["sender"] != nil {
		t.Errorf("it belongs to somebody: %v", told)
	}
	// What comes after it is next: it is sent once, and not to the one concerned.
	s.post(`{"id":"last","type":"message.recalled","conversation":"group-1","conversationtype":"group","sender":"alice","target":"first"}`)
	select {
	case e := <-other.events:
		if e["id"] != "last" {
			t.Errorf("told again: %v", e)
		}
	case <-time.After(time.Minute):
		t.Fatalf("the last event did not come\n%s", s.log)
	}
	if e := <-gone.events; e["id"] != "first" || len(gone.events) != 0 {
		t.Errorf("the endpoint that is gone got %v and %d more", e, len(gone.events))
	}
	a := s.do(request{path: "/v1/apps/" + s.app + "/events"})
	if n := strings.Count(string(a.body), "coffer:endpoint-disabled:"); a.status != http.StatusOK || n != 1 {
		t.Errorf("replay has %d of it: %d %s", n, a.status, a.body)
	}
	// The audit log has it, with who did it and why.
	var record map[string]any
	for deadline := time.Now().Add(time.Minute); record == nil; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it is not audited")
		}
		log := s.do(request{path: "/v1/admin/audit", token: s.operator})
		for line := range strings.Lines(string(log.body)) {
			if r := (answer{body: []byte(line)}).json(t); r["action"] == "endpoint.disabled" {
				record = r
			}
		}
	}
	detail, ok := record["detail"].(map[string]any)
	if !ok || record["actor"] != "process:callbacks" || record["target"] != "endpoint:"+id || record["outcome"] != "ok" ||
		detail["app"] != s.app || detail["reason"] != "gone" {
		t.Errorf("audited as %v", record)
	}
}
