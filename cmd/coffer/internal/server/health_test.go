package server_test

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
)

// await asks until the condition holds; readiness is kept for a second.
func await(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !condition(); {
		if time.Now().After(deadline) {
			t.Fatalf("%s did not happen", what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// TestKeysAway takes the region's key file away: cached keys serve, new keys
// cannot be had, readiness says why, and no restart is needed when it is back.
func TestKeysAway(t *testing.T) {
	s := newSite(t, config.Limits{})
	s.fill(3)
	file := filepath.Join(s.options.Dir, "eu", "kek.json")
	ready := func() answer { return s.do(request{path: "/readyz", token: "-"}) }
	if a := ready(); a.status != http.StatusOK || a.json(t)["ready"] != true {
		t.Fatalf("at first: %d %s", a.status, a.body)
	}
	if err := os.Rename(file, file+".away"); err != nil {
		t.Fatal(err)
	}
	await(t, "readiness without keys", func() bool { return ready().status == http.StatusServiceUnavailable })
	reasons := ready().json(t)["reasons"].([]any)
	if len(reasons) != 1 || reasons[0].(map[string]any)["part"] != "kms" {
		t.Errorf("reasons: %v", reasons)
	}
	if a := s.do(request{path: "/livez", token: "-"}); a.status != http.StatusOK {
		t.Errorf("livez: %d", a.status)
	}
	s.post(sent("cached", "ann", "ben", "x"))
	a := s.do(request{method: "POST", path: "/v1/admin/apps", token: s.operator, body: `{"name":"x","plan":"free"}`})
	if a.status != http.StatusServiceUnavailable || a.code(t) != "kms-unavailable" {
		t.Errorf("new app: %d %s", a.status, a.body)
	}
	if err := os.Rename(file+".away", file); err != nil {
		t.Fatal(err)
	}
	await(t, "readiness with keys", func() bool { return ready().status == http.StatusOK })
	if a := s.do(request{path: "/v1/admin/apps", token: s.operator}); len(a.json(t)["data"].([]any)) != 1 {
		t.Errorf("apps: %s", a.body)
	}
	// Other regions never noticed.
	if a := s.do(request{url: s.regions["us"]["COFFER_URL"], path: "/readyz", token: "-"}); a.status != http.StatusOK {
		t.Errorf("us: %d %s", a.status, a.body)
	}
}

func TestTLS(t *testing.T) {
	s := newSite(t, config.Limits{})
	u, err := url.Parse(s.url)
	if err != nil {
		t.Fatal(err)
	}
	roots := s.client.Transport.(*http.Transport).TLSClientConfig.RootCAs
	dial := func(change func(*tls.Config)) (tls.ConnectionState, error) {
		c := &tls.Config{RootCAs: roots, ServerName: "localhost", MinVersion: tls.VersionTLS10} //nolint:gosec // what must be refused
		change(c)
		d := tls.Dialer{Config: c}
		conn, err := d.DialContext(t.Context(), "tcp", u.Host)
		if err != nil {
			return tls.ConnectionState{}, err
		}
		defer func() { _ = conn.Close() }()
		return conn.(*tls.Conn).ConnectionState(), nil
	}
	if state, err := dial(func(*tls.Config) {}); err != nil || state.Version != tls.VersionTLS13 {
		t.Errorf("default: %x %v", state.Version, err)
	}
	if state, err := dial(func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }); err != nil || state.Version != tls.VersionTLS12 {
		t.Errorf("TLS 1.2: %x %v", state.Version, err)
	}
	for name, change := range map[string]func(*tls.Config){
		"TLS 1.1": func(c *tls.Config) { c.MaxVersion = tls.VersionTLS11 },
		"CBC": func(c *tls.Config) {
			c.MaxVersion, c.CipherSuites = tls.VersionTLS12, []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA}
		},
		"another name": func(c *tls.Config) { c.ServerName = "example.com" },
		"other roots":  func(c *tls.Config) { c.RootCAs = nil },
	} {
		if state, err := dial(change); err == nil {
			t.Errorf("%s: connected with %x", name, state.Version)
		}
	}
	// The region's certificate is its own.
	var serials []string
	for _, r := range s.regions {
		host, _ := url.Parse(r["COFFER_URL"])
		d := tls.Dialer{Config: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}
		conn, err := d.DialContext(t.Context(), "tcp", host.Host)
		if err != nil {
			t.Fatal(err)
		}
		serials = append(serials, fmt.Sprint(conn.(*tls.Conn).ConnectionState().PeerCertificates[0].SerialNumber))
		_ = conn.Close()
	}
	for i, a := range serials {
		for _, b := range serials[:i] {
			if a == b {
				t.Error("two regions share a certificate")
			}
		}
	}
	plain, err := net.Dial("tcp", u.Host)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = plain.Close() }()
	_, _ = plain.Write([]byte("GET /livez HTTP/1.0\r\n\r\n"))
	answer := make([]byte, 12)
	if n, _ := plain.Read(answer); string(answer[:n]) == "HTTP/1.0 200" {
		t.Error("answered without TLS")
	}
}

func TestAdmin(t *testing.T) {
	s := newSite(t, config.Limits{})
	do := func(method, path, body string) answer {
		return s.do(request{method: method, path: path, token: s.operator, body: body})
	}
	for _, body := range []string{`{"id":"home","name":"Beijing","home":"cn"}`, `{"id":"granted","home":"cn","regions":["eu"]}`, `{"id":"world","name":"World"}`} {
		if a := do("POST", "/v1/admin/accounts", body); a.status != http.StatusCreated {
			t.Fatalf("%s: %d %s", body, a.status, a.body)
		}
	}
	for _, c := range []struct {
		path, body, code string
		status           int
	}{
		{"apps", `{"name":"a","account":"world","plan":"pro"}`, "", 201},
		{"apps", `{"name":"a","account":"granted","plan":"pro"}`, "", 201},
		{"apps", `{"plan":"free"}`, "", 201},
		{"apps", `{"name":"a","account":"home","plan":"pro"}`, "region-forbidden", 403},
		{"apps", `{"name":"a","account":"none","plan":"pro"}`, "invalid-request", 400},
		{"apps", `{"name":"a","account":"a/b","plan":"pro"}`, "invalid-request", 400},
		{"apps", `{"name":"a","plan":"gold"}`, "invalid-request", 400},
		{"apps", `{"name":"a\u202e","plan":"pro"}`, "invalid-request", 400},
		{"apps", `{"name":"a","plan":"pro","surprise":1}`, "invalid-request", 400},
		{"apps", `{"name":1,"plan":"pro"}`, "invalid-request", 400},
		{"apps", `{"name":"a","name":"b","plan":"pro"}`, "invalid-request", 400},
		{"apps", `{`, "invalid-request", 400},
		{"accounts", `{"id":"world"}`, "already-exists", 409},
		{"accounts", `{"id":"a.b"}`, "invalid-request", 400},
		{"accounts", `{"id":""}`, "invalid-request", 400},
		{"accounts", `{"id":"x","home":"us"}`, "invalid-request", 400},
	} {
		a := do("POST", "/v1/admin/"+c.path, c.body)
		if code := a.code(t); a.status != c.status || code != c.code {
			t.Errorf("%s %s: %d %s", c.path, c.body, a.status, a.body)
		}
	}
	apps := do("GET", "/v1/admin/apps", "").json(t)["data"].([]any)
	if len(apps) != 4 {
		t.Errorf("%d apps", len(apps))
	}
	for _, app := range apps {
		v := app.(map[string]any)
		shown := do("GET", "/v1/admin/apps/"+v["id"].(string), "")
		if shown.status != http.StatusOK || v["certificates"] != nil || shown.json(t)["certificates"] != nil {
			t.Errorf("app: %s", shown.body)
		}
	}
	if own := do("GET", "/v1/admin/apps?account=world", "").json(t)["data"].([]any); len(own) != 1 {
		t.Errorf("of world: %v", own)
	}
	if a := do("GET", "/v1/admin/apps/03"+s.app[2:31]+flip(s.app[31]), ""); a.code(t) != "not-found" {
		t.Errorf("unknown app: %d %s", a.status, a.body)
	}
	if a := do("GET", "/v1/admin/apps/"+s.regions["us"]["COFFER_APP"], ""); a.code(t) != "wrong-region" {
		t.Errorf("app of us: %d %s", a.status, a.body)
	}
	streams := do("GET", "/v1/admin/streams", "").json(t)
	if len(streams["data"].([]any)) != 4 || len(streams["drift"].([]any)) != 0 {
		t.Errorf("streams: %v", streams)
	}
	kinds := map[any]int{}
	for _, one := range streams["stored"].([]any) {
		kinds[one.(map[string]any)["kind"]]++
	}
	if kinds["messages"] != 4 || kinds["audit"] != 1 || kinds["keyring"] != 1 {
		t.Errorf("what is stored: %v", streams["stored"])
	}
	inventory := do("GET", "/v1/admin/keys/inventory?app="+s.app, "")
	if got := string(inventory.body); !strings.Contains(got, s.app) || !strings.Contains(got, `{"end":{"count":1}}`) {
		t.Errorf("the inventory of one app: %s", got)
	}
	for query, code := range map[string]string{"03" + s.app[2:31] + flip(s.app[31]): "not-found", "%0a": "not-found", "": "not-found"} {
		if a := do("GET", "/v1/admin/keys/inventory?app="+query, ""); a.code(t) != code {
			t.Errorf("the inventory of app %q: %d %s", query, a.status, a.body)
		}
	}
}

// TestIdleConnection uses a connection again after the time that a write may
// take has passed: the deadline of one answer must not be that of the next.
func TestIdleConnection(t *testing.T) {
	s := newSite(t, config.Limits{WriteTimeout: config.Duration(150 * time.Millisecond)})
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: s.client.Transport.(*http.Transport).TLSClientConfig.RootCAs, MinVersion: tls.VersionTLS12}}
	s.client = &http.Client{Transport: transport} // HTTP/1.1: one connection, requests in turn; a POST is not sent again by the client
	for _, r := range []request{
		{path: s.events()}, {method: "POST", path: "/none", body: "{}"}, {method: "POST", path: s.events(), body: "{", token: "-"}, {path: s.events()},
	} {
		req := s.build(t.Context(), r)
		if resp, err := transport.RoundTrip(req); err != nil {
			t.Errorf("%s: %v", r.path, err)
		} else {
			_ = resp.Body.Close()
		}
		time.Sleep(300 * time.Millisecond)
	}
}

// TestCallerGone leaves in the middle of a stream: that is no error of the
// server's.
func TestCallerGone(t *testing.T) {
	s := newSite(t, config.Limits{})
	s.fill(3)
	resp := s.open(request{path: s.events() + "?follow=true", header: map[string]string{"Accept": "application/x-ndjson"}})
	one := make([]byte, 1)
	if _, err := resp.Body.Read(one); err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	await(t, "the log line", func() bool { return strings.Contains(s.log.String(), `"caller_gone":true`) })
	if strings.Contains(s.log.String(), `"level":"ERROR"`) {
		t.Error("it is logged as an error")
	}
}
