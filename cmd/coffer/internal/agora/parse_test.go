package agora

import (
	"bufio"
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/journal"
)

// seeds are the lines of testdata/history.jsonl: one per message type and
// chat_type.
func seeds(t testing.TB) []string {
	t.Helper()
	b, err := os.ReadFile("testdata/history.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		lines = append(lines, s.Text())
	}
	if len(lines) < 14 {
		t.Fatalf("%d seeds, want one per message type and chat type", len(lines))
	}
	return lines
}

func TestParseEachType(t *testing.T) {
	want := []struct {
		event journal.Event
		data  string
	}{
		{
			journal.Event{ID: "1001", Type: journal.MessageSent, ConversationType: journal.Direct, Sender: "alice", Recipient: "bob"},
			`{"bodies":[{"type":"txt","msg":"the quay at nine"}],"ext":{"k":"v"},"agora":{"chat_type":"chat","timestamp":1700000000001,"direction":"outgoing"}}`,
		},
		{
			journal.Event{ID: "1002", Type: journal.MessageSent, ConversationType: journal.Direct, Sender: "bob", Recipient: "alice"},
			`{"bodies":[{"type":"img","url":"https://a.invalid/1","secret":"s1","filename":"a.jpg","file_length":128827,"size":{"width":746,"height":1325}}],"ext":{},"agora":{"chat_type":"chat","timestamp":1700000000002,"direction":"outgoing"}}`,
		},
		{
			journal.Event{ID: "1003", Type: journal.MessageSent, Conversation: "200001", ConversationType: journal.Group, Sender: "alice"},
			`{"bodies":[{"type":"audio","url":"https://a.invalid/2","secret":"s2","filename":"a.amr","file_length":6630,"length":10}],"ext":{},"agora":{"chat_type":"groupchat","timestamp":1700000000003,"direction":"outgoing"}}`,
		},
		{
			journal.Event{ID: "1004", Type: journal.MessageSent, Conversation: "200001", ConversationType: journal.Group, Sender: "carol"},
			`{"bodies":[{"type":"video","url":"https://a.invalid/3","secret":"s3","filename":"a.mp4","file_length":58103,"length":10,"thumb":"https://a.invalid/4","thumb_secret":"s4","size":{"width":480,"height":360}}],"ext":{},"agora":{"chat_type":"group","timestamp":1700000000004,"direction":"outgoing"}}`,
		},
		{
			journal.Event{ID: "1005", Type: journal.MessageSent, Conversation: "300001", ConversationType: journal.Room, Sender: "carol"},
			`{"bodies":[{"type":"file","url":"https://a.invalid/5","secret":"s5","filename":"a.pdf","file_length":3279}],"ext":{},"agora":{"chat_type":"chatroom","timestamp":1700000000005,"direction":"outgoing"}}`,
		},
		{
			journal.Event{ID: "1006", Type: journal.MessageSent, ConversationType: journal.Direct, Sender: "alice", Recipient: "bob"},
			`{"bodies":[{"type":"loc","addr":"Quay 9","lat":39.9053,"lng":116.36302}],"ext":{},"agora":{"chat_type":"chat","timestamp":1700000000006,"direction":"outgoing"}}`,
		},
		{
			journal.Event{ID: "1007", Type: journal.MessageSent, ConversationType: journal.Direct, Sender: "alice", Recipient: "bob"},
			`{"bodies":[{"type":"cmd","action":"ring"}],"ext":{},"agora":{"chat_type":"chat","timestamp":1700000000007,"direction":"outgoing"}}`,
		},
		{
			journal.Event{ID: "1008", Type: journal.MessageSent, ConversationType: journal.Direct, Sender: "alice", Recipient: "bob"},
			`{"bodies":[{"type":"custom","customEvent":"gift","customExts":[{"name":"rose"},{"size":"9"}],"v2:customExts":{"name":"rose","size":"9"}}],"ext":{},"agora":{"chat_type":"chat","timestamp":1700000000008,"direction":"outgoing"}}`,
		},
		{
			journal.Event{ID: "1009", Type: journal.MessageSent, Conversation: "200001", ConversationType: journal.Group, Sender: "alice"},
			`{"bodies":[{"type":"combine","subType":"sub_combine","title":"chat history","summary":"a and b","combineLevel":1,"url":"https://a.invalid/6","secret":"s6","filename":"c","file_length":500}],"ext":{},"agora":{"chat_type":"groupchat","timestamp":1700000000009,"direction":"outgoing"}}`,
		},
		{
			journal.Event{ID: "1010", Type: journal.ReceiptRead, ConversationType: journal.Direct, Sender: "bob", Recipient: "alice", Target: "1001"},
			`{"ext":{},"agora":{"chat_type":"read_ack","timestamp":1700000000010,"eventType":"chat"}}`,
		},
		{
			journal.Event{ID: "1011", Type: journal.ReceiptDelivered, ConversationType: journal.Direct, Sender: "bob", Recipient: "alice", Target: "1006"},
			`{"agora":{"chat_type":"delivery_ack","timestamp":1700000000011,"eventType":"chat"}}`,
		},
		{
			journal.Event{ID: "1012", Type: journal.ReceiptRead, Conversation: "200001", ConversationType: journal.Group, Sender: "carol", Target: "1003"},
			`{"agora":{"chat_type":"read_ack","timestamp":1700000000012,"eventType":"chat","payload":{"msg_config":{"allow_group_ack":true},"type":"read_ack"}}}`,
		},
		{
			journal.Event{ID: "1013", Type: journal.MessageEdited, ConversationType: journal.Direct, Sender: "alice", Recipient: "bob", Target: "1001"},
			`{"bodies":[{"type":"txt","msg":"the quay at ten"}],"ext":{},"agora":{"chat_type":"edit","timestamp":1700000000013,"eventType":"chat","payload":{"meta":{"edit_msg":{"chat_type":"chat:user","count":1}},"type":"edit"}}}`,
		},
		{
			journal.Event{ID: "1014", Type: journal.MessageRecalled, Conversation: "200001", ConversationType: journal.Group, Sender: "carol", Target: "1004"},
			`{"ext":{},"agora":{"chat_type":"recall","timestamp":1700000000014,"group_id":"200001","eventType":"chat"}}`,
		},
	}
	lines := seeds(t)
	if len(lines) != len(want) {
		t.Fatalf("%d lines, %d expectations", len(lines), len(want))
	}
	for i, line := range lines {
		got, err := Parse([]byte(line))
		if err != nil {
			t.Errorf("line %d: %v", i+1, err)
			continue
		}
		w := want[i].event
		w.Time = time.UnixMilli(1700000000001 + int64(i)).UTC()
		if g := got; g.ID != w.ID || g.Type != w.Type || !g.Time.Equal(w.Time) || g.Conversation != w.Conversation ||
			g.ConversationType != w.ConversationType || g.Sender != w.Sender || g.Recipient != w.Recipient || g.Target != w.Target {
			t.Errorf("line %d: got %+v\nwant %+v", i+1, got, w)
		}
		if string(got.Data) != want[i].data {
			t.Errorf("line %d: data\n got %s\nwant %s", i+1, got.Data, want[i].data)
		}
	}
}

