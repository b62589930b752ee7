package journal

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"
)

func testApp() AppID { return AppID{0: 3, 15: 0x7f} }

func testNow() time.Time { return time.Date(2026, 11, 24, 18, 0, 0, 123e6, time.UTC) }

// accepted are events that a caller may send, and their canonical form.
var accepted = []struct{ name, in, want string }{
	{
		"group message",
		`{"id":"m-1","type":"message.sent","time":"2026-11-24T17:59:00.5+00:00","conversation":"g1","conversationtype":"group","sender":"alice","data":{"bodies":[{"type":"txt","msg":"hi"}],"ext":{"k":[1,2]}}}`,
		`{"specversion":"1.0","id":"m-1","source":"/apps/0300000000000000000000000000007f","type":"message.sent","time":"2026-11-24T17:59:00.500Z","conversation":"g1","conversationtype":"group","sender":"alice","datacontenttype":"application/json","data":{"bodies":[{"type":"txt","msg":"hi"}],"ext":{"k":[1,2]}}}`,
	},
	{
		"direct message, conversation derived, white space and escapes",
		"\n{ \"specversion\" : \"1.0\", \"source\":\"/apps/0300000000000000000000000000007f\", \"id\":\"m-2\", \"type\":\"message.sent\",\t\"time\":\"2026-11-24T19:59:00.1239+02:00\", \"sender\":\"zoe\", \"recipient\":\"bob\", \"datacontenttype\":\"application/json\", \"data\": { \"bodies\" : [ { \"msg\" : \"\\u0068i\\/ \\u00e9 \\ud83d\\ude00\\n\", \"type\":\"txt\" } ] } }\r\n",
		`{"specversion":"1.0","id":"m-2","source":"/apps/0300000000000000000000000000007f","type":"message.sent","time":"2026-11-24T17:59:00.123Z","conversation":"bob,zoe","conversationtype":"direct","sender":"zoe","recipient":"bob","datacontenttype":"application/json","data":{"bodies":[{"msg":"hi/ é 😀\n","type":"txt"}]}}`,
	},
	{
		"recall without data, null is unset",
		`{"id":"r-1","type":"message.recalled","time":"2026-11-24T17:59:00Z","conversation":"g1","conversationtype":"room","sender":null,"recipient":null,"target":"m-1","data":null}`,
		`{"specversion":"1.0","id":"r-1","source":"/apps/0300000000000000000000000000007f","type":"message.recalled","time":"2026-11-24T17:59:00.000Z","conversation":"g1","conversationtype":"room","target":"m-1"}`,
	},
	{
		"receipt",
		`{"id":"r-2","type":"receipt.read","time":"2026-11-24T17:59:00Z","sender":"bob","recipient":"zoe","target":"m-2"}`,
		`{"specversion":"1.0","id":"r-2","source":"/apps/0300000000000000000000000000007f","type":"receipt.read","time":"2026-11-24T17:59:00.000Z","conversation":"bob,zoe","conversationtype":"direct","sender":"bob","recipient":"zoe","target":"m-2"}`,
	},
	{
		"every kind of body, unknown members kept, numbers as they were",
		`{"id":"m-3","type":"message.edited","time":"2026-11-24T17:59:00Z","conversation":"a,b","conversationtype":"group","sender":"bob","target":"m-2","data":{"x":1.50e1,"bodies":[` + everyBody + `],"ext":{}}}`,
		`{"specversion":"1.0","id":"m-3","source":"/apps/0300000000000000000000000000007f","type":"message.edited","time":"2026-11-24T17:59:00.000Z","conversation":"a,b","conversationtype":"group","sender":"bob","target":"m-2","datacontenttype":"application/json","data":{"x":1.50e1,"bodies":[` + everyBody + `],"ext":{}}}`,
	},
	{
		"white space without an escape",
		`{"id":"m-4","type":"message.sent","time":"2026-11-24T17:59:00Z","sender":"zoe","recipient":"zoe","data":{"bodies": [ {"type":"cmd", "action":"a b"}]}}`,
		`{"specversion":"1.0","id":"m-4","source":"/apps/0300000000000000000000000000007f","type":"message.sent","time":"2026-11-24T17:59:00.000Z","conversation":"zoe,zoe","conversationtype":"direct","sender":"zoe","recipient":"zoe","datacontenttype":"application/json","data":{"bodies":[{"type":"cmd","action":"a b"}]}}`,
	},
}

