package awskms_test

import (
	"context"
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

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"go.uber.org/goleak"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/awskms"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

var binding = kms.Context{Region: "eu", App: "03aa", Purpose: kms.PurposeApp}

// canary stands for what AWS may write into a body and nobody may repeat.
const canary = "CANARY-7f3a"

const secretKey = "CANARY-secret-access-key"

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// front stands before a KMS and answers in its place what KMS, or something on
// the way to it, may answer in bad times.
type front struct {
	*httptest.Server
	requests atomic.Int64

	mu   sync.Mutex
	rule http.HandlerFunc // nil passes everything on; guarded by mu
}

func newFront(t testing.TB, behind http.Handler) *front {
	t.Helper()
	f := &front{}
	f.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.requests.Add(1)
		f.mu.Lock()
		rule := f.rule
		f.mu.Unlock()
		if rule != nil {
			rule(w, r)
			return
		}
		behind.ServeHTTP(w, r)
	}))
	t.Cleanup(func() {
		f.set(nil)
		f.CloseClientConnections()
		f.Close()
	})
	return f
}

func (f *front) set(rule http.HandlerFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rule = rule
}

func reverse(t testing.TB, to string) http.Handler {
	t.Helper()
	target, err := url.Parse(to)
	must(t, err)
	return &httputil.ReverseProxy{
		Rewrite:      func(r *httputil.ProxyRequest) { r.SetURL(target) },
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
		ModifyResponse: func(r *http.Response) error {
			// Where AWS answers with nothing, moto answers "null".
			if r.ContentLength == int64(len("null")) {
				_ = r.Body.Close()
				r.Body, r.ContentLength = io.NopCloser(strings.NewReader("{}")), 2
				r.Header.Set("Content-Length", "2")
			}
			return nil
		},
	}
}

// answering is an error of KMS: a status, a code and a message.
func answering(status int, code string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/x-amz-json-1.1")
		w.Header().Set("X-Amzn-Requestid", "01234567-89ab-cdef-0123-456789abcdef")
		w.WriteHeader(status)
		fmt.Fprintf(w, `{"__type":%q,"message":%q}`, code, "why: "+canary)
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

// source gives out credentials that may be changed.
type source struct {
	mu      sync.Mutex
	id      string // guarded by mu
	err     error  // guarded by mu
	fetched atomic.Int64
}

func (s *source) Retrieve(context.Context) (aws.Credentials, error) {
	s.fetched.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	return aws.Credentials{AccessKeyID: s.id, SecretAccessKey: secretKey}, s.err
}

func (s *source) set(id string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.id, s.err = id, err
}

func options(endpoint, key, region string) awskms.Options {
	return awskms.Options{
		Key: key, Region: region, Endpoint: endpoint,
		Credentials: credentials.NewStaticCredentialsProvider("AKIDTEST", secretKey, ""),
	}
}

func open(t testing.TB, o awskms.Options) *awskms.Provider {
	t.Helper()
	isolate(t)
	p, err := awskms.New(t.Context(), o)
	must(t, err)
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// isolate keeps this machine's AWS configuration out of a test.
func isolate(t testing.TB) {
	t.Helper()
	for name, value := range map[string]string{
		"AWS_CONFIG_FILE": "/nonexistent", "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent", "AWS_EC2_METADATA_DISABLED": "true",
		"AWS_PROFILE": "", "AWS_ENDPOINT_URL": "", "AWS_ENDPOINT_URL_KMS": "", "AWS_REGION": "us-west-1",
	} {
		t.Setenv(name, value)
	}
}

// calls records what Observe is told.
type calls struct {
	mu   sync.Mutex
	seen []kms.Call // guarded by mu
}

func (c *calls) observe(_ context.Context, call kms.Call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seen = append(c.seen, call)
}

func (c *calls) all() []kms.Call {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]kms.Call(nil), c.seen...)
}

func operations(t testing.TB, p *awskms.Provider, w kms.Wrap) map[string]func() error {
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
			results, err := p.Rewrap(t.Context(), []kms.RewrapItem{{Context: binding, Wrap: w}})
			if err == nil {
				err = results[0].Err
			}
			return err
		},
		"rotate":  func() error { _, err := p.Rotate(t.Context()); return err },
		"disable": func() error { return p.Disable(t.Context()) },
	}
}

