package server_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
)

func member(what, id, user, conversation string) string {
	return fmt.Sprintf(`{"id":%q,"type":"member.%s","conversation":%q,"conversationtype":"group","sender":%q}`, id, what, conversation, user)
}

func inGroup(id, sender, conversation, text string) string {
	return fmt.Sprintf(`{"id":%q,"type":"message.sent","conversation":%q,"conversationtype":"group","sender":%q,"data":{"bodies":[{"type":"txt","msg":%q}]}}`,
		id, conversation, sender, text)
}

func about(kind, id, sender, conversation, target string) string {
	data := ""
	if kind == "message.edited" {
		data = `,"data":{"bodies":[{"type":"txt","msg":"better"}]}`
	}
	return fmt.Sprintf(`{"id":%q,"type":%q,"conversation":%q,"conversationtype":"group","sender":%q,"target":%q%s}`,
		id, kind, conversation, sender, target, data)
}

func (s *site) get(token, path string) answer {
	s.t.Helper()
	return s.do(request{path: "/v1/apps/" + s.app + path, token: token})
}

func (s *site) data(token, path string) []map[string]any {
	s.t.Helper()
	a := s.get(token, path)
	if a.status != http.StatusOK {
		s.t.Fatalf("%s: %d %s", path, a.status, a.body)
	}
	var page struct {
		Data []map[string]any `json:"data"`
	}
	if err := json.Unmarshal(a.body, &page); err != nil {
		s.t.Fatal(err)
	}
	return page.Data
}

// TestUserReadsItsConversations reads what a user takes part in, and is told
// nothing of the rest, at once after its backend was told.
func TestUserReadsItsConversations(t *testing.T) {
	s := newSite(t, config.Limits{})
	positions := s.post(
		member("joined", "j1", "ann", "g"), inGroup("g1", "ben", "g", "one"), inGroup("g2", "ben", "g", "two"),
		about("message.edited", "g3", "ben", "g", "g1"), about("message.recalled", "g4", "ben", "g", "g2"),
		inGroup("h1", "ben", "h", "secret"), sent("d1", "ben", "ann", "hi"),
		about("receipt.read", "r1", "ann", "g", "g1"), about("receipt.delivered", "r2", "cid", "g", "g1"),
	)
	ann := s.userToken("ann")
	list := s.data(ann, "/conversations?min_position="+positions[len(positions)-1])
	if len(list) != 2 {
		t.Fatalf("conversations: %v", list)
	}
	direct, group := list[0], list[1]
	if direct["conversation"] != "ann,ben" || direct["unread"] != 1.0 || direct["last"].(map[string]any)["state"] != "sent" {
		t.Errorf("the direct conversation is %v", direct)
	}
	if group["conversation"] != "g" || group["conversationtype"] != "group" || group["unread"] != 0.0 ||
		group["last"].(map[string]any)["state"] != "recalled" {
		t.Errorf("the group is %v", group)
	}
	// The app's token asks for anybody.
	if got := s.data("", "/conversations?user=ann"); len(got) != 2 {
		t.Errorf("by the app: %v", got)
	}
	if a := s.get("", "/conversations"); a.status != http.StatusBadRequest {
		t.Errorf("the app without a user: %d", a.status)
	}
	page := s.data(ann, "/conversations?limit=1")
	next := s.get(ann, "/conversations?limit=1").json(t)["next"].(string)
	rest := s.data(ann, "/conversations?limit=1&before="+next)
	if len(page) != 1 || len(rest) != 1 || rest[0]["conversation"] != "g" {
		t.Errorf("pages: %v, %v", page, rest)
	}
	// A cursor is its reader's own.
	if a := s.get("", "/conversations?user=ann&limit=1&before="+next); a.code(t) != "cursor-mismatch" {
		t.Errorf("a user's cursor with the app's token: %d %s", a.status, a.body)
	}

	messages := s.data(ann, "/conversations/g/messages")
	receipts := messages[1]["receipts"].(map[string]any)
	if receipts["delivered"] != 2.0 || receipts["read"] != 1.0 || receipts["own"] != "read" {
		t.Errorf("receipts of the first message: %v", receipts)
	}
	if got := s.data("", "/conversations/g/messages")[1]["receipts"].(map[string]any)["own"]; got != nil {
		t.Errorf("the app has an own receipt: %v", got)
	}
	if got := s.data(ann, "/events?conversation=g"); len(got) != 6 { // without the message that was recalled
		t.Errorf("events of the group: %v", ids(got))
	}
	if a := s.get(ann, "/events"); a.status != http.StatusBadRequest {
		t.Errorf("events without a conversation: %d %s", a.status, a.body)
	}
	// What is not the user's looks as what is not there.
	for path, absent := range map[string]string{
		"/conversations/h/messages": "/conversations/none/messages",
		"/events?conversation=h":    "/events?conversation=none",
		"/events/h1":                "/events/none",
		"/users/ben/inbox":          "/users/nobody/inbox",
		"/conversations?user=ben":   "/conversations?user=nobody",
	} {
		a, b := s.get(ann, path), s.get(ann, absent)
		if a.status != http.StatusNotFound || b.status != http.StatusNotFound || a.json(t)["detail"] != b.json(t)["detail"] {
			t.Errorf("%s: %d %s\nabsent: %d %s", path, a.status, a.body, b.status, b.body)
		}
	}
	for i := range 20 {
		id := fmt.Sprint("late", i)
		s.post(member("joined", id, "ann", id))
		if a := s.get(ann, "/conversations/"+id+"/messages"); a.status != http.StatusOK {
			t.Fatalf("just after joining: %d %s", a.status, a.body)
		}
	}
}

