package journal

import (
	"time"

	"github.com/go-json-experiment/json/jsontext"
)

// An Event is something that happened to a message, a receipt, a user or an
// app. Its JSON form, on the wire and inside the envelope, is a CloudEvent
// (docs/format/record.md).
type Event struct {
	// ID identifies the event within its app, for ever: it is the key for
	// idempotency. When empty, one is made.
	ID string
	// Type says what happened.
	Type Type
	// Time is when it happened, to the millisecond; when zero, the time of
	// arrival.
	Time time.Time
	// Conversation is the id of the conversation. When it is empty and there is
	// a recipient, the event belongs to the direct conversation of sender and
	// recipient, whose id is the two ids, the smaller first, joined by a comma.
	Conversation string
	// ConversationType is the kind of the conversation.
	ConversationType ConversationType
	// Sender is the user who acted; empty for the app itself. The event is
	// sealed under this user's key and goes when the user is erased.
	Sender string
	// Recipient is the other user of a direct conversation.
	Recipient string
	// Target is the id of the event that this one edits, recalls or
	// acknowledges.
	Target string
	// Data is the JSON object with the content. Unknown members are kept.
	Data jsontext.Value

	// checked marks Data as canonical and valid for the type.
	checked dataMark
}

// A Result says what became of one appended event.
type Result struct {
	// ID is the event's id, made when the caller gave none.
	ID string
	// Position is where the event is stored; for a duplicate, where the first
	// one is.
	Position Position
	// Time is the event's time as stored.
	Time time.Time
	// Duplicate is set when the same event had been stored before.
	Duplicate bool
	// Err is why the event was not stored, or is not known to be.
	Err error
}

// A Sealed is a record as it was read from a stream.
type Sealed struct {
	App      AppID
	Position Position
	// Sequence is the record's sequence in its stream.
	Sequence uint64
	// Stored is when the record arrived; of a copy, when the event first did.
	Stored time.Time
	// Plan is the plan of the stream that it was read from.
	Plan string
	// Record is the header and the envelope, see [ParseRecord]; of a marker its
	// payload.
	Record []byte
	// Role is what the record is.
	Role Role
	// Generation is the route generation that wrote the record; of a copy it is
	// greater than its position's.
	Generation uint16
	// From is the plan that a copy was made from.
	From string
	// Source is the sequence, in the stream that a copy was made from, of what
	// was copied.
	Source uint64
}

// A Role says what a record of a stream is. All but events belong to plan
// changes; see docs/format/subjects.md.
type Role uint8

// The roles.
const (
	// RoleEvent is an event, at its first place.
	RoleEvent Role = iota
	// RoleCopy is an event that a plan change has copied: the same event at the
	// same position, with another envelope.
	RoleCopy
	// RoleSeal ends an app's part of a stream.
	RoleSeal
	// RoleOpen begins an app's part of a stream.
	RoleOpen
	// RoleClose says that everything that a plan change keeps has been copied.
	RoleClose
)

// StreamInfo names one message stream of a region.
type StreamInfo struct {
	Name string
	Plan string
	// Shard counts from 0.
	Shard int
	// Incarnation is the random id that the stream was created with.
	Incarnation string
}

// dataMark remembers which bytes were found valid for which type, so that an
// event that was parsed is not validated a second time when it is appended.
type dataMark struct {
	kind  Type
	first *byte
	size  int
}

func (e *Event) mark() dataMark {
	if len(e.Data) == 0 {
		return dataMark{}
	}
	return dataMark{kind: e.Type, first: &e.Data[0], size: len(e.Data)}
}