const everyBody = `{"type":"txt","msg":"","lang":"en"},` +
	`{"type":"img","url":"https://x/y","secret":"s","filename":"f.png","file_length":1024,"size":{"width":480,"height":720.5}},` +
	`{"type":"audio","url":"u","filename":"f.amr","file_length":0,"length":10},` +
	`{"type":"video","url":"u","secret":"s","filename":"f.mp4","file_length":9007199254740992,"size":{"width":1,"height":2},"length":1.5,"thumb":"t","thumb_secret":"ts"},` +
	`{"type":"file","url":"u","filename":"f","file_length":12},` +
	`{"type":"loc","addr":"Berlin","lat":52.5,"lng":"-13.4"},` +
	`{"type":"cmd","action":"typing"},` +
	`{"type":"custom","customEvent":"gift","customExts":[{"a":"b"}],"v2:customExts":{"k":"v"}},` +
	`{"type":"combine","subType":"sub_combine","title":"t","summary":"s","combineLevel":1,"url":"u"}`

func TestParseAccepted(t *testing.T) {
	for _, tt := range accepted {
		t.Run(tt.name, func(t *testing.T) {
			e, err := ParseEvent([]byte(tt.in), testApp(), Limits{})
			if err != nil {
				t.Fatal(err)
			}
			data := e.Data
			if err := e.Normalize(testNow(), Limits{}); err != nil {
				t.Fatal(err)
			}
			if len(data) > 0 && &data[0] != &e.Data[0] {
				t.Error("data that was parsed was validated a second time")
			}
			got := string(e.AppendJSON(nil, testApp()))
			if got != tt.want {
				t.Errorf("canonical form\n got %s\nwant %s", got, tt.want)
			}
			if e.size() != len(got) {
				t.Errorf("size() is %d, the JSON has %d bytes", e.size(), len(got))
			}

			// The Go interface reaches the same form.
			direct := Event{
				ID: e.ID, Type: e.Type, Time: e.Time, Conversation: e.Conversation, ConversationType: e.ConversationType,
				Sender: e.Sender, Recipient: e.Recipient, Target: e.Target, Data: e.Data.Clone(),
			}
			if err := direct.Normalize(testNow(), Limits{}); err != nil {
				t.Fatal(err)
			}
			if s := string(direct.AppendJSON(nil, testApp())); s != tt.want {
				t.Errorf("normalized from Go\n got %s\nwant %s", s, tt.want)
			}

			// And so does a replay, read back.
			pos, err := NewPosition(2, 41)
			if err != nil {
				t.Fatal(err)
			}
			line := SplicePosition(nil, []byte(got), pos)
			if want := got[:len(got)-1] + `,"position":"9007199254741033"}`; string(line) != want {
				t.Errorf("with position\n got %s\nwant %s", line, want)
			}
			r, err := ParseReplayed(line)
			if err != nil {
				t.Fatal(err)
			}
			if r.App != testApp() || r.Position != pos || string(r.AppendJSON(nil, r.App)) != got {
				t.Errorf("read back: app %v, position %v, %s", r.App, r.Position, r.AppendJSON(nil, r.App))
			}
		})
	}
}

// The limit counts the text, not its escapes.
func TestTextLimit(t *testing.T) {
	for _, unit := range []string{"x", `\n`, `\"`} {
		for n, ok := range map[int]bool{5120: true, 5121: false} {
			_, err := ParseEvent([]byte(withBody(`{"type":"txt","msg":"`+strings.Repeat(unit, n)+`"}`)), testApp(), Limits{})
			if ok != (err == nil) {
				t.Errorf("%d of %s: %v", n, unit, err)
			}
		}
	}
}

func TestNormalizeFillsIn(t *testing.T) {
	e := Event{Type: MessageSent, Sender: "a", Recipient: "b", Data: jsontext.Value(`{"bodies":[{"type":"cmd","action":"x"}]}`)}
	if err := e.Normalize(testNow(), Limits{}); err != nil {
		t.Fatal(err)
	}
	if err := CheckEventID(e.ID); e.ID == "" || err != nil {
		t.Errorf("id %q: %v", e.ID, err)
	}
	if !e.Time.Equal(testNow()) || e.Conversation != "a,b" || e.ConversationType != Direct {
		t.Errorf("got %v %q %v", e.Time, e.Conversation, e.ConversationType)
	}
}

