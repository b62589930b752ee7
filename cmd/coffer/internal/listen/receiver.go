package listen

import (
	"bytes"
	"crypto/subtle"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/cmd/coffer/internal/agora"
	"github.com/cofferdb/coffer/cmd/coffer/internal/webhook"
)

// MaxBody is the longest request that is taken: a hundred events, sealed.
const MaxBody = 16 << 20

// Options says how a receiver answers. The zero value takes everything.
type Options struct {
	// Secrets are what signatures are verified with; one that fits is enough.
	// Without any they are not looked at.
	Secrets []*webhook.Secret
	// Key opens sealed bodies.
	Key *webhook.PrivateKey
	// AgoraSecret is what the member security of bodies in the form of Agora's
	// callbacks is checked with; empty: it is not looked at.
	AgoraSecret string
	// Status is what events are answered with; 0 means 204.
	Status int
	// Delay is how long the answer to an event takes.
	Delay time.Duration
	// Limit is after how many requests Done is closed and others are refused
	// with 503; 0: never. Verifications do not count.
	Limit int
	// Take gets each request in turn, before it is answered. When it fails the
	// answer is 503.
	Take func(Received) error
}

// Signature is what was found of a request's signature.
type Signature string

// The findings.
const (
	Valid     Signature = "valid"
	Invalid   Signature = "invalid"
	Unchecked Signature = "unchecked" // without a secret
)

// Received is a request as it is printed.
type Received struct {
	Time      time.Time `json:"received"`
	ID        string    `json:"webhook_id"`
	Signature Signature `json:"signature"`
	// Security is the same for the member of that name in Agora's form; empty when
	// there is none.
	Security Signature `json:"security,omitzero"`
	// Status is what is answered.
	Status int `json:"status"`
	// Sealed says that the body was encrypted.
	Sealed bool `json:"sealed,omitzero"`
	// Type is that of the event, or of the first of several.
	Type string `json:"type,omitzero"`
	// Body is the event, or an array of events; nil when it is not JSON.
	Body jsontext.Value `json:"body,omitzero"`
	// Text is a body that is not JSON, or that could not be opened.
	Text string `json:"text,omitzero"`
	// Error says what is wrong with the request.
	Error string `json:"error,omitzero"`
}

// Receiver is the handler.
type Receiver struct {
	o    Options
	done chan struct{}

	mu    sync.Mutex // guards count, and gives Take its turn
	count int
}

// New returns a receiver.
func New(o Options) *Receiver { return &Receiver{o: o, done: make(chan struct{})} }

// Done is closed when Options.Limit is reached.
func (r *Receiver) Done() <-chan struct{} { return r.done }

// typeVerification is the request that asks for its challenge.
const typeVerification = "endpoint.verification"

// typeQuestion asks whether a message may be stored.
const typeQuestion = "message.question"

// ServeHTTP takes one request.
func (r *Receiver) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	if q.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		http.Error(w, "webhooks are posted", http.StatusMethodNotAllowed)
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, q.Body, MaxBody))
	if err != nil {
		http.Error(w, "the body was cut or is too long", http.StatusRequestEntityTooLarge)
		return
	}
	got, challenge := r.look(q.Header, body)
	if !r.take(got, challenge != nil) {
		http.Error(w, "no more is taken", http.StatusServiceUnavailable)
		return
	}
	if challenge != nil && got.Status == http.StatusOK {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(challenge) //nolint:gosec // its caller's own words, and as JSON
		return
	}
	if r.o.Delay > 0 {
		select {
		case <-q.Context().Done():
			return
		case <-time.After(r.o.Delay):
		}
	}
	w.WriteHeader(got.Status)
}

