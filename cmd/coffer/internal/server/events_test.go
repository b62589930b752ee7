package server_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/server"
)

func sent(id, sender, recipient, text string) string {
	return fmt.Sprintf(`{"id":%q,"type":"message.sent","sender":%q,"recipient":%q,"data":{"bodies":[{"type":"txt","msg":%q}]}}`, id, sender, recipient, text)
}

func TestAppend(t *testing.T) {
	s := newSite(t, config.Limits{})
	one := s.do(request{method: "POST", path: s.events(), body: sent("e1", "ann", "ben", "hello")})
	first := one.json(t)
	if one.status != http.StatusCreated || first["id"] != "e1" || first["position"] == nil || first["time"] == nil {
		t.Fatalf("append: %d %s", one.status, one.body)
	}
	if got := one.header.Get("Location"); got != s.events()+"/e1" {
		t.Errorf("location %q", got)
	}
	again := s.do(request{method: "POST", path: s.events(), body: sent("e1", "ann", "ben", "hello")})
	if again.status != http.StatusOK || again.json(t)["position"] != first["position"] {
		t.Errorf("again: %d %s, first %s", again.status, again.body, one.body)
	}
	event := s.do(request{path: s.events() + "/e1?min_position=" + first["position"].(string)})
	v := event.json(t)
	if event.status != http.StatusOK || v["position"] != first["position"] || v["source"] != "/apps/"+s.app || v["conversation"] != "ann,ben" {
		t.Errorf("one event: %d %s", event.status, event.body)
	}

	t.Run("made id", func(t *testing.T) {
		body := strings.Replace(sent("", "ann", "ben", "x"), `"id":"",`, "", 1)
		a, b := s.do(request{method: "POST", path: s.events(), body: body}), s.do(request{method: "POST", path: s.events(), body: body})
		if a.status != 201 || b.status != 201 || a.json(t)["id"] == b.json(t)["id"] {
			t.Errorf("%s %s", a.body, b.body)
		}
	})
	t.Run("idempotency key", func(t *testing.T) {
		body := strings.Replace(sent("", "ann", "ben", "y"), `"id":"",`, "", 1)
		key := map[string]string{"Idempotency-Key": "order-7"}
		a, b := s.do(request{method: "POST", path: s.events(), body: body, header: key}), s.do(request{method: "POST", path: s.events(), body: body, header: key})
		if a.status != 201 || b.status != 200 || a.json(t)["id"] != "order-7" || a.json(t)["position"] != b.json(t)["position"] {
			t.Errorf("%d %s, %d %s", a.status, a.body, b.status, b.body)
		}
		batch := s.do(request{method: "POST", path: s.events(), body: "[" + body + "," + sent("own", "ann", "ben", "z") + "]", header: key})
		data := batch.json(t)["data"].([]any)
		if batch.status != 201 || data[0].(map[string]any)["id"] != "order-7:0" || data[1].(map[string]any)["id"] != "own" {
			t.Errorf("batch: %d %s", batch.status, batch.body)
		}
	})
	t.Run("batch forms", func(t *testing.T) {
		for i, c := range []struct{ media, open, join, end string }{
			{"application/json", "[", ",", "]"},
			{"application/cloudevents-batch+json; charset=UTF-8", " [ ", " , ", " ]\n"},
			{"application/x-ndjson", "", "\n\n", ""},
			{"application/ndjson", "", "\r\n", "\r\n"},
		} {
			a, b := sent(fmt.Sprint("b", i, "a"), "ann", "ben", "1"), sent(fmt.Sprint("b", i, "b"), "ann", "ben", "2")
			r := request{method: "POST", path: s.events(), header: map[string]string{"Content-Type": c.media}}
			r.body = c.open + a + c.join + b + c.end
			got := s.do(r)
			if got.status != http.StatusCreated || len(got.json(t)["data"].([]any)) != 2 {
				t.Errorf("%s: %d %s", c.media, got.status, got.body)
			}
			r.body = packed(t, []byte(r.body))
			r.header["Content-Encoding"] = "gzip"
			zipped := s.do(r)
			status := zipped.json(t)["data"].([]any)[1].(map[string]any)["status"]
			if zipped.status != http.StatusCreated || status != "duplicate" {
				t.Errorf("%s, gzip, again: %d %s", c.media, zipped.status, zipped.body)
			}
		}
	})
	t.Run("part of a batch", func(t *testing.T) {
		a := s.do(request{method: "POST", path: s.events(), body: "[" + strings.Join([]string{
			sent("p1", "ann", "ben", "1"), `{"id":"p2"}`, sent("e1", "ann", "ben", "other"), `{"id":"a","id":"b"}`, sent("p1", "ann", "ben", "1"),
			strings.Replace(sent("p3", "ann", "ben", "1"), `"id"`, `"time":"2001-01-01T00:00:00Z","id"`, 1),
		}, ",") + "]"})
		if a.status != http.StatusMultiStatus {
			t.Fatalf("%d %s", a.status, a.body)
		}
		var got []string
		for _, d := range a.json(t)["data"].([]any) {
			v := d.(map[string]any)
			p, _ := v["problem"].(map[string]any)
			got = append(got, fmt.Sprint(v["status"], " ", p["code"]))
			if p["code"] == "retention-expired" && p["oldest_available"] == nil {
				t.Error("no oldest_available")
			}
		}
		want := []string{"created <nil>", "refused invalid-request", "refused idempotency-conflict", "refused invalid-request", "duplicate <nil>", "refused retention-expired"}
		if !slices.Equal(got, want) {
			t.Errorf("got %q", got)
		}
	})
}

