package server_test

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
)

// admin is a call as the operator, which must give the status.
func (s *site) admin(method, path, body string, status int) map[string]any {
	s.t.Helper()
	a := s.do(request{method: method, path: "/v1/admin/" + path, body: body, token: s.operator})
	if a.status != status {
		s.t.Fatalf("%s %s: %d %s, want %d", method, path, a.status, a.body, status)
	}
	if len(a.body) == 0 {
		return nil
	}
	return a.json(s.t)
}

// audited returns the actions in the audit log that have the target.
func (s *site) audited(target string) string {
	s.t.Helper()
	a := s.do(request{path: "/v1/admin/audit", token: s.operator})
	var actions []string
	for line := range strings.Lines(string(a.body)) {
		v := answer{body: []byte(line)}.json(s.t)
		if v["target"] == target {
			actions = append(actions, v["action"].(string))
		}
	}
	return strings.Join(actions, " ")
}

func TestCertificateRotation(t *testing.T) {
	s := newSite(t, config.Limits{})
	token := func(certificate string) string {
		text, err := auth.Build(auth.Spec{AppID: s.app, Certificate: certificate, Issued: s.now(), Lifetime: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	expect := func(when, certificate string, status int) {
		t.Helper()
		if a := s.do(request{path: s.events(), token: token(certificate)}); a.status != status {
			t.Errorf("%s: %d %s, want %d", when, a.status, a.body, status)
		}
	}
	path := "apps/" + s.app
	first := s.certificate
	made := s.admin("POST", path+"/certificates", "", 201)
	second := made["certificates"].([]any)[0].(string)
	if second == first || len(made["certificates"].([]any)) != 1 || made["rotating"] != true {
		t.Fatalf("rotated: %v", made)
	}
	expect("the old one while rotating", first, 200)
	expect("the new one while rotating", second, 200)
	if a := s.do(request{method: "POST", path: "/v1/admin/" + path + "/certificates", token: s.operator}); a.status != 409 || a.code(t) != "certificate-rotating" {
		t.Errorf("a third certificate: %d %s", a.status, a.body)
	}
	if shown := s.admin("GET", path, "", 200); shown["rotating"] != true || shown["certificates"] != nil {
		t.Errorf("shown: %v", shown)
	}
	for range 2 { // it can be repeated
		if left := s.admin("DELETE", path+"/certificates/previous", "", 200); left["rotating"] != false || left["certificates"] != nil {
			t.Errorf("withdrawn: %v", left)
		}
	}
	expect("the old one afterwards", first, 401)
	expect("the new one afterwards", second, 200)
	if got := s.audited("app:" + s.app); got != "app.created app.certificate_rotated app.certificate_withdrawn" && got != "app.certificate_rotated app.certificate_withdrawn" {
		t.Errorf("audited: %s", got)
	}
}

func TestDisabledApp(t *testing.T) {
	s := newSite(t, config.Limits{})
	s.post(sent("e1", "ann", "ben", "x"))
	calls := map[string]request{
		"append":  {method: "POST", path: s.events(), body: sent("e2", "ann", "ben", "x")},
		"replay":  {path: s.events()},
		"event":   {path: s.events() + "/e1"},
		"history": {path: "/v1/apps/" + s.app + "/conversations/ann,ben/messages"},
		"a user":  {method: "POST", path: s.events(), token: s.userToken("ann"), body: sent("e3", "ann", "ben", "x")},
	}
	refused := func(why string) {
		t.Helper()
		for name, r := range calls {
			if a := s.do(r); a.status != http.StatusForbidden || a.code(t) != "app-disabled" {
				t.Errorf("%s of an app that is disabled with %s: %d %s", name, why, a.status, a.body)
			}
		}
	}
	served := func(want string) {
		t.Helper()
		if events, _ := s.replay(""); strings.Join(ids(events), " ") != want {
			t.Errorf("served %v, want %s", strings.Join(ids(events), " "), want)
		}
	}
	if v := s.admin("PATCH", "apps/"+s.app, `{"disabled":true}`, 200); v["disabled"] != true {
		t.Errorf("disabled: %v", v)
	}
	refused("its own switch")
	s.admin("PATCH", "apps/"+s.app, `{"disabled":false}`, 200)
	served("e1")
	if v := s.admin("PATCH", "accounts/dev", `{"disabled":true}`, 200); v["disabled"] != true {
		t.Errorf("account disabled: %v", v)
	}
	refused("its account's")
	s.admin("PATCH", "accounts/dev", `{"disabled":false}`, 200)
	served("e1")
	for _, body := range []string{`{}`, `{"disabled":null}`, `{"disabled":1}`, `{"region":"us"}`, `{"disabled":true,"id":"x"}`} {
		if a := s.do(request{method: "PATCH", path: "/v1/admin/apps/" + s.app, body: body, token: s.operator}); a.status != 400 {
			t.Errorf("%s: %d %s", body, a.status, a.body)
		}
	}
	served("e1")
	if got := s.audited("app:" + s.app); !strings.HasSuffix(got, "app.disabled app.enabled") {
		t.Errorf("audited: %s", got)
	}
	if got := s.audited("account:dev"); !strings.HasSuffix(got, "account.disabled account.enabled") {
		t.Errorf("audited: %s", got)
	}
}

// TestChinaGrants: an account of Mainland China may use this region once an
// operator has said so, and that is in the audit log.
func TestChinaGrants(t *testing.T) {
	s := newSite(t, config.Limits{})
	app := `{"name":"a","account":"beijing","plan":"pro"}`
	forbidden := func(when string) {
		t.Helper()
		if a := s.do(request{method: "POST", path: "/v1/admin/apps", body: app, token: s.operator}); a.status != 403 || a.code(t) != "region-forbidden" {
			t.Errorf("%s: %d %s", when, a.status, a.body)
		}
	}
	s.admin("POST", "accounts", `{"id":"beijing","name":"B","email":"b@example.com","home":"cn"}`, 201)
	forbidden("before a grant")
	if a := s.do(request{method: "PUT", path: "/v1/admin/accounts/beijing/regions/us", token: s.operator}); a.status != 400 {
		t.Errorf("a grant for another region: %d %s", a.status, a.body)
	}
	for range 2 {
		s.admin("PUT", "accounts/beijing/regions/eu", "", 200)
	}
	made := s.admin("POST", "apps", app, 201)
	s.admin("DELETE", "accounts/beijing/regions/eu", "", 200)
	forbidden("after it was taken back")
	if shown := s.admin("GET", "apps/"+made["id"].(string), "", 200); shown["region"] != "eu" {
		t.Errorf("the app that was made under the grant: %v", shown)
	}
	if got := s.audited("account:beijing"); got != "account.created account.region_granted account.region_revoked" {
		t.Errorf("audited: %s", got)
	}
	shown := s.admin("GET", "accounts/beijing", "", 200)
	if shown["email"] != "b@example.com" || shown["state"] != "active" || shown["ends"] == nil {
		t.Errorf("shown: %v", shown)
	}
	s.admin("PATCH", "accounts/beijing", `{"name":"Beijing"}`, 200)
	if shown := s.admin("GET", "accounts/beijing", "", 200); shown["name"] != "Beijing" || shown["email"] != "b@example.com" {
		t.Errorf("changed: %v", shown)
	}
	s.admin("PATCH", "accounts/beijing", `{"email":"nobody"}`, 400)
	s.admin("GET", "accounts/nobody", "", 404)
	s.admin("GET", "accounts/UPPER", "", 400)
}

// TestDeleteApp deletes an app and an account by their routes.
func TestDeleteApp(t *testing.T) {
	s := newSite(t, config.Limits{})
	s.admin("POST", "accounts", `{"id":"acme","name":"Acme"}`, 201)
	made := s.admin("POST", "apps", `{"plan":"enterprise","account":"acme"}`, 201)
	mine, app, certificate := s.app, made["id"].(string), made["certificates"].([]any)[0].(string)
	s.post(sent("before", "ann", "ben", "x"))
	token, err := auth.Build(auth.Spec{AppID: app, Certificate: certificate, Issued: s.now(), Lifetime: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	path := "/v1/apps/" + app + "/events"
	for _, id := range []string{"a", "b", "c"} {
		if a := s.do(request{method: "POST", path: path, token: token, body: sent(id, "ann", "ben", "x")}); a.status != 201 {
			t.Fatalf("append: %d %s", a.status, a.body)
		}
	}
	last := s.post(sent("after", "ann", "ben", "x"))
	would := s.admin("DELETE", "accounts/acme?dry_run=true", "", 200)
	if text, _ := json.Marshal(would); !strings.Contains(string(text), `"messages":3`) || !strings.Contains(string(text), app) {
		t.Errorf("would delete %s", text)
	}
	if a := s.do(request{path: path, token: token}); a.status != 200 {
		t.Errorf("after a dry run: %d %s", a.status, a.body)
	}
	begun := s.admin("DELETE", "apps/"+app, "", 202)
	for range 2 {
		if a := s.do(request{path: path, token: token}); a.status != 404 {
			t.Errorf("while it is deleted: %d %s", a.status, a.body)
		}
	}
	if done := s.deleted(begun["id"].(string)); done["removed"].(float64) < 3 {
		t.Errorf("done: %v", done)
	}
	again := s.admin("DELETE", "apps/"+app, "", 202)
	s.deleted(again["id"].(string))
	if a := s.do(request{path: "/v1/admin/apps/" + app, token: s.operator}); a.status != 404 && a.status != 410 {
		t.Errorf("shown: %d %s", a.status, a.body)
	}
	if a := s.do(request{method: "PATCH", path: "/v1/admin/apps/" + app, body: `{"disabled":false}`, token: s.operator}); a.status != 410 || a.code(t) != "deleted" {
		t.Errorf("changed: %d %s", a.status, a.body)
	}
	s.deleted(s.admin("DELETE", "accounts/acme", "", 202)["id"].(string))
	if v := s.admin("GET", "accounts/acme", "", 200); v["state"] != "deleted" || v["name"] != "" {
		t.Errorf("the account: %v", v)
	}
	if a := s.do(request{method: "POST", path: "/v1/admin/accounts", body: `{"id":"acme"}`, token: s.operator}); a.status != 409 {
		t.Errorf("its id again: %d %s", a.status, a.body)
	}
	if a := s.do(request{method: "POST", path: "/v1/admin/apps", body: `{"plan":"pro","account":"acme"}`, token: s.operator}); a.status != 410 {
		t.Errorf("an app for it: %d %s", a.status, a.body)
	}
	s.admin("DELETE", "accounts/nobody", "", 404)
	s.admin("DELETE", "apps/"+app[:2]+strings.Repeat("0", 30), "", 404)
	s.admin("DELETE", "apps/"+mine+"?dry_run=maybe", "", 400)
	s.admin("GET", "deletions/nobody", "", 404)
	if list := s.admin("GET", "deletions", "", 200); len(list["data"].([]any)) != 2 {
		t.Errorf("the deletions: %v", list)
	}
	if events, _ := s.replay("?min_position=" + last[0]); strings.Join(ids(events), " ") != "before after" {
		t.Errorf("the other app has %v", ids(events))
	}
	if got := s.audited("app:" + app); !strings.HasPrefix(got, "app.created app.deletion_started app.deleted") {
		t.Errorf("audited: %s", got)
	}
}

// deleted waits until a deletion is done.
func (s *site) deleted(id string) map[string]any {
	s.t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		job := s.admin("GET", "deletions/"+id, "", 200)
		if job["state"] == "done" {
			return job
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("the deletion is still %v", job)
		}
	}
}

// TestTailsOfADisabledApp: what is being followed ends, and says why. That it ends
// before the next sign of life is not shown: no test depends on a duration.
func TestTailsOfADisabledApp(t *testing.T) {
	s := newSite(t, config.Limits{})
	s.post(sent("e1", "ann", "ben", "x"))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for _, change := range []struct{ path, off, on string }{
		{"apps/" + s.app, `{"disabled":true}`, `{"disabled":false}`}, {"accounts/dev", `{"disabled":true}`, `{"disabled":false}`},
	} {
		tails := map[string]func() string{
			"lines":  s.textTail(ctx, "?follow=true", s.token, "application/x-ndjson"),
			"events": s.textTail(ctx, "?follow=true", s.token, "text/event-stream"),
			"socket": s.wordTail(ctx, "?follow=true", s.token),
		}
		for form, next := range tails {
			if got := next(); !strings.Contains(got, `"id":"e1"`) {
				t.Fatalf("%s: %s", form, got)
			}
		}
		s.admin("PATCH", change.path, change.off, 200)
		for form, next := range tails {
			if got := next(); !strings.Contains(got, "app-disabled") {
				t.Errorf("%s of %s went on with %s", form, change.path, got)
			}
		}
		s.admin("PATCH", change.path, change.on, 200)
	}
}
