package journal

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	// MaxID is the longest id of an event, user or conversation, in bytes.
	MaxID = 128

	// maxDirectID is the longest id of a direct conversation: two user ids and
	// a comma.
	maxDirectID = 2*MaxID + 1
)

// A Type says what kind of thing happened. Its number stands in the record's
// header and is never reused.
type Type uint8

// The types of events. Those from 32 on are operational: only the server
// writes them.
const (
	MessageSent       Type = 1
	MessageEdited     Type = 2
	MessageRecalled   Type = 3
	ReceiptDelivered  Type = 4
	ReceiptRead       Type = 5
	UserErased        Type = 6
	AttachmentStored  Type = 7
	MemberJoined      Type = 8
	MemberLeft        Type = 9
	InboxAcked        Type = 10
	AppCreated        Type = 32
	AppPlanChanged    Type = 33
	KeyRotated        Type = 34
	KeyRewrapped      Type = 35
	KeyRetired        Type = 36
	CallbackAttempted Type = 37
	EndpointDisabled  Type = 38
	AccountExpiring   Type = 39
	ProfileExpiring   Type = 40
)

// String returns the type's name in a CloudEvent, "message.sent".
func (t Type) String() string {
	switch t {
	case MessageSent:
		return "message.sent"
	case MessageEdited:
		return "message.edited"
	case MessageRecalled:
		return "message.recalled"
	case ReceiptDelivered:
		return "receipt.delivered"
	case ReceiptRead:
		return "receipt.read"
	case UserErased:
		return "user.erased"
	case AttachmentStored:
		return "attachment.stored"
	case MemberJoined:
		return "member.joined"
	case MemberLeft:
		return "member.left"
	case InboxAcked:
		return "inbox.acked"
	case AppCreated:
		return "app.created"
	case AppPlanChanged:
		return "app.plan_changed"
	case KeyRotated:
		return "key.rotated"
	case KeyRewrapped:
		return "key.rewrapped"
	case KeyRetired:
		return "key.retired"
	case CallbackAttempted:
		return "callback.attempted"
	case EndpointDisabled:
		return "endpoint.disabled"
	case AccountExpiring:
		return "account.expiring"
	case ProfileExpiring:
		return "profile.expiring"
	}
	return ""
}

// ParseType parses a type's name.
func ParseType(s string) (Type, error) {
	switch s {
	case "message.sent":
		return MessageSent, nil
	case "message.edited":
		return MessageEdited, nil
	case "message.recalled":
		return MessageRecalled, nil
	case "receipt.delivered":
		return ReceiptDelivered, nil
	case "receipt.read":
		return ReceiptRead, nil
	case "user.erased":
		return UserErased, nil
	case "attachment.stored":
		return AttachmentStored, nil
	case "member.joined":
		return MemberJoined, nil
	case "member.left":
		return MemberLeft, nil
	case "inbox.acked":
		return InboxAcked, nil
	case "app.created":
		return AppCreated, nil
	case "app.plan_changed":
		return AppPlanChanged, nil
	case "key.rotated":
		return KeyRotated, nil
	case "key.rewrapped":
		return KeyRewrapped, nil
	case "key.retired":
		return KeyRetired, nil
	case "callback.attempted":
		return CallbackAttempted, nil
	case "endpoint.disabled":
		return EndpointDisabled, nil
	case "account.expiring":
		return AccountExpiring, nil
	case "profile.expiring":
		return ProfileExpiring, nil
	}
	return 0, fmt.Errorf("event type: %w: not a known type", ErrInvalid)
}

// Known reports whether the type has a name.
func (t Type) Known() bool { return t.String() != "" }

// Reserved reports whether only the server writes events of this type;
// [ParseEvent] refuses them from a caller.
func (t Type) Reserved() bool {
	return t == UserErased || t == AttachmentStored || t == InboxAcked || t >= AppCreated
}

// reservedPrefixes begin the ids of the events that the server writes: an id that
// is made of what happened makes a repetition the same event, as long as nobody
// else has taken it.
func reservedPrefixes() [4]string {
	return [...]string{"coffer:", "attachment:", "erasure:", "inbox-acked:"}
}

// ReservedID reports whether only the server gives events ids like this one;
// [ParseEvent] refuses them from a caller.
func ReservedID(id string) bool {
	for _, prefix := range reservedPrefixes() {
		if strings.HasPrefix(id, prefix) {
			return true
		}
	}
	return false
}

// CheckCallerEventID is [CheckEventID] for an id that a caller gives an event: it
// refuses those of the server too.
func CheckCallerEventID(s string) error {
	if ReservedID(s) {
		return invalid("", reservedDetail)
	}
	return CheckEventID(s)
}

const reservedDetail = "ids that begin with coffer:, attachment:, erasure: or inbox-acked: are of events that the server writes"

// A ConversationType is the kind of a conversation.
type ConversationType uint8

// The kinds of conversations; the zero value is for events that belong to none.
const (
	Direct ConversationType = 1
	Group  ConversationType = 2
	Room   ConversationType = 3
)

// String returns "direct", "group", "room", or "" for none.
func (t ConversationType) String() string {
	switch t {
	case Direct:
		return "direct"
	case Group:
		return "group"
	case Room:
		return "room"
	}
	return ""
}

// ParseConversationType parses "direct", "group" or "room".
func ParseConversationType(s string) (ConversationType, error) {
	switch s {
	case "direct":
		return Direct, nil
	case "group":
		return Group, nil
	case "room":
		return Room, nil
	}
	return 0, fmt.Errorf("conversation type: %w: not direct, group or room", ErrInvalid)
}