// fill stores n events of three users in two conversations and returns their
// positions.
func (s *site) fill(n int) []string {
	s.t.Helper()
	var events []string
	for i := range n {
		users := [][2]string{{"ann", "ben"}, {"ben", "cid"}, {"cid", "ann"}}[i%3]
		events = append(events, sent(fmt.Sprintf("e%03d", i), users[0], users[1], fmt.Sprint("text ", i)))
	}
	positions := s.post(events...)
	a := s.do(request{path: s.events() + "?limit=1&min_position=" + positions[n-1]})
	if a.status != http.StatusOK {
		s.t.Fatalf("waiting: %d %s", a.status, a.body)
	}
	return positions
}

// TestResumeAtEveryCut reads a replay in two parts, cut everywhere, in each
// order and form: together they are the whole, nothing twice.
func TestResumeAtEveryCut(t *testing.T) {
	s := newSite(t, config.Limits{})
	positions := s.fill(23)
	for _, filter := range []string{"", "&user=ann", "&conversation=ann,ben", "&order=desc", "&order=desc&user=cid", "&type=message.sent,message.edited&type=receipt.read"} {
		whole, _ := s.replay("?" + strings.TrimPrefix(filter, "&"))
		if len(whole) < 7 {
			t.Fatalf("%s: only %d events", filter, len(whole))
		}
		want := ids(whole)
		for cut := 1; cut < len(want); cut++ {
			first, end := s.replay(fmt.Sprintf("?limit=%d%s", cut, filter))
			byCursor, _ := s.replay("?after=" + end["next"].(string) + filter)
			byPosition, _ := s.replay("?after=" + first[cut-1]["position"].(string) + filter)
			if got := append(ids(first), ids(byCursor)...); !slices.Equal(got, want) {
				t.Errorf("%s cut at %d, by cursor: %v", filter, cut, got)
			}
			if got := append(ids(first), ids(byPosition)...); !slices.Equal(got, want) {
				t.Errorf("%s cut at %d, by position: %v", filter, cut, got)
			}
			if got := s.pages(fmt.Sprintf("?limit=%d%s", cut, filter)); !slices.Equal(got, want) {
				t.Errorf("%s in pages of %d: %v", filter, cut, got)
			}
		}
	}
	// From each position on, there is exactly what follows it.
	for i, p := range positions {
		if rest, _ := s.replay("?after=" + p); len(rest) != len(positions)-i-1 {
			t.Errorf("after %d: %d events", i, len(rest))
		}
	}
	// After the end there is nothing, and the cursor stays good for what comes.
	_, end := s.replay("")
	s.post(sent("later", "ann", "ben", "x"))
	for deadline := time.Now().Add(5 * time.Second); ; {
		rest, _ := s.replay("?after=" + end["next"].(string))
		if got := fmt.Sprint(ids(rest)); got == "[later]" {
			break
		} else if got != "[]" || time.Now().After(deadline) {
			t.Fatalf("after the end: %s", got)
		}
	}
}

// pages follows next through JSON pages.
func (s *site) pages(query string) []string {
	s.t.Helper()
	var got []string
	after := ""
	for range 100 {
		a := s.do(request{path: s.events() + query + after})
		if a.status != http.StatusOK {
			s.t.Fatalf("page %s%s: %d %s", query, after, a.status, a.body)
		}
		v := a.json(s.t)
		for _, e := range v["data"].([]any) {
			got = append(got, e.(map[string]any)["id"].(string))
		}
		next, ok := v["next"].(string)
		if !ok {
			if v["scanned_through"] == nil || v["oldest_available"] == nil {
				s.t.Errorf("page: %s", a.body)
			}
			return got
		}
		after = "&after=" + url.QueryEscape(next)
	}
	s.t.Fatal("pages without an end")
	return nil
}

