package server_test

import (
	"crypto/md5"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/node"
	"github.com/cofferdb/coffer/cmd/coffer/internal/webhook"
)

// A question is what came to an oracle; what it answers has a status of HTTP.
type question struct {
	header http.Header
	body   []byte
}

// oracle is the server of somebody who is asked; a test says what it answers.
type oracle struct {
	*httptest.Server

	mu     sync.Mutex // guards what follows
	asked  int
	answer func(question) (status int, body string)
}

func newOracle(t *testing.T) *oracle {
	t.Helper()
	o := &oracle{}
	o.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		var v struct {
			Type string `json:"type"`
			Data struct {
				Challenge string `json:"challenge"`
			} `json:"data"`
		}
		if json.Unmarshal(body, &v) == nil && v.Type == "endpoint.verification" {
			_ = json.NewEncoder(w).Encode(map[string]string{"challenge": v.Data.Challenge})
			return
		}
		o.mu.Lock()
		o.asked++
		answer := o.answer
		o.mu.Unlock()
		status, text := answer(question{r.Header, body})
		w.WriteHeader(status)
		_, _ = io.WriteString(w, text)
	}))
	o.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	o.StartTLS()
	t.Cleanup(o.Close)
	return o
}

func (o *oracle) answers(f func(question) (int, string)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.answer = f
}

func (o *oracle) questions() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.asked
}

// consulting is a site where an oracle can be asked.
type consulting struct {
	*site
	*oracle

	base string
}

func newConsulting(t *testing.T) *consulting {
	t.Helper()
	o := newOracle(t)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: o.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	s := newSiteWith(t, node.DevOptions{Callbacks: config.Callbacks{
		Allow: []string{"127.0.0.0/8"}, CAFile: ca, PresendTimeout: config.Duration(30 * time.Second),
	}})
	return &consulting{s, o, "/v1/apps/" + s.app}
}

// ask makes an endpoint for the oracle, has it asked, and returns what is known of
// it.
func (c *consulting) ask(endpoint, setting string) map[string]any {
	c.t.Helper()
	made := c.do(request{method: "POST", path: c.base + "/endpoints", body: `{"url":"` + c.URL + `","asked_only":true` + endpoint + `}`}).json(c.t)
	if made["state"] != "enabled" {
		c.t.Fatalf("made: %v", made)
	}
	c.set(made, setting)
	return made
}

func (c *consulting) set(endpoint map[string]any, setting string) {
	c.t.Helper()
	id, _ := endpoint["id"].(string)
	if a := c.do(request{method: "PUT", path: c.base + "/presend", body: `{"endpoint":"` + id + `"` + setting + `}`}); a.status != http.StatusOK {
		c.t.Fatalf("set: %d %s", a.status, a.body)
	}
}

func (c *consulting) send(body string) answer {
	return c.do(request{method: "POST", path: c.events(), body: body})
}

func (c *consulting) outcomes() map[string]any {
	c.t.Helper()
	outcomes, _ := c.do(request{path: c.base + "/presend"}).json(c.t)["outcomes"].(map[string]any)
	return outcomes
}

// stored is the data of an event that was appended with an answer.
func (c *consulting) stored(id string, appended answer) string {
	c.t.Helper()
	position, _ := appended.json(c.t)["position"].(string)
	a := c.do(request{path: c.events() + "/" + id + "?min_position=" + position})
	var e struct {
		Data json.RawMessage `json:"data"`
	}
	if err := json.Unmarshal(a.body, &e); err != nil || a.status != http.StatusOK {
		c.t.Fatalf("%s: %d %s", id, a.status, a.body)
	}
	return string(e.Data)
}

