package journal

import (
	"encoding/binary"
	"fmt"

	"github.com/cofferdb/coffer/kms"
)

const (
	attemptsMagic   = 0xC2
	attemptsVersion = 1
	attemptsHead    = 86
	attemptSize     = 58

	// MaxAttempts is the number of entries of one record.
	MaxAttempts = 512
)

// EndpointID is the random id of a webhook endpoint.
type EndpointID [16]byte

// AttemptsKind says what a record of the callback stream is about.
type AttemptsKind uint8

// The kinds of docs/format/callbacks.md.
const (
	AttemptsOutcomes AttemptsKind = 1 // what became of deliveries
	AttemptsTaken    AttemptsKind = 2 // another process delivers from here on
	AttemptsReplay   AttemptsKind = 3 // how far a replay has come
)

// A DeliveryState is how a delivery stands.
type DeliveryState uint8

// The states. Delivered and parked ones are not sent again by themselves.
const (
	DeliveryDone    DeliveryState = 1
	DeliveryWaiting DeliveryState = 2 // for its next attempt
	DeliveryParked  DeliveryState = 3
	DeliveryHeld    DeliveryState = 4 // behind one of its conversation that waits
)

// String returns the name that callers of the interface see.
func (s DeliveryState) String() string {
	switch s {
	case DeliveryDone:
		return "delivered"
	case DeliveryWaiting:
		return "waiting"
	case DeliveryParked:
		return "parked"
	case DeliveryHeld:
		return "held"
	}
	return "unknown"
}

// A Cause is why an attempt failed.
type Cause uint8

// The causes.
const (
	CauseNone    Cause = 0
	CauseStatus  Cause = 1 // the endpoint answered, and not with 2xx
	CauseConnect Cause = 2
	CauseTimeout Cause = 3
	CauseAddress Cause = 4 // it may not be called
	CauseExpired Cause = 5 // callbacks are not kept that long
	CauseEnded   Cause = 6 // the endpoint was disabled or deleted
	CauseBody    Cause = 7 // no body could be made
)

// String returns the name that callers of the interface see.
func (c Cause) String() string {
	names := [...]string{"", "status", "connection", "timeout", "address", "expired", "ended", "body"}
	if int(c) < len(names) {
		return names[c]
	}
	return "unknown"
}

// An Attempt is what became of one delivery.
type Attempt struct {
	Number       uint64 // of the event, within the endpoint
	Position     Position
	Conversation kms.Tag // zero where the order does not matter
	State        DeliveryState
	Cause        Cause
	Status       uint16 // of HTTP
	Attempts     uint16 // so far
	Millis       uint32 // how long this one took
	Due          int64  // milliseconds since 1970, of one that waits
	Arrived      int64  // when the event was stored
}

// Attempts is a record of the callback stream: what became of deliveries of one
// endpoint, and how far its events have been looked at.
type Attempts struct {
	Kind     AttemptsKind
	Millis   int64 // when it was made
	ID       [16]byte
	Endpoint EndpointID
	Token    uint64 // of the lease
	// Every event up to Through has a number up to Number, and its outcome in
	// this record or before it.
	Number  uint64
	Through Position
	Replay  [16]byte
	Entries []Attempt
}

// Append appends the clear part of the record to dst.
func (a *Attempts) Append(dst []byte) []byte {
	be := binary.BigEndian
	dst = append(dst, attemptsMagic, attemptsVersion, byte(a.Kind), 0)
	dst = be.AppendUint64(dst, uint64(a.Millis))
	dst = append(dst, a.ID[:]...)
	dst = append(dst, a.Endpoint[:]...)
	dst = be.AppendUint64(dst, a.Token)
	dst = be.AppendUint64(dst, a.Number)
	dst = be.AppendUint64(dst, uint64(a.Through))
	dst = append(dst, a.Replay[:]...)
	dst = be.AppendUint16(dst, uint16(len(a.Entries)))
	for i := range a.Entries {
		dst = be.AppendUint64(dst, a.Entries[i].Number)
		dst = a.Entries[i].AppendRest(dst)
	}
	return dst
}

// AttemptRest is the size of what [Attempt.AppendRest] appends.
const AttemptRest = attemptSize - 8

// AppendRest appends an entry without its number.
func (e *Attempt) AppendRest(dst []byte) []byte {
	be := binary.BigEndian
	dst = be.AppendUint64(dst, uint64(e.Position))
	dst = append(dst, e.Conversation[:]...)
	dst = append(dst, byte(e.State), byte(e.Cause))
	dst = be.AppendUint16(dst, e.Status)
	dst = be.AppendUint16(dst, e.Attempts)
	dst = be.AppendUint32(dst, e.Millis)
	dst = be.AppendUint64(dst, uint64(e.Due))
	return be.AppendUint64(dst, uint64(e.Arrived))
}

// ParseAttemptRest reads what [Attempt.AppendRest] appended.
func ParseAttemptRest(b []byte) (Attempt, error) {
	if len(b) != AttemptRest {
		return Attempt{}, fmt.Errorf("attempt: %w: %d bytes", ErrCorrupt, len(b))
	}
	be := binary.BigEndian
	e := Attempt{
		Position: Position(be.Uint64(b)), State: DeliveryState(b[24]), Cause: Cause(b[25]),
		Status: be.Uint16(b[26:]), Attempts: be.Uint16(b[28:]), Millis: be.Uint32(b[30:]),
		Due: int64(be.Uint64(b[34:])), Arrived: int64(be.Uint64(b[42:])),
	}
	copy(e.Conversation[:], b[8:])
	if e.State < DeliveryDone || e.State > DeliveryHeld || e.Cause > CauseBody {
		return Attempt{}, fmt.Errorf("attempt: %w: state %d, cause %d", ErrCorrupt, e.State, e.Cause)
	}
	return e, nil
}

// ParseAttempts parses a record and returns the envelope behind it, which is
// empty when there are no details. Everything unknown is refused with
// [ErrCorrupt].
func ParseAttempts(record []byte) (a Attempts, envelope []byte, err error) {
	be := binary.BigEndian
	if len(record) < attemptsHead || record[0] != attemptsMagic || record[1] != attemptsVersion || record[3] != 0 {
		return a, nil, fmt.Errorf("attempts: %w: not a record of %d bytes", ErrCorrupt, len(record))
	}
	a.Kind = AttemptsKind(record[2])
	count := int(be.Uint16(record[84:]))
	end := attemptsHead + count*attemptSize
	switch {
	case a.Kind < AttemptsOutcomes || a.Kind > AttemptsReplay:
		return a, nil, fmt.Errorf("attempts: %w: kind %d is not known", ErrCorrupt, a.Kind)
	case count > MaxAttempts || end > len(record), a.Kind == AttemptsTaken && count != 0, a.Kind == AttemptsReplay && count != 1:
		return a, nil, fmt.Errorf("attempts: %w: %d entries", ErrCorrupt, count)
	}
	a.Millis = int64(be.Uint64(record[4:]))
	copy(a.ID[:], record[12:])
	copy(a.Endpoint[:], record[28:])
	a.Token, a.Number, a.Through = be.Uint64(record[44:]), be.Uint64(record[52:]), Position(be.Uint64(record[60:]))
	copy(a.Replay[:], record[68:])
	if count > 0 {
		a.Entries = make([]Attempt, count)
	}
	for i := range a.Entries {
		b := record[attemptsHead+i*attemptSize:]
		if a.Entries[i], err = ParseAttemptRest(b[8:attemptSize]); err != nil {
			return a, nil, err
		}
		a.Entries[i].Number = be.Uint64(b)
	}
	return a, record[end:], nil
}
