package roaming

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
	tableMembers  = 'a' // app, conversation, user: row
	tableOfUser   = 'b' // app, user, conversation
	tableAwaited  = 'c' // app, event, conversation: a recall came before it
	tableIndex    = 'd' // app, conversation, position: entry
	tableIDs      = 'e' // app, event: place
	tableReceipts = 'f' // app, conversation, position, user: bits
	tableAcks     = 'g' // app, user: how far the inbox was acknowledged
	tableExpiry   = 'h' // until, kind, app, …: what goes then
)

// format is raised when keys or values change; the runner then rebuilds.
const format = 1

const (
	formByte = 1 // the first byte of rows and entries

	flagRecalled = 1

	bitDelivered = 1
	bitRead      = 2

	appSize = len(journal.AppID{})
	tagSize = len(kms.Tag{})
)

// The kinds of table h.
const (
	expireIndex   = 1
	expireRow     = 2
	expireAck     = 3
	expireID      = 4
	expireAwaited = 5
)

const maxPosition = journal.Position(1<<64 - 1)

// key is room for the longest key, so that building one allocates nothing.
type key struct {
	b [80]byte
	n int
}

func (k *key) bytes() []byte { return k.b[:k.n] }

func (k *key) table(table byte) *key {
	k.b[0], k.n = table, 1
	return k
}

func (k *key) app(app journal.AppID) *key {
	k.n += copy(k.b[k.n:], app[:])
	return k
}

func (k *key) tag(t kms.Tag) *key {
	k.n += copy(k.b[k.n:], t[:])
	return k
}

func (k *key) number(n uint64) *key {
	binary.BigEndian.PutUint64(k.b[k.n:], n)
	k.n += 8
	return k
}

func (k *key) kind(b byte) *key {
	k.b[k.n] = b
	k.n++
	return k
}

func (k *key) member(app journal.AppID, conversation, user kms.Tag) []byte {
	return k.table(tableMembers).app(app).tag(conversation).tag(user).bytes()
}

func (k *key) ofUser(app journal.AppID, user, conversation kms.Tag) []byte {
	return k.table(tableOfUser).app(app).tag(user).tag(conversation).bytes()
}

func (k *key) awaited(app journal.AppID, event, conversation kms.Tag) []byte {
	return k.table(tableAwaited).app(app).tag(event).tag(conversation).bytes()
}

func (k *key) index(app journal.AppID, conversation kms.Tag, p journal.Position) []byte {
	return k.table(tableIndex).app(app).tag(conversation).number(uint64(p)).bytes()
}

func (k *key) id(app journal.AppID, event kms.Tag) []byte {
	return k.table(tableIDs).app(app).tag(event).bytes()
}

func (k *key) receipts(app journal.AppID, conversation kms.Tag, p journal.Position) *key {
	return k.table(tableReceipts).app(app).tag(conversation).number(uint64(p))
}

func (k *key) ack(app journal.AppID, user kms.Tag) []byte {
	return k.table(tableAcks).app(app).tag(user).bytes()
}

// expiry is the beginning of a key of table h.
func (k *key) expiry(until int64, kind byte, app journal.AppID) *key {
	return k.table(tableExpiry).number(uint64(until)).kind(kind).app(app)
}

// past returns the first key behind those with the prefix. A table's byte is
// never 0xff.
func past(prefix []byte, to *key) []byte {
	to.n = copy(to.b[:], prefix)
	for to.n > 0 && to.b[to.n-1] == 0xff {
		to.n--
	}
	to.b[to.n-1]++
	return to.bytes()
}

// damaged is the error for what this package did not write.
func damaged(what string, size int) error {
	return fmt.Errorf("roaming: %w: %s of %d bytes", projections.ErrCorrupt, what, size)
}

// lastTag is the tag at the end of a key, lastPosition the position.
func lastTag(k []byte) kms.Tag { return kms.Tag(k[len(k)-tagSize:]) }

func lastPosition(k []byte) journal.Position {
	return journal.Position(binary.BigEndian.Uint64(k[len(k)-8:]))
}

// A mark is an event that says something about a user and a conversation.
type mark struct {
	kind     journal.Type // of a membership; 0 is none
	position journal.Position
	stored   int64 // ms
	until    int64 // ms
}

// kept reports whether the plan still keeps the event, by its arrival.
func (m mark) kept(oldest int64) bool { return m.position != 0 && m.stored >= oldest }

