package history

import (
	"encoding/binary"
	"fmt"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections"
)

// The tables of docs/format/views.md, by the first byte of their keys. Numbers
// are big-endian, so that keys sort as the numbers do.
const (
	tableEvents        = 'E' // app, position: the record, in the app's order
	tableConversations = 'C' // app, conversation, position: a message, folded
	tableByConv        = 'D' // app, conversation, position: every event of it
	tableIDs           = 'I' // app, event: where the event is
	tableUsers         = 'U' // app, subject, position: of sender and recipient
	tableTargets       = 'G' // app, target, position: its edits and recalls
	tableTimes         = 'T' // app, hour: positions of the events of the hour
	tableExpiry        = 'X' // hour, app, block: what expires in the hour
	tableMoves         = 'M' // app: what plan changes have taken away
	tableTrimmed       = 'O' // app: through where events have expired
)

// format is raised when keys or values change; the runner then rebuilds.
const format = 2

// formatBits is where the length of an hour in seconds stands in the format, if it
// is not an hour.
const formatBits = 8

const (
	formByte = 1 // the first byte of the values of E and C

	flagRecalled = 1
	flagEdited   = 2
	flagCopied   = 4

	eventPrefix   = 10 // form, flags, stored
	messagePrefix = 22 // form, flags, stored, changed, length
)

const maxPosition = journal.Position(1<<64 - 1)

// key is room for the longest key, so that building one allocates nothing.
type key struct {
	b [64]byte
	n int
}

func (k *key) bytes() []byte { return k.b[:k.n] }

// appKey starts a key: table and app.
func (k *key) app(table byte, app journal.AppID) *key {
	k.b[0] = table
	copy(k.b[1:], app[:])
	k.n = 17
	return k
}

func (k *key) tag(t kms.Tag) *key {
	copy(k.b[k.n:], t[:])
	k.n += len(t)
	return k
}

func (k *key) position(p journal.Position) *key {
	binary.BigEndian.PutUint64(k.b[k.n:], uint64(p))
	k.n += 8
	return k
}

func (k *key) hour(h uint32) *key {
	binary.BigEndian.PutUint32(k.b[k.n:], h)
	k.n += 4
	return k
}

func (k *key) event(app journal.AppID, p journal.Position) []byte {
	return k.app(tableEvents, app).position(p).bytes()
}

// indexed is a key of the tables C, D, U and G.
func (k *key) indexed(table byte, app journal.AppID, t kms.Tag, p journal.Position) []byte {
	return k.app(table, app).tag(t).position(p).bytes()
}

func (k *key) id(app journal.AppID, event kms.Tag) []byte {
	return k.app(tableIDs, app).tag(event).bytes()
}

func (k *key) time(app journal.AppID, hour uint32) []byte {
	return k.app(tableTimes, app).hour(hour).bytes()
}

func (k *key) expiry(x expiryKey) []byte {
	k.b[0] = tableExpiry
	k.n = 1
	k.hour(x.hour)
	copy(k.b[k.n:], x.app[:])
	k.n += len(x.app)
	return k.position(journal.Position(x.block)).bytes()
}

func (k *key) trimmed(app journal.AppID) []byte { return k.app(tableTrimmed, app).bytes() }

// lastPosition is the position at the end of a key.
func lastPosition(k []byte) (journal.Position, error) {
	if len(k) < 17+8 {
		return 0, damaged("key", len(k))
	}
	return journal.Position(binary.BigEndian.Uint64(k[len(k)-8:])), nil
}

// damaged is the error for what this package did not write.
func damaged(what string, size int) error {
	return fmt.Errorf("history: %w: %s of %d bytes", projections.ErrCorrupt, what, size)
}

