package server_test

import (
	"bufio"
	"context"
	"crypto/fips140"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/client"
)

// tailer is a live tail in one of the forms: next gives the id of the event that
// comes next and the place after it, and ok false when the tail has ended.
type tailer interface {
	next() (id, place string, ok bool)
	close()
}

// openTail opens a tail after a place; "" is the beginning.
type openTail func(ctx context.Context, s *site, query, after string) tailer

func tailForms() map[string]openTail {
	return map[string]openTail{"http": openLines, "sse": openEventStream, "wss": openSocket}
}

type bodyTail struct {
	s       *site
	body    io.Closer
	lines   *bufio.Scanner
	sse     bool
	comment int
	end     map[string]any
}

func openLines(ctx context.Context, s *site, query, after string) tailer {
	header := map[string]string{"Accept": "application/x-ndjson"}
	if after != "" {
		query += "&after=" + after
	}
	return newBodyTail(ctx, s, request{path: s.events() + "?follow=true" + query, header: header})
}

func openEventStream(ctx context.Context, s *site, query, after string) tailer {
	header := map[string]string{"Accept": "text/event-stream"}
	if after != "" {
		header["Last-Event-ID"] = after
	}
	return newBodyTail(ctx, s, request{path: s.events() + "?" + strings.TrimPrefix(query, "&"), header: header})
}

func newBodyTail(ctx context.Context, s *site, r request) *bodyTail {
	s.t.Helper()
	resp, err := s.client.Do(s.build(ctx, r))
	if err != nil {
		s.t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(resp.Body)
		s.t.Fatalf("%s: %d %s", r.path, resp.StatusCode, body)
	}
	return &bodyTail{s: s, body: resp.Body, lines: bufio.NewScanner(resp.Body), sse: strings.HasPrefix(resp.Header.Get("Content-Type"), "text/event-stream")}
}

func (b *bodyTail) close() { _ = b.body.Close() }

func (b *bodyTail) next() (string, string, bool) {
	var id, name string
	for b.lines.Scan() {
		line := strings.TrimLeft(b.lines.Text(), " ")
		if b.sse {
			field, value, _ := strings.Cut(line, ": ")
			switch field {
			case "":
				continue
			case ":":
				b.comment++
				continue
			case "id":
				id = value
				continue
			case "event":
				name = value
				continue
			case "retry":
				continue
			case "data":
				line = value
			default:
				b.s.t.Fatalf("line %q", line)
			}
		}
		var v map[string]any
		if err := json.Unmarshal([]byte(line), &v); err != nil {
			b.s.t.Fatalf("line %q: %v", line, err)
		}
		if end, ok := v["end"].(map[string]any); ok {
			if b.sse && (name != "end" || id != end["next"]) {
				b.s.t.Errorf("the trailer has the name %q and the id %q: %s", name, id, line)
			}
			b.end = end
			return "", end["next"].(string), false
		}
		if b.sse {
			return v["id"].(string), id, true
		}
		return v["id"].(string), v["position"].(string), true
	}
	return "", "", false
}

type socketTail struct {
	s    *site
	ctx  context.Context
	conn *websocket.Conn
	err  error
}

func (s *site) dial(ctx context.Context, query string, header http.Header) (conn *websocket.Conn, resp *http.Response, err error) {
	if header == nil {
		header = http.Header{}
	}
	if header.Get("Authorization") == "" {
		header.Set("Authorization", "Bearer "+s.token)
	}
	fips140.WithoutEnforcement(func() { // the handshake has SHA-1
		conn, resp, err = websocket.Dial(ctx, strings.Replace(s.url, "https://", "wss://", 1)+s.events()+query, &websocket.DialOptions{HTTPClient: s.client, HTTPHeader: header})
	})
	return conn, resp, err
}

func openSocket(ctx context.Context, s *site, query, after string) tailer {
	if after != "" {
		query += "&after=" + after
	}
	conn, _, err := s.dial(ctx, "?"+strings.TrimPrefix(query, "&"), nil) //nolint:bodyclose // Dial has replaced it
	if err != nil {
		s.t.Fatal(err)
	}
	return &socketTail{s: s, ctx: ctx, conn: conn}
}

func (k *socketTail) close() { _ = k.conn.CloseNow() }