const okTail = `,"time":"2026-11-24T17:59:00Z","conversation":"g1","conversationtype":"group","sender":"alice","data":{"bodies":[{"type":"txt","msg":"hi"}]}}`

func withData(data string) string {
	return `{"id":"m-1","type":"message.sent","conversation":"g1","conversationtype":"group","sender":"alice","data":` + data + `}`
}

func withBody(body string) string { return withData(`{"bodies":[` + body + `]}`) }

// refused are inputs with the pointer and the class of their error, and a word
// of its text.
var refused = []struct {
	name, in, pointer, word string
	class                   error
}{
	{"empty", ``, "", "empty", ErrInvalid},
	{"white space", " \n\t", "", "empty", ErrInvalid},
	{"an array", `[]`, "", "object", ErrInvalid},
	{"a string", `"x"`, "", "object", ErrInvalid},
	{"cut", `{"id":"m-1"`, "", "ends early", ErrInvalid},
	{"cut in a string", `{"id":"m-`, "", "ends early", ErrInvalid},
	{"no JSON", `{id:1}`, "", "not valid JSON", ErrInvalid},
	{"trailing comma", `{"id":"m-1",}`, "", "not valid JSON", ErrInvalid},
	{"two events", `{"id":"m-1","type":"message.sent"` + okTail + `{}`, "", "after the event", ErrInvalid},
	{"raw NUL", "{\"id\":\"m\x00\"}", "/id", "not valid JSON", ErrInvalid},
	{"invalid UTF-8", "{\"id\":\"\xff\"}", "", "UTF-8", ErrInvalid},
	{"duplicate attribute", `{"id":"m-1","id":"m-2","type":"message.sent"` + okTail, "/id", "twice", ErrInvalid},
	{"duplicate by escape", `{"id":"m-1","\u0069d":"m-2","type":"message.sent"` + okTail, "/id", "twice", ErrInvalid},
	{"unknown attribute", `{"id":"m-1","color":"red"}`, "/color", "unknown attribute", ErrInvalid},
	{"unknown attribute, direction changed", "{\"a\u202eb\":1}", "/a?b", "unknown attribute", ErrInvalid},
	{"attribute in another case", `{"ID":"m-1"}`, "/ID", "unknown attribute", ErrInvalid},
	{"binary data", `{"data_base64":"AA=="}`, "/data_base64", "binary", ErrInvalid},
	{"position", `{"position":"1"}`, "/position", "given by the server", ErrInvalid},
	{"wrong version", `{"specversion":"0.3"}`, "/specversion", "1.0", ErrInvalid},
	{"number for a string", `{"id":7}`, "/id", "string", ErrInvalid},
	{"no type", `{"id":"m-1"}`, "/type", "missing", ErrInvalid},
	{"unknown type", `{"id":"m-1","type":"message.liked"` + okTail, "/type", "known type", ErrInvalid},
	{"reserved type", `{"id":"m-1","type":"user.erased","recipient":"bob"}`, "/type", "server only", ErrInvalid},
	{"source of another app", `{"source":"/apps/0300000000000000000000000000007e","type":"message.sent"` + okTail, "/source", "another app", ErrInvalid},
	{"source malformed", `{"source":"/apps/x","type":"message.sent"` + okTail, "/source", "32 hex", ErrInvalid},
	{"source elsewhere", `{"source":"https://x","type":"message.sent"` + okTail, "/source", "/apps/", ErrInvalid},
	{"content type", `{"datacontenttype":"text/xml","type":"message.sent"` + okTail, "/datacontenttype", "application/json", ErrInvalid},
	{"time malformed", `{"time":"yesterday"}`, "/time", "RFC 3339", ErrInvalid},
	{"time without zone", `{"time":"2026-11-24T17:59:00"}`, "/time", "RFC 3339", ErrInvalid},
	{"time with a comma", `{"time":"2026-11-24T17:59:00,5Z"}`, "/time", "RFC 3339", ErrInvalid},
	{"time with month 13", `{"time":"2026-13-24T17:59:00Z"}`, "/time", "RFC 3339", ErrInvalid},
	{"time too early", `{"time":"1999-12-31T23:59:59.999Z"}`, "/time", "2000", ErrTimeRange},
	{"time in the future", `{"id":"m-1","type":"message.sent","time":"2026-11-24T18:05:00.124Z","conversation":"g","conversationtype":"group","data":{"bodies":[{"type":"txt","msg":""}]}}`, "/time", "future", ErrTimeRange},
	{"time in the far future", `{"id":"m-1","type":"message.sent","time":"9999-12-31T23:59:59-23:59","conversation":"g","conversationtype":"group","data":{"bodies":[{"type":"txt","msg":""}]}}`, "/time", "9999", ErrTimeRange},

	{"id empty", `{"id":""}`, "/id", "empty", ErrInvalid},
	{"id with full stop", `{"id":"a.b"}`, "/id", "full stop", ErrInvalid},
	{"id with star", `{"id":"*"}`, "/id", "wildcard", ErrInvalid},
	{"id with arrow", `{"id":"a>"}`, "/id", "wildcard", ErrInvalid},
	{"id with space", `{"id":"a b"}`, "/id", "white space", ErrInvalid},
	{"id with line break", `{"id":"a\nb"}`, "/id", "line break", ErrInvalid},
	{"id with path", `{"id":"../a"}`, "/id", "full stop", ErrInvalid},
	{"sender that begins with a full stop", `{"type":"message.sent","sender":".a"}`, "/sender", "begin with a full stop", ErrInvalid},
	{"conversation of a user that does", `{"type":"message.sent","conversation":"a,.b"}`, "/conversation", "begin with a full stop", ErrInvalid},
	{"sender that is a step", `{"type":"message.sent","sender":".."}`, "/sender", "begin with a full stop", ErrInvalid},
	{"id with slash", `{"id":"a/b"}`, "/id", "path separator", ErrInvalid},
	{"id with NUL", `{"id":"a\u0000"}`, "/id", "NUL", ErrInvalid},
	{"id with control", `{"id":"a\u0007"}`, "/id", "control character (U+0007)", ErrInvalid},
	{"id with comma", `{"id":"a,b"}`, "/id", "comma", ErrInvalid},
	{"id too long", `{"id":"` + strings.Repeat("a", 129) + `"}`, "/id", "128", ErrTooLarge},
	{"id far too long", `{"id":"` + strings.Repeat("a", 5000) + `"}`, "/id", "too long", ErrTooLarge},
	{"sender with direction", `{"sender":"a\u202eb"}`, "/sender", "direction of text (U+202E)", ErrInvalid},
	{"sender with zero width", `{"sender":"a\u200bb"}`, "/sender", "invisible character (U+200B)", ErrInvalid},
	{"sender not ASCII", `{"sender":"é"}`, "/sender", "outside ASCII (U+00E9)", ErrInvalid},
	{"sender with quote", `{"sender":"\""}`, "/sender", "U+0022", ErrInvalid},
	{"half a surrogate pair", `{"sender":"\ud800"}`, "/sender", "surrogate", ErrInvalid},
	{"conversation too long", `{"conversation":"` + strings.Repeat("a", 200) + `,` + strings.Repeat("a", 57) + `"}`, "/conversation", "257", ErrTooLarge},
	{"conversation type", `{"conversationtype":"chat"}`, "/conversationtype", "direct, group or room", ErrInvalid},
	{"no conversation", `{"id":"m","type":"message.sent","sender":"a","data":{"bodies":[{"type":"txt","msg":""}]}}`, "/conversation", "missing", ErrInvalid},
	{"group without conversation", `{"id":"m","type":"message.sent","sender":"a","conversationtype":"group","recipient":"b","data":{"bodies":[{"type":"txt","msg":""}]}}`, "/conversation", "names its conversation", ErrInvalid},
	{"room without anything", `{"id":"m","type":"message.sent","sender":"a","conversationtype":"room","data":{"bodies":[{"type":"txt","msg":""}]}}`, "/conversation", "not named", ErrInvalid},
	{"conversation without kind", `{"id":"m","type":"message.sent","sender":"a","conversation":"g","data":{"bodies":[{"type":"txt","msg":""}]}}`, "/conversationtype", "missing", ErrInvalid},
	{"direct without sender", `{"id":"m","type":"message.sent","recipient":"a","data":{"bodies":[{"type":"txt","msg":""}]}}`, "/sender", "sender and recipient", ErrInvalid},
	{"direct without recipient", `{"id":"m","type":"message.sent","sender":"a","conversation":"c","conversationtype":"direct","data":{"bodies":[{"type":"txt","msg":""}]}}`, "/recipient", "a sender and a recipient", ErrInvalid},
	{"direct of the wrong two", `{"id":"m","type":"message.sent","sender":"a","recipient":"b","conversation":"b,a","conversationtype":"direct","data":{"bodies":[{"type":"txt","msg":""}]}}`, "/conversation", "smaller first", ErrInvalid},
	{"new message with target", `{"id":"m","type":"message.sent","target":"x","sender":"a","recipient":"b","data":{"bodies":[{"type":"txt","msg":""}]}}`, "/target", "no target", ErrInvalid},
	{"edit without target", `{"id":"m","type":"message.edited","sender":"a","recipient":"b","data":{"bodies":[{"type":"txt","msg":""}]}}`, "/target", "missing", ErrInvalid},
	{"recall without target", `{"id":"m","type":"message.recalled","sender":"a","recipient":"b"}`, "/target", "missing", ErrInvalid},
	{"receipt without target", `{"id":"m","type":"receipt.read","sender":"a","recipient":"b"}`, "/target", "missing", ErrInvalid},
	{"receipt without sender", `{"id":"m","type":"receipt.read","conversation":"g","conversationtype":"group","target":"x"}`, "/sender", "missing", ErrInvalid},

	{"no data", `{"id":"m","type":"message.sent","sender":"a","recipient":"b"}`, "/data", "bodies", ErrInvalid},
	{"data a string", withData(`"x"`), "/data", "object", ErrInvalid},
	{"duplicate in data", withData(`{"bodies":[{"type":"txt","msg":""}],"ext":{"a":{"b":1,"b":2}}}`), "/data/ext/a/b", "twice", ErrInvalid},
	{"NUL in data", withBody(`{"type":"txt","msg":"a\u0000b"}`), "/data/bodies/0/msg", "NUL", ErrInvalid},
	{"number out of range", withData(`{"bodies":[{"type":"txt","msg":""}],"ext":{"n":[0,1e400]}}`), "/data/ext/n/1", "floating point", ErrInvalid},
	{"number of a thousand digits", withData(`{"bodies":[{"type":"txt","msg":""}],"ext":{"n":` + strings.Repeat("9", 1000) + `}}`), "/data/ext/n", "floating point", ErrInvalid},
	{"deep nesting", withData(`{"ext":` + strings.Repeat(`[`, 31) + strings.Repeat(`]`, 31) + `}`), "", "deeper than 32", ErrInvalid},
	{"no bodies", withData(`{}`), "/data/bodies", "missing", ErrInvalid},
	{"bodies empty", withData(`{"bodies":[]}`), "/data/bodies", "at least one", ErrInvalid},
	{"bodies an object", withData(`{"bodies":{}}`), "/data/bodies", "array", ErrInvalid},
	{"too many bodies", withBody(strings.Repeat(`{"type":"txt","msg":""},`, 32) + `{"type":"txt","msg":""}`), "/data/bodies", "32", ErrTooLarge},
	{"ext an array", withData(`{"ext":[],"bodies":[{"type":"txt","msg":""}]}`), "/data/ext", "object", ErrInvalid},
	{"body a string", withBody(`"x"`), "/data/bodies/0", "object", ErrInvalid},
	{"body without type", withBody(`{"msg":"x"}`), "/data/bodies/0/type", "missing", ErrInvalid},
	{"body of another type", withBody(`{"type":"txt","msg":""},{"type":"sticker"}`), "/data/bodies/1/type", "not one of", ErrInvalid},
	{"body type a number", withBody(`{"type":1}`), "/data/bodies/0/type", "string", ErrInvalid},
	{"txt without msg", withBody(`{"type":"txt"}`), "/data/bodies/0/msg", "missing", ErrInvalid},
	{"txt msg a number", withBody(`{"type":"txt","msg":1}`), "/data/bodies/0/msg", "string", ErrInvalid},
	{"txt too long", withBody(`{"type":"txt","msg":"` + strings.Repeat("é", 2561) + `"}`), "/data/bodies/0/msg", "5120", ErrTooLarge},
	{"img without url", withBody(`{"type":"img","filename":"x"}`), "/data/bodies/0/url", "missing", ErrInvalid},
	{"file with empty url", withBody(`{"type":"file","url":""}`), "/data/bodies/0/url", "empty", ErrInvalid},
	{"file length negative", withBody(`{"type":"file","url":"u","file_length":-1}`), "/data/bodies/0/file_length", "integer", ErrInvalid},
	{"file length broken", withBody(`{"type":"file","url":"u","file_length":1.5}`), "/data/bodies/0/file_length", "integer", ErrInvalid},
	{"file length too large", withBody(`{"type":"file","url":"u","file_length":1e17}`), "/data/bodies/0/file_length", "2^53", ErrInvalid},
	{"file length a string", withBody(`{"type":"file","url":"u","file_length":"12"}`), "/data/bodies/0/file_length", "integer", ErrInvalid},
	{"size an array", withBody(`{"type":"img","url":"u","size":[1,2]}`), "/data/bodies/0/size", "width", ErrInvalid},
	{"width negative", withBody(`{"type":"img","url":"u","size":{"width":-1}}`), "/data/bodies/0/size", "at least 0", ErrInvalid},
	{"length negative", withBody(`{"type":"audio","url":"u","length":-0.5}`), "/data/bodies/0/length", "at least 0", ErrInvalid},
	{"latitude", withBody(`{"type":"loc","lat":91,"lng":0}`), "/data/bodies/0/lat", "-90", ErrInvalid},
	{"latitude as a hex string", withBody(`{"type":"loc","lat":"0x10","lng":0}`), "/data/bodies/0/lat", "-90", ErrInvalid},
	{"longitude missing", withBody(`{"type":"loc","lat":1}`), "/data/bodies/0/lng", "missing", ErrInvalid},
	{"longitude", withBody(`{"type":"loc","lat":1,"lng":"181"}`), "/data/bodies/0/lng", "-180", ErrInvalid},
	{"cmd without action", withBody(`{"type":"cmd"}`), "/data/bodies/0/action", "missing", ErrInvalid},
	{"custom without event", withBody(`{"type":"custom"}`), "/data/bodies/0/customEvent", "missing", ErrInvalid},
	{"custom exts a string", withBody(`{"type":"custom","customEvent":"e","customExts":"x"}`), "/data/bodies/0/customExts", "array", ErrInvalid},
	{"17 custom exts", withBody(`{"type":"custom","customEvent":"e","customExts":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]}`), "/data/bodies/0/customExts", "16", ErrTooLarge},
	{"v2 custom exts an array", withBody(`{"type":"custom","customEvent":"e","v2:customExts":[]}`), "/data/bodies/0/v2:customExts", "object", ErrInvalid},
	{"combine of another kind", withBody(`{"type":"combine","url":"u","subType":"x"}`), "/data/bodies/0/subType", "sub_combine", ErrInvalid},
	{"too large", withData(`{"bodies":[{"type":"txt","msg":""}],"ext":{"x":"` + strings.Repeat("x", 64<<10) + `"}}`), "", "65536", ErrTooLarge},
	{"far too large", withData(`{"bodies":[{"type":"txt","msg":""}],"ext":{"x":"` + strings.Repeat("x", 128<<10) + `"}}`), "", "65536", ErrTooLarge},
}