func TestInbox(t *testing.T) {
	s := newSite(t, config.Limits{})
	positions := s.post(
		member("joined", "j1", "ann", "g"), inGroup("g1", "ben", "g", "one"), inGroup("g2", "ann", "g", "own"),
		inGroup("g3", "ben", "g", "two"), about("message.recalled", "g4", "ben", "g", "g3"), inGroup("h1", "ben", "h", "secret"),
	)
	ann := s.userToken("ann")
	box := s.get(ann, "/users/ann/inbox?limit=1&min_position="+positions[len(positions)-1]).json(t)
	first := s.data(ann, "/users/ann/inbox?limit=1")
	if len(first) != 1 || first[0]["id"] != "g1" || box["next"] == nil || box["acked"] != "0" {
		t.Fatalf("first page: %v", box)
	}
	rest := s.data(ann, "/users/ann/inbox?after="+box["next"].(string))
	if got := strings.Join(ids(rest), " "); got != "g4" {
		t.Errorf("the rest: %s", got)
	}
	ack := func(through, want string) {
		t.Helper()
		a := s.do(request{method: "POST", path: "/v1/apps/" + s.app + "/users/ann/inbox/ack", token: ann, body: `{"through":"` + through + `"}`})
		if a.status != http.StatusOK || a.json(t)["acked"] != want {
			t.Errorf("acknowledging %s: %d %s, want %s", through, a.status, a.body, want)
		}
	}
	through := box["scanned_through"].(string)
	ack(through, through)
	ack(through, through)
	ack(box["next"].(string), through)
	ack("1", through)
	if got := strings.Join(ids(s.data(ann, "/users/ann/inbox")), " "); got != "g4" {
		t.Errorf("after acknowledging: %s", got)
	}
	end := s.get(ann, "/users/ann/inbox").json(t)["scanned_through"].(string)
	ack("18446744073709551615", end)
	ack(through, end)
	last := s.post(inGroup("g5", "ben", "g", "three"))[0]
	events, _ := s.replay("?type=inbox.acked&min_position=" + last)
	if len(events) != 2 || events[0]["sender"] != "ann" || events[0]["target"] != "g1" {
		t.Errorf("acknowledgements in the journal: %v", events)
	}
	// It is kept: after a restart the inbox is where it was.
	s.stop()
	s.start()
	if got := strings.Join(ids(s.data(s.userToken("ann"), "/users/ann/inbox?min_position="+last)), " "); got != "g5" {
		t.Errorf("after a restart: %s", got)
	}
	for _, body := range []string{`{}`, `{"through":""}`, `{"through":"x"}`, `{"through":"-1"}`, `{"through":1}`, `{"more":1}`, `[]`, ``} {
		a := s.do(request{method: "POST", path: "/v1/apps/" + s.app + "/users/ann/inbox/ack", body: body, header: map[string]string{"Content-Type": "application/json"}})
		if a.status != http.StatusBadRequest {
			t.Errorf("body %q: %d %s", body, a.status, a.body)
		}
	}
}

