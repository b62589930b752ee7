package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"go.uber.org/goleak"

	"github.com/cofferdb/coffer/journal"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var testApp = journal.NewAppID(3) //nolint:gochecknoglobals // an id, the same in every test

func start(t *testing.T, h http.HandlerFunc) *Client {
	t.Helper()
	srv := httptest.NewTLSServer(h)
	t.Cleanup(srv.Close)
	c, err := New(Config{URL: srv.URL, App: testApp, Token: StaticToken("secret-token"), OperatorToken: StaticToken("operator"), HTTP: srv.Client(), RetryFor: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func problemJSON(w http.ResponseWriter, status int, code, detail string, retryable bool) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(status)
	_, _ = fmt.Fprintf(w, `{"type":"urn:coffer:problem:%s","title":"t","status":%d,"detail":%q,"code":%q,"retryable":%v}`, code, status, detail, code, retryable)
}

func message(id string) journal.Event {
	return journal.Event{
		ID: id, Type: journal.MessageSent, Time: time.UnixMilli(1700000000000).UTC(), Sender: "a", Recipient: "b",
		Data: jsontext.Value(`{"bodies":[{"type":"txt","msg":"m"}]}`),
	}
}

// eventLine is an event as a replay sends it.
func eventLine(n int) string {
	e := message("m" + strconv.Itoa(n))
	if err := e.Normalize(time.Now(), journal.Limits{}); err != nil {
		panic(err)
	}
	return string(journal.SplicePosition(nil, e.AppendJSON(nil, testApp), journal.Position(n))) + "\n"
}

func TestURLs(t *testing.T) {
	for url, want := range map[string]string{
		"https://host:1":         "",
		"https://host:1/":        "",
		"http://127.0.0.1:1":     "",
		"http://[::1]:1":         "",
		"http://localhost:1":     "",
		"":                       "missing",
		"host:1":                 "must look like",
		"http://host:1":          "must be https",
		"ftp://host":             "scheme",
		"https://u:p@host":       "scheme, host and port only",
		"https://host/v1":        "scheme, host and port only",
		"https://host?x=1":       "scheme, host and port only",
		"https://ho st":          "must look like",
		"http://localhost.evil/": "must be https",
	} {
		_, err := New(Config{URL: url})
		if got := fmt.Sprint(err); (want == "") != (err == nil) || !strings.Contains(got, want) {
			t.Errorf("%q: error %v, want %q", url, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "u:p") {
			t.Errorf("%q: the error quotes a password", url)
		}
	}
}

func TestAppendSaysWhatBecameOfEach(t *testing.T) {
	var got string
	c := start(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		got = r.Method + " " + r.URL.Path + " " + r.Header.Get("Content-Type") + " " + r.Header.Get("Authorization") + " " + strconv.Itoa(strings.Count(string(b), "\n"))
		w.WriteHeader(http.StatusMultiStatus)
		_, _ = io.WriteString(w, `{"data":[{"id":"m1","position":"7","status":"created"},{"id":"m2","position":"3","status":"duplicate"},`+
			`{"id":"m3","status":"refused","problem":{"type":"urn:coffer:problem:retention-expired","status":422,"detail":"too old","oldest_available":"2026-01-02T03:04:05Z"}}]}`)
	})
	bad := message("no.dots")
	results, err := c.Append(t.Context(), message("m1"), bad, message("m2"), message("m3"))
	if err != nil {
		t.Fatal(err)
	}
	if want := "POST /v1/apps/" + testApp.String() + "/events application/x-ndjson Bearer secret-token 3"; got != want {
		t.Errorf("sent %s\nwant %s", got, want)
	}
	if r := results[0]; r.ID != "m1" || r.Position != 7 || r.Duplicate || r.Err != nil {
		t.Errorf("created: %+v", r)
	}
	if !errors.Is(results[1].Err, journal.ErrInvalid) {
		t.Errorf("invalid: %+v", results[1])
	}
	if r := results[2]; r.Position != 3 || !r.Duplicate || r.Err != nil {
		t.Errorf("duplicate: %+v", r)
	}
	p := (*Problem)(nil)
	if r := results[3]; !errors.As(r.Err, &p) || !errors.Is(r.Err, ErrExpired) || p.OldestAvailable.Year() != 2026 {
		t.Errorf("refused: %+v", r)
	}
	if _, err := c.Append(t.Context()); !errors.Is(err, ErrBatch) {
		t.Errorf("empty batch: %v", err)
	}
}

// TestAppendRepeats: away, busy, cut and refused for a while are repeated; the
// events that were stored are not sent again.
func TestAppendRepeats(t *testing.T) {
	var calls atomic.Int32
	var last string
	c := start(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		switch calls.Add(1) {
		case 1:
			problemJSON(w, 503, "store-unavailable", "later", true)
		case 2:
			problemJSON(w, 429, "rate-limited", "later", true)
		case 3:
			panic(http.ErrAbortHandler)
		case 4:
			w.Header().Set("Content-Length", "1000")
			_, _ = io.WriteString(w, `{"data":[`) // and cut
		case 5:
			w.WriteHeader(http.StatusMultiStatus)
			_, _ = io.WriteString(w, `{"data":[{"id":"m1","position":"7","status":"created"},{"id":"m2","status":"refused","problem":{"type":"urn:coffer:problem:kms-unavailable","status":503,"retryable":true}}]}`)
		default:
			last = string(b)
			_, _ = io.WriteString(w, `{"data":[{"id":"m2","position":"8","status":"created"}]}`)
		}
	})
	results, err := c.Append(t.Context(), message("m1"), message("m2"))
	if err != nil {
		t.Fatal(err)
	}
	if results[0].Position != 7 || results[1].Position != 8 || results[1].Err != nil {
		t.Errorf("results %+v", results)
	}
	if calls.Load() != 6 || strings.Contains(last, `"m1"`) {
		t.Errorf("%d calls, the last with %s", calls.Load(), last)
	}
}

func TestWhatIsNotRepeated(t *testing.T) {
	for _, tt := range []struct {
		status int
		code   string
		class  error
	}{
		{400, "invalid-request", ErrInvalid},
		{401, "token-expired", ErrUnauthorized},
		{403, "privilege-missing", ErrForbidden},
		{404, "not-found", ErrNotFound},
		{409, "idempotency-conflict", ErrConflict},
		{410, "cursor-expired", ErrExpired},
		{413, "payload-too-large", ErrInvalid},
		{421, "wrong-region", ErrForbidden},
		{422, "retention-expired", ErrExpired},
		{500, "internal", ErrFailed},
		{503, "kms-unavailable", ErrUnavailable}, // until an operator acts
		{503, "store-inconsistent", ErrFailed},
	} {
		var calls atomic.Int32
		c := start(t, func(w http.ResponseWriter, _ *http.Request) {
			calls.Add(1)
			problemJSON(w, tt.status, tt.code, "the detail", false)
		})
		_, err := c.Event(t.Context(), "m1")
		if !errors.Is(err, tt.class) || calls.Load() != 1 {
			t.Errorf("%d %s: error %v after %d calls, want %v", tt.status, tt.code, err, calls.Load(), tt.class)
		}
		if want := tt.code + ": the detail"; err.Error() != want {
			t.Errorf("error text %q, want %q", err, want)
		}
		if _, err := c.Append(t.Context(), message("m1")); !errors.Is(err, tt.class) {
			t.Errorf("%d %s: append: error %v, want %v", tt.status, tt.code, err, tt.class)
		}
	}
}

// TestAnswersOfSomethingElse: a proxy's page, a redirect, a result too few.
func TestAnswersOfSomethingElse(t *testing.T) {
	c := start(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			_, _ = io.WriteString(w, `{"data":[]}`)
			return
		}
		w.Header().Set("Location", "https://elsewhere.invalid/")
		w.WriteHeader(http.StatusFound)
		_, _ = io.WriteString(w, "<html>secret page</html>")
	})
	// The client under test refuses redirects; httptest's does not.
	c.http.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	_, err := c.Event(t.Context(), "m1")
	if p := (*Problem)(nil); !errors.As(err, &p) || p.Status != 302 || strings.Contains(err.Error(), "page") {
		t.Errorf("redirect: %v", err)
	}
	if _, err := c.Append(t.Context(), message("m1")); !errors.Is(err, ErrProtocol) {
		t.Errorf("too few results: %v", err)
	}
}

