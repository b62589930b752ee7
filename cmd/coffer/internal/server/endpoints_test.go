package server_test

import (
	"encoding/json"
	"encoding/pem"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/node"
	"github.com/cofferdb/coffer/cmd/coffer/internal/webhook"
)

// hooks is the server of somebody who is told of events.
type hooks struct {
	*httptest.Server

	status atomic.Int32 // of answers to events
	silent atomic.Bool  // no challenge is given back
	secret atomic.Pointer[webhook.Secret]
	bad    atomic.Int32 // signatures that did not fit
	events chan map[string]any
}

func newHooks(t *testing.T) *hooks {
	t.Helper()
	h := &hooks{events: make(chan map[string]any, 1000)}
	h.status.Store(http.StatusNoContent)
	h.Server = httptest.NewUnstartedServer(http.HandlerFunc(h.serve))
	h.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	h.StartTLS()
	t.Cleanup(h.Close)
	return h
}

func (h *hooks) serve(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	if secret := h.secret.Load(); secret != nil && secret.Verify(r.Header, body, time.Now()) != nil {
		h.bad.Add(1)
	}
	var event map[string]any
	if json.Unmarshal(body, &event) != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	switch event["type"] {
	case "endpoint.verification":
		if !h.silent.Load() {
			_ = json.NewEncoder(w).Encode(event["data"])
		}
	case "endpoint.test":
		w.WriteHeader(http.StatusAccepted)
	default:
		status := int(h.status.Load())
		w.WriteHeader(status)
		if status >= http.StatusBadRequest {
			_, _ = io.WriteString(w, "not now")
		}
		h.events <- event
	}
}

