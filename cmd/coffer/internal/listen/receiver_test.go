package listen_test

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/listen"
	"github.com/cofferdb/coffer/cmd/coffer/internal/webhook"
)

// local is a receiver with what it took.
type local struct {
	*httptest.Server

	receiver *listen.Receiver
	took     []listen.Received // read after the answer only
}

func start(t *testing.T, o listen.Options) *local {
	t.Helper()
	l := &local{}
	o.Take = func(got listen.Received) error {
		l.took = append(l.took, got)
		return nil
	}
	l.receiver = listen.New(o)
	l.Server = httptest.NewServer(l.receiver)
	t.Cleanup(l.Close)
	return l
}

// post sends a body and returns the answer.
func (l *local) post(t *testing.T, contentType, body string, secrets ...*webhook.Secret) (int, string) {
	t.Helper()
	q, err := http.NewRequestWithContext(t.Context(), http.MethodPost, l.URL, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	q.Header.Set("Content-Type", contentType)
	if len(secrets) > 0 {
		if err := webhook.Sign(q.Header, "msg_1", time.Now(), []byte(body), secrets...); err != nil {
			t.Fatal(err)
		}
	}
	answer, err := http.DefaultClient.Do(q)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close() //nolint:errcheck // read to its end
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, string(text)
}

func (l *local) last() listen.Received { return l.took[len(l.took)-1] }

func newSecret(t *testing.T, kind webhook.Kind) *webhook.Secret {
	t.Helper()
	s, err := webhook.NewSecret(kind)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

const (
	event        = `{"type":"message.sent","id":"m1","number":"1"}`
	verification = `{"type":"endpoint.verification","data":{"challenge":"abc"}}`
)

func TestSignatures(t *testing.T) {
	for _, kind := range []webhook.Kind{webhook.Symmetric, webhook.Asymmetric} {
		secret, other := newSecret(t, kind), newSecret(t, kind)
		public, err := webhook.ParseSecret(secret.Verifier())
		if err != nil {
			t.Fatal(err)
		}
		l := start(t, listen.Options{Secrets: []*webhook.Secret{public, newSecret(t, webhook.Symmetric)}})
		for _, c := range []struct {
			name, body string
			by         []*webhook.Secret
			status     int
			signature  listen.Signature
			answer     string
		}{
			{"an event", event, []*webhook.Secret{secret}, 204, listen.Valid, ""},
			{"in a rotation", event, []*webhook.Secret{other, secret}, 204, listen.Valid, ""},
			{"of another", event, []*webhook.Secret{other}, 401, listen.Invalid, ""},
			{"unsigned", event, nil, 401, listen.Invalid, ""},
			{"a verification", verification, []*webhook.Secret{secret}, 200, listen.Valid, `{"challenge":"abc"}`},
			{"a verification of another", verification, []*webhook.Secret{other}, 401, listen.Invalid, ""},
		} {
			status, answer := l.post(t, "application/json", c.body, c.by...)
			if got := l.last(); status != c.status || answer != c.answer || got.Signature != c.signature || got.Status != c.status {
				t.Errorf("%s, %s: %d %q, %+v", kind, c.name, status, answer, got)
			}
		}
	}
}

// TestQuestions allows what it is asked about, in either form.
func TestQuestions(t *testing.T) {
	l := start(t, listen.Options{AgoraSecret: "s3cret", Status: 503})
	// echo -n 'a#b_1s3cret5' | md5sum
	inAgora := `{"callId":"a#b_1","timestamp":5,"chat_type":"chat","security":"SUM","delivery":{"type":"message.question"}}`
	for body, want := range map[string]string{
		`{"type":"message.question","data":{}}`:                                `{"decision":"allow"}`,
		strings.Replace(inAgora, "SUM", "da609c153643149b1a00540b5dbd386f", 1): `{"valid":true}`,
	} {
		status, answer := l.post(t, "application/json", body)
		if got := l.last(); status != 200 || answer != want || got.Type != "message.question" {
			t.Errorf("%s: %d %s, %+v", body, status, answer, got)
		}
	}
	if status, _ := l.post(t, "application/json", inAgora); status != 401 || l.last().Security != listen.Invalid {
		t.Errorf("of another: %d, %+v", status, l.last())
	}
}

func TestSealed(t *testing.T) {
	key, err := webhook.NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	public, err := key.Public()
	if err != nil {
		t.Fatal(err)
	}
	recipient, err := webhook.ParseRecipient(public)
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := recipient.Seal([]byte("["+event+"]"), "application/cloudevents-batch+json")
	if err != nil {
		t.Fatal(err)
	}
	l := start(t, listen.Options{Key: key})
	if status, _ := l.post(t, webhook.TypeSealed, sealed); status != 204 || string(l.last().Body) != "["+event+"]" || l.last().Type != "message.sent" || !l.last().Sealed {
		t.Errorf("%d, %+v", status, l.last())
	}
	i := len(sealed) - 10 // within the tag
	changed := sealed[:i] + string(sealed[i]^1) + sealed[i+1:]
	if l.post(t, webhook.TypeSealed, changed); l.last().Body != nil || l.last().Error == "" || l.last().Text != changed {
		t.Errorf("changed: %+v", l.last())
	}
	without := start(t, listen.Options{})
	if without.post(t, webhook.TypeSealed, sealed); without.last().Error == "" || without.last().Signature != listen.Unchecked {
		t.Errorf("without a key: %+v", without.last())
	}
}

// TestAnswers: failures that were asked for, and what is not an event.
func TestAnswers(t *testing.T) {
	l := start(t, listen.Options{Status: 503, Limit: 3})
	for body, want := range map[string]string{event: event, "not \xff JSON": "", "{\n \"a\": 1 }": `{"a":1}`} {
		if status, _ := l.post(t, "text/plain", body); status != 503 || string(l.last().Body) != want || (want == "") != (l.last().Text != "") {
			t.Errorf("%q: %d, %+v", body, status, l.last())
		}
		if status, answer := l.post(t, "application/json", verification); status != 200 || answer != `{"challenge":"abc"}` {
			t.Errorf("a verification: %d %s", status, answer)
		}
	}
	select {
	case <-l.receiver.Done():
	default:
		t.Error("the limit was reached, and it goes on")
	}
	n := len(l.took)
	if status, _ := l.post(t, "application/json", event); status != 503 || len(l.took) != n {
		t.Errorf("beyond the limit: %d, %d taken", status, len(l.took)-n)
	}
	get, err := http.NewRequestWithContext(t.Context(), http.MethodGet, l.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := http.DefaultClient.Do(get)
	if err != nil || answer.StatusCode != http.StatusMethodNotAllowed || answer.Body.Close() != nil {
		t.Errorf("GET: %v, %v", answer, err)
	}
}

// TestDelay: an answer that is delayed by an hour does not come, and the handler
// ends with its caller.
func TestDelay(t *testing.T) {
	l := start(t, listen.Options{Delay: time.Hour})
	ctx, cancel := context.WithCancel(t.Context())
	q, err := http.NewRequestWithContext(ctx, http.MethodPost, l.URL, strings.NewReader(event))
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	handler := l.Config.Handler
	entered := make(chan struct{})
	l.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(entered)
		handler.ServeHTTP(w, r)
		ended <- nil
	})
	go func() {
		<-entered
		cancel()
	}()
	answer, err := http.DefaultClient.Do(q)
	if err == nil {
		_ = answer.Body.Close()
		t.Fatalf("it was answered %d", answer.StatusCode)
	}
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Error("the handler goes on")
	}
}
