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
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/node"
	"github.com/cofferdb/coffer/cmd/coffer/internal/webhook"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/client"
)

// judge is the server of somebody who is asked about messages.
type judge struct {
	*httptest.Server

	secret atomic.Pointer[webhook.Secret]
	bad    atomic.Int32 // signatures that did not fit
	events atomic.Int32 // that are no questions
	broken atomic.Bool  // nothing is answered well
	mu     sync.Mutex   // guards asked
	asked  map[string]int
}

func newJudge(t *testing.T) *judge {
	t.Helper()
	j := &judge{asked: make(map[string]int)}
	j.Server = httptest.NewUnstartedServer(http.HandlerFunc(j.serve))
	j.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	j.StartTLS()
	t.Cleanup(j.Close)
	return j
}

func (j *judge) serve(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	var q struct {
		Type string `json:"type"`
		Data struct {
			ID        string `json:"id"`
			Challenge string `json:"challenge"`
			Data      struct {
				Bodies []struct {
					Msg string `json:"msg"`
				} `json:"bodies"`
			} `json:"data"`
		} `json:"data"`
	}
	if json.Unmarshal(body, &q) != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	if q.Type == "endpoint.verification" {
		_ = json.NewEncoder(w).Encode(map[string]string{"challenge": q.Data.Challenge})
		return
	}
	if secret := j.secret.Load(); secret == nil || secret.Verify(r.Header, body, time.Now()) != nil {
		j.bad.Add(1)
	}
	if q.Type != "message.question" {
		j.events.Add(1)
		return
	}
	j.mu.Lock()
	j.asked[q.Data.ID]++
	n := j.asked[q.Data.ID]
	j.mu.Unlock()
	if j.broken.Load() {
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	answer := map[string]string{"decision": "allow"}
	switch text := q.Data.Data.Bodies[0].Msg; {
	case strings.HasPrefix(text, "bad"):
		answer = map[string]string{"decision": "deny", "reason": "not\nhere"}
	case strings.HasPrefix(text, "rude"):
		// A second question would get another answer.
		answer = map[string]string{"decision": "rewrite", "text": "kind " + strings.Repeat("i", n)}
	case strings.HasPrefix(text, "odd"):
		answer = map[string]string{"decision": "perhaps"}
	}
	_ = json.NewEncoder(w).Encode(answer)
}

func (j *judge) times(id string) int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.asked[id]
}