// cutServer serves total events and breaks off after each number in cuts, of
// lines or, when negative, in the middle of a line.
type cutServer struct {
	total int
	cuts  []int
	asked []string
}

func (s *cutServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	s.asked = append(s.asked, q.Get("after")+" "+q.Get("limit")+" "+q.Get("type")+q.Get("order"))
	after, _ := strconv.Atoi(q.Get("after"))
	limit, err := strconv.Atoi(q.Get("limit"))
	if err != nil {
		limit = s.total
	}
	cut := -1 << 30
	if len(s.cuts) > 0 {
		cut, s.cuts = s.cuts[0], s.cuts[1:]
	}
	n := 0
	for i := after + 1; i <= s.total && n < limit; i++ {
		if n == cut {
			panic(http.ErrAbortHandler)
		}
		line := eventLine(i)
		if n == -cut-1 {
			_, _ = io.WriteString(w, line[:len(line)/2])
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}
		if n%3 == 0 {
			line = "  " + line // a sign of life
		}
		_, _ = io.WriteString(w, line)
		_ = http.NewResponseController(w).Flush()
		n++
	}
	if n == cut {
		return // no trailer, and a proper end
	}
	_, _ = fmt.Fprintf(w, `  {"end":{"count":%d,"omitted":0,"next":"c1_%d","checkpoint":null}}`+"\n", n, after+n)
}

