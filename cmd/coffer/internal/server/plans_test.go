package server_test

import (
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
)

// TestPlanByRoute changes an app's plan over HTTP: what would go is told first,
// then it goes, and positions, the rest and its order stay.
func TestPlanByRoute(t *testing.T) {
	s := newSite(t, config.Limits{})
	admin := "/v1/admin/apps/" + s.app
	ask := func(body string) answer {
		return s.do(request{method: "POST", path: admin + "/plan", token: s.operator, body: body})
	}
	had, _ := s.do(request{path: admin, token: s.operator}).json(t)["plan"].(string)
	if had == "free" {
		t.Fatal("the development app has the shortest plan already")
	}
	event := func(id string, age time.Duration) string {
		return `{"id":"` + id + `","type":"message.sent","conversation":"g","conversationtype":"group","sender":"u","time":"` +
			s.now().Add(-age).UTC().Format(time.RFC3339) + `","data":{"bodies":[{"type":"txt","msg":"hello"}]}}`
	}
	positions := s.post(event("old", 100*time.Hour), event("kept", 50*time.Hour), event("new", time.Minute))

	for body, want := range map[string]string{
		`{"plan":"` + had + `"}`: "invalid-request", `{"plan":"gold"}`: "invalid-request", `{"plan":""}`: "invalid-request",
		`{}`: "invalid-request", `{"plan":"free","x":1}`: "invalid-request", `[]`: "invalid-request", `{"plan":7}`: "invalid-request",
	} {
		if a := ask(body); a.code(t) != want {
			t.Errorf("%s: %d %s", body, a.status, a.body)
		}
	}
	if a := s.do(request{path: admin + "/moves/1", token: s.operator}); a.code(t) != "not-found" {
		t.Errorf("a plan change that was not: %d %s", a.status, a.body)
	}
	preview := ask(`{"plan":"free","dry_run":true}`)
	if v := preview.json(t); preview.status != http.StatusOK || v["events"] != 3.0 || v["hidden"] != 1.0 || v["to"] != "free" {
		t.Errorf("preview: %d %s", preview.status, preview.body)
	}
	if events, _ := s.replay("?min_position=" + positions[2]); len(events) != 3 {
		t.Fatalf("%d events after the preview", len(events))
	}

	a := ask(`{"plan":"free"}`)
	if a.status != http.StatusAccepted || a.header.Get("Location") != admin+"/moves/1" {
		t.Fatalf("plan change: %d %s", a.status, a.body)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		v := s.do(request{path: a.header.Get("Location"), token: s.operator}).json(t)
		if v["state"] == "done" {
			if v["copied"] != 2.0 || v["skipped"] != 1.0 || v["verified"] != 2.0 || v["error"] != nil {
				t.Errorf("the plan change: %v", v)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("it does not end: %v", v)
		}
	}
	events, _ := s.replay("")
	if got := ids(events); len(got) != 3 || !slices.Equal(got[:2], []string{"kept", "new"}) || !strings.HasPrefix(got[2], "coffer:plan-changed:") {
		t.Errorf("after the plan change: %v", got)
	}
	for i, e := range events[:2] {
		if e["position"] != positions[i+1] {
			t.Errorf("%v was at %s", e, positions[i+1])
		}
	}
	if later, _ := s.replay("?after=" + positions[1]); len(later) != 2 || later[0]["id"] != "new" {
		t.Errorf("after an old position: %v", ids(later))
	}
	if a := s.do(request{path: s.events() + "/old"}); a.status != http.StatusNotFound && a.status != http.StatusGone {
		t.Errorf("what is too old: %d %s", a.status, a.body)
	}
	if again := s.do(request{method: "POST", path: s.events(), body: event("kept", 50*time.Hour)}); again.code(t) != "idempotency-conflict" && again.status != http.StatusOK {
		t.Errorf("an id over the plan change: %d %s", again.status, again.body)
	}
	if v := s.do(request{path: admin, token: s.operator}).json(t); v["plan"] != "free" {
		t.Errorf("the app: %v", v)
	}
	if log := s.do(request{path: "/v1/admin/audit", token: s.operator}); strings.Count(string(log.body), `"app.plan_changed"`) != 2 {
		t.Errorf("the audit log does not have the beginning and the end:\n%s", log.body)
	}
	if a := s.do(request{path: admin + "/moves/2", token: s.operator}); a.code(t) != "not-found" {
		t.Errorf("a plan change to come: %d %s", a.status, a.body)
	}
}