func TestParseRefused(t *testing.T) {
	for _, tt := range refused {
		t.Run(tt.name, func(t *testing.T) {
			e, err := ParseEvent([]byte(tt.in), testApp(), Limits{})
			if err == nil {
				err = e.Normalize(testNow(), Limits{})
			}
			if err == nil {
				t.Fatalf("accepted: %s", e.AppendJSON(nil, testApp()))
			}
			var input *InputError
			if !errors.As(err, &input) {
				t.Fatalf("%T: %v", err, err)
			}
			if input.Pointer != tt.pointer {
				t.Errorf("pointer %q, want %q (%v)", input.Pointer, tt.pointer, err)
			}
			if !errors.Is(err, tt.class) {
				t.Errorf("class %v, want %v", errors.Unwrap(err), tt.class)
			}
			if !strings.Contains(input.Detail, tt.word) {
				t.Errorf("detail %q lacks %q", input.Detail, tt.word)
			}
		})
	}
}

// An error goes into logs and answers, so it must not carry content.
func TestErrorsCarryNoPayload(t *testing.T) {
	const canary = "canary-5f0c"
	for _, in := range []string{
		withBody(`{"type":"txt","msg":"` + canary + strings.Repeat("x", 6000) + `"}`),
		withBody(`{"type":"` + canary + `"}`),
		withBody(`{"type":"loc","lat":"` + canary + `","lng":1}`),
		withData(`{"bodies":["` + canary + `"]}`),
		`{"id":"` + canary + ` "}`,
		`{"type":"` + canary + `"}`,
		`{"time":"` + canary + `"}`,
		`{"id":"` + canary,
		`{"id":` + canary + `}`,
		`{"source":"` + canary + `"}`,
	} {
		_, err := ParseEvent([]byte(in), testApp(), Limits{})
		if err == nil {
			t.Errorf("accepted %s", in)
		} else if strings.Contains(err.Error(), canary) {
			t.Errorf("%v repeats the input", err)
		}
	}
}

