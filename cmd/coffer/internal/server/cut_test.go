package server_test

import (
	"bufio"
	"context"
	"crypto/fips140"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/client"
)

// scissors is a proxy that cuts each connection after so many bytes of what the
// server has sent. It passes TLS through or, when open is set, ends it, and then
// cuts what was inside: anywhere, not only between records.
type scissors struct {
	url  string
	cuts atomic.Int64 // connections that were cut
}

func newScissors(s *site, open bool, after func() int64) *scissors {
	s.t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		s.t.Fatal(err)
	}
	address := strings.TrimPrefix(s.url, "https://")
	p := &scissors{url: "https://" + listener.Addr().String()}
	if open {
		p.url = "http://" + listener.Addr().String()
	}
	settings := s.transport(false).TLSClientConfig
	settings.ClientSessionCache = tls.NewLRUClientSessionCache(4)
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	s.t.Cleanup(func() {
		cancel()
		_ = listener.Close()
		work.Wait()
	})
	pass := func(caller net.Conn) {
		defer func() { _ = caller.Close() }()
		var server net.Conn
		var err error
		if open {
			server, err = (&tls.Dialer{Config: settings}).DialContext(ctx, "tcp", address)
		} else {
			server, err = (&net.Dialer{}).DialContext(ctx, "tcp", address)
		}
		if err != nil {
			return
		}
		stop := context.AfterFunc(ctx, func() { _ = server.Close() })
		defer stop()
		work.Go(func() {
			_, _ = io.Copy(server, caller)
			_ = server.Close() // the caller has left
		})
		n := after()
		var in io.Reader = server
		if n >= 0 {
			in = io.LimitReader(server, n)
		}
		passed, err := io.Copy(caller, in)
		if err == nil && passed == n {
			p.cuts.Add(1)
		}
		_ = server.Close()
	}
	work.Go(func() {
		for {
			caller, err := listener.Accept()
			if err != nil {
				return
			}
			work.Go(func() { pass(caller) })
		}
	})
	return p
}

// transport makes connections of its own.
func (s *site) transport(http2 bool) *http.Transport {
	settings := s.client.Transport.(*http.Transport).TLSClientConfig.Clone()
	settings.NextProtos = nil
	if !http2 {
		settings.NextProtos = []string{"http/1.1"}
	}
	return &http.Transport{TLSClientConfig: settings, ForceAttemptHTTP2: http2}
}

// reading is what a reader has, and where it goes on.
type reading struct {
	ids   []string
	place string
}

func (r *reading) take(text, place string) bool {
	var v struct {
		ID       string          `json:"id"`
		Position string          `json:"position"`
		End      json.RawMessage `json:"end"`
	}
	if err := json.Unmarshal([]byte(text), &v); err != nil || v.End != nil {
		return false
	}
	if place == "" {
		place = v.Position
	}
	r.ids, r.place = append(r.ids, v.ID), place
	return true
}

// A resumer reads from the place until it has want events or the connection is
// cut. What has not arrived whole does not count.
type resumer func(ctx context.Context, s *site, c *http.Client, url string, r *reading, want int)

func resumers() map[string]resumer {
	return map[string]resumer{"http": resumeLines, "sse": resumeEventStream, "wss": resumeSocket}
}

func answerLines(ctx context.Context, s *site, c *http.Client, url, query string, header map[string]string, line func(string) bool) {
	resp, err := c.Do(s.build(ctx, request{url: url, path: s.events() + query, header: header}))
	if err != nil {
		return // cut before the answer
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		s.t.Errorf("%s: status %d", query, resp.StatusCode)
		return
	}
	in := bufio.NewReader(resp.Body)
	for {
		text, err := in.ReadString('\n')
		if err != nil || !line(strings.TrimSuffix(text, "\n")) {
			return
		}
	}
}

func resumeLines(ctx context.Context, s *site, c *http.Client, url string, r *reading, want int) {
	query := "?follow=true"
	if r.place != "" {
		query += "&after=" + r.place
	}
	answerLines(ctx, s, c, url, query, map[string]string{"Accept": "application/x-ndjson"}, func(text string) bool {
		return r.take(text, "") && len(r.ids) < want
	})
}

func resumeEventStream(ctx context.Context, s *site, c *http.Client, url string, r *reading, want int) {
	header := map[string]string{"Accept": "text/event-stream"}
	if r.place != "" {
		header["Last-Event-ID"] = r.place
	}
	var id, data string
	answerLines(ctx, s, c, url, "", header, func(text string) bool {
		field, value, _ := strings.Cut(text, ": ")
		switch field {
		case "id":
			id = value
		case "data":
			data = value
		case "": // the message is complete
			if data != "" && !r.take(data, id) {
				return false
			} else if data == "" && id != "" {
				r.place = id
			}
			id, data = "", ""
		}
		return len(r.ids) < want
	})
}

