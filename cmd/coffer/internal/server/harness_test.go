package server_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/node"
)

// site is a development set-up on disk, with four regions behind TLS, and what
// a caller of region eu needs.
type site struct {
	t       testing.TB
	options node.DevOptions
	process *node.Process
	client  *http.Client
	log     *logBuffer

	mu    sync.Mutex
	shift time.Duration // of the server's clock
	stood time.Time     // where it stands still, if it does

	url, app, certificate, token, operator string
	regions                                map[string]map[string]string
}

// logBuffer keeps everything that was logged, at every level.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func newSite(t testing.TB, limits config.Limits) *site {
	t.Helper()
	return newSiteWith(t, node.DevOptions{Limits: limits})
}

func newSiteWith(t testing.TB, o node.DevOptions) *site {
	t.Helper()
	// Goroutines of tests beside it would be taken for its own: this forbids
	// t.Parallel to a test that has a site.
	t.Setenv("COFFER_TEST_SITE", "1")
	leaks := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, leaks) })
	s := &site{t: t, log: &logBuffer{}}
	s.options = o
	s.options.Dir, s.options.Now = filepath.Join(t.TempDir(), "data"), s.now
	s.options.Log = slog.New(slog.NewJSONHandler(s.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	s.start()
	t.Cleanup(s.stop)
	return s
}

func (s *site) now() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.stood.IsZero() {
		return s.stood
	}
	return time.Now().Add(s.shift)
}

func (s *site) setClock(shift time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shift = shift
}

// freeze lets the server's clock stand still.
func (s *site) freeze(at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stood = at
}

func (s *site) start() {
	s.t.Helper()
	process, err := node.Dev(context.Background(), s.options)
	if err != nil {
		s.t.Fatalf("starting: %v\n%s", err, s.log)
	}
	s.process = process
	text, err := os.ReadFile(process.File)
	if err != nil {
		s.t.Fatal(err)
	}
	var file struct {
		Regions map[string]map[string]string `json:"regions"`
	}
	if err := json.Unmarshal(text, &file); err != nil {
		s.t.Fatal(err)
	}
	s.regions = file.Regions
	eu := file.Regions["eu"]
	s.url, s.app, s.certificate = eu["COFFER_URL"], eu["COFFER_APP"], eu["COFFER_APP_CERTIFICATE"]
	s.token, s.operator = eu["COFFER_TOKEN"], eu["COFFER_OPERATOR_TOKEN"]
	s.client = newClient(s.t, eu["COFFER_CA"])
}

func newClient(t testing.TB, caFile string) *http.Client {
	t.Helper()
	pem, err := os.ReadFile(caFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		t.Fatal("no certificate in the authority's file")
	}
	return &http.Client{
		Transport:     &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}, ForceAttemptHTTP2: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

func (s *site) stop() {
	s.t.Helper()
	if s.process == nil {
		return
	}
	s.client.CloseIdleConnections()
	if err := s.process.Close(context.Background()); err != nil {
		s.t.Errorf("closing: %v", err)
	}
	s.process = nil
}

func (s *site) userToken(user string) string { return s.userTokenOf(s.app, s.certificate, user) }

func (s *site) userTokenOf(app, certificate, user string) string {
	s.t.Helper()
	token, err := auth.Build(auth.Spec{AppID: app, Certificate: certificate, User: user, Issued: s.now(), Lifetime: time.Hour, Salt: 1})
	if err != nil {
		s.t.Fatal(err)
	}
	return token
}

// answer is what came back.
type answer struct {
	status int
	header http.Header
	body   []byte
}

func (a answer) json(t testing.TB) map[string]any {
	t.Helper()
	var v map[string]any
	if err := json.Unmarshal(a.body, &v); err != nil {
		t.Fatalf("status %d: not JSON: %q", a.status, a.body)
	}
	return v
}

func (a answer) code(t testing.TB) string {
	t.Helper()
	if a.status < 400 {
		return ""
	}
	if got := a.header.Get("Content-Type"); got != "application/problem+json" {
		t.Errorf("status %d has the type %q", a.status, got)
	}
	v := a.json(t)
	code, _ := v["code"].(string)
	for _, member := range []string{"type", "title", "status", "retryable", "request_id"} {
		if v[member] == nil {
			t.Errorf("the problem has no %s: %s", member, a.body)
		}
	}
	if v["type"] != "urn:coffer:problem:"+code || v["status"] != float64(a.status) {
		t.Errorf("the problem does not agree with itself: %s", a.body)
	}
	return code
}

// request is a call with the app's token and JSON, unless it says otherwise.
type request struct {
	method, path string
	token        string // "-" for none
	header       map[string]string
	body         string
	reader       io.Reader
	url          string
}

func (s *site) do(r request) answer {
	s.t.Helper()
	resp := s.open(r)
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatalf("%s %s: reading the answer: %v", r.method, r.path, err)
	}
	return answer{resp.StatusCode, resp.Header, body}
}