func TestNormalizeRefusesFromGo(t *testing.T) {
	message := func(data string) Event {
		return Event{ID: "m", Type: MessageSent, Sender: "a", Recipient: "b", Data: jsontext.Value(data)}
	}
	for name, tt := range map[string]struct {
		event   Event
		pointer string
	}{
		"data cut":               {message(`{"bodies":[`), "/data"},
		"data twice":             {message(`{}{}`), "/data"},
		"data an array":          {message(`[]`), "/data"},
		"duplicate in data":      {message(`{"a":1,"a":2}`), "/data/a"},
		"invalid UTF-8 in data":  {message("{\"a\":\"\xff\"}"), "/data/a"},
		"NUL in data":            {message(`{"a":["\u0000"]}`), "/data/a/0"},
		"deep data":              {message(strings.Repeat(`{"a":`, 32) + `1` + strings.Repeat(`}`, 32)), "/data"},
		"type unknown":           {Event{ID: "m", Type: 11}, "/type"},
		"type missing":           {Event{ID: "m"}, "/type"},
		"conversation kind":      {Event{ID: "m", Type: MessageRecalled, Target: "t", Conversation: "c", ConversationType: 4}, "/conversationtype"},
		"id with quote":          {Event{ID: `m"`, Type: MessageRecalled}, "/id"},
		"target with full stop":  {Event{ID: "m", Type: MessageRecalled, Target: "a.b"}, "/target"},
		"erasure with a sender":  {Event{ID: "m", Type: UserErased, Sender: "a", Recipient: "a"}, "/sender"},
		"erasure without a user": {Event{ID: "m", Type: UserErased}, "/recipient"},

		"membership of nothing":       {Event{ID: "m", Type: MemberJoined, Sender: "a"}, "/conversation"},
		"membership of nobody":        {Event{ID: "m", Type: MemberLeft, Conversation: "c", ConversationType: Group}, "/sender"},
		"membership of two":           {Event{ID: "m", Type: MemberJoined, Sender: "a", Recipient: "b"}, "/conversationtype"},
		"membership with a recipient": {Event{ID: "m", Type: MemberJoined, Conversation: "c", ConversationType: Room, Sender: "a", Recipient: "b"}, "/recipient"},
		"membership with a target":    {Event{ID: "m", Type: MemberLeft, Conversation: "c", ConversationType: Group, Sender: "a", Target: "t"}, "/target"},
		"acknowledgement of nobody":   {Event{ID: "m", Type: InboxAcked, Target: "t"}, "/sender"},
		"acknowledgement of nothing":  {Event{ID: "m", Type: InboxAcked, Sender: "a"}, "/target"},
	} {
		t.Run(name, func(t *testing.T) {
			err := tt.event.Normalize(testNow(), Limits{})
			var input *InputError
			if !errors.As(err, &input) || input.Pointer != tt.pointer {
				t.Errorf("got %v, want an error at %s", err, tt.pointer)
			}
		})
	}
	erased := Event{ID: "m", Type: UserErased, Recipient: "a"}
	if err := erased.Normalize(testNow(), Limits{}); err != nil || erased.Conversation != "" {
		t.Errorf("an erasure: %v, conversation %q", err, erased.Conversation)
	}
}

