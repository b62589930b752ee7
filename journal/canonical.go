package journal

import (
	"bytes"
	"errors"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"
)

// Normalize checks e and completes it to what is sealed: an id and a time where
// there is none, the id of a direct conversation, the time cut to milliseconds
// in UTC, the data without insignificant white space and with the shortest
// escapes. Its errors are an [*InputError].
//
// Data that is canonical already is kept, not copied: its bytes must not be
// changed from then on.
func (e *Event) Normalize(now time.Time, limits Limits) error {
	limits = limits.withDefaults()
	now = now.UTC().Truncate(time.Millisecond)
	if e.ID == "" {
		e.ID = NewEventID(now)
	}
	if e.Time.IsZero() {
		e.Time = now
	}
	e.Time = e.Time.UTC().Truncate(time.Millisecond)
	switch {
	case e.Time.Before(earliest()):
		return &InputError{Pointer: "/time", Detail: "the time lies before the year 2000", class: ErrTimeRange}
	case e.Time.After(now.Add(limits.Future)):
		return &InputError{Pointer: "/time", Detail: "the time lies in the future", class: ErrTimeRange}
	case !e.Type.Known():
		return invalid("/type", "not a known type of event")
	}
	if err := e.checkIDs(); err != nil {
		return err
	}
	if err := e.place(); err != nil {
		return err
	}
	if err := e.normalizeData(limits); err != nil {
		return err
	}
	if e.size() > limits.Bytes {
		return tooLarge("", "the event must not be larger than "+strconv.Itoa(limits.Bytes)+" bytes")
	}
	return nil
}

func (e *Event) checkIDs() error {
	if err := checkAt("/id", e.ID, idOfEvent); err != nil {
		return err
	}
	if e.Conversation != "" {
		if err := checkAt("/conversation", e.Conversation, idOfConversation); err != nil {
			return err
		}
	}
	if e.Sender != "" {
		if err := checkAt("/sender", e.Sender, idOfUser); err != nil {
			return err
		}
	}
	if e.Recipient != "" {
		if err := checkAt("/recipient", e.Recipient, idOfUser); err != nil {
			return err
		}
	}
	if e.Target != "" {
		return checkAt("/target", e.Target, idOfEvent)
	}
	return nil
}

// place completes the conversation and checks what the type needs.
func (e *Event) place() error {
	const missing = "the attribute is missing"
	if e.Conversation == "" && e.Recipient != "" && e.Type != UserErased {
		if e.ConversationType != 0 && e.ConversationType != Direct {
			return invalid("/conversation", "an event in a group or room names its conversation")
		}
		if e.Sender == "" {
			return invalid("/sender", "a direct conversation without an id of its own needs sender and recipient")
		}
		e.Conversation = DirectConversation(e.Sender, e.Recipient)
		e.ConversationType = Direct
	}
	switch {
	case e.Conversation == "" && e.ConversationType != 0:
		return invalid("/conversation", "the conversation of this kind is not named; a direct one needs sender and recipient")
	case e.Conversation != "" && e.ConversationType == 0:
		return invalid("/conversationtype", missing)
	case e.ConversationType > Room:
		return invalid("/conversationtype", "not direct, group or room")
	case e.ConversationType == Direct && e.Sender != "" && e.Recipient != "" &&
		strings.Contains(e.Conversation, ",") && e.Conversation != DirectConversation(e.Sender, e.Recipient):
		return invalid("/conversation", "not the two ids, the smaller first, joined by a comma")
	}

	switch e.Type {
	case MessageSent:
		if e.ConversationType == Direct && (e.Sender == "" || e.Recipient == "") {
			return invalid("/recipient", "a message in a direct conversation has a sender and a recipient")
		}
		if e.Target != "" {
			return invalid("/target", "a new message has no target")
		}
	case MessageEdited, MessageRecalled:
		if e.Target == "" {
			return invalid("/target", missing)
		}
	case ReceiptDelivered, ReceiptRead:
		if e.Target == "" {
			return invalid("/target", missing)
		}
		if e.Sender == "" {
			return invalid("/sender", missing)
		}
	case MemberJoined, MemberLeft:
		return e.placeMember()
	case InboxAcked:
		if e.Sender == "" {
			return invalid("/sender", missing)
		}
		if e.Target == "" {
			return invalid("/target", missing)
		}
		return nil
	case UserErased:
		// Sealed under the user's own key it could not be read afterwards.
		if e.Sender != "" {
			return invalid("/sender", "the event of an erasure is the app's own")
		}
		if e.Recipient == "" {
			return invalid("/recipient", missing)
		}
		return nil
	default:
		return nil
	}
	if e.Conversation == "" {
		return invalid("/conversation", missing)
	}
	return nil
}

