package agora

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/journal"
)

// ErrLine is the reason for every line that is not an event. The caller should
// report the line, keep it for whoever repairs it, and go on with the next.
var ErrLine = errors.New("not an Agora message")

// FieldError says which member of a line is at fault. It wraps ErrLine. Its text
// quotes no message content.
type FieldError struct {
	Field  string // a path such as payload.bodies[0].type; empty for the line as a whole
	Detail string
}

func (e *FieldError) Error() string {
	if e.Field == "" {
		return e.Detail
	}
	return e.Field + ": " + e.Detail
}

// Unwrap makes errors.Is(err, ErrLine) true.
func (e *FieldError) Unwrap() error { return ErrLine }

func fault(field, format string, args ...any) error {
	return &FieldError{Field: field, Detail: fmt.Sprintf(format, args...)}
}

// kind is what a chat_type means.
type kind struct {
	event journal.Type
	conv  journal.ConversationType
	known bool // whether conv is certain; otherwise the record is asked
}

func kindOf(chatType string) (kind, bool) {
	switch chatType {
	case "chat":
		return kind{journal.MessageSent, journal.Direct, true}, true
	case "groupchat", "group":
		return kind{journal.MessageSent, journal.Group, true}, true
	case "chatroom", "room":
		return kind{journal.MessageSent, journal.Room, true}, true
	case "read_ack":
		return kind{journal.ReceiptRead, journal.Direct, false}, true
	case "delivery_ack":
		return kind{journal.ReceiptDelivered, journal.Direct, false}, true
	case "edit":
		return kind{journal.MessageEdited, journal.Direct, false}, true
	case "recall":
		return kind{journal.MessageRecalled, journal.Direct, false}, true
	}
	return kind{}, false
}

// bodyType reports whether t is one of the vendor's message bodies.
func bodyType(t string) bool {
	switch t {
	case "txt", "img", "audio", "video", "file", "loc", "cmd", "custom", "combine":
		return true
	}
	return false
}

// record is a line taken apart. Values that are not understood stay in rest.
type record struct {
	id, chatType      string
	millis            int64
	rawTimestamp      jsontext.Value
	from, to          string
	groupID, recallID string
	rest              []member // of the record, in its order
	own               jsontext.Value

	payload payload
}

type payload struct {
	from, to    string
	ack, edit   string
	bodies, ext jsontext.Value
	groupAck    bool
	editOf      string // meta.edit_msg.chat_type
	rest        []member
}

type member struct {
	name  string
	value jsontext.Value
}

// Parse turns one line into an event. Its errors are *FieldError.
func Parse(line []byte) (journal.Event, error) {
	r, err := parseRecord(line)
	if err != nil {
		return journal.Event{}, err
	}
	k, ok := kindOf(r.chatType)
	if !ok {
		return journal.Event{}, fault("chat_type", "%s is not a known chat type", quote(r.chatType))
	}
	if r.own != nil {
		return r.restore(k)
	}
	if !k.known {
		k.conv = r.conversationType()
	}
	e := journal.Event{
		ID:               r.id,
		Type:             k.event,
		Time:             time.UnixMilli(r.millis).UTC(),
		ConversationType: k.conv,
		Sender:           first(r.payload.from, r.from),
	}
	if e.Sender == "" {
		return journal.Event{}, fault("from", "is missing")
	}
	to := first(r.payload.to, r.to)
	if k.conv == journal.Direct {
		if to == "" {
			return journal.Event{}, fault("to", "is missing")
		}
		e.Recipient = to // the journal names the conversation after the two
	} else {
		e.Conversation = first(r.groupID, to)
		if e.Conversation == "" {
			return journal.Event{}, fault("to", "is missing (the group or room)")
		}
	}
	if e.Target, err = r.target(k.event); err != nil {
		return journal.Event{}, err
	}
	withBodies := k.event == journal.MessageSent || k.event == journal.MessageEdited
	if withBodies {
		if err := checkBodies(r.payload.bodies); err != nil {
			return journal.Event{}, err
		}
	}
	e.Data = r.data(withBodies)
	return e, nil
}