// TestUserSendsIntoItsConversations shows that nobody gets in by sending, or by
// being named.
func TestUserSendsIntoItsConversations(t *testing.T) {
	s := newSite(t, config.Limits{})
	s.post(member("joined", "j1", "ann", "g"), inGroup("g1", "ann", "g", "one"), inGroup("h1", "ben", "h", "two"), inGroup("g2", "ben", "g", "x"))
	ann := s.userToken("ann")
	to := func(id, recipient, conversation, kind string) string {
		return fmt.Sprintf(`{"id":%q,"type":"message.sent","conversation":%q,"conversationtype":%q,"sender":"ann","recipient":%q,"data":{"bodies":[{"type":"txt","msg":"x"}]}}`,
			id, conversation, kind, recipient)
	}
	for name, c := range map[string]struct {
		body   string
		status int
	}{
		"into its group":                     {inGroup("a1", "ann", "g", "x"), 201},
		"to somebody new":                    {sent("a2", "ann", "eve", "x"), 201},
		"to a member":                        {to("a3", "ben", "g", "group"), 201},
		"edits its own":                      {about("message.edited", "a4", "ann", "g", "g1"), 201},
		"reads":                              {about("receipt.read", "a5", "ann", "g", "g2"), 201},
		"into another group":                 {inGroup("b1", "ann", "h", "x"), 404},
		"a receipt into another group":       {about("receipt.read", "b2", "ann", "h", "h1"), 404},
		"into a direct one of others":        {to("b3", "eve", "ben,eve", "group"), 404},
		"naming somebody into its group":     {to("b4", "eve", "g", "group"), 404},
		"naming into a direct one by an id":  {to("b5", "eve", "g", "direct"), 404},
		"joins":                              {member("joined", "b6", "ann", "h"), 403},
		"leaves":                             {member("left", "b7", "ann", "g"), 403},
		"edits another's":                    {about("message.edited", "b8", "ann", "g", "g2"), 404},
		"recalls another's":                  {about("message.recalled", "b9", "ann", "g", "g2"), 404},
		"recalls what is not there":          {about("message.recalled", "b10", "ann", "g", "none"), 404},
		"acknowledges by hand":               {`{"id":"b11","type":"inbox.acked","sender":"ann","target":"g2"}`, 400},
		"a group with a direct one's own id": {to("b12", "zoe", "ann,zoe", "group"), 404},
	} {
		a := s.do(request{method: "POST", path: s.events(), token: ann, body: c.body})
		if a.status != c.status {
			t.Errorf("%s: %d %s, want %d", name, a.status, a.body, c.status)
		}
	}
	if a := s.get(s.userToken("eve"), "/conversations/g/messages"); a.status != http.StatusNotFound {
		t.Errorf("eve got in: %d", a.status)
	}
	// The recall of a recalled message, sent again, is still the user's own.
	recall := about("message.recalled", "a6", "ann", "g", "g1")
	for _, want := range []int{201, 200} {
		if a := s.do(request{method: "POST", path: s.events(), token: ann, body: recall}); a.status != want {
			t.Errorf("recalling: %d %s, want %d", a.status, a.body, want)
		}
	}
}