// placeMember checks an event of a membership. Its sender is the member, whoever
// decided: so the event is sealed under the member's key, and goes with it.
func (e *Event) placeMember() error {
	switch {
	case e.Conversation == "":
		return invalid("/conversation", "the attribute is missing")
	case e.ConversationType == Direct:
		return invalid("/conversationtype", "a direct conversation has no members; its users are its own")
	case e.Sender == "":
		return invalid("/sender", "the member is missing")
	case e.Recipient != "":
		return invalid("/recipient", "the member is the sender; there is no recipient")
	case e.Target != "":
		return invalid("/target", "an event of a membership has no target")
	}
	return nil
}

func (e *Event) normalizeData(limits Limits) error {
	if len(e.Data) > 0 {
		if e.checked == e.mark() {
			return nil
		}
		canonical, err := canonicalData(e.Data, limits, false)
		if err != nil {
			return err
		}
		e.Data = canonical
	}
	if err := checkData(e.Type, e.Data, limits); err != nil {
		return err
	}
	e.checked = e.mark()
	return nil
}

// canonicalData returns the canonical form of a JSON object: no white space,
// members in their order, the shortest escapes, numbers as they were. A valid
// one was already checked for grammar, duplicate names and UTF-8, and is copied;
// another one is kept where it is canonical.
func canonicalData(raw jsontext.Value, limits Limits, valid bool) (jsontext.Value, error) {
	canonicalAlready := isCanonical(raw)
	if valid && canonicalAlready {
		return bytes.Clone(raw), nil
	}
	if !valid {
		if len(raw) > 2*limits.Bytes {
			return nil, tooLarge("/data", "the event must not be larger than "+strconv.Itoa(limits.Bytes)+" bytes")
		}
		if err := inspect(raw, limits.Depth, 1); err != nil {
			return nil, within("/data", err)
		}
		if canonicalAlready && raw.Kind() == '{' && raw.IsValid() {
			return raw, nil // the usual case: half the time, and no copy
		}
	}
	canonical, err := jsontext.AppendFormat(make([]byte, 0, len(raw)), raw)
	if err != nil {
		return nil, within("/data", syntaxError(err))
	}
	if jsontext.Value(canonical).Kind() != '{' {
		return nil, invalid("/data", "data must be a JSON object")
	}
	return canonical, nil
}

func within(pointer string, err error) error {
	if input, ok := errors.AsType[*InputError](err); ok {
		input.Pointer = pointer + input.Pointer
	}
	return err
}

// isCanonical reports whether a valid JSON text is surely canonical already: it
// has no escape and no white space outside its strings.
func isCanonical(raw []byte) bool {
	if bytes.IndexByte(raw, '\\') >= 0 {
		return false
	}
	for {
		i := bytes.IndexByte(raw, '"')
		outside := raw
		if i >= 0 {
			outside = raw[:i]
		}
		for _, c := range outside {
			if c <= ' ' {
				return false
			}
		}
		if i < 0 {
			return true
		}
		raw = raw[i+1:]
		raw = raw[bytes.IndexByte(raw, '"')+1:]
	}
}