func (k *socketTail) next() (string, string, bool) {
	kind, text, err := k.conn.Read(k.ctx)
	if err != nil {
		k.err = err
		return "", "", false
	}
	var v map[string]any
	if err := json.Unmarshal(text, &v); err != nil || kind != websocket.MessageText {
		k.s.t.Fatalf("message %q: %v", text, err)
	}
	return v["id"].(string), v["position"].(string), true
}

// TestTailResumesAtEveryCut reads the same tail with a cut after every event, in
// each form, with and without a filter, over what was there before and what came
// while it was read.
func TestTailResumesAtEveryCut(t *testing.T) {
	s := newSite(t, config.Limits{})
	s.fill(12)
	for form, open := range tailForms() {
		for _, query := range []string{"", "&user=ann"} {
			t.Run(form+query, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				past, _ := s.replay("?" + strings.TrimPrefix(query, "&"))
				want := ids(past)
				var live []string
				for i := range 6 {
					live = append(live, fmt.Sprintf("%s-%d-%d", form, len(query), i))
				}
				want = append(want, live...)
				for cut := 1; cut < len(want); cut++ {
					var got []string
					tail := open(ctx, s, query, "")
					place := ""
					for range cut {
						if len(got) == len(want)-len(live) && cut > len(got) {
							s.post(sent(live[len(got)+len(live)-len(want)], "ann", "ben", "x"))
						}
						id, p, ok := tail.next()
						if !ok {
							t.Fatalf("cut at %d: the tail has ended after %v", cut, got)
						}
						got, place = append(got, id), p
						if n := len(got) + len(live) - len(want); n > 0 && len(got) < cut {
							s.post(sent(live[n], "ann", "ben", "x"))
						}
					}
					tail.close()
					tail = open(ctx, s, query, place)
					for len(got) < len(want) {
						if n := len(got) + len(live) - len(want); n >= 0 {
							s.post(sent(live[n], "ann", "ben", "x"))
						}
						id, _, ok := tail.next()
						if !ok {
							t.Fatalf("resumed at %d: the tail has ended after %v", cut, got)
						}
						got = append(got, id)
					}
					tail.close()
					if !slices.Equal(got, want) {
						t.Fatalf("cut at %d: %v, want %v", cut, got, want)
					}
				}
			})
		}
	}
}

// TestTailsJoinHistoryAndLive opens tails at every moment of an append that goes
// on, cuts them now and then, and finds in each the one order without a gap or a
// repetition. The server then ends them and says where to go on.
func TestTailsJoinHistoryAndLive(t *testing.T) {
	s := newSite(t, config.Limits{})
	const events = 240
	type result struct {
		form string
		ids  []string
		err  error
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	results := make(chan result)
	tails := 0
	read := func(form string, open openTail, every int) {
		r := result{form: form}
		place := ""
		tail := open(ctx, s, "", place)
		for len(r.ids) < events {
			id, p, ok := tail.next()
			if !ok {
				r.err = errors.New("the tail has ended")
				break
			}
			r.ids, place = append(r.ids, id), p
			if len(r.ids)%every == 0 {
				tail.close()
				tail = open(ctx, s, "", place)
			}
		}
		tail.close()
		results <- r
	}
	var want []string
	for i := range events {
		if i%60 == 5 {
			for form, open := range tailForms() {
				tails++
				go read(form, open, 7+i%13)
			}
		}
		id := fmt.Sprint("e", i)
		s.post(sent(id, "ann", "ben", "x"))
		want = append(want, id)
	}
	for range tails {
		r := <-results
		if r.err != nil || !slices.Equal(r.ids, want) {
			t.Errorf("%s: %v: %v", r.form, r.err, r.ids)
		}
	}
}

// TestTailsEndWithTheServer: each form says that it is over and where to go on.
func TestTailsEndWithTheServer(t *testing.T) {
	s := newSite(t, config.Limits{})
	s.fill(5)
	open := map[string]tailer{}
	for form, f := range tailForms() {
		open[form] = f(t.Context(), s, "", "")
		for i := range 5 {
			if id, _, ok := open[form].next(); !ok || id != fmt.Sprintf("e%03d", i) {
				t.Fatalf("%s: event %d is %q", form, i, id)
			}
		}
	}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		s.stop()
	}()
	places := map[string]string{}
	for form, tail := range open {
		_, place, ok := tail.next()
		if ok {
			t.Errorf("%s: an event after the last", form)
		}
		if k, ok := tail.(*socketTail); ok {
			var closed websocket.CloseError
			if !errors.As(k.err, &closed) || closed.Code != websocket.StatusGoingAway {
				t.Fatalf("%s: ended with %v", form, k.err)
			}
			reason, next, _ := strings.Cut(closed.Reason, " ")
			if place = next; reason != "stopping" {
				t.Errorf("%s: the reason is %q", form, closed.Reason)
			}
		}
		places[form] = place
		tail.close()
	}
	<-stopped
	s.start()
	s.post(sent("after", "ann", "ben", "x"))
	for form, f := range tailForms() {
		tail := f(t.Context(), s, "", places[form])
		if id, _, ok := tail.next(); !ok || id != "after" {
			t.Errorf("%s: after the end comes %q", form, id)
		}
		tail.close()
	}
}