// TestPresendAgora asks in the form of Agora Chat's pre-send callbacks, and reads
// what receivers of those answer.
func TestPresendAgora(t *testing.T) {
	c := newConsulting(t)
	made := c.ask(`,"mode":"agora"`, `,"timeout":"30s","rewrite":true,"fallback":"deny"`)
	secret, err := webhook.ParseSecret(made["secret"].(string)) //nolint:errcheck,forcetypeassert // the test ends
	if err != nil {
		t.Fatal(err)
	}
	agoraSecret, _ := made["agora_secret"].(string)
	appkey, _ := made["agora_appkey"].(string)
	var seen map[string]any
	reply := func(status int, body string) {
		c.answers(func(q question) (int, string) {
			if err := secret.Verify(q.header, q.body, time.Now()); err != nil {
				return http.StatusUnauthorized, err.Error()
			}
			seen = nil
			if err := json.Unmarshal(q.body, &seen); err != nil {
				return http.StatusBadRequest, err.Error()
			}
			payload, _ := json.Marshal(seen["payload"])
			return status, strings.ReplaceAll(body, "ECHO", string(payload))
		})
	}
	group := func(id, data string) string {
		return `{"id":"` + id + `","type":"message.sent","conversation":"g-1","conversationtype":"group","sender":"ann","data":` + data + `}`
	}
	text := func(id string) string {
		return group(id, `{"bodies":[{"type":"txt","msg":"rude"}],"ext":{"n":1.50}}`)
	}

	reply(200, `{"valid":true,"code":"HX:10000","chatroom_msg_level":"high"}`)
	if a := c.send(text("a1")); a.status != http.StatusCreated {
		t.Fatalf("valid: %d %s", a.status, a.body)
	}
	callID, _ := seen["callId"].(string)
	millis, _ := seen["timestamp"].(float64)
	sum := md5.Sum([]byte(callID + agoraSecret + strconv.FormatInt(int64(millis), 10)))
	if !strings.HasPrefix(callID, appkey+"_") || len(callID) != len(appkey)+37 || seen["security"] != hex.EncodeToString(sum[:]) {
		t.Errorf("callId and security: %v", seen)
	}
	for name, want := range map[string]any{"chat_type": "groupchat", "group_id": "g-1", "from": "ann", "to": "g-1", "msg_id": "a1"} {
		if seen[name] != want {
			t.Errorf("%s: %v", name, seen[name])
		}
	}
	for _, name := range []string{"eventType", "securityVersion", "type", "specversion"} {
		if _, has := seen[name]; has {
			t.Errorf("a question has %s: %v", name, seen)
		}
	}
	reply(200, `{"valid":true}`)
	if a := c.send(sent("a2", "ann", "ben", "hi")); a.status != http.StatusCreated || seen["chat_type"] != "chat" || seen["to"] != "ben" || seen["group_id"] != nil {
		t.Errorf("a direct message: %d, %v", a.status, seen)
	}

	// What is not valid is refused, with its code as the reason.
	reply(200, `{"valid":false,"code":"no\nlinks"}`)
	if a := c.send(text("b1")); a.status != http.StatusForbidden || a.code(t) != "message-refused" || !strings.Contains(string(a.body), "no links") {
		t.Errorf("not valid: %d %s", a.status, a.body)
	}

	// A payload changes text and ext of a message of text, or nothing.
	for id, want := range map[string][2]string{
		"c1": {`{"valid":true,"payload":ECHO}`, `{"bodies":[{"type":"txt","msg":"rude"}],"ext":{"n":1.50}}`},
		"c2": {`{"valid":true,"payload":{"bodies":[{"type":"txt","msg":"kind"}]}}`, `{"bodies":[{"type":"txt","msg":"kind"}],"ext":{"n":1.50},"presend":`},
		"c3": {`{"valid":true,"payload":{"bodies":[{"msg":"kind","type":"txt"}],"ext":{"k":"v"}}}`, `{"bodies":[{"type":"txt","msg":"kind"}],"ext":{"k":"v"},"presend":`},
		"c4": {`{"valid":true,"payload":{"ext":{"k":"v"}}}`, `{"bodies":[{"type":"txt","msg":"rude"}],"ext":{"k":"v"},"presend":`},
	} {
		reply(200, want[0])
		a := c.send(text(id))
		if a.status != http.StatusCreated {
			t.Errorf("%s: %d %s", id, a.status, a.body)
			continue
		}
		if got := c.stored(id, a); !strings.HasPrefix(got, want[1]) {
			t.Errorf("%s: stored %s", id, got)
		}
		if again := c.send(text(id)); again.status != http.StatusOK || again.json(t)["position"] != a.json(t)["position"] {
			t.Errorf("%s again: %d %s", id, again.status, again.body)
		}
	}
	image := `{"bodies":[{"type":"img","url":"https://a.example/1","filename":"f","file_length":1}]}`
	reply(200, `{"valid":true,"payload":ECHO}`)
	if a := c.send(group("i1", image)); a.status != http.StatusCreated {
		t.Errorf("an image that is not changed: %d %s", a.status, a.body)
	}

	// Anything else is no answer.
	for i, body := range []string{
		``, `{}`, `{"code":"HX:10000"}`, `{"valid":"true"}`, `{"valid":null}`, `{"valid":false,"code":7}`, `[true]`, `{"decision":"allow"}`,
		`{"valid":true,"payload":{"bodies":[{"type":"img","url":"u"}]}}`, `{"valid":true,"payload":{"bodies":[{"type":"txt","msg":""}]}}`,
		`{"valid":true,"payload":{"ext":7}}`, `{"valid":true,"payload":"x"}`,
	} {
		reply(200, body)
		if a := c.send(text("u" + strconv.Itoa(i))); a.status != http.StatusServiceUnavailable || a.code(t) != "presend-unavailable" {
			t.Errorf("%s: %d %s", body, a.status, a.body)
		}
	}
	reply(200, `{"valid":true,"payload":{"bodies":[{"type":"txt","msg":"x"}]}}`)
	if a := c.send(group("i2", image)); a.code(t) != "presend-unavailable" {
		t.Errorf("an image that becomes text: %d %s", a.status, a.body)
	}
	if n, _ := c.outcomes()["unclear"].(float64); n != 13 {
		t.Errorf("outcomes: %v", c.outcomes())
	}
	// Where the setting lets nobody rewrite, what changes nothing still passes.
	c.set(made, `,"timeout":"30s","fallback":"deny"`)
	if a := c.send(text("r1")); a.code(t) != "presend-unavailable" {
		t.Errorf("a rewriting that is not allowed: %d %s", a.status, a.body)
	}
	reply(200, `{"valid":true,"payload":ECHO}`)
	if a := c.send(text("r2")); a.status != http.StatusCreated {
		t.Errorf("the message's own payload: %d %s", a.status, a.body)
	}
}