// TestPresend: an endpoint allows, refuses and rewrites messages before they are
// stored, is asked once about each, and is left alone when it does not answer.
func TestPresend(t *testing.T) {
	j := newJudge(t)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: j.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	s := newSiteWith(t, node.DevOptions{Callbacks: config.Callbacks{
		Allow: []string{"127.0.0.0/8"}, CAFile: ca, PresendTimeout: config.Duration(30 * time.Second), // a busy machine is no failure
	}})
	base := "/v1/apps/" + s.app
	if got := s.do(request{path: base + "/presend"}).code(t); got != "not-found" {
		t.Errorf("before: %s", got)
	}
	made := s.do(request{method: "POST", path: base + "/endpoints", body: `{"url":"` + j.URL + `","asked_only":true,"mode":"full"}`}).json(t)
	if made["state"] != "enabled" {
		t.Fatalf("made: %v", made)
	}
	secret, err := webhook.ParseSecret(made["secret"].(string)) //nolint:errcheck,forcetypeassert // the test ends
	if err != nil {
		t.Fatal(err)
	}
	j.secret.Store(secret)
	id := made["id"].(string) //nolint:errcheck,forcetypeassert // the test ends
	for body, code := range map[string]string{
		`{}`: "endpoint-invalid", `{"endpoint":"00000000000000000000000000000000"}`: "endpoint-invalid",
		`{"endpoint":"` + id + `","timeout":"31s"}`:              "endpoint-invalid",
		`{"endpoint":"` + id + `","timeout":"0s"}`:               "endpoint-invalid",
		`{"endpoint":"` + id + `","fallback":"maybe"}`:           "endpoint-invalid",
		`{"endpoint":"` + id + `","types":["message.recalled"]}`: "endpoint-invalid",
		`{"endpoint":"` + id + `","url":"https://a.example/"}`:   "invalid-request",
	} {
		if got := s.do(request{method: "PUT", path: base + "/presend", body: body}).code(t); got != code {
			t.Errorf("%s: %s, want %s", body, got, code)
		}
	}
	set := func(more string) {
		t.Helper()
		if a := s.do(request{method: "PUT", path: base + "/presend", body: `{"endpoint":"` + id + `"` + more + `}`}); a.status != http.StatusOK {
			t.Fatalf("set: %d %s", a.status, a.body)
		}
	}
	set(`,"timeout":"30s","rewrite":true,"fallback":"deny"`)
	send := func(id, text string) answer {
		return s.do(request{method: "POST", path: s.events(), body: sent(id, "ann", "ben", text)})
	}
	at := send("fine", "fine")
	if at.status != http.StatusCreated {
		t.Fatalf("allowed: %d %s", at.status, at.body)
	}
	refused := send("bad", "bad word")
	if got := refused.code(t); refused.status != http.StatusForbidden || got != "message-refused" || !strings.Contains(string(refused.body), "not here") {
		t.Errorf("denied: %d %s", refused.status, refused.body)
	}
	if a := send("odd", "odd"); a.code(t) != "presend-unavailable" || a.status != http.StatusServiceUnavailable {
		t.Errorf("an unclear answer: %d %s", a.status, a.body)
	}

	// The same event at the same time, and again: one question, one position.
	var work sync.WaitGroup
	positions := make([]string, 8)
	for i := range positions {
		work.Go(func() {
			positions[i], _ = send("rude", "rude word").json(t)["position"].(string)
		})
	}
	work.Wait()
	for _, p := range positions {
		if p == "" || p != positions[0] {
			t.Errorf("the same event lies at %v", positions)
			break
		}
	}
	stored := s.do(request{path: s.events() + "/rude?min_position=" + positions[0]})
	if !strings.Contains(string(stored.body), `"msg":"kind i"`) || strings.Contains(string(stored.body), "rude word") {
		t.Errorf("rewritten: %d %s", stored.status, stored.body)
	}
	// After a restart nothing is remembered but what is stored.
	s.stop()
	s.start()
	s.replay("?min_position=" + positions[0])
	if a := send("rude", "rude word"); a.status != http.StatusOK || a.json(t)["position"] != positions[0] {
		t.Errorf("again after a restart: %d %s", a.status, a.body)
	}
	if a := send("rude", "rude words"); a.code(t) != "idempotency-conflict" {
		t.Errorf("another content: %d %s", a.status, a.body)
	}
	if n := j.times("rude"); n != 1 {
		t.Errorf("%d questions about one event", n)
	}

	batch := s.do(request{method: "POST", path: s.events(), body: "[" + sent("b1", "ann", "ben", "bad") + "," + sent("b2", "ann", "ben", "x") + "]"})
	if data, _ := batch.json(t)["data"].([]any); batch.status != http.StatusMultiStatus || len(data) != 2 ||
		data[0].(map[string]any)["status"] != "refused" || data[1].(map[string]any)["status"] != "created" { //nolint:errcheck,forcetypeassert // the test ends
		t.Errorf("a batch: %d %s", batch.status, batch.body)
	}
	// An app's backend may leave the question out, a user may not.
	if a := s.do(request{method: "POST", path: s.events() + "?presend=skip", body: sent("skipped", "ann", "ben", "bad")}); a.status != http.StatusCreated || j.times("skipped") != 0 {
		t.Errorf("skipped: %d %s", a.status, a.body)
	}
	unasked := client.Config{URL: s.url, Token: client.StaticToken(s.token), HTTP: s.client, Unasked: true}
	if unasked.App, err = journal.ParseAppID(s.app); err != nil {
		t.Fatal(err)
	}
	importing, err := client.New(unasked)
	if err != nil {
		t.Fatal(err)
	}
	results, err := importing.Append(t.Context(), journal.Event{
		ID: "imported", Type: journal.MessageSent, Sender: "ann", Recipient: "ben", Data: []byte(`{"bodies":[{"type":"txt","msg":"bad"}]}`),
	})
	if err != nil || results[0].Err != nil || j.times("imported") != 0 {
		t.Errorf("imported: %v, %v", results, err)
	}
	if a := s.do(request{method: "POST", path: s.events() + "?presend=skip", token: s.userToken("ann"), body: sent("user", "ann", "ben", "bad")}); a.status != http.StatusForbidden {
		t.Errorf("skipped by a user: %d %s", a.status, a.body)
	}
	if a := s.do(request{method: "POST", path: s.events(), token: s.userToken("ann"), body: sent("user", "ann", "ben", "bad")}); a.code(t) != "message-refused" {
		t.Errorf("of a user: %d %s", a.status, a.body)
	}

	// A dead endpoint is asked five times and then left alone.
	j.broken.Store(true)
	set(`,"timeout":"29s","fallback":"allow"`)
	for _, name := range []string{"d1", "d2", "d3", "d4", "d5"} {
		if a := send(name, "bad"); a.status != http.StatusCreated {
			t.Errorf("the fallback: %d %s", a.status, a.body)
		}
		if j.times(name) != 1 {
			t.Errorf("%s was asked about %d times", name, j.times(name))
		}
	}
	v := s.do(request{path: base + "/presend"}).json(t)
	if outcomes, _ := v["outcomes"].(map[string]any); outcomes["failed"] != float64(5) {
		t.Errorf("outcomes: %v", v)
	}
	for end := time.Now().Add(time.Minute); !strings.Contains(s.audited("endpoint:"+id), "presend.failing"); {
		if time.Now().After(end) {
			t.Fatalf("the audit log has %s", s.audited("endpoint:"+id))
		}
	}
	if n := j.events.Load(); n != 0 {
		t.Errorf("%d events came to who is only asked", n)
	}
	if n := j.bad.Load(); n != 0 {
		t.Errorf("%d signatures did not fit", n)
	}
	if a := s.do(request{method: "DELETE", path: base + "/presend"}); a.status != http.StatusNoContent {
		t.Errorf("removed: %d %s", a.status, a.body)
	}
	if a := send("after", "bad"); a.status != http.StatusCreated || j.times("after") != 0 {
		t.Errorf("after: %d %s", a.status, a.body)
	}
}
