package journal

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/cofferdb/coffer/kms"
)

const (
	// HeaderSize is the size of a record's header in bytes; the envelope
	// follows it.
	HeaderSize = 76

	recordMagic   = 0xC1
	recordVersion = 1
)

// A Header is the clear part of a record: what views need to index, fold and
// expire an event without opening it. It holds no id, only tags under a key of
// the app. The whole header is bound to the envelope.
type Header struct {
	Type Type
	// Millis is the event's time in milliseconds since 1970.
	Millis int64
	// Event, Conversation and Target are the tags of the ids; Peer is the
	// subject tag of the recipient. A tag is zero where the event has no such
	// id.
	Event, Conversation, Peer, Target kms.Tag
}

// Time returns the event's time.
func (h Header) Time() time.Time { return time.UnixMilli(h.Millis).UTC() }

// Append appends the 76 bytes of the header to dst.
func (h Header) Append(dst []byte) []byte {
	dst = append(dst, recordMagic, recordVersion, byte(h.Type), 0)
	dst = binary.BigEndian.AppendUint64(dst, uint64(h.Millis))
	dst = append(dst, h.Event[:]...)
	dst = append(dst, h.Conversation[:]...)
	dst = append(dst, h.Peer[:]...)
	return append(dst, h.Target[:]...)
}

// ParseHeader parses the header of a record. It allocates nothing. Bytes of an
// unknown version, type or flag are refused with [ErrCorrupt].
func ParseHeader(record []byte) (Header, error) {
	var h Header
	switch {
	case len(record) < HeaderSize:
		return h, fmt.Errorf("record header: %w: %d bytes", ErrCorrupt, len(record))
	case record[0] != recordMagic:
		return h, fmt.Errorf("record header: %w: not a record", ErrCorrupt)
	case record[1] != recordVersion:
		return h, fmt.Errorf("record header: %w: version %d is not known", ErrCorrupt, record[1])
	case !Type(record[2]).Known():
		return h, fmt.Errorf("record header: %w: event type %d is not known", ErrCorrupt, record[2])
	case record[3] != 0:
		return h, fmt.Errorf("record header: %w: flags %#x are not known", ErrCorrupt, record[3])
	}
	h.Type = Type(record[2])
	h.Millis = int64(binary.BigEndian.Uint64(record[4:12]))
	copy(h.Event[:], record[12:28])
	copy(h.Conversation[:], record[28:44])
	copy(h.Peer[:], record[44:60])
	copy(h.Target[:], record[60:76])
	return h, nil
}

// ParseRecord parses the header of a record and returns the envelope that
// follows it, which it does not look into.
func ParseRecord(record []byte) (Header, []byte, error) {
	h, err := ParseHeader(record)
	if err != nil {
		return h, nil, err
	}
	return h, record[HeaderSize:], nil
}

// A LogID is the random id of a region's set of data. It is part of what every
// envelope is bound to, so a record cannot be passed off in another
// installation, or in a region that was set up anew.
type LogID [16]byte

// appendAAD appends what an envelope is bound to besides its own header: the
// region, the app, the log and the record's header, each with its length in 32
// bits in front, so that no two combinations have the same bytes.
func appendAAD(dst []byte, region string, app AppID, log LogID, header []byte) []byte {
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(region)))
	dst = append(dst, region...)
	dst = binary.BigEndian.AppendUint32(dst, 2*uint32(len(app)))
	dst, _ = app.AppendText(dst)
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(log)))
	dst = append(dst, log[:]...)
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(header)))
	return append(dst, header...)
}
