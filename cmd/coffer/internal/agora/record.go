package agora

import (
	"bytes"
	"errors"
	"io"
	"iter"
	"slices"
	"strconv"

	"github.com/go-json-experiment/json/jsontext"
)

// maxDepth bounds nesting, so that a hostile line cannot make the event deeper
// than the server accepts by being wrapped in data.agora.payload.
const maxDepth = 28

// ownDepth is that of a line of ours: the members of data lie one level deeper
// there than in the event, which has 32.
const ownDepth = 33

func parseRecord(line []byte) (*record, error) {
	if len(bytes.TrimSpace(line)) == 0 {
		return nil, fault("", "the line is empty")
	}
	v := jsontext.Value(bytes.Clone(line))
	// Compact refuses bad syntax, invalid UTF-8 and duplicate names, and takes out
	// the white space that would otherwise make the same message two.
	if err := v.Compact(jsontext.AllowDuplicateNames(false), jsontext.AllowInvalidUTF8(false)); err != nil {
		return nil, fault("", "not JSON: %s", syntax(err))
	}
	if v.Kind() != '{' {
		return nil, fault("", "must be a JSON object")
	}
	ms, err := members(v)
	if err != nil {
		return nil, fault("", "%v", err)
	}
	limit := maxDepth
	if slices.ContainsFunc(ms, func(m member) bool { return m.name == own }) {
		limit = ownDepth
	}
	if d := depth(v); d > limit {
		return nil, fault("", "nested %d deep; the limit is %d", d, limit)
	}
	r := &record{}
	var hasPayload, hasID, hasChat bool
	for _, m := range ms {
		var err error
		switch m.name {
		case "msg_id":
			hasID = true
			r.id, err = identifier(m.value)
		case "timestamp":
			r.rawTimestamp = m.value
			r.millis, err = integer(m.value)
		case "chat_type":
			hasChat = true
			r.chatType, err = text(m.value)
		case "from":
			r.from, err = identifier(m.value)
		case "to":
			r.to, err = identifier(m.value)
		case "group_id":
			r.groupID, err = identifier(m.value)
		case "recall_id":
			r.recallID, err = identifier(m.value)
		case "payload":
			hasPayload = true
			err = r.payload.parse(m.value)
		case own:
			if r.own = m.value; m.value.Kind() != '{' {
				err = errors.New("must be an object")
			}
		case "sent_to":
			// Reserved: data() writes this name itself.
			err = errors.New("is not a member of an Agora record")
		default:
			r.rest = append(r.rest, m)
		}
		if err != nil {
			if fe := (*FieldError)(nil); errors.As(err, &fe) {
				return nil, fe
			}
			return nil, fault(m.name, "%v", err)
		}
	}
	switch {
	case !hasID || r.id == "":
		return nil, fault("msg_id", "is missing")
	case r.rawTimestamp == nil:
		return nil, fault("timestamp", "is missing")
	case !hasChat || r.chatType == "":
		return nil, fault("chat_type", "is missing")
	case !hasPayload:
		return nil, fault("payload", "is missing")
	}
	return r, nil
}

func (p *payload) parse(v jsontext.Value) error {
	if v.Kind() != '{' {
		return errors.New("must be an object")
	}
	ms, err := members(v)
	if err != nil {
		return err
	}
	for _, m := range ms {
		var err error
		switch m.name {
		case "from":
			p.from, err = identifier(m.value)
		case "to":
			p.to, err = identifier(m.value)
		case "ack_message_id":
			p.ack, err = identifier(m.value)
		case "edit_message_id":
			p.edit, err = identifier(m.value)
		case "bodies":
			if m.value.Kind() != 'n' {
				p.bodies = m.value
			}
		case "ext":
			if m.value.Kind() != 'n' {
				p.ext = m.value
			}
		case "msg_config":
			p.groupAck = string(lookup(m.value, "allow_group_ack")) == "true"
			p.rest = append(p.rest, m)
		case "meta":
			if t, err := text(lookup(m.value, "edit_msg", "chat_type")); err == nil {
				p.editOf = t
			}
			p.rest = append(p.rest, m)
		default:
			p.rest = append(p.rest, m)
		}
		if err != nil {
			return fault("payload."+m.name, "%v", err)
		}
	}
	return nil
}

