package vault_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/vault"
)

// proxy stands before a Vault and answers in its place what Vault, or something
// on the way to it, may answer in bad times.
type proxy struct {
	*httptest.Server
	requests atomic.Int64

	mu   sync.Mutex
	rule http.HandlerFunc // nil passes everything on; guarded by mu
}

func newProxy(t testing.TB, behind string) *proxy {
	t.Helper()
	target, err := url.Parse(behind)
	must(t, err)
	p := &proxy{}
	pass := reverse(target)
	p.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.requests.Add(1)
		p.mu.Lock()
		rule := p.rule
		p.mu.Unlock()
		if rule != nil && !strings.HasPrefix(r.URL.Path, "/v1/auth/") {
			rule(w, r)
			return
		}
		pass.ServeHTTP(w, r)
	}))
	t.Cleanup(func() {
		p.set(nil)
		p.CloseClientConnections()
		p.Close()
	})
	return p
}

func reverse(target *url.URL) *httputil.ReverseProxy {
	return &httputil.ReverseProxy{
		Rewrite:      func(r *httputil.ProxyRequest) { r.SetURL(target) },
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	}
}

// set makes the proxy answer everything but logins by rule.
func (p *proxy) set(rule http.HandlerFunc) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rule = rule
}

// answering is an error of Vault: a status and its body.
func answering(status int, texts ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		quoted := make([]string, len(texts))
		for i, text := range texts {
			quoted[i] = fmt.Sprintf("%q", text)
		}
		fmt.Fprintf(w, `{"errors":[%s]}`, strings.Join(quoted, ","))
	}
}

// hanging answers nothing until the client goes away or release is closed.
func hanging(release <-chan struct{}) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // else the server does not see the client go
		select {
		case <-release:
			w.WriteHeader(http.StatusServiceUnavailable)
		case <-r.Context().Done():
		}
	}
}

func raw(contentType, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", contentType)
		_, _ = io.WriteString(w, body)
	}
}

// canary stands for what Vault may write into a body and nobody may repeat.
const canary = "CANARY-7f3a"