// A row is a value of table a: a user in a conversation.
type row struct {
	member mark // the newest event of the membership
	took   mark // the newest other event with the user as sender or recipient
	read   journal.Position
}

const rowSize = 2 + 24 + 24 + 8

func parseRow(v []byte) (row, error) {
	if len(v) != rowSize || v[0] != formByte {
		return row{}, damaged("row", len(v))
	}
	n := func(at int) uint64 { return binary.BigEndian.Uint64(v[at:]) }
	return row{
		member: mark{journal.Type(v[1]), journal.Position(n(2)), int64(n(10)), int64(n(18))},
		took:   mark{0, journal.Position(n(26)), int64(n(34)), int64(n(42))},
		read:   journal.Position(n(50)),
	}, nil
}

func (r row) append(dst []byte) []byte {
	dst = append(dst, formByte, byte(r.member.kind))
	for _, m := range []mark{r.member, r.took} {
		dst = binary.BigEndian.AppendUint64(dst, uint64(m.position))
		dst = binary.BigEndian.AppendUint64(dst, uint64(m.stored))
		dst = binary.BigEndian.AppendUint64(dst, uint64(m.until))
	}
	return binary.BigEndian.AppendUint64(dst, uint64(r.read))
}

// takesPart is the rule of the decision: the newest event of the membership
// decides, and without one any event does.
func (r row) takesPart(oldest int64) bool {
	if r.member.kept(oldest) {
		return r.member.kind == journal.MemberJoined
	}
	return r.took.kept(oldest)
}

// newest is the newest event that speaks of the user.
func (r row) newest() journal.Position { return max(r.member.position, r.took.position) }

// An entry is a value of table d: an event of a conversation.
type entry struct {
	kind            journal.Type
	flags           byte
	clock           int64 // ms, see journal.Plan.Clock
	sender, event   kms.Tag
	delivered, read uint32
}

const entrySize = 3 + 8 + 2*tagSize + 8

func parseEntry(v []byte) (entry, error) {
	if len(v) != entrySize || v[0] != formByte {
		return entry{}, damaged("entry", len(v))
	}
	return entry{
		kind: journal.Type(v[1]), flags: v[2], clock: int64(binary.BigEndian.Uint64(v[3:])),
		sender: kms.Tag(v[11:27]), event: kms.Tag(v[27:43]),
		delivered: binary.BigEndian.Uint32(v[43:]), read: binary.BigEndian.Uint32(v[47:]),
	}, nil
}

func (e entry) append(dst []byte) []byte {
	dst = append(dst, formByte, byte(e.kind), e.flags)
	dst = binary.BigEndian.AppendUint64(dst, uint64(e.clock))
	dst = append(dst, e.sender[:]...)
	dst = append(dst, e.event[:]...)
	dst = binary.BigEndian.AppendUint32(dst, e.delivered)
	return binary.BigEndian.AppendUint32(dst, e.read)
}

// message reports whether the entry is a message that can be unread.
func (e entry) message() bool { return e.kind == journal.MessageSent && e.flags&flagRecalled == 0 }

// A place is a value of table e: where an event is.
type place struct {
	kind         journal.Type
	position     journal.Position
	conversation kms.Tag
}

const placeSize = 1 + 8 + tagSize

func parsePlace(v []byte) (place, error) {
	if len(v) != placeSize {
		return place{}, damaged("place", len(v))
	}
	return place{journal.Type(v[0]), journal.Position(binary.BigEndian.Uint64(v[1:])), kms.Tag(v[9:])}, nil
}

func (p place) append(dst []byte) []byte {
	dst = append(dst, byte(p.kind))
	dst = binary.BigEndian.AppendUint64(dst, uint64(p.position))
	return append(dst, p.conversation[:]...)
}

// An ack is a value of table g.
type ack struct {
	position journal.Position
	stored   int64
	until    int64
}

func parseAck(v []byte) (ack, error) {
	if len(v) != 24 {
		return ack{}, damaged("acknowledgement", len(v))
	}
	return ack{
		journal.Position(binary.BigEndian.Uint64(v)), int64(binary.BigEndian.Uint64(v[8:])), int64(binary.BigEndian.Uint64(v[16:])),
	}, nil
}

func (a ack) append(dst []byte) []byte {
	dst = binary.BigEndian.AppendUint64(dst, uint64(a.position))
	dst = binary.BigEndian.AppendUint64(dst, uint64(a.stored))
	return binary.BigEndian.AppendUint64(dst, uint64(a.until))
}