// AppendJSON appends the canonical JSON of a normalized event to dst: the
// attributes in a fixed order, no white space. It is what the envelope holds,
// and what a replay sends after [SplicePosition]. It allocates only when dst
// has no room.
func (e *Event) AppendJSON(dst []byte, app AppID) []byte {
	dst = append(dst, `{"specversion":"1.0","id":"`...)
	dst = append(dst, e.ID...)
	dst = append(dst, `","source":"/apps/`...)
	dst, _ = app.AppendText(dst)
	dst = append(dst, `","type":"`...)
	dst = append(dst, e.Type.String()...)
	dst = append(dst, `","time":"`...)
	dst = appendTime(dst, e.Time)
	if e.Conversation != "" {
		dst = append(dst, `","conversation":"`...)
		dst = append(dst, e.Conversation...)
		dst = append(dst, `","conversationtype":"`...)
		dst = append(dst, e.ConversationType.String()...)
	}
	if e.Sender != "" {
		dst = append(dst, `","sender":"`...)
		dst = append(dst, e.Sender...)
	}
	if e.Recipient != "" {
		dst = append(dst, `","recipient":"`...)
		dst = append(dst, e.Recipient...)
	}
	if e.Target != "" {
		dst = append(dst, `","target":"`...)
		dst = append(dst, e.Target...)
	}
	if len(e.Data) == 0 {
		return append(dst, `"}`...)
	}
	dst = append(dst, `","datacontenttype":"application/json","data":`...)
	dst = append(dst, e.Data...)
	return append(dst, '}')
}

const timeLayout = "2006-01-02T15:04:05.000Z"

// appendTime appends a time in timeLayout, which parsing the layout for each
// event would make three times as dear.
func appendTime(dst []byte, t time.Time) []byte {
	t = t.UTC()
	year, month, day := t.Date()
	if year < 1000 || year > 9999 {
		return t.AppendFormat(dst, timeLayout)
	}
	hour, minute, second := t.Clock()
	two := func(n int) { dst = append(dst, byte('0'+n/10), byte('0'+n%10)) }
	two(year / 100)
	two(year % 100)
	dst = append(dst, '-')
	two(int(month))
	dst = append(dst, '-')
	two(day)
	dst = append(dst, 'T')
	two(hour)
	dst = append(dst, ':')
	two(minute)
	dst = append(dst, ':')
	two(second)
	millis := t.Nanosecond() / int(time.Millisecond)
	dst = append(dst, '.', byte('0'+millis/100))
	two(millis % 100)
	return append(dst, 'Z')
}

// size is the length of the canonical JSON.
func (e *Event) size() int {
	n := len(`{"specversion":"1.0","id":"","source":"/apps/","type":"","time":""}`) +
		2*len(AppID{}) + len(timeLayout) + len(e.ID) + len(e.Type.String())
	if e.Conversation != "" {
		n += len(`,"conversation":"","conversationtype":""`) + len(e.Conversation) + len(e.ConversationType.String())
	}
	if e.Sender != "" {
		n += len(`,"sender":""`) + len(e.Sender)
	}
	if e.Recipient != "" {
		n += len(`,"recipient":""`) + len(e.Recipient)
	}
	if e.Target != "" {
		n += len(`,"target":""`) + len(e.Target)
	}
	if len(e.Data) > 0 {
		n += len(`,"datacontenttype":"application/json","data":`) + len(e.Data)
	}
	return n
}

// SplicePosition appends an event's canonical JSON to dst with its position as
// the last attribute, as replays send it.
func SplicePosition(dst, canonical []byte, position Position) []byte {
	end := len(canonical)
	if end > 0 && canonical[end-1] == '}' {
		end--
	}
	dst = append(dst, canonical[:end]...)
	dst = append(dst, `,"position":"`...)
	dst, _ = position.AppendText(dst)
	return append(dst, `"}`...)
}