// What the service does, and what becomes of it. Each runs against every
// operation.
func badTimes() map[string]struct {
	rule  http.HandlerFunc
	class error
} {
	type c = struct {
		rule  http.HandlerFunc
		class error
	}
	return map[string]c{
		"rate limit quota":       {answering(429, `request path "transit/decrypt/coffer-eu": rate limit quota exceeded `+canary), kms.ErrThrottled},
		"lease count quota":      {answering(429, `request path "auth/approle/login": lease count quota exceeded `+canary), kms.ErrQuota},
		"sealed":                 {answering(503, "Vault is sealed "+canary), kms.ErrUnavailable},
		"internal error":         {answering(500, "internal error "+canary), kms.ErrUnavailable},
		"bad gateway":            {raw502, kms.ErrUnavailable},
		"standby behind":         {answering(412, "required index state not present "+canary), kms.ErrUnavailable},
		"disaster recovery":      {answering(472, canary), kms.ErrUnavailable},
		"performance standby":    {answering(473, canary), kms.ErrUnavailable},
		"permission denied":      {answering(403, "1 error occurred:\n\t* permission denied\n\n", canary), kms.ErrAccessDenied},
		"invalid token":          {answering(403, "2 errors occurred:\n\t* permission denied\n\t* invalid token\n\n", canary), kms.ErrUnauthenticated},
		"mount missing":          {answering(404, `no handler for route "transit/decrypt/coffer-eu". route entry not found. `+canary), kms.ErrNotFound},
		"key missing":            {answering(400, "encryption key not found", canary), kms.ErrNotFound},
		"not transit":            {answering(405, "1 error occurred:\n\t* unsupported operation\n\n", canary), kms.ErrNotFound},
		"login page":             {raw("text/html", "<html>"+canary), kms.ErrUnavailable},
		"JSON as text":           {raw("text/plain", `{"request_id":"`+canary+`","data":{"plaintext":"`+canary+`"}}`), kms.ErrUnavailable},
		"empty answer":           {raw("application/json", ""), kms.ErrUnavailable},
		"no data":                {raw("application/json", `{"request_id":"`+canary+`"}`), kms.ErrUnavailable},
		"data of null":           {raw("application/json", `{"request_id":"`+canary+`","data":null}`), kms.ErrUnavailable},
		"data without keys":      {raw("application/json", `{"data":{"x":"`+canary+`"}}`), kms.ErrUnavailable},
		"list of data":           {raw("application/json", `{"data":["`+canary+`"]}`), kms.ErrUnavailable},
		"data twice":             {raw("application/json", `{"data":{"ciphertext":"vault:v1:AAAA"},"data":{"ciphertext":"vault:v1:AAAA"}}`), kms.ErrUnavailable},
		"ciphertext of nobody":   {raw("application/json", `{"data":{"ciphertext":"`+canary+`","plaintext":"AAAA","batch_results":[]}}`), nil},
		"cut short":              {cutShort, kms.ErrUnavailable},
		"reset":                  {reset, kms.ErrUnavailable},
		"huge answer":            {huge(200), kms.ErrUnavailable},
		"huge error":             {huge(503), kms.ErrUnavailable},
		"redirect":               {http.RedirectHandler("https://192.0.2.1/v1/", http.StatusTemporaryRedirect).ServeHTTP, kms.ErrUnavailable},
		"permanent redirect":     {http.RedirectHandler("https://192.0.2.1/v1/", http.StatusPermanentRedirect).ServeHTTP, kms.ErrUnavailable},
		"no content":             {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }, kms.ErrUnavailable},
		"teapot of a middlebox":  {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) }, kms.ErrUnavailable},
		"hangs":                  {hanging(nil), kms.ErrUnavailable},
		"drips":                  {drip, kms.ErrUnavailable},
		"headers without an end": {endlessHeaders, kms.ErrUnavailable},
	}
}

func raw502(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/html")
	w.WriteHeader(http.StatusBadGateway)
	_, _ = io.WriteString(w, "<html>"+canary)
}

func cutShort(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", "1000")
	_, _ = io.WriteString(w, `{"data":{"ciphertext":"vault:v1:AAAA`)
}

func reset(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }

func huge(status int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, `{"errors":["`)
		block := strings.Repeat(canary, 4096)
		for range 2000 { // 90 MB, if anybody took it
			if _, err := io.WriteString(w, block); err != nil {
				return
			}
		}
		_, _ = io.WriteString(w, `"]}`)
	}
}