// A mark of another event's data must not let this event's data pass.
func TestDataIsCheckedAgainWhenReplaced(t *testing.T) {
	e, err := ParseEvent([]byte(accepted[0].in), testApp(), Limits{})
	if err != nil {
		t.Fatal(err)
	}
	e.Data = jsontext.Value(`{"bodies":[{"type":"none"}]}`)
	if err := e.Normalize(testNow(), Limits{}); !errors.Is(err, ErrInvalid) {
		t.Errorf("replaced data passed: %v", err)
	}
	e, _ = ParseEvent([]byte(`{"id":"r","type":"message.recalled","conversation":"g","conversationtype":"group","target":"x","data":{"force":true}}`), testApp(), Limits{})
	e.Type = MessageEdited
	if err := e.Normalize(testNow(), Limits{}); !errors.Is(err, ErrInvalid) {
		t.Errorf("data of another type passed: %v", err)
	}
}

func kibEvent() Event {
	return Event{
		ID: NewEventID(testNow()), Type: MessageSent, Time: testNow(), Conversation: "group-4711", ConversationType: Group, Sender: "user0001",
		Data: jsontext.Value(`{"bodies":[{"type":"txt","msg":"` + strings.Repeat("lorem ipsum ", 58) + `"}],"ext":{}}`),
	}
}