// CheckUserID reports whether s can be a user's id: 1 to 128 bytes of letters,
// digits and "_@:+=~-." in ASCII, not beginning with a full stop. Wildcards,
// spaces, path separators, control characters and everything that is not ASCII
// are refused, so that an id cannot reach a path as something else, and two ids
// that look the same are the same. No id is ever part of a subject.
func CheckUserID(s string) error { return checkAt("", s, idOfUser) }

// CheckEventID reports whether s can be an event's id: as a user's, without full
// stops, which separate the parts of what a callback's signature covers.
func CheckEventID(s string) error { return checkAt("", s, idOfEvent) }

// CheckConversationID reports whether s can be a conversation's id: as a user's
// id, and commas; with a comma, up to 257 bytes.
func CheckConversationID(s string) error { return checkAt("", s, idOfConversation) }

// idKind is what an id is of: the rules differ.
type idKind int

const (
	idOfEvent idKind = iota
	idOfUser
	idOfConversation
)

// DirectConversation returns the id of the direct conversation of two users.
// It is the same whoever comes first.
func DirectConversation(a, b string) string {
	if b < a {
		a, b = b, a
	}
	return a + "," + b
}

// idClasses has the class of each ASCII character in an id: 1 is allowed in
// every id, 2 in a conversation's, 3 in a user's and a conversation's, 0 in none.
const idClasses = "0000000000000000" + "0000000000000000" + // control characters
	"0000000000012130" + //  !"#$%&'()*+,-./
	"1111111111100100" + // 0123456789:;<=>?
	"1111111111111111" + // @ABCDEFGHIJKLMNO
	"1111111111100001" + // PQRSTUVWXYZ[\]^_
	"0111111111111111" + // `abcdefghijklmno
	"1111111111100010" //   pqrstuvwxyz{|}~

func idClass(c byte) byte {
	if c >= 128 {
		return 0
	}
	return idClasses[c] - '0'
}

func checkID(s string, kind idKind) *InputError {
	if s == "" {
		return invalid("", "an id must not be empty")
	}
	commas := 0
	for i := range len(s) {
		switch idClass(s[i]) {
		case 1:
		case 2:
			if kind != idOfConversation {
				return invalid("", "an id must not contain a comma, which joins the two ids of a direct conversation")
			}
			commas++
		case 3:
			if kind == idOfEvent {
				return invalid("", "an event's id must not contain a full stop; a user's and a conversation's may")
			}
			if i == 0 || s[i-1] == ',' {
				return invalid("", "an id must not begin with a full stop, which stands for a step in a path")
			}
		default:
			return invalid("", badCharacter(s[i:]))
		}
	}
	limit := MaxID
	if commas > 0 {
		limit = maxDirectID
	}
	if len(s) > limit {
		return tooLarge("", fmt.Sprintf("an id must not be longer than %d bytes", limit))
	}
	return nil
}

// badCharacter describes the first character of s without repeating it: what
// cannot be read in a terminal or a log must not be written there.
func badCharacter(s string) string {
	r, size := utf8.DecodeRuneInString(s)
	const must = "an id must not contain "
	switch {
	case r == utf8.RuneError && size <= 1:
		return must + "invalid UTF-8"
	case r == 0:
		return must + "a NUL character"
	case r == '\n' || r == '\r':
		return must + "a line break"
	case r == ' ' || r == '\t':
		return must + "white space"
	case r < 0x20 || r == 0x7f || 0x80 <= r && r < 0xa0:
		return must + fmt.Sprintf("a control character (U+%04X)", r)
	case r == '*' || r == '>':
		return must + "a wildcard of subjects (* or >)"
	case r == '/' || r == '\\':
		return must + "a path separator"
	case r < 0x80:
		return must + fmt.Sprintf("the character U+%04X; letters, digits and _@:+=~-. are allowed", r)
	case isBidi(r):
		return must + fmt.Sprintf("a character that changes the direction of text (U+%04X)", r)
	case isInvisible(r):
		return must + fmt.Sprintf("an invisible character (U+%04X)", r)
	}
	return must + fmt.Sprintf("a character outside ASCII (U+%04X)", r)
}

func isBidi(r rune) bool {
	return r == 0x061c || r == 0x200e || r == 0x200f || 0x202a <= r && r <= 0x202e || 0x2066 <= r && r <= 0x2069
}

func isInvisible(r rune) bool {
	switch {
	case r == 0x00ad, r == 0x034f, r == 0x180e, r == 0xfeff, r == 0x3164, r == 0x115f, r == 0x1160,
		0x200b <= r && r <= 0x200d, 0x2060 <= r && r <= 0x2064, 0xfe00 <= r && r <= 0xfe0f, 0xe0000 <= r && r <= 0xe007f:
		return true
	}
	return false
}

// NewEventID returns an id for an event whose caller gave none: a version 7
// UUID (RFC 9562), whose first 48 bits are the time in milliseconds.
func NewEventID(now time.Time) string {
	var u [16]byte
	rand.Read(u[6:]) // never fails; it ends the process instead
	ms := uint64(now.UnixMilli())
	for i := range 6 {
		u[i] = byte(ms >> (40 - 8*i))
	}
	u[6] = u[6]&0x0f | 0x70
	u[8] = u[8]&0x3f | 0x80
	var s [36]byte
	hex.Encode(s[0:8], u[0:4])
	hex.Encode(s[9:13], u[4:6])
	hex.Encode(s[14:18], u[6:8])
	hex.Encode(s[19:23], u[8:10])
	hex.Encode(s[24:36], u[10:16])
	s[8], s[13], s[18], s[23] = '-', '-', '-', '-'
	return string(s[:])
}