// target finds the message that an edit, a recall or a receipt is about.
func (r *record) target(t journal.Type) (string, error) {
	switch t {
	case journal.ReceiptRead, journal.ReceiptDelivered:
		if r.payload.ack == "" {
			return "", fault("payload.ack_message_id", "is missing")
		}
		return r.payload.ack, nil
	case journal.MessageEdited:
		if r.payload.edit == "" {
			return "", fault("payload.edit_message_id", "is missing")
		}
		return r.payload.edit, nil
	case journal.MessageRecalled:
		if r.recallID != "" && r.payload.ack != "" && r.recallID != r.payload.ack {
			return "", fault("recall_id", "differs from payload.ack_message_id")
		}
		if id := first(r.recallID, r.payload.ack); id != "" {
			return id, nil
		}
		return "", fault("recall_id", "is missing")
	default:
		return "", nil
	}
}

func (r *record) conversationType() journal.ConversationType {
	if r.payload.editOf == "chat:room" || r.payload.editOf == "chat:chatroom" {
		return journal.Room
	}
	if r.groupID != "" || r.payload.groupAck || r.payload.editOf == "chat:group" {
		return journal.Group
	}
	return journal.Direct
}

func checkBodies(bodies jsontext.Value) error {
	const field = "payload.bodies"
	if bodies == nil {
		return fault(field, "is missing")
	}
	if bodies.Kind() != '[' {
		return fault(field, "must be an array")
	}
	n := 0
	for v, err := range elements(bodies) {
		at := field + "[" + strconv.Itoa(n) + "]"
		if err != nil {
			return fault(at, "%v", err)
		}
		if v.Kind() != '{' {
			return fault(at, "must be an object")
		}
		ms, err := members(v)
		if err != nil {
			return fault(at, "%v", err)
		}
		t := ""
		for _, m := range ms {
			if m.name == "type" {
				if t, err = text(m.value); err != nil {
					return fault(at+".type", "%v", err)
				}
			}
		}
		switch {
		case t == "":
			return fault(at+".type", "is missing")
		case !bodyType(t):
			return fault(at+".type", "%s is not a known message type", quote(t))
		}
		n++
	}
	if n == 0 {
		return fault(field, "is empty")
	}
	return nil
}

// data builds the event's data: bodies and ext as they came, the rest raw.
func (r *record) data(withBodies bool) jsontext.Value {
	b := []byte{'{'}
	p := r.payload
	if withBodies {
		b = appendMember(b, "bodies", p.bodies)
	} else if p.bodies != nil && !bytes.Equal(p.bodies, []byte("[]")) {
		p.rest = append([]member{{"bodies", p.bodies}}, p.rest...)
	}
	switch {
	case p.ext == nil:
	case p.ext.Kind() == '{':
		b = appendMember(b, "ext", p.ext)
	default: // seen as a string in old exports: not an ext that readers can use, kept raw
		p.rest = append(p.rest, member{"ext", p.ext})
	}

	raw := []byte{'{'}
	raw = appendMember(raw, "chat_type", quoted(r.chatType))
	raw = appendMember(raw, "timestamp", r.rawTimestamp)
	if r.from != "" && p.from != "" && r.from != p.from {
		raw = appendMember(raw, "from", quoted(r.from))
	}
	if r.to != "" && p.to != "" && r.to != p.to {
		raw = appendMember(raw, "to", quoted(r.to))
	}
	if r.groupID != "" {
		raw = appendMember(raw, "group_id", quoted(r.groupID))
		// The group took the conversation's place, so where the record was sent to
		// would be lost.
		if to := first(p.to, r.to); to != "" && to != r.groupID {
			raw = appendMember(raw, "sent_to", quoted(to))
		}
	}
	for _, m := range r.rest {
		raw = appendMember(raw, m.name, m.value)
	}
	if len(p.rest) > 0 {
		inner := []byte{'{'}
		for _, m := range p.rest {
			inner = appendMember(inner, m.name, m.value)
		}
		raw = appendMember(raw, "payload", append(inner, '}'))
	}
	b = appendMember(b, "agora", append(raw, '}'))
	return append(b, '}')
}

func appendMember(b []byte, name string, value []byte) []byte {
	if len(b) > 1 {
		b = append(b, ',')
	}
	b = append(append(b, quoted(name)...), ':')
	return append(b, value...)
}

// quoted is s as JSON. The decoder has refused invalid UTF-8, which is the only
// thing that AppendQuote reports.
func quoted(s string) jsontext.Value {
	b, _ := jsontext.AppendQuote(nil, s)
	return b
}

func first(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// quote shows at most 32 characters of a value that should be a keyword.
func quote(s string) string {
	if utf8.RuneCountInString(s) > 32 {
		s = string([]rune(s)[:32]) + "…"
	}
	return strconv.Quote(s)
}