// What the service does, and what becomes of it. Each runs against every
// operation.
func TestBadTimes(t *testing.T) {
	type c struct {
		rule  http.HandlerFunc
		class error
	}
	badTimes := map[string]c{
		"drips":               {drip, kms.ErrUnavailable},
		"hangs":               {hanging(nil), kms.ErrUnavailable},
		"reset":               {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, kms.ErrUnavailable},
		"login page":          {raw(200, "text/html", "<html>"+canary), kms.ErrUnavailable},
		"bad gateway":         {raw(502, "text/html", "<html>"+canary), kms.ErrUnavailable},
		"empty answer":        {raw(200, "application/x-amz-json-1.1", ""), kms.ErrUnavailable},
		"empty object":        {raw(200, "application/x-amz-json-1.1", "{}"), nil},
		"another's key":       {raw(200, "application/x-amz-json-1.1", anothers), kms.ErrMismatch},
		"half an answer":      {raw(200, "application/x-amz-json-1.1", `{"KeyId":"`), kms.ErrUnavailable},
		"huge answer":         {huge(200), kms.ErrUnavailable},
		"huge error":          {huge(400), kms.ErrUnavailable},
		"redirect":            {http.RedirectHandler("https://192.0.2.1/", http.StatusTemporaryRedirect).ServeHTTP, kms.ErrUnavailable},
		"permanent redirect":  {http.RedirectHandler("https://192.0.2.1/", http.StatusPermanentRedirect).ServeHTTP, kms.ErrUnavailable},
		"code with a message": {answering(400, canary+": you lose"), kms.ErrUnavailable},
		"forbidden by a WAF":  {raw(403, "text/html", canary), kms.ErrUnavailable},
		"throttled by a proxy": {
			raw(429, "text/html", canary), kms.ErrThrottled,
		},
	}
	for code, class := range map[string]error{
		"ThrottlingException": kms.ErrThrottled, "com.amazonaws.kms#ThrottlingException": kms.ErrThrottled,
		"RequestLimitExceeded": kms.ErrThrottled, "TooManyRequestsException": kms.ErrThrottled,
		"LimitExceededException": kms.ErrQuota,
		"AccessDeniedException":  kms.ErrAccessDenied, "UnrecognizedClientException": kms.ErrUnauthenticated,
		"InvalidSignatureException": kms.ErrUnauthenticated, "ExpiredTokenException": kms.ErrUnauthenticated,
		"MissingAuthenticationTokenException": kms.ErrUnauthenticated, "IncompleteSignatureException": kms.ErrUnauthenticated,
		"NotFoundException": kms.ErrNotFound, "InvalidArnException": kms.ErrNotFound, "InvalidKeyUsageException": kms.ErrNotFound,
		"DisabledException": kms.ErrDisabled, "InvalidCiphertextException": kms.ErrMismatch, "IncorrectKeyException": kms.ErrMismatch,
		"KeyUnavailableException": kms.ErrUnavailable, "DependencyTimeoutException": kms.ErrUnavailable, "SomethingNew": kms.ErrUnavailable,
	} {
		badTimes[code] = c{answering(400, code), class}
	}
	badTimes["KMSInternalException"] = c{answering(500, "KMSInternalException"), kms.ErrUnavailable}
	badTimes["ServiceUnavailableException"] = c{answering(503, "ServiceUnavailableException"), kms.ErrUnavailable}
	for name, c := range badTimes {
		t.Run(name, func(t *testing.T) {
			f := newFake("eu-west-2")
			front := newFront(t, f)
			o := options(front.URL, f.arn(f.create()), "")
			o.Timeout, o.Attempts = 150*time.Millisecond, 1
			p := open(t, o)
			_, w, err := p.Generate(t.Context(), binding)
			must(t, err)
			front.set(c.rule)
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

const anothers = `{"KeyId":"arn:aws:kms:eu-west-2:111122223333:key/00000000-0000-0000-0000-000000000000","CiphertextBlob":"AAAA","Plaintext":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
"SourceKeyId":"arn:aws:kms:eu-west-2:111122223333:key/00000000-0000-0000-0000-000000000000",
"KeyMetadata":{"Arn":"arn:aws:kms:eu-west-2:111122223333:key/00000000-0000-0000-0000-000000000000","KeyId":"x","KeyState":"Enabled","KeySpec":"SYMMETRIC_DEFAULT","KeyUsage":"ENCRYPT_DECRYPT"}}`

func raw(status int, contentType, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", contentType)
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

func huge(status int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/x-amz-json-1.1")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, `{"__type":"KMSInternalException","message":"`)
		block := strings.Repeat(canary, 4096)
		for range 2000 { // 90 MB, if anybody took it
			if _, err := io.WriteString(w, block); err != nil {
				return
			}
		}
	}
}

func drip(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	w.Header().Set("Content-Type", "application/x-amz-json-1.1")
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
