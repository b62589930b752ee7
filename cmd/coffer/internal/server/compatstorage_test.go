package server_test

import (
	"encoding/pem"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/node"
)

// TestCompatStorage: failed callbacks are listed by ten minutes and sent again to
// the endpoint they are for, and to no address that a request names.
func TestCompatStorage(t *testing.T) {
	h := newHooks(t)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: h.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	s := newSiteWith(t, node.DevOptions{Compat: true, Callbacks: config.Callbacks{Allow: []string{"127.0.0.0/8"}, CAFile: ca}})
	if data, _, a := s.ask("GET", "/callbacks/storage/info", "", ""); len(data.([]any)) != 0 { //nolint:errcheck,forcetypeassert // the test ends
		t.Errorf("nothing has failed: %s", a.body)
	}
	made := s.do(request{method: "POST", path: "/v1/apps/" + s.app + "/endpoints", body: `{"url": "` + h.URL + `/hook", "mode": "agora"}`})
	v := made.json(t)
	secret, _ := v["agora_secret"].(string)
	if made.status != http.StatusCreated || v["state"] != "enabled" || secret == "" || v["agora_appkey"] != "dev#"+s.app {
		t.Fatalf("made: %d %s", made.status, made.body)
	}
	if again := s.do(request{path: "/v1/apps/" + s.app + "/endpoints"}); strings.Contains(string(again.body), secret) {
		t.Error("the secret is told twice")
	}
	h.status.Store(http.StatusInternalServerError)
	s.post(line("m1", "group-1"), line("m2", "group-1"))
	next := func() map[string]any {
		select {
		case e := <-h.events:
			return e
		case <-time.After(time.Minute):
			t.Fatalf("no event came\n%s", s.log)
			return nil
		}
	}
	for range 2 {
		if e := next(); e["chat_type"] != "groupchat" || e["eventType"] != "chat" {
			t.Errorf("a body: %v", e)
		}
	}
	var keys []any
	total := func() (n float64) {
		data, _, _ := s.ask("GET", "/callbacks/storage/info", "", "")
		keys, _ = data.([]any)
		for _, k := range keys {
			n += k.(map[string]any)["size"].(float64) //nolint:errcheck,forcetypeassert // the test ends
		}
		return n
	}
	for end := time.Now().Add(time.Minute); total() != 2; {
		if time.Now().After(end) {
			t.Fatalf("what has failed: %v", keys)
		}
	}
	h.status.Store(http.StatusNoContent)
	elsewhere := newHooks(t)
	date := keys[0].(map[string]any)["date"].(string) //nolint:errcheck,forcetypeassert // the test ends
	for body, want := range map[string]string{
		`{"date":"` + date + `","targetUrl":"` + elsewhere.URL + `/hook"}`: "illegal_argument",
		`{"date":"` + date + `","targetUrl":"` + h.URL + `/other"}`:        "illegal_argument",
		`{"date":"` + date + `","targetUrl":"http://169.254.169.254/"}`:    "illegal_argument",
		`{"date":"` + date + `","retry":1}`:                                "service_resource_not_found",
		`{"date":"` + date[:len(date)-1] + `5"}`:                           "illegal_argument",
		`{"date":"yesterday"}`:                                             "illegal_argument",
		`{"date":"200101010000"}`:                                          "service_resource_not_found",
		`[]`:                                                               "illegal_argument",
	} {
		if _, name, a := s.ask("POST", "/callbacks/storage/retry", "", body); name != want || a.status < 400 || a.status > 499 {
			t.Errorf("%s: %d %s", body, a.status, a.body)
		}
	}
	if n := len(elsewhere.events); n != 0 {
		t.Errorf("%d requests went elsewhere", n)
	}
	for _, k := range keys {
		date := k.(map[string]any)["date"].(string) //nolint:errcheck,forcetypeassert // the test ends
		if _, name, a := s.ask("POST", "/callbacks/storage/retry", "", `{"date":"`+date+`","retry":0,"targetUrl":"`+h.URL+`/hook"}`); name != "" {
			t.Errorf("retry: %d %s", a.status, a.body)
		}
	}
	ids := map[any]bool{}
	for range 2 {
		ids[next()["msg_id"]] = true
	}
	if !ids["m1"] || !ids["m2"] {
		t.Errorf("sent again: %v", ids)
	}
	for end := time.Now().Add(time.Minute); total() != 0; {
		if time.Now().After(end) {
			t.Fatalf("what has failed: %v", keys)
		}
	}
}