// TestEndpoints leads an endpoint through its life by the routes.
func TestEndpoints(t *testing.T) {
	h := newHooks(t)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: h.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	s := newSiteWith(t, node.DevOptions{Callbacks: config.Callbacks{Allow: []string{"127.0.0.0/8"}, CAFile: ca}})
	base := "/v1/apps/" + s.app + "/endpoints"
	call := func(status int, r request) map[string]any {
		t.Helper()
		a := s.do(r)
		if a.status != status {
			t.Fatalf("%s %s %s: %d %s", r.method, r.path, r.body, a.status, a.body)
		}
		if len(a.body) == 0 {
			return nil
		}
		return a.json(t)
	}

	for body, code := range map[string]string{
		`{}`:                             "invalid-request",
		`{"url": "http://example.com/"}`: "endpoint-url-forbidden",
		`{"url": "https://10.0.0.1/"}`:   "endpoint-url-forbidden",
		`{"url": "https://[::ffff:169.254.169.254]/"}`:                          "endpoint-url-forbidden",
		`{"url": "https://2130706433/"}`:                                        "endpoint-url-forbidden",
		`{"url": "https://user:secret@example.com/"}`:                           "endpoint-url-forbidden",
		`{"url": "https://example.com/", "mode": "loud"}`:                       "endpoint-invalid",
		`{"url": "https://example.com/", "mode": "sealed"}`:                     "endpoint-invalid",
		`{"url": "https://example.com/", "types": ["nothing"]}`:                 "endpoint-invalid",
		`{"url": "https://example.com/", "users": ["a b"]}`:                     "endpoint-invalid",
		`{"url": "https://example.com/", "headers": {"Webhook-Id": "x"}}`:       "endpoint-invalid",
		`{"url": "https://example.com/", "headers": {"X-A": "a\r\nX-B: b"}}`:    "endpoint-invalid",
		`{"url": "https://example.com/", "secret": "whsec_short"}`:              "endpoint-invalid",
		`{"url": "https://example.com/", "encryption": "{}", "mode": "sealed"}`: "endpoint-invalid",
		`{"url": "https://example.com/", "concurrency": 1000}`:                  "endpoint-invalid",
		`{"url": "https://example.com/", "certificate": "x"}`:                   "endpoint-invalid",
		`{"url": "https://example.com/", "unknown": 1}`:                         "invalid-request",
	} {
		if got := s.do(request{method: "POST", path: base, body: body}).code(t); got != code {
			t.Errorf("%s: %s, want %s", body, got, code)
		}
	}
	if list := call(200, request{path: base})["data"].([]any); len(list) != 0 { //nolint:errcheck,forcetypeassert // the test ends
		t.Fatalf("endpoints were made: %v", list)
	}

	// One that does not give the challenge back gets nothing until it does.
	h.silent.Store(true)
	made := call(201, request{method: "POST", path: base, body: `{"url": "` + h.URL + `/hook", "description": "mine", "headers": {"X-Key": "k"}, "mode": "full"}`})
	path := base + "/" + made["id"].(string) //nolint:errcheck,forcetypeassert // the test ends
	if made["state"] != "unverified" || made["secret"] == nil {
		t.Errorf("made: %v", made)
	}
	secret, err := webhook.ParseSecret(made["secret"].(string)) //nolint:errcheck,forcetypeassert // the test ends
	if err != nil {
		t.Fatal(err)
	}
	h.secret.Store(secret)
	h.silent.Store(false)
	s.post(line("before", "group-1"))
	if e := call(200, request{method: "PATCH", path: path, body: `{"state": "enabled"}`}); e["state"] != "enabled" {
		t.Errorf("enabled: %v", e)
	}
	next := func() map[string]any {
		t.Helper()
		select {
		case e := <-h.events:
			return e
		case <-time.After(time.Minute):
			t.Fatalf("no event came\n%s", s.log)
			return nil
		}
	}
	// Everything since it was made: also what came while it was not enabled.
	if e := next(); e["id"] != "before" || e["number"] != "1" || e["data"] == nil {
		t.Errorf("the first event: %v", e)
	}
	s.post(line("after", "group-1"))
	if e := next(); e["id"] != "after" || e["number"] != "2" {
		t.Errorf("the second event: %v", e)
	}
	if a := call(200, request{method: "POST", path: path + "/test"}); a["delivered"] != true || a["status"] != float64(202) {
		t.Errorf("test: %v", a)
	}

	rotated := call(201, request{method: "POST", path: path + "/secret-rotations", body: `{"overlap": "1h", "signature": "ed25519"}`})
	if n := len(rotated["secrets"].([]any)); n != 2 { //nolint:errcheck,forcetypeassert // the test ends
		t.Errorf("%d secrets after a rotation", n)
	}
	if secret, err = webhook.ParseSecret(rotated["secret"].(string)); err != nil { //nolint:errcheck,forcetypeassert // the test ends
		t.Fatal(err)
	}
	s.post(line("rotated", "group-1"))
	next()
	h.secret.Store(secret)
	s.post(line("rotated-2", "group-1"))
	next()
	if n := h.bad.Load(); n != 0 {
		t.Errorf("%d signatures did not fit", n)
	}

	// A failure is visible, with what was answered.
	h.status.Store(http.StatusServiceUnavailable)
	s.post(line("fails", "group-1"))
	next()
	var waiting []any
	for end := time.Now().Add(time.Minute); len(waiting) == 0 && time.Now().Before(end); {
		waiting = call(200, request{path: path + "/deliveries?status=waiting"})["data"].([]any) //nolint:errcheck,forcetypeassert // the test ends
	}
	if len(waiting) != 1 {
		t.Fatalf("waiting: %v", waiting)
	}
	d := waiting[0].(map[string]any) //nolint:errcheck,forcetypeassert // the test ends
	if d["number"] != "5" || d["http_status"] != float64(503) || d["cause"] != "status" || d["due"] == nil || d["until"] == nil {
		t.Errorf("a delivery that waits: %v", d)
	}
	h.status.Store(http.StatusNoContent)

	polled := call(200, request{path: "/v1/apps/" + s.app + "/callbacks?endpoint=" + made["id"].(string) + "&limit=3"}) //nolint:errcheck,forcetypeassert // the test ends
	if n := len(polled["data"].([]any)); n != 3 {                                                                       //nolint:errcheck,forcetypeassert // the test ends
		t.Errorf("%d events were polled", n)
	}
	polled = call(200, request{path: "/v1/apps/" + s.app + "/callbacks?endpoint=" + made["id"].(string) + "&after=" + polled["next"].(string)}) //nolint:errcheck,forcetypeassert // the test ends
	if n := len(polled["data"].([]any)); n != 2 {                                                                                               //nolint:errcheck,forcetypeassert // the test ends
		t.Errorf("%d further events were polled", n)
	}

	replay := call(202, request{method: "POST", path: path + "/replays", body: `{"rate": 1000}`})
	for range 5 {
		next()
	}
	for end := time.Now().Add(time.Minute); ; {
		r := call(200, request{path: "/v1/apps/" + s.app + "/replays/" + replay["id"].(string)}) //nolint:errcheck,forcetypeassert // the test ends
		if r["state"] == "done" && r["sent"] == float64(5) {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the replay: %v", r)
		}
	}
	if got := s.do(request{method: "POST", path: path + "/replays", body: `{"status": "parked"}`}).code(t); got != "not-found" {
		t.Errorf("nothing is parked: %s", got)
	}
	if got := s.do(request{path: "/v1/apps/" + s.app + "/replays/00"}).code(t); got != "not-found" {
		t.Errorf("a replay that is not there: %s", got)
	}
	call(204, request{method: "DELETE", path: path})
	if got := s.do(request{path: path}).code(t); got != "not-found" {
		t.Errorf("after deletion: %s", got)
	}
}

// line is a message as a caller sends it.
func line(id, conversation string) string {
	return `{"id":"` + id + `","type":"message.sent","conversation":"` + conversation +
		`","conversationtype":"group","sender":"alice","data":{"bodies":[{"type":"txt","msg":"hello"}]}}`
}
