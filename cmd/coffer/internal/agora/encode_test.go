package agora

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/journal"
)

// written are events as callers send them.
func written(t testing.TB) []journal.Event {
	t.Helper()
	at := time.UnixMilli(1700000000123).UTC()
	deep := strings.Repeat(`[`, 29) + strings.Repeat(`]`, 29)
	events := []journal.Event{
		{ID: "a1", Type: journal.MessageSent, Time: at, Sender: "ann", Recipient: "ben", Data: jsontext.Value(`{"bodies":[{"type":"txt","msg":"hi"}],"ext":{"k":1}}`)},
		{ID: "a2", Type: journal.MessageSent, Time: at, Sender: "ben", Recipient: "ann", Data: jsontext.Value(`{"x":null,"ext":{},"bodies":[{"type":"txt","msg":"é\u0001"}],"y":[1,2.50]}`)},
		{ID: "a3", Type: journal.MessageSent, Time: at, Conversation: "g", ConversationType: journal.Group, Sender: "ann", Data: jsontext.Value(`{"bodies":[{"type":"cmd","action":"x"}]}`)},
		{ID: "a4", Type: journal.MessageSent, Time: at, Conversation: "r", ConversationType: journal.Room, Data: jsontext.Value(`{"bodies":[{"type":"txt","msg":"by the app"}]}`)},
		{ID: "a5", Type: journal.MessageEdited, Time: at, Conversation: "g", ConversationType: journal.Group, Sender: "ann", Target: "a3", Data: jsontext.Value(`{"bodies":[{"type":"txt","msg":"y"}]}`)},
		{ID: "a6", Type: journal.MessageRecalled, Time: at, Conversation: "own", ConversationType: journal.Direct, Sender: "ann", Recipient: "ben", Target: "a1"},
		{ID: "a7", Type: journal.ReceiptRead, Time: at, Conversation: "g", ConversationType: journal.Group, Sender: "ben", Target: "a3", Data: jsontext.Value(`{}`)},
		{ID: "a8", Type: journal.ReceiptDelivered, Time: at, Sender: "ben", Recipient: "ann", Target: "a1", Data: jsontext.Value(`{"agora":{"chat_type":"x"},"coffer":{"v":2},"z":7}`)},
		{ID: "a9", Type: journal.ReceiptRead, Time: at, Sender: "ben", Recipient: "ann", Target: "a1", Data: jsontext.Value(`{"deep":` + deep + `}`)},
	}
	for i := range events {
		if err := events[i].Normalize(at, journal.Limits{}); err != nil {
			t.Fatalf("%s: %v", events[i].ID, err)
		}
	}
	return events
}

func TestAppendLineAndParse(t *testing.T) {
	var app journal.AppID
	events := written(t)
	for _, s := range seeds(t) {
		e, err := Parse([]byte(s))
		if err != nil {
			t.Fatal(err)
		}
		events = append(events, e)
	}
	for _, e := range events {
		if err := e.Normalize(e.Time.Add(time.Second), journal.Limits{}); err != nil {
			t.Fatalf("%s: %v", e.ID, err)
		}
		line, ok := AppendLine(nil, e)
		if !ok {
			t.Fatalf("%s: no line", e.ID)
		}
		if !jsontext.Value(line).IsValid() || bytes.ContainsAny(line, "\n") {
			t.Errorf("%s: not one line of JSON: %s", e.ID, line)
		}
		got, err := Parse(line)
		if err != nil {
			t.Errorf("%s: %v\n%s", e.ID, err, line)
			continue
		}
		if err := got.Normalize(e.Time.Add(time.Second), journal.Limits{}); err != nil {
			t.Errorf("%s: %v", e.ID, err)
			continue
		}
		if want, have := e.AppendJSON(nil, app), got.AppendJSON(nil, app); !bytes.Equal(want, have) {
			t.Errorf("%s: came back as\n%s\nwas\n%s", e.ID, have, want)
		}
	}
}

// TestAppendLineForScripts holds what a script for the vendor's files reads.
func TestAppendLineForScripts(t *testing.T) {
	type line struct {
		ID        string `json:"msg_id"`
		Timestamp int64  `json:"timestamp"`
		From      string `json:"from"`
		To        string `json:"to"`
		ChatType  string `json:"chat_type"`
		Group     string `json:"group_id"`
		Recall    string `json:"recall_id"`
		Payload   struct {
			From   string           `json:"from"`
			To     string           `json:"to"`
			Ack    string           `json:"ack_message_id"`
			Edit   string           `json:"edit_message_id"`
			Bodies []jsontext.Value `json:"bodies"`
		} `json:"payload"`
	}
	want := map[string]string{
		"a1": "ann>ben chat", "a2": "ben>ann chat", "a3": "ann>g groupchat", "a4": ">r chatroom", "a5": "ann>g edit g a3",
		"a6": "ann>ben recall a1 a1", "a7": "ben>g read_ack g a3",
	}
	for _, e := range written(t)[:7] {
		text, _ := AppendLine(nil, e)
		var l line
		if err := json.Unmarshal(text, &l); err != nil {
			t.Fatal(err)
		}
		got := strings.Join(strings.Fields(l.From+">"+l.To+" "+l.ChatType+" "+l.Group+" "+l.Recall+" "+l.Payload.Ack+l.Payload.Edit), " ")
		if got != want[l.ID] || l.Timestamp != e.Time.UnixMilli() || l.Payload.From != l.From || l.Payload.To != l.To {
			t.Errorf("%s: %q, want %q: %s", e.ID, got, want[l.ID], text)
		}
		if e.Type == journal.MessageSent && len(l.Payload.Bodies) != 1 {
			t.Errorf("%s: no bodies: %s", e.ID, text)
		}
	}
	if _, ok := AppendLine(nil, journal.Event{ID: "x", Type: journal.UserErased}); ok {
		t.Error("an erasure has a line")
	}
}

func TestParseRefusesAnotherOwnMember(t *testing.T) {
	line, _ := AppendLine(nil, written(t)[1])
	for name, change := range map[string][2]string{
		"version":           {`"v":1`, `"v":2`},
		"not an object":     {`"coffer":{`, `"coffer":[{`},
		"unknown member":    {`"v":1,`, `"v":1,"z":1,`},
		"order too short":   {`"order":["x",`, `"order":[`},
		"order of another":  {`"order":["x",`, `"order":["w",`},
		"kind":              {`"conversationtype":"direct"`, `"conversationtype":"party"`},
		"order without one": {`"order":["x","ext","bodies","y"],`, ``},
	} {
		changed := bytes.Replace(line, []byte(change[0]), []byte(change[1]), 1)
		if bytes.Equal(changed, line) {
			t.Fatalf("%s: nothing to change in %s", name, line)
		}
		if _, err := Parse(changed); err == nil {
			t.Errorf("%s: accepted: %s", name, changed)
		}
	}
}