// lookup follows names into objects and returns nil where there is nothing.
func lookup(v jsontext.Value, names ...string) jsontext.Value {
	for _, name := range names {
		if v.Kind() != '{' {
			return nil
		}
		ms, err := members(v)
		if err != nil {
			return nil
		}
		v = nil
		for _, m := range ms {
			if m.name == name {
				v = m.value
			}
		}
	}
	return v
}

// members takes an object apart, keeping the order. v has been checked.
func members(v jsontext.Value) ([]member, error) {
	d := jsontext.NewDecoder(bytes.NewReader(v))
	if _, err := d.ReadToken(); err != nil {
		return nil, err
	}
	var ms []member
	for d.PeekKind() != '}' {
		name, err := d.ReadToken()
		if err != nil {
			return nil, err
		}
		n := name.String()
		value, err := d.ReadValue()
		if err != nil {
			return nil, err
		}
		ms = append(ms, member{n, value.Clone()})
	}
	return ms, nil
}

// elements walks an array. v has been checked.
func elements(v jsontext.Value) iter.Seq2[jsontext.Value, error] {
	return func(yield func(jsontext.Value, error) bool) {
		d := jsontext.NewDecoder(bytes.NewReader(v))
		if _, err := d.ReadToken(); err != nil {
			yield(nil, err)
			return
		}
		for d.PeekKind() != ']' {
			e, err := d.ReadValue()
			if !yield(e, err) || err != nil {
				return
			}
		}
	}
}

func depth(v jsontext.Value) int {
	d := jsontext.NewDecoder(bytes.NewReader(v))
	deepest := 0
	for {
		if _, err := d.ReadToken(); err != nil {
			return deepest
		}
		deepest = max(deepest, d.StackDepth())
	}
}

func text(v jsontext.Value) (string, error) {
	if v.Kind() != '"' {
		return "", errors.New("must be a string")
	}
	b, err := jsontext.AppendUnquote(nil, v)
	if err != nil {
		return "", errors.New("is not a valid string")
	}
	return string(b), nil
}

// identifier reads an id: a string, or the plain integer that some exports write.
// The digits are taken as they stand, since ids exceed 2^53. null is no id.
func identifier(v jsontext.Value) (string, error) {
	switch v.Kind() {
	case '"':
		return text(v)
	case 'n':
		return "", nil
	case '0':
		for _, c := range v {
			if c < '0' || c > '9' {
				return "", errors.New("must be a string or a whole number")
			}
		}
		return string(v), nil
	default:
		return "", errors.New("must be a string")
	}
}

// integer reads milliseconds: a number, or a string of digits as in the older
// exports.
func integer(v jsontext.Value) (int64, error) {
	s := string(v)
	if v.Kind() == '"' {
		var err error
		if s, err = text(v); err != nil {
			return 0, err
		}
	} else if v.Kind() != '0' {
		return 0, errors.New("must be a number of milliseconds")
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return 0, errors.New("must be a whole number of milliseconds")
	}
	// From 1970 to the year 9999, beyond which a time cannot be written as RFC
	// 3339. The journal is stricter; this keeps the event's time from being the
	// zero time, which would mean "now".
	if n < 0 || n > 253402300799999 {
		return 0, errors.New("is out of range")
	}
	return n, nil
}

// syntax words an error of the decoder without its package name.
func syntax(err error) string {
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return "the line ends too early"
	}
	if errors.Is(err, jsontext.ErrDuplicateName) {
		return "a member name occurs twice"
	}
	if se := (*jsontext.SyntacticError)(nil); errors.As(err, &se) && se.Err != nil {
		return se.Err.Error() + " at byte " + strconv.FormatInt(se.ByteOffset+1, 10)
	}
	return err.Error()
}