// look says what there is to say about a request, and returns the answer to a
// verification when it is one.
func (r *Receiver) look(h http.Header, body []byte) (Received, []byte) {
	got := Received{
		Time: time.Now().UTC().Truncate(time.Millisecond), ID: h.Get(webhook.HeaderID), Signature: Unchecked, Status: http.StatusNoContent,
	}
	if r.o.Status != 0 {
		got.Status = r.o.Status
	}
	if len(r.o.Secrets) > 0 {
		if got.Signature = r.verify(h, body); got.Signature == Invalid {
			got.Status, got.Error = http.StatusUnauthorized, "no signature fits"
		}
	}
	if webhook.IsSealed(h.Get("Content-Type")) {
		got.Sealed = true
		if r.o.Key == nil {
			got.Text, got.Error = printed(body), "sealed, and there is no key"
			return got, nil
		}
		opened, err := r.o.Key.Open(string(body))
		if err != nil {
			got.Text, got.Error = printed(body), err.Error()
			return got, nil
		}
		body = opened
	}
	value := jsontext.Value(bytes.TrimSpace(body))
	if !value.IsValid() {
		got.Text = printed(body)
		return got, nil
	}
	got.Body = value.Clone()
	if got.Body.Compact() != nil { // so that a line stays one
		got.Body, got.Text = nil, printed(body)
		return got, nil
	}
	var challenge []byte
	if got.Security = r.security(value); got.Security == Invalid {
		got.Status, got.Error = http.StatusUnauthorized, "security is not that of the secret"
	}
	if got.Type, challenge = kindOf(value); challenge != nil && got.Signature != Invalid && got.Security != Invalid {
		got.Status = http.StatusOK
	}
	return got, challenge
}

// printed is a body that is not JSON.
func printed(body []byte) string { return strings.ToValidUTF8(string(body), "\uFFFD") }

// kindOf returns the type of an event, and the answer to a verification.
func kindOf(body jsontext.Value) (kind string, challenge []byte) {
	var event struct {
		Type      string `json:"type"`
		EventType string `json:"eventType"`
		Delivery  struct {
			Type string `json:"type"`
		} `json:"delivery"`
		Data jsontext.Value `json:"data"`
	}
	if body.Kind() == '[' {
		var several []jsontext.Value
		if json.Unmarshal(body, &several) != nil || len(several) == 0 {
			return "", nil
		}
		body = several[0]
	}
	if body.Kind() != '{' || json.Unmarshal(body, &event) != nil {
		return "", nil
	}
	if event.Type == typeVerification && event.Data.Kind() == '{' {
		return event.Type, event.Data
	}
	if event.Type == typeQuestion {
		return event.Type, []byte(`{"decision":"allow"}`)
	}
	if event.Delivery.Type == typeQuestion { // in Agora's form
		return typeQuestion, []byte(`{"valid":true}`)
	}
	if event.Type == "" {
		event.Type = event.EventType
	}
	return event.Type, nil
}

// security judges a body in the form of Agora's callbacks.
func (r *Receiver) security(body jsontext.Value) Signature {
	var call struct {
		ID       string `json:"callId"`
		Millis   int64  `json:"timestamp"`
		Security string `json:"security"`
	}
	if body.Kind() != '{' || json.Unmarshal(body, &call) != nil || call.ID == "" {
		return ""
	}
	if r.o.AgoraSecret == "" {
		return Unchecked
	}
	want, err := agora.Security(call.ID, r.o.AgoraSecret, call.Millis)
	if err != nil || subtle.ConstantTimeCompare([]byte(want), []byte(call.Security)) != 1 {
		return Invalid
	}
	return Valid
}

func (r *Receiver) verify(h http.Header, body []byte) Signature {
	for _, secret := range r.o.Secrets {
		if secret.Verify(h, body, time.Now()) == nil {
			return Valid
		}
	}
	return Invalid
}

// take hands a request on, one at a time.
func (r *Receiver) take(got Received, verification bool) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !verification && r.o.Limit > 0 && r.count >= r.o.Limit {
		return false
	}
	if r.o.Take != nil && r.o.Take(got) != nil {
		return false
	}
	if !verification && r.o.Limit > 0 {
		if r.count++; r.count == r.o.Limit {
			close(r.done)
		}
	}
	return true
}