// TestPresendSealed: a question to an endpoint whose bodies are sealed is sealed,
// and its answer may rewrite the text.
func TestPresendSealed(t *testing.T) {
	c := newConsulting(t)
	key, err := webhook.NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	public, err := key.Public()
	if err != nil {
		t.Fatal(err)
	}
	made := c.ask(`,"mode":"sealed","encryption":`+strconv.Quote(string(public)), `,"timeout":"30s","rewrite":true,"fallback":"deny"`)
	secret, err := webhook.ParseSecret(made["secret"].(string)) //nolint:errcheck,forcetypeassert // the test ends
	if err != nil {
		t.Fatal(err)
	}
	c.answers(func(q question) (int, string) {
		if !webhook.IsSealed(q.header.Get("Content-Type")) || strings.Contains(string(q.body), "rude") {
			return http.StatusBadRequest, "it is not sealed"
		}
		if err := secret.Verify(q.header, q.body, time.Now()); err != nil { // over the ciphertext
			return http.StatusUnauthorized, err.Error()
		}
		opened, err := key.Open(string(q.body))
		if err != nil || !strings.Contains(string(opened), `"type":"message.question"`) || !strings.Contains(string(opened), `"msg":"rude"`) {
			return http.StatusBadRequest, "it is no question"
		}
		return http.StatusOK, `{"decision":"rewrite","text":"kind"}`
	})
	a := c.send(sent("s1", "ann", "ben", "rude"))
	if a.status != http.StatusCreated {
		t.Fatalf("asked: %d %s", a.status, a.body)
	}
	if got := c.stored("s1", a); !strings.Contains(got, `"msg":"kind"`) || strings.Contains(got, "rude") {
		t.Errorf("stored: %s", got)
	}
}