func TestAppendTime(t *testing.T) {
	for _, text := range []string{
		"2000-01-01T00:00:00.000Z", "2024-02-29T23:59:59.999Z", "1999-12-31T23:59:59.001Z", "9999-10-10T10:10:10.010Z",
		"0999-01-02T03:04:05.678Z", "0001-01-01T00:00:00.000Z",
	} {
		want, err := time.Parse(time.RFC3339Nano, text)
		if err != nil {
			t.Fatal(err)
		}
		for _, zone := range []*time.Location{time.UTC, time.FixedZone("", 5*3600+1800), time.FixedZone("", -9*3600)} {
			if got := string(appendTime([]byte("at "), want.In(zone))); got != "at "+text {
				t.Errorf("%s is written as %s", text, got)
			}
		}
	}
	for at := time.Unix(0, 0).UTC(); at.Year() < 2100; at = at.Add(1000*time.Hour + 3723456*time.Microsecond) {
		if got, want := string(appendTime(nil, at)), at.Format(timeLayout); got != want {
			t.Fatalf("%s is written as %s", want, got)
		}
	}
}

func TestAppendJSONDoesNotAllocate(t *testing.T) {
	e := kibEvent()
	if err := e.Normalize(testNow(), Limits{}); err != nil {
		t.Fatal(err)
	}
	dst := make([]byte, 0, 4096)
	if n := testing.AllocsPerRun(100, func() {
		dst = e.AppendJSON(dst[:0], testApp())
		dst = SplicePosition(dst[len(dst):], dst, 7)
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkAppendJSON(b *testing.B) {
	e := kibEvent()
	if err := e.Normalize(testNow(), Limits{}); err != nil {
		b.Fatal(err)
	}
	dst := make([]byte, 0, 4096)
	b.SetBytes(int64(e.size()))
	b.ReportAllocs()
	for b.Loop() {
		dst = e.AppendJSON(dst[:0], testApp())
	}
}

func BenchmarkParseEvent(b *testing.B) {
	e := kibEvent()
	if err := e.Normalize(testNow(), Limits{}); err != nil {
		b.Fatal(err)
	}
	in := e.AppendJSON(nil, testApp())
	b.SetBytes(int64(len(in)))
	b.ReportAllocs()
	for b.Loop() {
		e, err := ParseEvent(in, testApp(), Limits{})
		if err != nil {
			b.Fatal(err)
		}
		if err := e.Normalize(testNow(), Limits{}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkNormalizeFromGo(b *testing.B) {
	e := kibEvent()
	b.ReportAllocs()
	for b.Loop() {
		fresh := e
		if err := fresh.Normalize(testNow(), Limits{}); err != nil {
			b.Fatal(err)
		}
	}
}