func (s *site) open(r request) *http.Response {
	s.t.Helper()
	req := s.build(context.Background(), r)
	resp, err := s.client.Do(req)
	if err != nil {
		s.t.Fatalf("%s %s: %v", r.method, r.path, err)
	}
	return resp
}

func (s *site) build(ctx context.Context, r request) *http.Request {
	s.t.Helper()
	if r.method == "" {
		r.method = http.MethodGet
	}
	if r.url == "" {
		r.url = s.url
	}
	reader := r.reader
	if reader == nil && r.body != "" {
		reader = strings.NewReader(r.body)
	}
	req, err := http.NewRequestWithContext(ctx, r.method, r.url+r.path, reader)
	if err != nil {
		s.t.Fatal(err)
	}
	if reader != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	switch r.token {
	case "-":
	case "":
		req.Header.Set("Authorization", "Bearer "+s.token)
	default:
		req.Header.Set("Authorization", "Bearer "+r.token)
	}
	for name, value := range r.header {
		if value == "-" {
			req.Header.Del(name)
			continue
		}
		req.Header.Set(name, value)
	}
	return req
}

func (s *site) events() string { return "/v1/apps/" + s.app + "/events" }

// post appends and returns the positions in order.
func (s *site) post(events ...string) []string {
	s.t.Helper()
	a := s.do(request{
		method: "POST", path: s.events(), body: strings.Join(events, "\n"),
		header: map[string]string{"Content-Type": "application/x-ndjson"},
	})
	if a.status != http.StatusCreated {
		s.t.Fatalf("append: %d %s", a.status, a.body)
	}
	var positions []string
	for _, d := range a.json(s.t)["data"].([]any) {
		positions = append(positions, d.(map[string]any)["position"].(string))
	}
	return positions
}

// replay reads all events as lines, with the trailer apart.
func (s *site) replay(query string) ([]map[string]any, map[string]any) {
	s.t.Helper()
	a := s.do(request{path: s.events() + query, header: map[string]string{"Accept": "application/x-ndjson"}})
	if a.status != http.StatusOK {
		s.t.Fatalf("replay%s: %d %s", query, a.status, a.body)
	}
	return s.lines(a.body)
}

func (s *site) lines(body []byte) ([]map[string]any, map[string]any) {
	s.t.Helper()
	var events []map[string]any
	for line := range strings.Lines(string(body)) {
		var v map[string]any
		if err := json.Unmarshal([]byte(line), &v); err != nil {
			s.t.Fatalf("line %q: %v", line, err)
		}
		if end, ok := v["end"].(map[string]any); ok {
			if end["count"] != float64(len(events)) {
				s.t.Errorf("the trailer says %v, there are %d lines", end["count"], len(events))
			}
			return events, end
		}
		events = append(events, v)
	}
	s.t.Fatal("no trailer")
	return nil, nil
}

func ids(events []map[string]any) []string {
	list := make([]string, len(events))
	for i, e := range events {
		list[i], _ = e["id"].(string)
	}
	return list
}

func (s *site) appToken() string {
	s.t.Helper()
	return s.tokenOf(s.app, s.certificate)
}

func (s *site) tokenOf(app, certificate string) string {
	s.t.Helper()
	token, err := auth.Build(auth.Spec{AppID: app, Certificate: certificate, Issued: s.now(), Lifetime: time.Hour, Salt: 1})
	if err != nil {
		s.t.Fatal(err)
	}
	return token
}