func TestReplayByTime(t *testing.T) {
	s := newSite(t, config.Limits{})
	at := func(h int) string {
		return s.now().Add(time.Duration(h) * time.Hour).UTC().Format("2006-01-02T15:00:00Z")
	}
	var events []string
	for i, h := range []int{-30, -3, -20, -2, -1} { // not in the order of time
		events = append(events, strings.Replace(sent(fmt.Sprint("t", i), "ann", "ben", "x"), `"id"`, `"time":"`+at(h)+`","id"`, 1))
	}
	p := s.post(events...)
	for query, want := range map[string]string{
		"from=" + at(-3):                       "[t1 t3 t4]",
		"until=" + at(-3):                      "[t0 t2]",
		"from=" + at(-20) + "&until=" + at(-2): "[t1 t2]",
		"from=" + at(1):                        "[]",
		"from=" + at(-3) + "&order=desc":       "[t4 t3 t1]",
	} {
		got, _ := s.replay("?min_position=" + p[4] + "&" + query)
		if fmt.Sprint(ids(got)) != want {
			t.Errorf("%s: %v, want %s", query, ids(got), want)
		}
	}
}

// TestFollow reads on past the end, gets what is appended, white space while
// nothing happens, and the trailer when the server shuts down.
func TestFollow(t *testing.T) {
	s := newSite(t, config.Limits{})
	s.fill(5)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	req := s.build(ctx, request{path: s.events() + "?follow=true", header: map[string]string{"Accept": "application/x-ndjson"}})
	resp, err := s.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	lines := bufio.NewReader(resp.Body)
	next := func() map[string]any {
		t.Helper()
		line, err := lines.ReadString('\n')
		if err != nil {
			t.Fatalf("reading: %v", err)
		}
		var v map[string]any
		if err := json.Unmarshal([]byte(line), &v); err != nil {
			t.Fatalf("line %q: %v", line, err)
		}
		return v
	}
	for i := range 5 {
		if id := next()["id"]; id != fmt.Sprintf("e%03d", i) {
			t.Fatalf("past event %d has the id %v", i, id)
		}
	}
	for i := range 20 {
		id := fmt.Sprint("live", i)
		s.post(sent(id, "ann", "ben", "x"))
		if got := next()["id"]; got != id {
			t.Fatalf("live event %s has the id %v", id, got)
		}
	}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		s.stop()
	}()
	end, ok := next()["end"].(map[string]any)
	if !ok || end["count"] != float64(25) || end["next"] == nil {
		t.Errorf("trailer %v", end)
	}
	if rest, err := io.ReadAll(lines); err != nil || len(rest) != 0 {
		t.Errorf("after the trailer: %q %v", rest, err)
	}
	<-stopped
	s.start()
	if rest, _ := s.replay("?after=" + end["next"].(string)); len(rest) != 0 {
		t.Errorf("after the trailer's cursor: %v", ids(rest))
	}
	if strings.TrimSpace(server.KeepAlive) != "" || strings.Contains(server.KeepAlive, "\n") {
		t.Error("the keep-alive is not white space within a line")
	}
}

func change(id, kind, target, text string) string {
	data := ""
	if text != "" {
		data = fmt.Sprintf(`,"data":{"bodies":[{"type":"txt","msg":%q}]}`, text)
	}
	return fmt.Sprintf(`{"id":%q,"type":%q,"sender":"ann","recipient":"ben","target":%q%s}`, id, kind, target, data)
}