func drip(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	w.Header().Set("Content-Type", "application/json")
	for {
		if _, err := io.WriteString(w, " "); err != nil {
			return
		}
		_ = http.NewResponseController(w).Flush()
		select {
		case <-r.Context().Done():
			return
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func endlessHeaders(w http.ResponseWriter, _ *http.Request) {
	for i := range 4000 {
		w.Header().Set(fmt.Sprintf("X-%s-%d", canary, i), strings.Repeat("x", 100))
	}
}

func operations(t testing.TB, p *vault.Provider, w kms.Wrap) map[string]func() error {
	return map[string]func() error{
		"describe": func() error { _, err := p.Describe(t.Context()); return err },
		"generate": func() error {
			key, _, err := p.Generate(t.Context(), binding)
			if err != nil && key != nil {
				t.Error("a key came with the error")
			}
			return err
		},
		"wrap": func() error { _, err := p.Wrap(t.Context(), binding, make([]byte, kms.KeySize)); return err },
		"unwrap": func() error {
			key, err := p.Unwrap(t.Context(), binding, w)
			if err != nil && key != nil {
				t.Error("a key came with the error")
			}
			return err
		},
		"rewrap": func() error {
			_, err := p.Rewrap(t.Context(), []kms.RewrapItem{{Context: binding, Wrap: w}})
			return err
		},
		"rotate": func() error { _, err := p.Rotate(t.Context()); return err },
		"retire": func() error { return p.Retire(t.Context(), "1") },
	}
}

func TestBadTimes(t *testing.T) {
	s := newServer(t)
	front := newProxy(t, s.process.URL)
	for name, c := range badTimes() {
		t.Run(name, func(t *testing.T) {
			o := s.tokenOptions("coffer", "coffer-operator")
			o.Address, o.Timeout, o.Attempts = front.URL, 150*time.Millisecond, 1
			o.Host = "vault.test"
			p := open(t, o)
			_, w, err := p.Generate(t.Context(), binding)
			must(t, err)
			front.set(c.rule)
			defer front.set(nil)
			for op, do := range operations(t, p, w) {
				err := do()
				var e *kms.Error
				switch {
				case !errors.As(err, &e):
					t.Errorf("%s: %v, want *kms.Error", op, err)
				case c.class != nil && !errors.Is(err, c.class):
					t.Errorf("%s: %v, want %v", op, err, c.class)
				case kms.Class(err) == nil:
					t.Errorf("%s: %v has no class", op, err)
				case strings.Contains(fmt.Sprintf("%v %+v %#v", err, err, *e), canary):
					t.Errorf("%s: the error repeats the answer: %v", op, err)
				case errors.Is(err, kms.ErrUnavailable) != kms.Retryable(err) && !errors.Is(err, kms.ErrThrottled):
					t.Errorf("%s: %v: retryable is %v", op, err, kms.Retryable(err))
				}
			}
			front.set(nil)
			if _, err := p.Unwrap(t.Context(), binding, w); err != nil {
				t.Errorf("it does not recover: %v", err)
			}
		})
	}
}

// What may pass is tried again within the call, what may not is not.
func TestRetriesWithinTheCall(t *testing.T) {
	s := newServer(t)
	front := newProxy(t, s.process.URL)
	o := s.options()
	o.Address = front.URL
	var seen calls
	o.Observe = seen.observe
	p := open(t, o)
	_, w, err := p.Generate(t.Context(), binding)
	must(t, err)
	failing := func(status, times int) {
		var n atomic.Int64
		target, err := url.Parse(s.process.URL)
		must(t, err)
		pass := reverse(target)
		front.set(func(w http.ResponseWriter, r *http.Request) {
			if n.Add(1) <= int64(times) {
				answering(status, canary)(w, r)
				return
			}
			pass.ServeHTTP(w, r)
		})
	}
	failing(503, 3)
	if _, err := p.Unwrap(t.Context(), binding, w); err != nil {
		t.Errorf("after three failures: %v", err)
	}
	if n := len(seen.of("unwrap")); n != 4 {
		t.Errorf("%d attempts were observed, want 4", n)
	}
	failing(404, 1)
	if _, err := p.Unwrap(t.Context(), binding, w); !errors.Is(err, kms.ErrNotFound) {
		t.Errorf("what cannot pass was tried again: %v", err)
	}
}

// A token must not travel to where a redirect leads.
func TestRedirectDoesNotTakeTheTokenAlong(t *testing.T) {
	s := newServer(t)
	var stolen atomic.Bool
	thief := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { stolen.Store(true) }))
	defer thief.Close()
	front := newProxy(t, s.process.URL)
	o := s.options()
	o.Address, o.Attempts = front.URL, 1
	p := open(t, o)
	_, w, err := p.Generate(t.Context(), binding)
	must(t, err)
	for _, status := range []int{301, 302, 303, 307, 308} {
		front.set(func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, thief.URL+r.URL.Path, status) })
		if _, err := p.Unwrap(t.Context(), binding, w); !errors.Is(err, kms.ErrUnavailable) {
			t.Errorf("status %d: %v", status, err)
		}
	}
	if stolen.Load() {
		t.Error("a redirect was followed")
	}
}
