package agora

import (
	"strings"
	"testing"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/journal"
)

// TestAppendCallback: what is written is read as the same event by who reads
// callbacks, and its security is what the vendor's formula says.
func TestAppendCallback(t *testing.T) {
	seen := map[journal.Type]bool{}
	for _, e := range written(t) {
		seen[e.Type] = true
		body, ok, err := AppendCallback([]byte("before"), e, Callback{CallID: "org#app_1", Secret: "s3cret", Delivery: []byte(`{"number":"7"}`)})
		if err != nil || !ok || !strings.HasPrefix(string(body), `before{"callId":"org#app_1","eventType":"chat","timestamp":1700000000123,`) {
			t.Fatalf("%s: %s, %v", e.ID, body, err)
		}
		body = body[len("before"):]
		// echo -n 'org#app_1s3cret1700000000123' | md5sum
		if !strings.Contains(string(body), `"securityVersion":"1.0.0","security":"9decd615dad753b4b5c0541aaf07079f"`) {
			t.Errorf("%s: the security of %s", e.ID, body)
		}
		var v struct {
			Group    string `json:"group_id"`
			Delivery struct {
				Number string `json:"number"`
			} `json:"delivery"`
		}
		if err := json.Unmarshal(body, &v); err != nil || v.Delivery.Number != "7" || (v.Group != "") != (e.ConversationType != journal.Direct) {
			t.Errorf("%s: %s, %v", e.ID, body, err)
		}
		if e.Sender == "" {
			continue // the app's own messages: the form has no such thing
		}
		back, err := Parse(body)
		if err != nil {
			t.Errorf("%s: %v: %s", e.ID, err, body)
			continue
		}
		if back.ID != e.ID || back.Type != e.Type || back.Sender != e.Sender || back.Target != e.Target || !back.Time.Equal(e.Time) {
			t.Errorf("%s: read as %+v", e.ID, back)
		}
	}
	for _, typ := range Types() {
		if !seen[typ] {
			t.Errorf("no %s was written", typ)
		}
	}
	if _, ok, err := AppendCallback(nil, journal.Event{Type: journal.MemberJoined}, Callback{}); ok || err != nil {
		t.Errorf("a type without a form: %v, %v", ok, err)
	}
	question, _, err := AppendCallback(nil, journal.Event{Type: journal.MessageSent, Sender: "a", Recipient: "b"}, Callback{CallID: "a_1", Question: true})
	if err != nil || strings.Contains(string(question), "eventType") || strings.Contains(string(question), "msg_id") || strings.Contains(string(question), "securityVersion") {
		t.Errorf("a question about what has no id: %s, %v", question, err)
	}
	gone, err := AppendGone(nil, "msg_1", 5, Callback{CallID: "a_1", Secret: "s"})
	if err != nil || !strings.Contains(string(gone), `"chat_type":"gone"`) || !strings.Contains(string(gone), `"payload":{}`) {
		t.Errorf("gone: %s, %v", gone, err)
	}
}
