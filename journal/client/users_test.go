package client

import (
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
)

func TestUsers(t *testing.T) {
	var acks atomic.Int32
	c := start(t, func(w http.ResponseWriter, r *http.Request) {
		base := "/v1/apps/" + testApp.String()
		switch r.Method + " " + r.URL.RequestURI() {
		case "GET " + base + "/conversations?before=c1_a&limit=2&min_position=7&user=ann":
			_, _ = io.WriteString(w, `{"data":[{"conversation":"ann,ben","conversationtype":"direct","position":"9","unread":2,"read_through":"5",`+
				`"last":{"position":"9","state":"recalled","receipts":{"delivered":1,"read":0,"own":"delivered"}}}],`+
				`"next":null,"oldest_available":"2026-01-02T03:04:05.678Z"}`)
		case "GET " + base + "/users/ann/inbox":
			_, _ = io.WriteString(w, `{"data":[`+strings.TrimSpace(eventLine(9))+`],"next":"c1_b","scanned_through":"9","acked":"5","oldest_available":"2026-01-02T03:04:05.678Z"}`)
		case "POST " + base + "/users/ann/inbox/ack":
			if acks.Add(1) == 1 { // it can be repeated
				problemJSON(w, http.StatusServiceUnavailable, "store-unavailable", "later", true)
				return
			}
			body, _ := io.ReadAll(r.Body)
			if string(body) != `{"through":"9"}` {
				t.Errorf("body %s", body)
			}
			_, _ = io.WriteString(w, `{"acked":"9"}`)
		default:
			t.Errorf("got %s %s", r.Method, r.URL.RequestURI())
		}
	})
	page, err := c.Conversations(t.Context(), ConversationQuery{User: "ann", Before: "c1_a", Limit: 2, MinPosition: 7})
	if err != nil || len(page.Conversations) != 1 || page.Next != "" {
		t.Fatalf("%+v, %v", page, err)
	}
	got := page.Conversations[0]
	if got.ID != "ann,ben" || got.Type != "direct" || got.Unread != 2 || got.ReadThrough != 5 || got.Last.Receipts.Own != "delivered" {
		t.Errorf("%+v", got)
	}
	box, err := c.Inbox(t.Context(), "ann", InboxQuery{})
	if err != nil || len(box.Events) != 1 || box.ScannedThrough != 9 || box.Acked != 5 || box.Next != "c1_b" {
		t.Fatalf("%+v, %v", box, err)
	}
	if acked, err := c.Ack(t.Context(), "ann", box.ScannedThrough); err != nil || acked != 9 {
		t.Errorf("%v, %v", acked, err)
	}
}