func resumeSocket(ctx context.Context, s *site, c *http.Client, url string, r *reading, want int) {
	query := ""
	if r.place != "" {
		query = "?after=" + r.place
	}
	var conn *websocket.Conn
	var err error
	fips140.WithoutEnforcement(func() { // the handshake has SHA-1
		conn, _, err = websocket.Dial(ctx, strings.Replace(url, "http", "ws", 1)+s.events()+query, //nolint:bodyclose // Dial has replaced it
			&websocket.DialOptions{HTTPClient: c, HTTPHeader: http.Header{"Authorization": {"Bearer " + s.token}}})
	})
	if err != nil {
		return
	}
	defer func() { _ = conn.CloseNow() }()
	for len(r.ids) < want {
		_, text, err := conn.Read(ctx)
		if err != nil || !r.take(string(text), "") {
			return
		}
	}
}

// TestCutAtEveryByte cuts the answer to a tail after each of its bytes, header
// included, and resumes after what has arrived whole.
func TestCutAtEveryByte(t *testing.T) {
	s := newSite(t, config.Limits{})
	var want []string
	for i := range 2 {
		want = append(want, fmt.Sprint("e", i))
		s.post(sent(want[i], "a", "b", "x"))
	}
	for form, resume := range resumers() {
		t.Run(form, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			var after atomic.Int64
			p := newScissors(s, true, after.Load)
			c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
			arrived := make(map[int]bool)
			for cut := int64(0); ; cut++ {
				var r reading
				after.Store(cut)
				resume(ctx, s, c, p.url, &r, len(want))
				before := len(r.ids)
				arrived[before] = true
				if before == len(want) {
					if cut < 500 || len(arrived) != len(want)+1 {
						t.Errorf("%d bytes hold the whole answer; it was cut after %v events", cut, arrived)
					}
					break
				}
				after.Store(-1)
				resume(ctx, s, c, p.url, &r, len(want))
				if !slices.Equal(r.ids, want) {
					t.Fatalf("cut after %d bytes, which hold %d events: %v", cut, before, r.ids)
				}
			}
		})
	}
}

// TestCutAnywhere reads a longer past and what a writer appends meanwhile, with
// the encrypted connection cut at random places, in each form and through the
// public client.
func TestCutAnywhere(t *testing.T) {
	s := newSite(t, config.Limits{})
	const past, live = 200, 200
	var want []string
	var batch []string
	for i := range past + live {
		want = append(want, fmt.Sprintf("e%03d", i))
		if i < past {
			batch = append(batch, sent(want[i], "ann", "ben", strings.Repeat("x", i%97)))
		}
	}
	s.post(batch...)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	seed := uint64(0)
	proxy := func(least, most int64) *scissors {
		seed++
		random := rand.New(rand.NewPCG(6, seed)) //nolint:gosec // where to cut
		var mu sync.Mutex
		return newScissors(s, false, func() int64 {
			mu.Lock()
			defer mu.Unlock()
			return least + random.Int64N(most-least)
		})
	}
	var proxies []*scissors
	readers := make(map[string]func() ([]string, error))
	for form, resume := range resumers() {
		p := proxy(500, 20_000)
		proxies = append(proxies, p)
		readers[form] = func() ([]string, error) {
			var r reading
			transport := s.transport(form != "wss")
			defer transport.CloseIdleConnections()
			for len(r.ids) < len(want) && ctx.Err() == nil {
				resume(ctx, s, &http.Client{Transport: transport}, p.url, &r, len(want))
			}
			return r.ids, ctx.Err()
		}
	}
	app, err := journal.ParseAppID(s.app)
	if err != nil {
		t.Fatal(err)
	}
	for _, form := range []string{"client's replay", "client's tail"} {
		// Fewer cuts: the client pauses after each, and the tail for the second
		// that the server asks for.
		p := proxy(15_000, 45_000)
		proxies = append(proxies, p)
		readers[form] = func() ([]string, error) {
			// HTTP/1.1: a frame of HTTP/2 arrives whole or not at all.
			transport := s.transport(false)
			defer transport.CloseIdleConnections()
			c, err := client.New(client.Config{URL: p.url, App: app, Token: client.StaticToken(s.token), HTTP: &http.Client{Transport: transport}})
			if err != nil {
				return nil, err
			}
			events := c.Tail(ctx, client.Query{}).Events()
			if form == "client's replay" {
				events = c.Replay(ctx, client.Query{Follow: true}).Events()
			}
			var r reading
			for e, err := range events {
				if err != nil {
					return r.ids, err
				}
				if !r.take(string(e.JSON), "") {
					return r.ids, fmt.Errorf("event %s", e.JSON)
				}
				if len(r.ids) == len(want) {
					return r.ids, nil
				}
			}
			return r.ids, errors.New("it ended by itself")
		}
	}
	type result struct {
		form string
		ids  []string
		err  error
	}
	results := make(chan result, len(readers))
	for form, read := range readers {
		go func() {
			got, err := read()
			results <- result{form, got, err}
		}()
	}
	for i := past; i < past+live; i++ {
		s.post(sent(want[i], "ann", "ben", strings.Repeat("x", i%97)))
	}
	for range readers {
		if r := <-results; r.err != nil || !slices.Equal(r.ids, want) {
			t.Errorf("%s: %v: %d events: %v", r.form, r.err, len(r.ids), r.ids)
		}
	}
	for _, p := range proxies {
		if n := p.cuts.Load(); n < 2 {
			t.Errorf("only %d connections of a reader were cut", n)
		}
	}
}
