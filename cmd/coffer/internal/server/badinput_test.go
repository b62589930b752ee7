package server_test

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
)

func packed(t *testing.T, content []byte) string {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// dripping is a chunked body that never ends.
type dripping struct{ stop chan struct{} }

func (d dripping) Read(p []byte) (int, error) {
	select {
	case <-d.stop:
		return 0, io.EOF
	case <-time.After(time.Millisecond):
		p[0] = ' '
		return 1, nil
	}
}

// TestBadInput sends what must be refused: each with a problem of its own, and
// nothing stored, in this app or any other.
func TestBadInput(t *testing.T) {
	s := newSite(t, config.Limits{BodyTimeout: config.Duration(300 * time.Millisecond), RequestBytes: 1 << 20})
	s.post(sent("taken", "ann", "ben", "first"))
	stop := make(chan struct{})
	defer close(stop)

	event := func(member, value string) string {
		e := map[string]string{
			"id": `"new"`, "type": `"message.sent"`, "sender": `"ann"`, "recipient": `"ben"`,
			"data": `{"bodies":[{"type":"txt","msg":"x"}]}`,
		}
		e[member] = value
		var parts []string
		for _, name := range []string{"id", "source", "specversion", "type", "time", "conversation", "conversationtype", "sender", "recipient", "target", "data", "surprise", "position", "data_base64"} {
			if e[name] != "" {
				parts = append(parts, fmt.Sprintf("%q:%s", name, e[name]))
			}
		}
		return "{" + strings.Join(parts, ",") + "}"
	}
	nested := strings.Repeat(`{"a":`, 40) + "1" + strings.Repeat("}", 40)
	head := func(pairs ...string) map[string]string {
		h := make(map[string]string)
		for i := 0; i < len(pairs); i += 2 {
			h[pairs[i]] = pairs[i+1]
		}
		return h
	}
	type bad struct {
		name   string
		r      request
		status int
		code   string
		says   string
	}
	cases := []bad{
		{"malformed JSON", request{body: `{"id":`}, 400, "invalid-request", "ends early"},
		{"not an object", request{body: `"text"`}, 400, "invalid-request", "object"},
		{"two values", request{body: event("id", `"new"`) + "{}"}, 400, "invalid-request", "after the event"},
		{"invalid UTF-8", request{body: event("sender", "\"a\xff\"")}, 400, "invalid-request", "UTF-8"},
		{"half a surrogate", request{body: event("data", `{"bodies":[{"type":"txt","msg":"\ud800"}]}`)}, 400, "invalid-request", "surrogate"},
		{"NUL in text", request{body: event("data", `{"bodies":[{"type":"txt","msg":"a\u0000b"}]}`)}, 400, "invalid-request", "NUL"},
		{"NUL in an id", request{body: event("sender", `"a\u0000b"`)}, 400, "invalid-request", "NUL"},
		{"raw NUL", request{body: "\x00"}, 400, "invalid-request", ""},
		{"empty", request{reader: strings.NewReader("")}, 400, "invalid-request", "empty"},
		{"white space", request{body: " \n "}, 400, "invalid-request", "empty"},
		{"empty array", request{body: "[]"}, 400, "invalid-request", "empty"},
		{"unfinished array", request{body: "[" + event("id", `"new"`)}, 400, "invalid-request", "array"},
		{"after the array", request{body: "[" + event("id", `"new"`) + "] x"}, 400, "invalid-request", "after the array"},
		{"deep nesting", request{body: event("data", nested)}, 400, "invalid-request", "nested deeper"},
		{"duplicate member", request{body: `{"id":"new","id":"new2","type":"message.sent"}`}, 400, "invalid-request", "twice"},
		{"duplicate member in data", request{body: event("data", `{"bodies":[{"type":"txt","msg":"x","msg":"y"}]}`)}, 400, "invalid-request", "twice"},
		{"unknown member", request{body: event("surprise", "1")}, 400, "invalid-request", "unknown attribute"},
		{"position given", request{body: event("position", `"1"`)}, 400, "invalid-request", "position"},
		{"binary data", request{body: event("data_base64", `"AA=="`)}, 400, "invalid-request", "base64"},
		{"number out of range", request{body: event("data", `{"bodies":[{"type":"txt","msg":"x"}],"ext":{"n":1e999}}`)}, 400, "invalid-request", "64 bits"},
		{"unknown type", request{body: event("type", `"message.shouted"`)}, 400, "invalid-request", "type"},
		{"server's type", request{body: event("type", `"user.erased"`)}, 400, "invalid-request", "server only"},
		{"operational type", request{body: event("type", `"key.rotated"`)}, 400, "invalid-request", "server only"},
		{"id of the server's", request{body: event("id", `"coffer:endpoint-disabled:x:1"`)}, 400, "invalid-request", `"pointer":"/id"`},
		{"id of the server's, escaped", request{body: event("id", `"\u0063offer:x"`)}, 400, "invalid-request", "begin with coffer:"},
		{"id of an attachment's event", request{body: event("id", `"attachment:pic"`)}, 400, "invalid-request", "begin with coffer:"},
		{"id of an erasure's event", request{body: event("id", `"erasure:x"`)}, 400, "invalid-request", "begin with coffer:"},
		{"id of an acknowledgement", request{body: event("id", `"inbox-acked:x:1"`)}, 400, "invalid-request", "begin with coffer:"},
		{"idempotency key of the server's", request{body: event("id", ""), header: head("Idempotency-Key", "coffer:x")}, 400, "invalid-request", "begin with coffer:"},
		{"idempotency key of the server's, batch", request{body: "[" + event("id", "") + "]", header: head("Idempotency-Key", "erasure:x")}, 400, "invalid-request", "Idempotency-Key"},
		{"another app's source", request{body: event("source", `"/apps/03000000000000000000000000000000"`)}, 400, "invalid-request", "another app"},
		{"other version", request{body: event("specversion", `"0.3"`)}, 400, "invalid-request", "1.0"},
		{"year 1999", request{body: event("time", `"1999-12-31T23:59:59Z"`)}, 400, "invalid-request", "2000"},
		{"an hour ahead", request{body: event("time", `"`+time.Now().Add(time.Hour).UTC().Format(time.RFC3339)+`"`)}, 400, "invalid-request", "future"},
		{"year 0", request{body: event("time", `"0000-01-01T00:00:00Z"`)}, 400, "invalid-request", "2000"},
		{"year 9999", request{body: event("time", `"9999-12-31T23:59:59Z"`)}, 400, "invalid-request", "future"},
		{"year 10000", request{body: event("time", `"10000-01-01T00:00:00Z"`)}, 400, "invalid-request", "RFC 3339"},
		{"day that is none", request{body: event("time", `"2026-02-30T00:00:00Z"`)}, 400, "invalid-request", "RFC 3339"},
		{"time without a zone", request{body: event("time", `"2026-01-02T03:04:05"`)}, 400, "invalid-request", "RFC 3339"},
		{"time as a number", request{body: event("time", "1700000000")}, 400, "invalid-request", ""},
		{"id as a number", request{body: event("id", "1")}, 400, "invalid-request", ""},
		{"byte order mark", request{body: "\xef\xbb\xbf" + event("id", `"new"`)}, 400, "invalid-request", ""},
		{"UTF-16", request{body: "\xff\xfe{\x00}\x00"}, 400, "invalid-request", ""},
		{"overlong UTF-8", request{body: event("sender", "\"a\xc0\xaf\"")}, 400, "invalid-request", "UTF-8"},
		{"no time", request{body: event("time", `"yesterday"`)}, 400, "invalid-request", "RFC 3339"},
		{"older than the plan", request{body: event("time", `"2001-01-01T00:00:00Z"`)}, 422, "retention-expired", "older"},
		{"id taken by another body", request{body: event("id", `"taken"`)}, 409, "idempotency-conflict", "another content"},
		{"text over 5 KiB", request{body: event("data", `{"bodies":[{"type":"txt","msg":"`+strings.Repeat("a", 5121)+`"}]}`)}, 413, "payload-too-large", ""},
		{"event over 64 KiB", request{body: event("data", `{"bodies":[{"type":"txt","msg":"x"}],"ext":{"a":"`+strings.Repeat("a", 64<<10)+`"}}`)}, 413, "payload-too-large", ""},
		{"long id", request{body: event("id", `"`+strings.Repeat("a", 129)+`"`)}, 413, "payload-too-large", "128"},
		{"over the body limit", request{body: strings.Repeat(" ", 1<<20+1)}, 413, "payload-too-large", "1048576"},
		{"over the body limit, chunked", request{reader: io.MultiReader(strings.NewReader(strings.Repeat(" ", 1<<20+1)))}, 413, "payload-too-large", "1048576"},
		{"1,001 events", request{body: "[" + strings.Repeat("{},", 1000) + "{}]"}, 413, "payload-too-large", "1000"},
		{"1,001 lines", request{body: strings.Repeat("{}\n", 1001), header: head("Content-Type", "application/x-ndjson")}, 413, "payload-too-large", "1000"},
		{"never-ending chunked body", request{reader: dripping{stop}}, 408, "request-timeout", ""},

		{"no content type", request{body: event("id", `"new"`), header: head("Content-Type", "-")}, 415, "unsupported-media-type", "Content-Type"},
		{"wrong content type", request{body: event("id", `"new"`), header: head("Content-Type", "text/plain")}, 415, "unsupported-media-type", "application/json"},
		{"form", request{body: "a=b", header: head("Content-Type", "application/x-www-form-urlencoded")}, 415, "unsupported-media-type", ""},
		{"wrong charset", request{body: event("id", `"new"`), header: head("Content-Type", "application/json; charset=iso-8859-1")}, 415, "unsupported-media-type", "utf-8"},
		{"unknown parameter", request{body: event("id", `"new"`), header: head("Content-Type", "application/json; version=2")}, 415, "unsupported-media-type", "parameter"},
		{"broken content type", request{body: event("id", `"new"`), header: head("Content-Type", "application/json; charset")}, 415, "unsupported-media-type", ""},
		{"array as one event", request{body: "[" + event("id", `"new"`) + "]", header: head("Content-Type", "application/cloudevents+json")}, 400, "invalid-request", "one event"},
		{"event as array", request{body: event("id", `"new"`), header: head("Content-Type", "application/cloudevents-batch+json")}, 400, "invalid-request", "array"},
		{"undeclared gzip", request{body: packed(t, []byte(event("id", `"new"`)))}, 400, "invalid-request", "Content-Encoding"},
		{"gzip that is none", request{body: event("id", `"new"`), header: head("Content-Encoding", "gzip")}, 400, "invalid-request", "encoding"},
		{"cut gzip", request{body: packed(t, []byte(event("id", `"new"`)))[:40], header: head("Content-Encoding", "gzip")}, 400, "invalid-request", ""},
		{"gzip with a tail", request{body: packed(t, []byte(event("id", `"new"`))) + "tail", header: head("Content-Encoding", "gzip")}, 400, "invalid-request", ""},
		{"gzip bomb", request{body: packed(t, make([]byte, 64<<20)), header: head("Content-Encoding", "gzip")}, 413, "payload-too-large", "1048576"},
		{"other encoding", request{body: "x", header: head("Content-Encoding", "br")}, 415, "unsupported-media-type", "gzip"},
		{"gzip twice", request{body: "x", header: head("Content-Encoding", "gzip, gzip")}, 415, "unsupported-media-type", "gzip"},
		{"bad idempotency key", request{body: event("id", `"new"`), header: head("Idempotency-Key", "a/b")}, 400, "invalid-request", "Idempotency-Key"},
		{"long idempotency key", request{body: event("id", `"new"`), header: head("Idempotency-Key", strings.Repeat("a", 128))}, 400, "invalid-request", "Idempotency-Key"},
		{"query on append", request{path: s.events() + "?x=1", body: event("id", `"new"`)}, 400, "invalid-request", "unknown parameter"},

		{"malformed app id", request{path: "/v1/apps/xyz/events", body: "{}"}, 400, "invalid-request", "32"},
		{"upper-case app id", request{path: "/v1/apps/" + strings.ToUpper(s.app) + "/events", body: "{}"}, 400, "invalid-request", "lower-case"},
		{"app of no region", request{path: "/v1/apps/ff" + s.app[2:] + "/events", body: "{}"}, 404, "not-found", ""},
		{"app of another region", request{path: "/v1/apps/04" + s.app[2:] + "/events", body: "{}"}, 421, "wrong-region", "us"},
		{"unknown path", request{path: "/v1/nothing", body: "{}"}, 404, "not-found", ""},
		{"path with dots", request{path: "/v1/apps/../apps/" + s.app + "/events", body: "{}"}, 404, "not-found", ""},
		{"double slash", request{path: "/v1//apps/" + s.app + "/events", body: "{}"}, 404, "not-found", ""},
		{"trailing slash", request{path: s.events() + "/", body: "{}"}, 405, "method-not-allowed", "GET"},
		{"method", request{method: "DELETE", path: s.events()}, 405, "method-not-allowed", "POST"},
	}
	for name, id := range map[string]string{
		"full stop": ".a", "path": "..", "star": "a*", "greater": "a>", "space": "a b", "newline": `a\nb`, "tab": `a\tb`, "slash": "../a", "backslash": `a\\b`,
		"percent": "a%2f", "bidi": "a\u202eb", "zero width": "a\u200bb", "umlaut": "ä", "emoji": "😀", "colon and quote": `a\"b`, "empty": "",
	} {
		for _, member := range []string{"id", "sender", "recipient", "conversation"} {
			if member == "id" && id == "" || member == "conversation" && id == "" {
				continue // none is given: one is made
			}
			cases = append(cases, bad{member + " with " + name, request{body: event(member, `"`+id+`"`)}, 400, "invalid-request", ""})
		}
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if c.r.method == "" {
				c.r.method = http.MethodPost
			}
			if c.r.path == "" {
				c.r.path = s.events()
			}
			a := s.do(c.r)
			if code := a.code(t); a.status != c.status || code != c.code {
				t.Fatalf("%d %s", a.status, a.body)
			}
			if !strings.Contains(string(a.body), c.says) {
				t.Errorf("%s does not say %q", a.body, c.says)
			}
		})
	}
	last := s.post(sent("last", "ann", "ben", "last"))
	events, _ := s.replay("?min_position=" + last[0])
	if got := strings.Join(ids(events), " "); got != "taken last" {
		t.Errorf("stored: %s", got)
	}
}