// TestTailEndsWithItsToken: a stream does not outlive its credential.
func TestTailEndsWithItsToken(t *testing.T) {
	s := newSite(t, config.Limits{})
	s.fill(3)
	whole := s.token
	for form, open := range tailForms() {
		token, err := auth.Build(auth.Spec{AppID: s.app, Certificate: s.certificate, Issued: s.now(), Lifetime: 2 * time.Second, Salt: 1})
		if err != nil {
			t.Fatal(err)
		}
		s.token = token
		tail := open(t.Context(), s, "", "")
		s.token = whole
		for range 3 {
			if _, _, ok := tail.next(); !ok {
				t.Fatalf("%s: ended early", form)
			}
		}
		if _, _, ok := tail.next(); ok {
			t.Errorf("%s: an event after the last", form)
		}
		switch tail := tail.(type) {
		case *bodyTail:
			if p, _ := tail.end["problem"].(map[string]any); p["code"] != "token-expired" {
				t.Errorf("%s: ended with %v", form, tail.end)
			}
		case *socketTail:
			if websocket.CloseStatus(tail.err) != websocket.StatusPolicyViolation || !strings.Contains(tail.err.Error(), "token-expired") {
				t.Errorf("%s: ended with %v", form, tail.err)
			}
		}
		tail.close()
	}
}

