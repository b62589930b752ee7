package callbacks

import (
	"encoding/binary"
	"fmt"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections"
)

// The tables of docs/format/callbacks.md, by the first byte of their keys.
const (
	tableEndpoints  = 'i' // app, endpoint: how far it has come
	tableDeliveries = 'j' // app, endpoint, number: a delivery
	tableDue        = 'k' // app, endpoint, due, number: what waits
	tableStates     = 'l' // app, endpoint, state, number: all but the delivered
	tableExpiry     = 'm' // hour, app, endpoint, block: what expires in the hour
	tableReplays    = 'n' // app, endpoint, replay: how far a replay has come
)

// format is raised when keys or values change; the runner then rebuilds.
const format = 1

// formatBits is where the length of a span in seconds stands in the format, if it is
// not an hour.
const formatBits = 8

const form = 1 // the first byte of values

// key is room for the longest key, so that building one allocates nothing.
type key struct {
	b [64]byte
	n int
}

func (k *key) bytes() []byte { return k.b[:k.n] }

func (k *key) endpoint(table byte, app journal.AppID, ep journal.EndpointID) *key {
	k.b[0] = table
	k.n = 1
	return k.raw(app[:]).raw(ep[:])
}

func (k *key) raw(b []byte) *key {
	k.n += copy(k.b[k.n:], b)
	return k
}

func (k *key) number(n uint64) *key {
	binary.BigEndian.PutUint64(k.b[k.n:], n)
	k.n += 8
	return k
}

func (k *key) state(s journal.DeliveryState) *key {
	k.b[k.n] = byte(s)
	k.n++
	return k
}

func (k *key) expiry(hour uint32, app journal.AppID, ep journal.EndpointID, block uint64) []byte {
	k.b[0] = tableExpiry
	binary.BigEndian.PutUint32(k.b[1:], hour)
	k.n = 5
	return k.raw(app[:]).raw(ep[:]).number(block).bytes()
}

const endpointKeySize = 1 + 16 + 16

// lastNumber is the number at the end of a key.
func lastNumber(k []byte) (uint64, error) {
	if len(k) < endpointKeySize+8 {
		return 0, damaged("key", len(k))
	}
	return binary.BigEndian.Uint64(k[len(k)-8:]), nil
}

func damaged(what string, size int) error {
	return fmt.Errorf("callbacks: %w: %s of %d bytes", projections.ErrCorrupt, what, size)
}

// A Progress says how far an endpoint has come.
type Progress struct {
	// Token is the highest lease token seen.
	Token uint64
	// Every event up to Through has a number up to Number, and an outcome.
	Number  uint64
	Through journal.Position
	// Highest is the highest number that has an outcome.
	Highest uint64
	// Recorded, Delivered and Failing are times in milliseconds since 1970: of
	// the last record, of the last success, and of the first failure since.
	Recorded, Delivered, Failing int64
	// Counts of deliveries by state.
	Done, Waiting, Parked, Held uint64
}

const progressSize = 1 + 11*8

func (p *Progress) append(dst []byte) []byte {
	be := binary.BigEndian
	dst = append(dst, form)
	for _, v := range [...]uint64{
		p.Token, p.Number, uint64(p.Through), p.Highest, uint64(p.Recorded), uint64(p.Delivered), uint64(p.Failing),
		p.Done, p.Waiting, p.Parked, p.Held,
	} {
		dst = be.AppendUint64(dst, v)
	}
	return dst
}

func parseProgress(v []byte) (Progress, error) {
	if len(v) != progressSize || v[0] != form {
		return Progress{}, damaged("progress", len(v))
	}
	at := func(i int) uint64 { return binary.BigEndian.Uint64(v[1+8*i:]) }
	return Progress{
		Token: at(0), Number: at(1), Through: journal.Position(at(2)), Highest: at(3),
		Recorded: int64(at(4)), Delivered: int64(at(5)), Failing: int64(at(6)),
		Done: at(7), Waiting: at(8), Parked: at(9), Held: at(10),
	}, nil
}

// count returns the counter of a state.
func (p *Progress) count(s journal.DeliveryState) *uint64 {
	switch s {
	case journal.DeliveryWaiting:
		return &p.Waiting
	case journal.DeliveryParked:
		return &p.Parked
	case journal.DeliveryHeld:
		return &p.Held
	default:
		return &p.Done
	}
}

// A Delivery is one event for one endpoint, with the outcome of its last
// attempt.
type Delivery struct {
	journal.Attempt

	// Recorded is when the last attempt was, in milliseconds since 1970.
	Recorded int64
	// Shard and Sequence say where its details are, see
	// journal.Callbacks.Details.
	Shard    uint16
	Sequence uint64
}

const deliverySize = 1 + 8 + 2 + 8 + journal.AttemptRest

func (d *Delivery) append(dst []byte) []byte {
	be := binary.BigEndian
	dst = append(dst, form)
	dst = be.AppendUint64(dst, uint64(d.Recorded))
	dst = be.AppendUint16(dst, d.Shard)
	dst = be.AppendUint64(dst, d.Sequence)
	return d.AppendRest(dst)
}

func parseDelivery(v []byte) (Delivery, error) {
	if len(v) != deliverySize || v[0] != form {
		return Delivery{}, damaged("delivery", len(v))
	}
	be := binary.BigEndian
	d := Delivery{Recorded: int64(be.Uint64(v[1:])), Shard: be.Uint16(v[9:]), Sequence: be.Uint64(v[11:])}
	var err error
	if d.Attempt, err = journal.ParseAttemptRest(v[19:]); err != nil {
		return d, damaged("delivery", len(v))
	}
	return d, nil
}

// A Replay says how far a replay has come.
type Replay struct {
	Recorded int64 // milliseconds since 1970
	// State is DeliveryDone at its end, DeliveryWaiting on the way, and
	// DeliveryParked when it was cancelled.
	State  journal.DeliveryState
	At     journal.Position
	Sent   uint64
	Failed uint16 // 65,535 stands for that and more
}

const replaySize = 1 + 8 + 1 + 8 + 8 + 2

func (r Replay) append(dst []byte) []byte {
	be := binary.BigEndian
	dst = append(dst, form)
	dst = be.AppendUint64(dst, uint64(r.Recorded))
	dst = append(dst, byte(r.State))
	dst = be.AppendUint64(dst, uint64(r.At))
	dst = be.AppendUint64(dst, r.Sent)
	return be.AppendUint16(dst, r.Failed)
}

func parseReplay(v []byte) (Replay, error) {
	if len(v) != replaySize || v[0] != form {
		return Replay{}, damaged("replay", len(v))
	}
	be := binary.BigEndian
	return Replay{
		Recorded: int64(be.Uint64(v[1:])), State: journal.DeliveryState(v[9]), At: journal.Position(be.Uint64(v[10:])),
		Sent: be.Uint64(v[18:]), Failed: be.Uint16(v[26:]),
	}, nil
}