func collect(t *testing.T, r *Replay) ([]int, error) {
	t.Helper()
	var got []int
	for e, err := range r.Events() {
		if err != nil {
			return got, err
		}
		parsed, perr := journal.ParseReplayed(e.JSON)
		if perr != nil {
			t.Fatalf("%s: %v", e.JSON, perr)
		}
		if parsed.Position != e.Position || parsed.ID != "m"+e.Position.String() {
			t.Fatalf("position %s with %s", e.Position, e.JSON)
		}
		got = append(got, int(e.Position))
	}
	return got, nil
}

// TestReplayEveryCut breaks the stream once at every place: before and after each
// line, and in the middle of it. Each event must arrive once and in order.
func TestReplayEveryCut(t *testing.T) {
	const total = 12
	for cut := -total; cut <= total; cut++ {
		srv := &cutServer{total: total, cuts: []int{cut}}
		c := start(t, srv.ServeHTTP)
		r := c.Replay(t.Context(), Query{Types: []journal.Type{journal.MessageSent, journal.MessageEdited}})
		got, err := collect(t, r)
		if err != nil {
			t.Fatalf("cut at %d: %v", cut, err)
		}
		if len(got) != total || got[0] != 1 || got[total-1] != total {
			t.Errorf("cut at %d: got %v", cut, got)
		}
		for i := 1; i < len(got); i++ {
			if got[i] != got[i-1]+1 {
				t.Errorf("cut at %d: got %v", cut, got)
			}
		}
		if r.Next() != "c1_12" || r.Count() != total || !strings.Contains(string(r.End()), `"end"`) {
			t.Errorf("cut at %d: next %s, count %d, end %s", cut, r.Next(), r.Count(), r.End())
		}
		for _, asked := range srv.asked {
			if !strings.HasSuffix(asked, "message.sent,message.edited") {
				t.Errorf("the filter was lost: %q", asked)
			}
		}
	}
}