func TestTailForms(t *testing.T) {
	s := newSite(t, config.Limits{})
	positions := s.fill(9)
	sse := map[string]string{"Accept": "text/event-stream"}

	t.Run("a range that ends", func(t *testing.T) {
		for query, want := range map[string]int{"?follow=false": 9, "?limit=4": 4, "?follow=false&order=desc": 9, "?follow=false&user=ann": 6} {
			a := s.do(request{path: s.events() + query, header: sse})
			if got := strings.Count(string(a.body), "\ndata: {\"specversion\""); got != want || !strings.HasPrefix(string(a.body), "retry: ") {
				t.Errorf("%s: %d events, want %d: %s", query, got, want, a.body)
			}
			if !strings.Contains(string(a.body), "event: end\nid: c1_") || !strings.HasSuffix(string(a.body), "}}\n\n") {
				t.Errorf("%s: no trailer: %s", query, a.body)
			}
		}
	})
	t.Run("latest", func(t *testing.T) {
		for form, open := range tailForms() {
			tail := open(t.Context(), s, "&after=latest&min_position="+positions[8], "")
			s.post(sent("new-"+form, "ann", "ben", "x"))
			if id, _, _ := tail.next(); id != "new-"+form {
				t.Errorf("%s: the first event is %q", form, id)
			}
			tail.close()
		}
	})
	t.Run("refused", func(t *testing.T) {
		_, end := s.replay("?user=ann")
		for name, r := range map[string]request{
			"desc":           {path: "?order=desc", header: sse},
			"until":          {path: "?until=2030-01-01T00:00:00Z", header: sse},
			"page":           {path: "?follow=true"},
			"latest desc":    {path: "?after=latest&order=desc"},
			"id of another":  {header: map[string]string{"Accept": "text/event-stream", "Last-Event-ID": end["next"].(string)}},
			"id is nonsense": {header: map[string]string{"Accept": "text/event-stream", "Last-Event-ID": "nonsense"}},
			"http/2 upgrade": {header: map[string]string{"Upgrade": "websocket", "Connection": "Upgrade"}},
		} {
			r.path = s.events() + r.path
			if a := s.do(r); a.status != http.StatusBadRequest || a.code(t) == "" {
				t.Errorf("%s: %d %s", name, a.status, a.body)
			}
		}
		if a := s.do(request{path: s.events(), header: map[string]string{"Accept": "text/html"}}); a.code(t) != "not-acceptable" {
			t.Errorf("HTML: %d %s", a.status, a.body)
		}
	})
	t.Run("websocket refused", func(t *testing.T) {
		_, end := s.replay("?user=ann")
		host, err := url.Parse(s.url)
		if err != nil {
			t.Fatal(err)
		}
		for name, c := range map[string]struct {
			query  string
			header http.Header
			status int
			code   string
		}{
			"no token":         {"", http.Header{"Authorization": {"Bearer x"}}, 401, "token-invalid"},
			"operator":         {"", http.Header{"Authorization": {"Bearer " + s.operator}}, 403, "privilege-missing"},
			"user":             {"", http.Header{"Authorization": {"Bearer " + s.userToken("ann")}}, 400, "invalid-request"},
			"user elsewhere":   {"?conversation=x", http.Header{"Authorization": {"Bearer " + s.userToken("eve")}}, 404, "not-found"},
			"origin":           {"", http.Header{"Origin": {"https://evil.example"}}, 403, "origin-forbidden"},
			"null origin":      {"", http.Header{"Origin": {"null"}}, 403, "origin-forbidden"},
			"other cursor":     {"?after=" + end["next"].(string), nil, 400, "cursor-mismatch"},
			"other filter":     {"?color=red", nil, 400, "invalid-request"},
			"same origin":      {"", http.Header{"Origin": {"https://" + host.Host}}, 101, ""},
			"without anything": {"", nil, 101, ""},
		} {
			conn, resp, err := s.dial(t.Context(), c.query, c.header)
			if conn != nil {
				_ = conn.CloseNow()
			}
			if resp == nil {
				t.Fatalf("%s: %v", name, err)
			}
			var body []byte
			if conn == nil {
				body, _ = io.ReadAll(resp.Body)
				_ = resp.Body.Close()
			}
			if resp.StatusCode != c.status || !strings.Contains(string(body), c.code) {
				t.Errorf("%s: %d %s", name, resp.StatusCode, body)
			}
		}
	})
	t.Run("a caller that speaks", func(t *testing.T) {
		conn, _, err := s.dial(t.Context(), "?after=latest", nil) //nolint:bodyclose // Dial has replaced it
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.CloseNow() }()
		if err := conn.Write(t.Context(), websocket.MessageText, []byte(strings.Repeat("x", 4000))); err != nil {
			t.Fatal(err)
		}
		for {
			_, _, err = conn.Read(t.Context())
			if err != nil {
				break
			}
		}
		if code := websocket.CloseStatus(err); code != websocket.StatusPolicyViolation && code != websocket.StatusMessageTooBig {
			t.Errorf("ended with %v", err)
		}
	})
}

// TestClientTail reads through the public client, whose connections are cut
// after a few hundred bytes each, while events are appended.
func TestClientTail(t *testing.T) {
	s := newSite(t, config.Limits{})
	s.fill(10)
	app, err := journal.ParseAppID(s.app)
	if err != nil {
		t.Fatal(err)
	}
	c, err := client.New(client.Config{
		URL: s.url, App: app, Token: client.StaticToken(s.token),
		HTTP: &http.Client{Transport: &cutting{RoundTripper: s.client.Transport}},
	})
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for e, err := range c.Tail(t.Context(), client.Query{}).Events() {
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf(`"id":"e%03d"`, n); !strings.Contains(string(e.JSON), want) {
			t.Fatalf("event %d is %s", n, e.JSON)
		}
		if n++; n == 16 {
			break
		}
		if n >= 10 {
			s.post(sent(fmt.Sprintf("e%03d", n), "ann", "ben", "x"))
		}
	}
}

// cutting cuts each answer after more bytes than the one before.
type cutting struct {
	http.RoundTripper

	n int64
}

func (c *cutting) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := c.RoundTripper.RoundTrip(r)
	if err == nil {
		c.n += 311
		resp.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(resp.Body, c.n), resp.Body}
	}
	return resp, err
}
