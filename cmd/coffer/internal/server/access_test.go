package server_test

import (
	"cmp"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/server"
)

// TestRoutesAndCallers walks the whole table with every kind of caller. Who is not
// named for a route gets no further than its credential; a user who is named for
// it, but takes no part in what the path names, is told that there is no such
// thing.
func TestRoutesAndCallers(t *testing.T) {
	s := newSite(t, config.Limits{})
	s.post(
		member("joined", "j1", "ann", "g"), member("joined", "j2", "dan", "g"),
		inGroup("e1", "ann", "g", "hello"), member("left", "l2", "dan", "g"),
	)
	other := s.do(request{method: "POST", path: "/v1/admin/apps", token: s.operator, body: `{"name":"other","plan":"free"}`})
	if other.status != http.StatusCreated {
		t.Fatalf("creating an app: %d %s", other.status, other.body)
	}
	created := other.json(t)
	token := func(change func(*auth.Spec)) string {
		spec := auth.Spec{AppID: s.app, Certificate: s.certificate, Issued: s.now(), Lifetime: time.Hour}
		change(&spec)
		text, err := auth.Build(spec)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	ofOther := func(a *auth.Spec) {
		a.AppID, a.Certificate = created["id"].(string), created["certificates"].([]any)[0].(string)
	}
	callers := []struct{ who, token, user string }{
		{"nobody", "-", ""},
		{"app", s.token, ""},
		{"user", s.userToken("ann"), "ann"},
		{"another user", s.userToken("eve"), "eve"},
		{"removed member", s.userToken("dan"), "dan"},
		{"operator", s.operator, ""},
		{"another app", token(ofOther), ""},
		{"user of another app", token(func(a *auth.Spec) { ofOther(a); a.User = "ann" }), "ann"},
		{"another region's app", s.regions["us"]["COFFER_TOKEN"], ""},
		{"expired app", token(func(a *auth.Spec) { a.Issued = a.Issued.Add(-2 * time.Hour) }), ""},
		{"expired user", token(func(a *auth.Spec) { a.Issued, a.User = a.Issued.Add(-2*time.Hour), "ann" }), "ann"},
		{"a stranger", "nonsense", ""},
	}
	for _, row := range server.Table() {
		for _, c := range callers {
			allowed := row.Anyone || (row.App && c.who == "app") || (row.User && c.who == "user") || (row.Operator && c.who == "operator")
			if row.App && !strings.Contains(row.Path, "{app}") {
				allowed = allowed || c.who == "another app" // of this region, which the route is about
			}
			hidden := row.User && (c.who == "another user" || c.who == "removed member")
			sender := cmp.Or(c.user, "ann")
			r := request{method: row.Method, path: fill(row.Path, s.app), token: c.token}
			if strings.HasPrefix(row.Path, "/v1/admin/") { // some change or delete an app: one that is not there
				r.path = fill(row.Path, s.app[:2]+strings.Repeat("0", 30))
			}
			switch {
			case strings.HasSuffix(row.Path, "/ack"):
				r.body = `{"through":"1"}`
			case strings.HasSuffix(row.Path, "/{attachment}") && row.Body:
				r.path, r.body = r.path+"?conversation=g", "content"
			case row.Body:
				r.body = inGroup("by-"+strings.ReplaceAll(strings.ReplaceAll(c.who, " ", "-"), "'", ""), sender, "g", "x")
			case row.Path == "/v1/apps/{app}/events":
				r.path += "?conversation=g"
			case row.Path == "/v1/apps/{app}/conversations":
				r.path += "?user=ann"
			}
			a := s.do(r)
			code := a.code(t)
			refused := a.status == http.StatusUnauthorized || a.status == http.StatusForbidden
			there := strings.Contains(row.Path, "/events") || strings.Contains(row.Path, "/conversations") || strings.Contains(row.Path, "/inbox")
			switch {
			case allowed && refused, allowed && row.User && there && a.status >= 300:
				t.Errorf("%s %s by %s: refused with %d %s", row.Method, row.Path, c.who, a.status, code)
			case hidden && (a.status != http.StatusNotFound || code != "not-found"):
				t.Errorf("%s %s by %s: got %d %s, want 404", row.Method, row.Path, c.who, a.status, code)
			case !allowed && !hidden && !refused:
				t.Errorf("%s %s by %s: got %d %s", row.Method, row.Path, c.who, a.status, code)
			case !allowed && (c.who == "nobody" || c.who == "a stranger") && a.header.Get("WWW-Authenticate") == "":
				t.Errorf("%s %s by %s: no WWW-Authenticate", row.Method, row.Path, c.who)
			}
		}
	}
	// A path of another region is answered before the credential is looked at.
	elsewhere := strings.NewReplacer("{app}", s.regions["us"]["COFFER_APP"])
	for _, row := range server.Table() {
		if row.User {
			path := fill(elsewhere.Replace(row.Path), "")
			if a := s.do(request{method: row.Method, path: path, token: s.userToken("ann")}); a.status != http.StatusMisdirectedRequest {
				t.Errorf("%s %s of another region: %d", row.Method, row.Path, a.status)
			}
		}
	}
	events, _ := s.replay("?type=message.sent")
	for _, id := range ids(events) {
		if id != "e1" && id != "by-app" && id != "by-user" {
			t.Errorf("event %s was stored", id)
		}
	}
}

func fill(path, app string) string {
	return strings.NewReplacer(
		"{app}", app, "{event}", "e1", "{attachment}", "a1", "{conversation}", "g",
		"{user}", "ann", "{account}", "none", "{region}", "eu", "{deletion}", "account-none",
		"{export}", "0123456789abcdef", "{file}", "events-000001.ndjson",
	).Replace(path)
}

func TestUserSendsAsItselfOnly(t *testing.T) {
	s := newSite(t, config.Limits{})
	ann := s.userToken("ann")
	own := s.do(request{method: "POST", path: s.events(), token: ann, body: sent("own", "ann", "ben", "x")})
	if own.status != http.StatusCreated {
		t.Fatalf("own: %d %s", own.status, own.body)
	}
	for name, body := range map[string]string{
		"another's":  sent("e2", "ben", "ann", "x"),
		"no sender":  `{"id":"e3","type":"message.sent","conversation":"g","conversationtype":"group","data":{"bodies":[{"type":"txt","msg":"x"}]}}`,
		"upper case": sent("e4", "Ann", "ben", "x"),
	} {
		a := s.do(request{method: "POST", path: s.events(), token: ann, body: body})
		if code := a.code(t); a.status != http.StatusForbidden || code != "privilege-missing" {
			t.Errorf("%s: %d %s", name, a.status, a.body)
		}
	}
	batch := s.do(request{
		method: "POST", path: s.events(), token: ann,
		body: "[" + sent("e5", "ann", "ben", "x") + "," + sent("e6", "ben", "ann", "x") + "]",
	})
	if batch.status != http.StatusMultiStatus {
		t.Errorf("batch: %d %s", batch.status, batch.body)
	}
	events, _ := s.replay("?min_position=" + batch.json(t)["data"].([]any)[0].(map[string]any)["position"].(string))
	if got := strings.Join(ids(events), " "); got != "own e5" {
		t.Errorf("stored: %s", got)
	}
}

func TestWrongRegion(t *testing.T) {
	s := newSite(t, config.Limits{})
	us := s.regions["us"]
	for _, token := range []string{"-", us["COFFER_TOKEN"], s.token} {
		a := s.do(request{path: "/v1/apps/" + us["COFFER_APP"] + "/events", token: token})
		v := a.json(t)
		if a.status != http.StatusMisdirectedRequest || a.code(t) != "wrong-region" || v["region"] != "us" || v["url"] != us["COFFER_URL"] {
			t.Errorf("got %d %s", a.status, a.body)
		}
	}
	at := s.do(request{url: us["COFFER_URL"], path: "/v1/apps/" + us["COFFER_APP"] + "/events", token: us["COFFER_TOKEN"]})
	if at.status != http.StatusOK {
		t.Errorf("at the named region: %d %s", at.status, at.body)
	}
}

func TestTokens(t *testing.T) {
	s := newSite(t, config.Limits{})
	build := func(change func(*auth.Spec)) string {
		spec := auth.Spec{AppID: s.app, Certificate: s.certificate, Issued: s.now(), Lifetime: time.Hour}
		change(&spec)
		token, err := auth.Build(spec)
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	for _, c := range []struct {
		name, token, code string
		status            int
	}{
		{"good", build(func(*auth.Spec) {}), "", 200},
		{"expired", build(func(a *auth.Spec) { a.Issued = a.Issued.Add(-2 * time.Hour) }), "token-expired", 401},
		{"not yet valid", build(func(a *auth.Spec) { a.Issued = a.Issued.Add(5 * time.Minute) }), "token-invalid", 401},
		{"another certificate", build(func(a *auth.Spec) { a.Certificate = strings.Repeat("0", 32) }), "token-invalid", 401},
		{"another app", build(func(a *auth.Spec) { a.AppID = s.app[:31] + flip(s.app[31]) }), "token-invalid", 401},
		{"app id of another system", build(func(a *auth.Spec) { a.AppID = "not-an-app" }), "token-invalid", 401},
		{"truncated", s.token[:len(s.token)-4], "token-invalid", 401},
		{"trailing bytes", s.token + "AAAA", "token-invalid", 401},
		{"operator's, cut", s.operator[:len(s.operator)-1], "token-invalid", 401},
		{"empty", " ", "token-invalid", 401},
	} {
		a := s.do(request{path: s.events(), token: c.token})
		if code := a.code(t); a.status != c.status || code != c.code {
			t.Errorf("%s: %d %s", c.name, a.status, a.body)
		}
		if strings.Contains(string(a.body), c.token) && c.token != " " && c.status != 200 {
			t.Errorf("%s: the answer repeats the token", c.name)
		}
	}
	basic := s.do(request{path: s.events(), header: map[string]string{"Authorization": "Basic " + s.token}})
	if basic.status != http.StatusUnauthorized {
		t.Errorf("basic: %d", basic.status)
	}
}

func flip(c byte) string {
	if c == '0' {
		return "1"
	}
	return "0"
}