func TestReplayLimitOverCuts(t *testing.T) {
	srv := &cutServer{total: 20, cuts: []int{3, -3, 0}}
	c := start(t, srv.ServeHTTP)
	got, err := collect(t, c.Replay(t.Context(), Query{Limit: 9}))
	if err != nil || len(got) != 9 || got[8] != 9 {
		t.Errorf("got %v, %v", got, err)
	}
	if want := " 9 |3 6 |5 4 |5 4 "; strings.Join(srv.asked, "|") != want {
		t.Errorf("asked %q, want %q", strings.Join(srv.asked, "|"), want)
	}
}

func TestReplayGivesUpWithItsPlace(t *testing.T) {
	srv := &cutServer{total: 20, cuts: []int{5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}}
	c := start(t, srv.ServeHTTP)
	c.retryFor = 400 * time.Millisecond
	r := c.Replay(t.Context(), Query{})
	got, err := collect(t, r)
	cut := (*CutError)(nil)
	if len(got) != 5 || !errors.As(err, &cut) || cut.Next != "5" || !errors.Is(err, ErrUnavailable) {
		t.Fatalf("got %v, %v", got, err)
	}
	srv.cuts = nil
	if got, err = collect(t, r); err != nil || len(got) != 15 || got[0] != 6 {
		t.Errorf("taken up again: %v, %v", got, err)
	}
}

// TestReplayDistrusts what does not add up.
func TestReplayDistrusts(t *testing.T) {
	for name, tt := range map[string]struct {
		body string
		want error
	}{
		"a count too high":       {eventLine(1) + `{"end":{"count":2,"next":null}}` + "\n", ErrProtocol},
		"no count":               {eventLine(1) + `{"end":{}}` + "\n", ErrProtocol},
		"a line without a place": {`{"id":"m1"}` + "\n", ErrProtocol},
		"no JSON":                {"<html>\n", ErrProtocol},
		"an endless line":        {strings.Repeat("x", maxReplayLine+5) + "\n", ErrProtocol},
		"a problem at the end":   {eventLine(1) + `{"end":{"count":1,"next":"1","problem":{"type":"urn:coffer:problem:data-corrupt","status":500}}}` + "\n", ErrFailed},
	} {
		c := start(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, tt.body) })
		r := c.Replay(t.Context(), Query{})
		if _, err := collect(t, r); !errors.Is(err, tt.want) {
			t.Errorf("%s: error %v, want %v", name, err, tt.want)
		}
		if r.End() != nil && tt.want != nil {
			t.Errorf("%s: taken as whole", name)
		}
	}
}

// TestReplayPositionAnywhere: a proxy may write the JSON anew.
func TestReplayPositionAnywhere(t *testing.T) {
	p, err := position([]byte(`{"position": "12", "id":"x", "data":{"position":"5"}}`))
	if err != nil || p != 12 {
		t.Errorf("position %v, %v", p, err)
	}
}

func TestReplayCancelled(t *testing.T) {
	release := make(chan struct{})
	c := start(t, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, eventLine(1))
		_ = http.NewResponseController(w).Flush()
		<-release
	})
	defer close(release)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r := c.Replay(ctx, Query{Follow: true})
	var last error
	for _, err := range r.Events() {
		last = err
		cancel()
	}
	if cut := (*CutError)(nil); !errors.As(last, &cut) || !errors.Is(last, context.Canceled) || cut.Next != "1" {
		t.Errorf("error %v", last)
	}
}

func TestReplayStoppedByCaller(t *testing.T) {
	srv := &cutServer{total: 5}
	c := start(t, srv.ServeHTTP)
	r := c.Replay(t.Context(), Query{})
	for range r.Events() {
		break
	}
	if r.Next() != "1" || r.Count() != 1 {
		t.Errorf("next %s, count %d", r.Next(), r.Count())
	}
}