// TestPresendHangs: an endpoint that takes a question and does not answer costs
// the setting's time and then the fallback counts; after five of them it is left
// alone, then tried by one question, and asked again once that is answered.
func TestPresendHangs(t *testing.T) {
	c := newConsulting(t)
	release := make(chan struct{})
	hang := func(question) (int, string) { <-release; return http.StatusOK, `{"decision":"allow"}` }
	defer close(release) // before the server is closed
	c.answers(hang)
	made := c.ask("", `,"timeout":"20ms","fallback":"allow"`)
	for i := range 2 {
		if a := c.send(sent("l"+strconv.Itoa(i), "ann", "ben", "x")); a.status != http.StatusCreated {
			t.Errorf("allow: %d %s", a.status, a.body)
		}
	}
	if got := c.outcomes(); got["timeout"] != float64(2) {
		t.Errorf("outcomes: %v", got)
	}
	c.set(made, `,"timeout":"20ms","fallback":"deny"`)
	for i := range 5 {
		a := c.send(sent("d"+strconv.Itoa(i), "ann", "ben", "x"))
		if a.status != http.StatusServiceUnavailable || a.code(t) != "presend-unavailable" || !strings.Contains(string(a.body), `"retryable":true`) {
			t.Errorf("deny: %d %s", a.status, a.body)
		}
	}
	if got := c.outcomes(); got["timeout"] != float64(7) {
		t.Errorf("outcomes: %v", got)
	}

	// A setting that is changed begins with a closed breaker, which five failures
	// open.
	c.answers(func(question) (int, string) { return http.StatusInternalServerError, "" })
	c.set(made, `,"timeout":"30s","fallback":"allow"`)
	for i := range 5 {
		c.send(sent("f"+strconv.Itoa(i), "ann", "ben", "x"))
	}
	probe, asked := make(chan struct{}), make(chan struct{}, 64)
	c.answers(func(question) (int, string) {
		asked <- struct{}{}
		<-probe
		return http.StatusOK, `{"decision":"deny"}`
	})
	// One of these is let through when the pause is over, and hangs.
	denied := make(chan answer)
	go func() {
		for i := 0; ; i++ {
			if a := c.send(sent("p"+strconv.Itoa(i), "ann", "ben", "x")); a.status != http.StatusCreated {
				denied <- a
				return
			}
		}
	}()
	<-asked
	n := c.questions()
	for i := range 3 {
		if a := c.send(sent("h"+strconv.Itoa(i), "ann", "ben", "x")); a.status != http.StatusCreated {
			t.Errorf("beside the one that tries: %d %s", a.status, a.body)
		}
	}
	if got := c.questions(); got != n {
		t.Errorf("%d questions beside the one that tries", got-n)
	}
	close(probe)
	if a := <-denied; a.code(t) != "message-refused" {
		t.Errorf("the one that tries: %d %s", a.status, a.body)
	}
	for i := range 3 { // closed
		if a := c.send(sent("e"+strconv.Itoa(i), "ann", "ben", "x")); a.code(t) != "message-refused" {
			t.Errorf("after it: %d %s", a.status, a.body)
		}
	}
	if skipped, _ := c.outcomes()["skipped"].(float64); skipped < 3 {
		t.Errorf("outcomes: %v", c.outcomes())
	}
}