func TestMessages(t *testing.T) {
	s := newSite(t, config.Limits{})
	var events []string
	for i := range 12 {
		events = append(events, sent(fmt.Sprintf("m%02d", i), "ann", "ben", fmt.Sprint("text ", i)))
	}
	events = append(events,
		change("edit1", "message.edited", "m05", "first change"), change("edit2", "message.edited", "m05", "second change"),
		change("gone", "message.recalled", "m07", ""), sent("elsewhere", "ann", "cid", "x"))
	p := s.post(events...)
	path := "/v1/apps/" + s.app + "/conversations/ann,ben/messages"
	get := func(query string) (list []map[string]any, v map[string]any) {
		t.Helper()
		a := s.do(request{path: path + query})
		if a.status != http.StatusOK {
			t.Fatalf("%s: %d %s", query, a.status, a.body)
		}
		v = a.json(t)
		for _, m := range v["data"].([]any) {
			list = append(list, m.(map[string]any))
		}
		return list, v
	}
	whole, _ := get("?min_position=" + p[len(p)-1])
	if len(whole) != 12 {
		t.Fatalf("%d messages", len(whole))
	}
	name := func(m map[string]any) string { return m["position"].(string) }
	for i, m := range whole {
		n := 11 - i
		state, _ := m["state"].(string)
		event, _ := m["event"].(map[string]any)
		switch n {
		case 5:
			text := fmt.Sprint(event["data"])
			if state != "edited" || !strings.Contains(text, "second change") || strings.Contains(text, "text 5") || m["edit"].(map[string]any)["id"] != "edit2" {
				t.Errorf("edited: %v", m)
			}
			if event["id"] != "m05" || event["position"] != p[5] {
				t.Errorf("edited: %v", event)
			}
		case 7:
			if state != "recalled" || event != nil || m["recall"].(map[string]any)["id"] != "gone" {
				t.Errorf("recalled: %v", m)
			}
		default:
			if state != "sent" || event["id"] != fmt.Sprintf("m%02d", n) || event["position"] != name(m) {
				t.Errorf("message %d: %v", n, m)
			}
		}
	}
	// Pages, older and then newer again, are the whole at every size.
	for limit := 1; limit <= 13; limit++ {
		var down []string
		query := fmt.Sprint("?limit=", limit)
		list, v := get(query)
		for {
			for _, m := range list {
				down = append(down, name(m))
			}
			next, ok := v["next"].(string)
			if !ok {
				break
			}
			list, v = get(query + "&before=" + next)
		}
		up := []string{}
		for _, m := range slices.Backward(list) {
			up = append(up, name(m))
		}
		for {
			previous, ok := v["previous"].(string)
			if !ok {
				break
			}
			list, v = get(query + "&after=" + previous)
			for _, m := range slices.Backward(list) {
				up = append(up, name(m))
			}
		}
		slices.Reverse(up)
		var want []string
		for _, m := range whole {
			want = append(want, name(m))
		}
		if !slices.Equal(down, want) || !slices.Equal(up, want) {
			t.Errorf("limit %d: down %v, up %v, want %v", limit, down, up, want)
		}
	}
	// A recalled message is gone from everything else too.
	if a := s.do(request{path: s.events() + "/m07"}); a.code(t) != "erased" || a.status != http.StatusGone {
		t.Errorf("recalled event: %d %s", a.status, a.body)
	}
	events2, end := s.replay("")
	if slices.Contains(ids(events2), "m07") || end["omitted"] != float64(1) || len(events2) != 15 {
		t.Errorf("replay: %v %v", ids(events2), end)
	}
	if got := s.pages("?limit=4"); !slices.Equal(got, ids(events2)) {
		t.Errorf("pages: %v", got)
	}
}

// TestRetention moves the clock past the retention of some events.
func TestRetention(t *testing.T) {
	s := newSite(t, config.Limits{})
	old := s.now().Add(-179 * 24 * time.Hour).UTC().Format(time.RFC3339)
	var events []string
	for i := range 6 {
		events = append(events, strings.Replace(sent(fmt.Sprintf("e%03d", i), "ben", "cid", "x"), `"id"`, `"time":"`+old+`","id"`, 1))
	}
	p := s.post(append(events, sent("fresh", "ann", "ben", "x"))...)
	before, end := s.replay("?limit=3&min_position=" + p[6])
	if len(before) != 3 {
		t.Fatalf("before: %v", ids(before))
	}
	s.setClock(2 * 24 * time.Hour)
	s.token = s.appToken()
	after, _ := s.replay("")
	if got := fmt.Sprint(ids(after)); got != "[fresh]" {
		t.Errorf("replay: %s", got)
	}
	for _, form := range []string{"application/json", "application/x-ndjson"} {
		a := s.do(request{path: s.events() + "?after=" + end["next"].(string), header: map[string]string{"Accept": form}})
		v := a.json(t)
		if a.status != http.StatusGone || a.code(t) != "cursor-expired" || v["oldest_available"] == nil || v["oldest_position"] == nil {
			t.Fatalf("old cursor as %s: %d %s", form, a.status, a.body)
		}
		if rest, _ := s.replay("?after=" + v["oldest_position"].(string)); fmt.Sprint(ids(rest)) != "[fresh]" {
			t.Errorf("after oldest_position: %v", ids(rest))
		}
	}
	if a := s.do(request{path: s.events() + "/e001"}); a.status != http.StatusGone || a.code(t) != "retention-expired" {
		t.Errorf("old event: %d %s", a.status, a.body)
	}
	if a := s.do(request{path: "/v1/apps/" + s.app + "/conversations/ben,cid/messages"}); len(a.json(t)["data"].([]any)) != 0 {
		t.Errorf("old messages: %s", a.body)
	}
}