// spanOf returns the keys of the positions after and before, both exclusive,
// under a prefix; a zero before is the end.
func spanOf(prefix []byte, after, before journal.Position, from, to *key) (lo, hi []byte) {
	from.n, to.n = copy(from.b[:], prefix), copy(to.b[:], prefix)
	if after == maxPosition {
		// Nothing follows: an empty range.
		return from.position(after).bytes(), to.position(after).bytes()
	}
	from.position(after + 1)
	if before != 0 {
		return from.bytes(), to.position(before).bytes()
	}
	// The end of the prefix: one more than its last byte that is not 0xff. The
	// table's byte never is.
	for to.n > 0 && to.b[to.n-1] == 0xff {
		to.n--
	}
	to.b[to.n-1]++
	return from.bytes(), to.bytes()
}

// An event is a value of table E.
type event struct {
	flags  byte
	stored int64   // milliseconds since 1970
	copied uint16  // the route generation that has copied it; 0: none
	sender kms.Tag // of a tombstone; otherwise the envelope has it
	record []byte  // the clear header, and the envelope unless it is a tombstone
}

func parseEvent(v []byte) (event, error) {
	if len(v) < eventPrefix || v[0] != formByte {
		return event{}, damaged("event", len(v))
	}
	e := event{flags: v[1], stored: int64(binary.BigEndian.Uint64(v[2:10])), record: v[eventPrefix:]}
	if e.flags&flagCopied != 0 && len(e.record) >= 2 {
		e.copied, e.record = binary.BigEndian.Uint16(e.record), e.record[2:]
	}
	if e.flags&flagRecalled != 0 && len(e.record) >= len(e.sender) {
		e.record = e.record[copy(e.sender[:], e.record):]
	}
	if len(e.record) < journal.HeaderSize {
		return event{}, damaged("event", len(v))
	}
	return e, nil
}

func (e event) append(dst []byte) []byte {
	dst = append(dst, formByte, withCopied(e.flags, e.copied))
	dst = binary.BigEndian.AppendUint64(dst, uint64(e.stored))
	if e.copied != 0 {
		dst = binary.BigEndian.AppendUint16(dst, e.copied)
	}
	if e.flags&flagRecalled != 0 {
		dst = append(dst, e.sender[:]...)
	}
	return append(dst, e.record...)
}

func withCopied(flags byte, generation uint16) byte {
	if generation != 0 {
		return flags | flagCopied
	}
	return flags &^ flagCopied
}

// senderOf reads the sender's tag from a whole record.
func senderOf(record []byte) (kms.Tag, error) {
	_, envelope, err := journal.ParseRecord(record)
	if err != nil {
		return kms.Tag{}, err
	}
	h, err := kms.ParseHeader(envelope)
	return h.Subject, err
}

// bury makes a tombstone of an event: its clear header and its sender's tag,
// without which its key in table U could not be found again.
func (e *event) bury() error {
	if e.flags&flagRecalled != 0 {
		return nil
	}
	sender, err := senderOf(e.record)
	if err != nil {
		return err
	}
	e.flags |= flagRecalled
	e.sender = sender
	e.record = e.record[:journal.HeaderSize:journal.HeaderSize]
	return nil
}

// millis reads the event's time from a record, which is known to have a header.
func millis(record []byte) int64 { return int64(binary.BigEndian.Uint64(record[4:12])) }

// kind reads the event's type from a record.
func kind(record []byte) journal.Type { return journal.Type(record[2]) }

// clock is the retention clock of an event: see journal.Plan.Clock.
func (e event) clock() int64 { return min(millis(e.record), e.stored) }

// A folded is a value of table C: a message and what became of it.
type folded struct {
	flags   byte
	stored  int64
	changed journal.Position // of second
	copied  uint16           // the route generation that has copied the message; 0: none
	first   []byte           // the message; its header if it was recalled
	second  []byte           // the newest edit, or the recall
}