func TestParseVariants(t *testing.T) {
	for _, tt := range []struct{ name, line, want string }{
		{
			"the payload's users win and the others are kept",
			`{"msg_id":"1","timestamp":5,"from":"x","to":"y","chat_type":"chat","payload":{"from":"a","to":"b","bodies":[{"type":"txt","msg":"m"}]}}`,
			`a b {"bodies":[{"type":"txt","msg":"m"}],"agora":{"chat_type":"chat","timestamp":5,"from":"x","to":"y"}}`,
		},
		{
			"numbers as ids, a string as a time, white space",
			`{"msg_id": 1234567890123456789, "timestamp": "1700000000001", "from": "a", "to": 7, "chat_type": "chat", "payload": {"bodies": [ {"type": "txt", "msg": "m"} ]}}`,
			`a 7 {"bodies":[{"type":"txt","msg":"m"}],"agora":{"chat_type":"chat","timestamp":"1700000000001"}}`,
		},
		{
			"an ext that is no object is kept raw, null is nothing",
			`{"msg_id":"1","timestamp":5,"from":"a","to":"b","chat_type":"chat","payload":{"ext":"old","bodies":[{"type":"txt","msg":"m"}],"from":null}}`,
			`a b {"bodies":[{"type":"txt","msg":"m"}],"agora":{"chat_type":"chat","timestamp":5,"payload":{"ext":"old"}}}`,
		},
		{
			"unknown members are kept where they were",
			`{"msg_id":"1","timestamp":5,"from":"a","to":"b","chat_type":"chat","new":[1,2],"payload":{"odd":{"x":1.50},"bodies":[{"type":"txt","msg":"m","later":true}]}}`,
			`a b {"bodies":[{"type":"txt","msg":"m","later":true}],"agora":{"chat_type":"chat","timestamp":5,"new":[1,2],"payload":{"odd":{"x":1.50}}}}`,
		},
		{
			"a group message names its group apart",
			`{"msg_id":"1","timestamp":5,"from":"a","to":"b","group_id":"g","chat_type":"groupchat","payload":{"bodies":[{"type":"txt","msg":"m"}]}}`,
			`a  {"bodies":[{"type":"txt","msg":"m"}],"agora":{"chat_type":"groupchat","timestamp":5,"group_id":"g","sent_to":"b"}}`,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e, err := Parse([]byte(tt.line))
			if err != nil {
				t.Fatal(err)
			}
			if got := e.Sender + " " + e.Recipient + " " + string(e.Data); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

func TestParseRefuses(t *testing.T) {
	const good = `{"msg_id":"1","timestamp":5,"from":"a","to":"b","chat_type":"chat","payload":{"bodies":[{"type":"txt","msg":"m"}]}}`
	if _, err := Parse([]byte(good)); err != nil {
		t.Fatal(err)
	}
	replace := func(part, with string) string {
		if !strings.Contains(good, part) {
			t.Fatalf("%q is not in the good line", part)
		}
		return strings.Replace(good, part, with, 1)
	}
	for _, tt := range []struct{ line, want string }{
		{"", "the line is empty"},
		{"hello", "not JSON: invalid character 'h'"},
		{good[:40], "not JSON: the line ends too early"},
		{good + good, "not JSON: invalid character '{' after top-level value"},
		{`[]`, "must be a JSON object"},
		{`null`, "must be a JSON object"},
		{replace(`"from":"a"`, `"from":"a","from":"b"`), "not JSON: a member name occurs twice"},
		{replace(`"m"}`, "\"\xff\"}"), "not JSON: invalid UTF-8"},
		{replace(`"m"}`, strings.Repeat("[", 40)+strings.Repeat("]", 40)+"}"), "nested 44 deep; the limit is 28"},
		{replace(`"msg_id":"1",`, ``), "msg_id: is missing"},
		{replace(`"msg_id":"1"`, `"msg_id":null`), "msg_id: is missing"},
		{replace(`"msg_id":"1"`, `"msg_id":true`), "msg_id: must be a string"},
		{replace(`"msg_id":"1"`, `"msg_id":1.5`), "msg_id: must be a string or a whole number"},
		{replace(`"timestamp":5,`, ``), "timestamp: is missing"},
		{replace(`"timestamp":5`, `"timestamp":1e3`), "timestamp: must be a whole number of milliseconds"},
		{replace(`"timestamp":5`, `"timestamp":{}`), "timestamp: must be a number of milliseconds"},
		{replace(`"timestamp":5`, `"timestamp":99999999999999999`), "timestamp: is out of range"},
		{replace(`"chat_type":"chat",`, ``), "chat_type: is missing"},
		{replace(`"chat_type":"chat"`, `"chat_type":"telex"`), `chat_type: "telex" is not a known chat type`},
		{replace(`"chat_type":"chat"`, `"chat_type":3`), `chat_type: must be a string`},
		{replace(`"from":"a",`, ``), "from: is missing"},
		{replace(`"to":"b",`, ``), "to: is missing"},
		{replace(`"to":"b","chat_type":"chat"`, `"chat_type":"group"`), "to: is missing (the group or room)"},
		{`{"msg_id":"1","timestamp":5,"from":"a","to":"b","chat_type":"chat"}`, "payload: is missing"},
		{replace(`{"bodies":[{"type":"txt","msg":"m"}]}`, `"x"`), "payload: must be an object"},
		{replace(`[{"type":"txt","msg":"m"}]`, `[]`), "payload.bodies: is empty"},
		{replace(`[{"type":"txt","msg":"m"}]`, `{}`), "payload.bodies: must be an array"},
		{replace(`"bodies":[{"type":"txt","msg":"m"}]`, ``), "payload.bodies: is missing"},
		{replace(`{"type":"txt","msg":"m"}`, `7`), "payload.bodies[0]: must be an object"},
		{replace(`{"type":"txt","msg":"m"}`, `{"type":"txt","msg":"m"},{"msg":"m"}`), "payload.bodies[1].type: is missing"},
		{replace(`"type":"txt"`, `"type":"smell"`), `payload.bodies[0].type: "smell" is not a known message type`},
		{replace(`"chat_type":"chat"`, `"chat_type":"read_ack"`), "payload.ack_message_id: is missing"},
		{replace(`"chat_type":"chat"`, `"chat_type":"edit"`), "payload.edit_message_id: is missing"},
		{replace(`"chat_type":"chat"`, `"chat_type":"recall"`), "recall_id: is missing"},
		{`{"msg_id":"1","timestamp":5,"from":"a","to":"b","chat_type":"recall","recall_id":"2","payload":{"ack_message_id":"3"}}`, "recall_id: differs from payload.ack_message_id"},
		{replace(`"from":"a"`, `"sent_to":"q","from":"a"`), "sent_to: is not a member of an Agora record"},
	} {
		_, err := Parse([]byte(tt.line))
		if !errors.Is(err, ErrLine) {
			t.Errorf("%.60s: error %v, want one of ErrLine", tt.line, err)
			continue
		}
		if !strings.HasPrefix(err.Error(), tt.want) {
			t.Errorf("%.60s:\n got %q\nwant %q", tt.line, err, tt.want)
		}
	}
}

// FuzzParse checks, for every line that is accepted, that the data is valid JSON
// and that parsing is a function of the line.
func FuzzParse(f *testing.F) {
	for _, s := range seeds(f) {
		f.Add([]byte(s))
	}
	for _, e := range written(f) {
		line, _ := AppendLine(nil, e)
		f.Add(line)
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		kept := bytes.Clone(line)
		e, err := Parse(line)
		if !bytes.Equal(kept, line) {
			t.Fatal("the line was changed")
		}
		if err != nil {
			if !errors.Is(err, ErrLine) {
				t.Fatalf("error %v is not ErrLine", err)
			}
			return
		}
		ours := bytes.Contains(line, []byte("coffer")) // what such a line lacks, Normalize refuses
		if e.ID == "" || !ours && e.Sender == "" || !ours && e.Conversation == "" && e.Recipient == "" || e.Time.IsZero() && e.Time.UnixMilli() == 0 {
			t.Fatalf("accepted without the essentials: %+v", e)
		}
		v := bytes.Clone(e.Data)
		if ours && v == nil {
			return
		}
		if err := (*jsontext.Value)(&v).Compact(); err != nil || !bytes.Equal(v, e.Data) {
			t.Fatalf("data is not compact JSON: %v: %s", err, e.Data)
		}
		again, err := Parse(kept)
		if err != nil || again.ID != e.ID || !again.Time.Equal(e.Time) || !bytes.Equal(again.Data, e.Data) {
			t.Fatalf("parsed twice with different results: %v", err)
		}
	})
}