func TestPagesAndAdmin(t *testing.T) {
	c := start(t, func(w http.ResponseWriter, r *http.Request) {
		auth := r.Header.Get("Authorization")
		switch r.Method + " " + r.URL.Path + "?" + r.URL.RawQuery {
		case "GET /v1/apps/" + testApp.String() + "/conversations/a,b/messages?limit=2":
			_, _ = fmt.Fprintf(w, `{"data":[{"position":"3","state":"recalled","recall":{"id":"r1","position":"4","time":"2026-01-02T03:04:05Z","sender":"a"}},{"position":"2","state":"sent","event":%s}],"next":"c1_x","previous":null,"oldest_available":"2026-01-02T03:04:05Z"}`, strings.TrimSpace(eventLine(2)))
		case "GET /v1/apps/" + testApp.String() + "/conversations/a,b/messages?before=c1_x&limit=2":
			_, _ = fmt.Fprintf(w, `{"data":[{"position":"1","state":"sent","event":%s}],"next":null}`, strings.TrimSpace(eventLine(1)))
		case "POST /v1/admin/apps?":
			if auth != "Bearer operator" {
				t.Errorf("authorization %q", auth)
			}
			_, _ = fmt.Fprintf(w, `{"id":%q,"name":"n","account":"acc","region":"eu","plan":"pro","created":"2026-01-02T03:04:05Z","certificates":["00"]}`, testApp)
		case "GET /v1/admin/apps?account=acc":
			_, _ = fmt.Fprintf(w, `{"data":[{"id":%q,"plan":"pro"}],"next":null}`, testApp)
		case "GET /v1/admin/apps/" + testApp.String() + "?":
			_, _ = fmt.Fprintf(w, `{"id":%q,"plan":"pro"}`, testApp)
		case "GET /readyz?":
			w.WriteHeader(http.StatusServiceUnavailable)
			_, _ = io.WriteString(w, `{"ready":false,"region":"eu","reasons":[{"part":"kms","detail":"away"}]}`)
		default:
			problemJSON(w, 404, "not-found", r.URL.String(), false)
		}
	})
	var states []string
	for m, err := range c.History(t.Context(), "a,b", PageQuery{Limit: 2}) {
		if err != nil {
			t.Fatal(err)
		}
		states = append(states, m.Position.String()+m.State)
		if _, err := m.Event(); (err != nil) != (m.State == "recalled") {
			t.Errorf("event of %s: %v", m.Position, err)
		}
	}
	if got := strings.Join(states, " "); got != "3recalled 2sent 1sent" {
		t.Errorf("history %s", got)
	}
	app, err := c.CreateApp(t.Context(), AppSpec{Name: "n", Account: "acc", Plan: "pro"})
	if err != nil || app.ID != testApp || len(app.Certificates) != 1 {
		t.Errorf("create: %+v, %v", app, err)
	}
	if apps, err := c.Apps(t.Context(), "acc"); err != nil || len(apps) != 1 {
		t.Errorf("apps: %+v, %v", apps, err)
	}
	if app, err = c.App(t.Context(), testApp); err != nil || app.Plan != "pro" {
		t.Errorf("app: %+v, %v", app, err)
	}
	if ready, err := c.Ready(t.Context()); err != nil || ready.Ready || ready.Reasons[0].Part != "kms" {
		t.Errorf("ready: %+v, %v", ready, err)
	}
}

// TestErrorsHoldNoSecret looks at errors of every kind of failure.
func TestErrorsHoldNoSecret(t *testing.T) {
	c := start(t, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	c.retryFor = -1
	_, err := c.Append(t.Context(), message("m1"))
	text := fmt.Sprint(err)
	for _, err := range c.Replay(t.Context(), Query{User: "alice-user"}).Events() {
		text += fmt.Sprint(err)
	}
	if strings.Contains(text, "secret-token") || strings.Contains(text, "alice-user") {
		t.Errorf("errors: %s", text)
	}
	p := &Problem{}
	if err := json.Unmarshal([]byte(`{"type":"urn:coffer:problem:invalid-request","status":400,"detail":"d","errors":[{"pointer":"/a","detail":"x"},{"parameter":"p","detail":"y"},{"header":"h","detail":"z"},{"detail":"w"}]}`), p); err != nil {
		t.Fatal(err)
	}
	if got, want := p.Error(), "invalid-request: d; /a: x; p: y; h: z; and 1 more"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
