package server_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
)

// TestRecallsErase: an operator says that recalls of an app erase; one then does,
// which the audit log shows, and the message stays hidden.
func TestRecallsErase(t *testing.T) {
	s := newSite(t, config.Limits{})
	path := "/v1/admin/apps/" + s.app
	var app map[string]any
	s.exchange("GET", path, s.operator, "", http.StatusOK, &app)
	if app["on_recall"] != "hide" {
		t.Errorf("at first: %v", app)
	}
	for body, status := range map[string]int{`{"on_recall":"burn"}`: 400, `{}`: 400, `{"on_recall":""}`: 400} {
		s.exchange("PATCH", path, s.operator, body, status, nil)
	}
	s.exchange("PATCH", path, s.token, `{"on_recall":"erase"}`, http.StatusForbidden, nil)
	s.exchange("PATCH", path, s.operator, `{"on_recall":"erase"}`, http.StatusOK, &app)
	if app["on_recall"] != "erase" || app["disabled"] != false {
		t.Errorf("set: %v", app)
	}
	s.post(sent("m1", "ann", "ben", "secret"), sent("m2", "ann", "ben", "kept"))
	at := s.post(`{"id":"r1","type":"message.recalled","sender":"ann","recipient":"ben","target":"m1"}`)
	await(t, "the erasure", func() bool {
		audit := s.do(request{path: "/v1/admin/audit", token: s.operator}).body
		return strings.Contains(string(audit), `"message.erased"`) && strings.Contains(string(audit), `"app.on_recall"`)
	})
	base := "/v1/apps/" + s.app
	a := s.do(request{path: base + "/conversations/ann,ben/messages?min_position=" + at[0]})
	if strings.Contains(string(a.body), "secret") || !strings.Contains(string(a.body), "kept") {
		t.Errorf("the conversation: %s", a.body)
	}
	if ids := ids(s.await("", 2)); !strings.Contains(strings.Join(ids, " "), "m2") {
		t.Errorf("the replay has %v", ids)
	}
	s.exchange("PATCH", path, s.operator, `{"on_recall":"hide"}`, http.StatusOK, &app)
	if app["on_recall"] != "hide" {
		t.Errorf("set back: %v", app)
	}
}
