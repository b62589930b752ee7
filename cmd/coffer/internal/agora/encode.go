package agora

import (
	"slices"
	"strconv"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/journal"
)

// own is the member that keeps what the vendor's form cannot say
// (docs/format/export.md).
const own = "coffer"

// ownVersion is the version of the member.
const ownVersion = 1

// chatType is the chat_type of an event's line; false for a type that has none.
func chatType(e journal.Event) (string, bool) {
	switch e.Type {
	case journal.MessageSent:
		switch e.ConversationType {
		case journal.Group:
			return "groupchat", true
		case journal.Room:
			return "chatroom", true
		case journal.Direct:
		}
		return "chat", true
	case journal.MessageEdited:
		return "edit", true
	case journal.MessageRecalled:
		return "recall", true
	case journal.ReceiptRead:
		return "read_ack", true
	case journal.ReceiptDelivered:
		return "delivery_ack", true
	default:
		return "", false
	}
}

// AppendLine appends an event as a line of the history export, without a line
// feed; ok is false for types that have no form there. [Parse] gives the same
// event back.
func AppendLine(dst []byte, e journal.Event) (line []byte, ok bool) {
	kind, ok := chatType(e)
	if !ok {
		return dst, false
	}
	to := e.Recipient
	if to == "" || e.ConversationType != journal.Direct {
		to = e.Conversation
	}
	line = append(dst, `{"msg_id":`...)
	line = append(line, quoted(e.ID)...)
	line = strconv.AppendInt(append(line, `,"timestamp":`...), e.Time.UnixMilli(), 10)
	line = append(line, `,"direction":"outgoing","from":`...)
	line = append(line, quoted(e.Sender)...)
	line = append(append(line, `,"to":`...), quoted(to)...)
	line = append(append(line, `,"chat_type":`...), quoted(kind)...)
	if e.ConversationType == journal.Group && e.Type != journal.MessageSent {
		line = append(append(line, `,"group_id":`...), quoted(e.Conversation)...)
	}
	if e.Type == journal.MessageRecalled {
		line = append(append(line, `,"recall_id":`...), quoted(e.Target)...)
	}
	payload, rest := split(payloadOf(e, to), e)
	line = append(append(line, `,"payload":`...), payload...)
	line = append(append(line, `},"`+own+`":`...), rest...)
	return append(line, '}'), true
}

// payloadOf is the beginning of an event's payload.
func payloadOf(e journal.Event, to string) []byte {
	payload := appendMember([]byte{'{'}, "from", quoted(e.Sender))
	payload = appendMember(payload, "to", quoted(to))
	switch {
	case e.Target == "":
	case e.Type == journal.MessageEdited:
		payload = appendMember(payload, "edit_message_id", quoted(e.Target))
	default:
		payload = appendMember(payload, "ack_message_id", quoted(e.Target))
	}
	return payload
}

// split puts bodies and ext into the payload and everything else into the member
// of our own.
func split(payload []byte, e journal.Event) (withData, rest []byte) {
	rest = append([]byte(`{"v":`), strconv.Itoa(ownVersion)...)
	for _, m := range []struct{ name, value string }{
		{"conversation", e.Conversation},
		{"conversationtype", e.ConversationType.String()},
		{"sender", e.Sender},
		{"recipient", e.Recipient},
	} {
		if m.value != "" {
			rest = appendMember(rest, m.name, quoted(m.value))
		}
	}
	if len(e.Data) == 0 {
		return payload, append(rest, '}')
	}
	ms, err := members(e.Data)
	if err != nil { // no object: the journal stores none
		return payload, append(rest, '}')
	}
	order, others := []byte{'['}, []byte{'{'}
	for i, m := range ms {
		if i > 0 {
			order = append(order, ',')
		}
		order = append(order, quoted(m.name)...)
		if inPayload(m) {
			payload = appendMember(payload, m.name, m.value)
		} else {
			others = appendMember(others, m.name, m.value)
		}
	}
	rest = appendMember(rest, "order", append(order, ']'))
	if len(others) > 1 {
		rest = appendMember(rest, "data", append(others, '}'))
	}
	return payload, append(rest, '}')
}

func inPayload(m member) bool {
	return m.name == "bodies" && m.value.Kind() == '[' || m.name == "ext" && m.value.Kind() == '{'
}

// ownMember is the member as it is read.
type ownMember struct {
	Version          int            `json:"v"`
	Conversation     string         `json:"conversation"`
	ConversationType string         `json:"conversationtype"`
	Sender           string         `json:"sender"`
	Recipient        string         `json:"recipient"`
	Order            *[]string      `json:"order"`
	Data             jsontext.Value `json:"data"`
}

// restore makes the event of a line that was written by [AppendLine].
func (r *record) restore(k kind) (journal.Event, error) {
	var o ownMember
	if err := json.Unmarshal(r.own, &o, json.RejectUnknownMembers(true)); err != nil {
		return journal.Event{}, fault(own, "cannot be read")
	}
	if o.Version != ownVersion {
		return journal.Event{}, fault(own+".v", "is a version that is not known")
	}
	e := journal.Event{
		ID: r.id, Type: k.event, Time: time.UnixMilli(r.millis).UTC(), Conversation: o.Conversation,
		Sender: o.Sender, Recipient: o.Recipient,
	}
	var err error
	if o.ConversationType != "" {
		if e.ConversationType, err = journal.ParseConversationType(o.ConversationType); err != nil {
			return e, fault(own+".conversationtype", "is not known")
		}
	}
	if e.Target, err = r.target(k.event); err != nil {
		return e, err
	}
	e.Data, err = r.merge(o)
	return e, err
}

// merge puts the members of data together again, in their order.
func (r *record) merge(o ownMember) (jsontext.Value, error) {
	if o.Order == nil {
		if o.Data != nil {
			return nil, fault(own+".order", "is missing")
		}
		return nil, nil //nolint:nilnil // the event has no data
	}
	have := []member{{"bodies", r.payload.bodies}, {"ext", r.payload.ext}}
	if o.Data != nil {
		if o.Data.Kind() != '{' {
			return nil, fault(own+".data", "must be an object")
		}
		others, err := members(o.Data)
		if err != nil {
			return nil, fault(own+".data", "cannot be read")
		}
		have = append(have, others...)
	}
	have = slices.DeleteFunc(have, func(m member) bool { return m.value == nil })
	if len(have) != len(*o.Order) {
		return nil, errOrder()
	}
	data := []byte{'{'}
	for _, name := range *o.Order {
		i := slices.IndexFunc(have, func(m member) bool { return m.name == name })
		if i < 0 {
			return nil, errOrder()
		}
		data = appendMember(data, name, have[i].value)
		have = slices.Delete(have, i, i+1)
	}
	return append(data, '}'), nil
}

func errOrder() error { return fault(own+".order", "does not name the members that there are") }