// TestErasedUserIsHidden erases a user and reads what others had with it.
func TestErasedUserIsHidden(t *testing.T) {
	s := newSite(t, config.Limits{})
	positions := s.post(
		member("joined", "j1", "ann", "g"), inGroup("g1", "ann", "g", "mine"), inGroup("g2", "ben", "g", "canary-of-ben"),
		sent("d1", "ben", "ann", "canary-of-ben"), inGroup("g3", "cid", "g", "still here"), inGroup("g4", "ben", "g", "canary-of-ben"),
	)
	ann, last := s.userToken("ann"), "min_position="+positions[len(positions)-1]
	if got := s.data(ann, "/conversations?"+last); len(got) != 2 {
		t.Fatalf("before: %v", got)
	}
	shred := s.do(request{method: "POST", path: "/v1/admin/keys/shred", token: s.operator, body: `{"app":"` + s.app + `","user":"ben"}`})
	if shred.status != http.StatusOK {
		t.Fatalf("erasing: %d %s", shred.status, shred.body)
	}
	list := s.data(ann, "/conversations")
	if len(list) != 1 || list[0]["conversation"] != "g" || list[0]["last"].(map[string]any)["event"].(map[string]any)["id"] != "g3" {
		t.Errorf("conversations: %v", list)
	}
	box := s.get(ann, "/users/ann/inbox")
	if got := strings.Join(ids(s.data(ann, "/users/ann/inbox")), " "); got != "g3" || box.json(t)["scanned_through"] != positions[5] {
		t.Errorf("inbox: %s %s", got, box.body)
	}
	ack := s.do(request{method: "POST", path: "/v1/apps/" + s.app + "/users/ann/inbox/ack", token: ann, body: `{"through":"` + positions[5] + `"}`})
	if ack.status != http.StatusOK || ack.json(t)["acked"] != positions[4] { // the newest that can still be named
		t.Errorf("acknowledging: %d %s", ack.status, ack.body)
	}
	for _, path := range []string{"/conversations", "/users/ann/inbox?after=0", "/conversations/g/messages", "/conversations/ann,ben/messages", "/events?conversation=g"} {
		if a := s.get(ann, path); a.status != http.StatusOK || strings.Contains(string(a.body), "canary-of-ben") {
			t.Errorf("%s: %d %s", path, a.status, a.body)
		}
	}
	if a := s.do(request{method: "POST", path: "/v1/apps/" + s.app + "/users/ben/inbox/ack", token: s.userToken("ben"), body: `{"through":"` + positions[5] + `"}`}); a.status >= 500 {
		t.Errorf("the erased user acknowledges: %d %s", a.status, a.body)
	}
}

// TestTailEndsWhenAMemberLeaves follows a conversation with a member's token, in
// every form, and shows that nothing that comes after the leaving is sent.
func TestTailEndsWhenAMemberLeaves(t *testing.T) {
	s := newSite(t, config.Limits{})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for form, open := range map[string]func(query, token string) (next func() string){
		"lines":  func(query, token string) func() string { return s.textTail(ctx, query, token, "application/x-ndjson") },
		"events": func(query, token string) func() string { return s.textTail(ctx, query, token, "text/event-stream") },
		"socket": func(query, token string) func() string { return s.wordTail(ctx, query, token) },
	} {
		t.Run(form, func(t *testing.T) {
			g := "g-" + form
			s.post(member("joined", "j1"+form, "ann", g), inGroup("m1"+form, "ben", g, "one"))
			next := open("?follow=true&conversation="+g, s.userToken("ann"))
			for _, want := range []string{"j1", "m1"} {
				if got := next(); !strings.Contains(got, `"id":"`+want+form) {
					t.Fatalf("got %s, want %s", got, want)
				}
			}
			s.post(inGroup("m2"+form, "ben", g, "two"))
			if got := next(); !strings.Contains(got, `"id":"m2`+form) {
				t.Fatalf("got %s, want m2", got)
			}
			s.post(member("left", "l1"+form, "ann", g), inGroup("m3"+form, "ben", g, "not for ann"))
			if got := next(); !strings.Contains(got, "not-found") || strings.Contains(got, "not for ann") {
				t.Errorf("the stream went on with %s", got)
			}
		})
	}
}

// textTail opens a tail over plain HTTP, and gives its lines with JSON.
func (s *site) textTail(ctx context.Context, query, token, accept string) func() string {
	s.t.Helper()
	resp, err := s.client.Do(s.build(ctx, request{path: s.events() + query, token: token, header: map[string]string{"Accept": accept}}))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = resp.Body.Close() })
	lines := bufio.NewScanner(resp.Body)
	return func() string {
		for lines.Scan() {
			if strings.Contains(lines.Text(), "{") {
				return lines.Text()
			}
		}
		return fmt.Sprint("the stream ended: ", lines.Err())
	}
}

// wordTail opens a WebSocket, and gives its messages and the reason of its end.
func (s *site) wordTail(ctx context.Context, query, token string) func() string {
	s.t.Helper()
	conn, _, err := s.dial(ctx, query, http.Header{"Authorization": {"Bearer " + token}}) //nolint:bodyclose // Dial has replaced it
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = conn.CloseNow() })
	return func() string {
		_, text, err := conn.Read(ctx)
		if err != nil {
			return err.Error()
		}
		return string(text)
	}
}