func parseFolded(v []byte) (folded, error) {
	if len(v) < messagePrefix || v[0] != formByte {
		return folded{}, damaged("message", len(v))
	}
	n := uint64(binary.BigEndian.Uint32(v[18:22]))
	rest, copied := v[messagePrefix:], uint16(0)
	if v[1]&flagCopied != 0 && len(rest) >= 2 {
		copied, rest = binary.BigEndian.Uint16(rest), rest[2:]
	}
	if n < journal.HeaderSize || n > uint64(len(rest)) {
		return folded{}, damaged("message", len(v))
	}
	f := folded{
		flags:   v[1] &^ flagCopied,
		copied:  copied,
		stored:  int64(binary.BigEndian.Uint64(v[2:10])),
		changed: journal.Position(binary.BigEndian.Uint64(v[10:18])),
		first:   rest[:n],
	}
	if rest := rest[n:]; len(rest) >= journal.HeaderSize {
		f.second = rest
	} else if len(rest) > 0 || f.flags != 0 {
		return folded{}, damaged("message", len(v))
	}
	return f, nil
}

func (f folded) append(dst []byte) []byte {
	dst = append(dst, formByte, withCopied(f.flags, f.copied))
	dst = binary.BigEndian.AppendUint64(dst, uint64(f.stored))
	dst = binary.BigEndian.AppendUint64(dst, uint64(f.changed))
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(f.first)))
	if f.copied != 0 {
		dst = binary.BigEndian.AppendUint16(dst, f.copied)
	}
	dst = append(dst, f.first...)
	return append(dst, f.second...)
}

// A place is a value of table I: where an event is. An awaited place stands for
// an event that edits or recalls name and that has not come yet; its position
// is that of the newest of them.
type place struct {
	kind         journal.Type // 0: awaited
	position     journal.Position
	conversation kms.Tag
}

const placeSize = 25

func parsePlace(v []byte) (place, error) {
	if len(v) != placeSize {
		return place{}, damaged("place", len(v))
	}
	p := place{kind: journal.Type(v[0]), position: journal.Position(binary.BigEndian.Uint64(v[1:9]))}
	copy(p.conversation[:], v[9:])
	return p, nil
}

func (p place) append(dst []byte) []byte {
	dst = append(dst, byte(p.kind))
	dst = binary.BigEndian.AppendUint64(dst, uint64(p.position))
	return append(dst, p.conversation[:]...)
}

// A span is a value of table T: the lowest and the highest position of the
// events of an hour, and how many there are.
type span struct {
	low, high journal.Position
	count     uint64
}

func parseSpan(v []byte) (span, error) {
	if len(v) != 24 {
		return span{}, damaged("span", len(v))
	}
	return span{
		low:   journal.Position(binary.BigEndian.Uint64(v[0:8])),
		high:  journal.Position(binary.BigEndian.Uint64(v[8:16])),
		count: binary.BigEndian.Uint64(v[16:24]),
	}, nil
}

func (s span) append(dst []byte) []byte {
	dst = binary.BigEndian.AppendUint64(dst, uint64(s.low))
	dst = binary.BigEndian.AppendUint64(dst, uint64(s.high))
	return binary.BigEndian.AppendUint64(dst, s.count)
}

// An expiryKey is a key of table X. Its value has the low byte of each position
// in the block that expires in the hour, in the order of arrival.
type expiryKey struct {
	hour  uint32 // everything under it has expired at the hour's beginning
	app   journal.AppID
	block uint64 // position / 256
}

const expiryKeySize = 1 + 4 + 16 + 8

func parseExpiryKey(k []byte) (expiryKey, error) {
	if len(k) != expiryKeySize {
		return expiryKey{}, damaged("expiry key", len(k))
	}
	x := expiryKey{hour: binary.BigEndian.Uint32(k[1:5]), block: binary.BigEndian.Uint64(k[21:29])}
	copy(x.app[:], k[5:21])
	return x, nil
}

// hours is the length, in milliseconds, of what tables T and X call an hour: of an
// hour, but when time is scaled.
type hours int64

// of is the number since 1970 of the hour of a time in milliseconds.
func (h hours) of(ms int64) uint32 {
	return uint32(min(max(ms/int64(h), 0), 1<<32-2))
}
