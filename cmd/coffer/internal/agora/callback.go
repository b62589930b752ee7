package agora

import (
	"crypto/fips140"
	"crypto/md5" //nolint:gosec // what the vendor's form asks for; the signature is another
	"encoding/hex"
	"errors"
	"strconv"

	"github.com/cofferdb/coffer/journal"
)

// securityVersion is that of the member security.
const securityVersion = "1.0.0"

// ErrFIPS means that the process may not compute MD5, which the vendor's callback
// is made with. Use another form.
var ErrFIPS = errors.New("the form of Agora callbacks needs MD5, which FIPS 140 excludes")

// Types are the types of events that have a form in callbacks.
func Types() []journal.Type {
	return []journal.Type{
		journal.MessageSent, journal.MessageEdited, journal.MessageRecalled, journal.ReceiptDelivered, journal.ReceiptRead,
	}
}

// A Callback is what stands around an event in a callback.
type Callback struct {
	CallID string // APPKEY_UUID
	// Secret makes the member security. It covers the call's id and time and
	// nothing else: whoever sees one body can send another under it.
	Secret string
	// Question makes it a pre-send callback, which asks whether the message may be
	// sent: that has no eventType and no securityVersion.
	Question bool
	// Delivery is the member "delivery", JSON, which is not the vendor's; none when
	// it is nil.
	Delivery []byte
}

// Security is the vendor's check of a callback: MD5 over the call's id, the
// secret and the time in milliseconds.
func Security(callID, secret string, millis int64) (string, error) {
	if fips140.Enforced() {
		return "", ErrFIPS
	}
	sum := md5.Sum([]byte(callID + secret + strconv.FormatInt(millis, 10))) //nolint:gosec // see above
	return hex.EncodeToString(sum[:]), nil
}

// AppendCallback appends an event as a callback. ok is false for types that have no
// form.
func AppendCallback(dst []byte, e journal.Event, c Callback) (body []byte, ok bool, err error) {
	kind, ok := chatType(e)
	if !ok {
		return dst, false, nil
	}
	to := e.Recipient
	if to == "" || e.ConversationType != journal.Direct {
		to = e.Conversation
	}
	body, err = beginCallback(c, e.Time.UnixMilli(), kind)
	if err != nil {
		return dst, true, err
	}
	if e.ConversationType != journal.Direct {
		body = appendMember(body, "group_id", quoted(e.Conversation))
	}
	body = appendMember(body, "from", quoted(e.Sender))
	body = appendMember(body, "to", quoted(to))
	if e.ID != "" {
		body = appendMember(body, "msg_id", quoted(e.ID))
	}
	if e.Type == journal.MessageRecalled {
		body = appendMember(body, "recall_id", quoted(e.Target))
	}
	payload, _ := split(payloadOf(e, to), e)
	return append(dst, endCallback(body, append(payload, '}'), c)...), true, nil
}

// AppendGone appends a callback for an event whose content is gone, so that a
// consumer that counts sees no hole. Its chat_type is "gone".
func AppendGone(dst []byte, id string, millis int64, c Callback) ([]byte, error) {
	body, err := beginCallback(c, millis, "gone")
	if err != nil {
		return dst, err
	}
	return append(dst, endCallback(appendMember(body, "msg_id", quoted(id)), []byte(`{}`), c)...), nil
}

func beginCallback(c Callback, millis int64, kind string) ([]byte, error) {
	security, err := Security(c.CallID, c.Secret, millis)
	if err != nil {
		return nil, err
	}
	body := appendMember([]byte{'{'}, "callId", quoted(c.CallID))
	if !c.Question {
		body = appendMember(body, "eventType", quoted("chat"))
	}
	body = appendMember(body, "timestamp", strconv.AppendInt(nil, millis, 10))
	body = appendMember(body, "chat_type", quoted(kind))
	if !c.Question {
		body = appendMember(body, "securityVersion", quoted(securityVersion))
	}
	return appendMember(body, "security", quoted(security)), nil
}

func endCallback(body, payload []byte, c Callback) []byte {
	body = appendMember(body, "payload", payload)
	if c.Delivery != nil {
		body = appendMember(body, "delivery", c.Delivery)
	}
	return append(body, '}')
}