// TestBadQueries are refused before anything is read.
func TestBadQueries(t *testing.T) {
	s := newSite(t, config.Limits{})
	s.post(sent("e1", "ann", "ben", "x"), sent("e2", "ann", "ben", "x"), sent("e3", "ann", "ben", "x"))
	page := s.do(request{path: s.events() + "?limit=1&min_position=" + s.post(sent("e4", "ann", "ben", "x"))[0]}).json(t)
	cursor, ok := page["next"].(string)
	if !ok {
		t.Fatalf("no cursor: %v", page)
	}
	forged := cursor[:len(cursor)-1] + flip(cursor[len(cursor)-1])
	messages := "/v1/apps/" + s.app + "/conversations/ann,ben/messages"
	for _, c := range []struct {
		path, code, says string
		status           int
	}{
		{"?surprise=1", "invalid-request", "unknown parameter", 400},
		{"?limit=1&limit=2", "invalid-request", "more than once", 400},
		{"?limit=0", "invalid-request", "limit", 400},
		{"?limit=1001", "invalid-request", "1000", 400},
		{"?limit=-1", "invalid-request", "limit", 400},
		{"?limit=1e2", "invalid-request", "limit", 400},
		{"?limit=", "invalid-request", "limit", 400},
		{"?order=up", "invalid-request", "order", 400},
		{"?from=yesterday", "invalid-request", "from", 400},
		{"?from=", "invalid-request", "from", 400},
		{"?from=2026-01-02T00:00:00Z&until=2026-01-01T00:00:00Z", "invalid-request", "until", 400},
		{"?type=message", "invalid-request", "type", 400},
		{"?type=message.sent,", "invalid-request", "type", 400},
		{"?user=.a", "invalid-request", "user", 400},
		{"?user=", "invalid-request", "user", 400},
		{"?conversation=a%2fb", "invalid-request", "conversation", 400},
		{"?after=x", "invalid-request", "after", 400},
		{"?after=-1", "invalid-request", "after", 400},
		{"?after=18446744073709551616", "invalid-request", "after", 400},
		{"?after=", "invalid-request", "after", 400},
		{"?min_position=x", "invalid-request", "min_position", 400},
		{"?min_position=99999999", "invalid-request", "min_position", 400},
		{"?follow=yes", "invalid-request", "follow", 400},
		{"?follow=true", "invalid-request", "ndjson", 400},
		{"?a=%zz", "invalid-request", "query", 400},
		{"?after=" + forged, "cursor-mismatch", "", 400},
		{"?after=c1_", "cursor-mismatch", "", 400},
		{"?after=" + cursor + "&order=desc", "cursor-mismatch", "", 400},
		{"?after=" + cursor + "&user=ann", "cursor-mismatch", "", 400},
		{"?after=" + cursor + "&conversation=ann,ben", "cursor-mismatch", "", 400},
		{"?after=" + cursor + "&type=message.sent", "cursor-mismatch", "", 400},
		{"?after=" + cursor + "&from=2026-01-02T00:00:00Z", "cursor-mismatch", "", 400},
		{"/none", "not-found", "no such event", 404},
		{"/a.b", "invalid-request", "full stop", 400},
		{"/a%2fb", "not-found", "", 404},
		{messages + "?after=" + cursor, "cursor-mismatch", "", 400},
		{messages + "?limit=1001", "invalid-request", "1000", 400},
		{strings.Replace(messages, "ann,ben", "a%20b", 1), "invalid-request", "white space", 400},
	} {
		t.Run(c.path, func(t *testing.T) {
			path := c.path
			if !strings.HasPrefix(path, "/v1") {
				path = s.events() + path
			}
			a := s.do(request{path: path})
			if code := a.code(t); a.status != c.status || code != c.code {
				t.Fatalf("%d %s", a.status, a.body)
			}
			if !strings.Contains(string(a.body), c.says) {
				t.Errorf("%s does not say %q", a.body, c.says)
			}
		})
	}
	// A cursor of one app is nothing to another.
	us := s.regions["us"]
	other := s.do(request{url: us["COFFER_URL"], path: "/v1/apps/" + us["COFFER_APP"] + "/events?after=" + cursor, token: us["COFFER_TOKEN"]})
	if other.code(t) != "cursor-mismatch" {
		t.Errorf("in another app: %d %s", other.status, other.body)
	}
	if a := s.do(request{path: s.events(), header: map[string]string{"Accept": "text/html"}}); a.code(t) != "not-acceptable" {
		t.Errorf("text/html: %d %s", a.status, a.body)
	}
	if a := s.do(request{path: s.events(), body: "{}"}); a.code(t) != "invalid-request" {
		t.Errorf("GET with a body: %d %s", a.status, a.body)
	}
}
