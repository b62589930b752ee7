package callbacks

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections"
)

// Config is what a view needs.
type Config struct {
	// Store is where the view is; required.
	Store projections.Store
	// Retention is how long deliveries are kept from their event's arrival; 0
	// means three days.
	Retention time.Duration
}

// A View reads the callback view, and is the projection that writes it. Its
// methods can be called from any goroutine.
type View struct {
	store     projections.Store
	retention time.Duration
	span      int64 // ms
	gate      atomic.Pointer[gateError]

	mu      sync.Mutex // guards applied and moved
	applied map[string]uint64
	moved   chan struct{} // closed when applied changes
}

type gateError struct{ err error }

var (
	_ projections.Gated    = (*View)(nil)
	_ projections.Follower = (*View)(nil)
)

// New returns the view in a store.
func New(cfg Config) (*View, error) {
	if cfg.Store == nil {
		return nil, errors.New("callbacks: a view needs a store")
	}
	if cfg.Retention <= 0 {
		cfg.Retention = 3 * 24 * time.Hour
	}
	span := max((cfg.Retention / spans).Truncate(time.Second), time.Second)
	if span/time.Second >= 1<<(32-formatBits) {
		return nil, fmt.Errorf("callbacks: a retention of %v is too long", cfg.Retention)
	}
	return &View{store: cfg.Store, retention: cfg.Retention, span: span.Milliseconds(), applied: make(map[string]uint64), moved: make(chan struct{})}, nil
}

// Name is part of [projections.Projection].
func (v *View) Name() string { return "callbacks" }

// Format is part of [projections.Projection].
//
// The length of a span is a part of it: with another one, the keys of table m would
// stand for other times.
func (v *View) Format() uint32 {
	if v.span == time.Hour.Milliseconds() {
		return format
	}
	return format | uint32(v.span/1000)<<formatBits //nolint:gosec // New bounds it
}

// Tables is part of [projections.Projection].
func (v *View) Tables() []byte {
	return []byte{tableEndpoints, tableDeliveries, tableDue, tableStates, tableExpiry, tableReplays}
}

// Gate is part of [projections.Gated].
func (v *View) Gate(err error) {
	if err == nil {
		v.gate.Store(nil)
		return
	}
	v.gate.Store(&gateError{err})
}

// Advanced is part of [projections.Follower].
func (v *View) Advanced(stream string, sequence uint64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.applied[stream] = sequence
	close(v.moved)
	v.moved = make(chan struct{})
}

// Ready returns nil when the view can be read.
func (v *View) Ready() error {
	if g := v.gate.Load(); g != nil {
		return fmt.Errorf("callbacks: %w", g.err)
	}
	return nil
}

// Wait returns when the view can be read and has applied the stream up to the
// sequence. It fails with [projections.ErrStopped] when that will not come.
func (v *View) Wait(ctx context.Context, stream string, sequence uint64) error {
	tick := time.NewTicker(time.Second) // the gate opens without a change
	defer tick.Stop()
	for {
		v.mu.Lock()
		at, moved := v.applied[stream], v.moved
		v.mu.Unlock()
		err := v.Ready()
		if at >= sequence && err == nil {
			return nil
		}
		if errors.Is(err, projections.ErrStopped) {
			return err
		}
		select {
		case <-moved:
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("callbacks: wait for the view: %w", ctx.Err())
		}
	}
}

// Apply is part of [projections.Projection].
func (v *View) Apply(_ context.Context, txn projections.Txn, stream string, batch []journal.Sealed) error {
	shard, err := strconv.ParseUint(stream[strings.LastIndexByte(stream, '_')+1:], 10, 16)
	if err != nil {
		return fmt.Errorf("callbacks: stream %s has no shard", stream)
	}
	f := folder{txn: txn, view: v, shard: uint16(shard), progress: make(map[endpointKey]*Progress)}
	for i := range batch {
		if err := f.apply(&batch[i]); err != nil {
			return &projections.RecordError{
				Projection: v.Name(), Stream: stream, Sequence: batch[i].Sequence, App: batch[i].App, Position: batch[i].Position, Err: err,
			}
		}
	}
	f.finish()
	return nil
}

// hour is the number since 1970 of the span of time that a time in milliseconds
// lies in. Spans are an hour long when deliveries are kept for three days, and no
// shorter than a second, so that their numbers fit the keys.
func (v *View) hour(ms int64) uint32 {
	return uint32(min(max(ms/v.span, 0), 1<<32-2))
}

// spans is the number of spans of the retention.
const spans = 72

type endpointKey struct {
	app journal.AppID
	ep  journal.EndpointID
}

// A folder is one transaction of Apply.
type folder struct {
	txn      projections.Txn
	view     *View
	shard    uint16
	progress map[endpointKey]*Progress
	expiry   map[string][]byte // values of table m that were read or written
	value    []byte
}

func (f *folder) apply(s *journal.Sealed) error {
	a, _, err := journal.ParseAttempts(s.Record)
	if err != nil {
		return err
	}
	p, err := f.load(endpointKey{s.App, a.Endpoint})
	if err != nil {
		return err
	}
	if a.Token < p.Token {
		return nil // its lease had been taken
	}
	p.Token = a.Token
	p.Recorded = max(p.Recorded, a.Millis)
	if a.Kind == journal.AttemptsReplay {
		return f.replay(s.App, &a)
	}
	for i := range a.Entries {
		if err := f.entry(s, p, &a, &a.Entries[i]); err != nil {
			return err
		}
	}
	p.Number, p.Through = max(p.Number, a.Number), max(p.Through, a.Through)
	return nil
}

func (f *folder) load(k endpointKey) (*Progress, error) {
	if p := f.progress[k]; p != nil {
		return p, nil
	}
	p, err := loadProgress(f.txn, k.app, k.ep)
	if err != nil {
		return nil, err
	}
	f.progress[k] = &p
	return &p, nil
}

func loadProgress(r projections.Reader, app journal.AppID, ep journal.EndpointID) (Progress, error) {
	var k key
	var room [progressSize]byte
	v, ok, err := r.Get(room[:0], k.endpoint(tableEndpoints, app, ep).bytes())
	if err != nil || !ok {
		return Progress{}, err
	}
	return parseProgress(v)
}

// entry applies one outcome.
func (f *folder) entry(s *journal.Sealed, p *Progress, a *journal.Attempts, e *journal.Attempt) error {
	var k key
	known := false             // and expires when it did
	if e.Number <= p.Highest { // otherwise there can be none
		v, ok, err := f.txn.Get(f.value[:0], k.endpoint(tableDeliveries, s.App, a.Endpoint).number(e.Number).bytes())
		if err != nil {
			return err
		}
		f.value = v
		if ok {
			old, err := parseDelivery(v)
			if err != nil {
				return err
			}
			if old.State == journal.DeliveryDone {
				return nil
			}
			known = old.Arrived == e.Arrived
			f.leave(s.App, a.Endpoint, e.Number, &old)
			*p.count(old.State)--
		}
	}
	p.Highest = max(p.Highest, e.Number)
	d := Delivery{Attempt: *e, Recorded: a.Millis, Shard: f.shard, Sequence: s.Sequence}
	f.value = d.append(f.value[:0])
	f.txn.Set(k.endpoint(tableDeliveries, s.App, a.Endpoint).number(e.Number).bytes(), f.value)
	*p.count(e.State)++
	switch e.State {
	case journal.DeliveryDone:
		p.Delivered, p.Failing = max(p.Delivered, a.Millis), 0
	case journal.DeliveryWaiting:
		f.txn.Set(k.endpoint(tableDue, s.App, a.Endpoint).number(uint64(e.Due)).number(e.Number).bytes(), nil)
		fallthrough
	default:
		if e.Attempts > 0 && p.Failing == 0 {
			p.Failing = a.Millis
		}
		f.txn.Set(k.endpoint(tableStates, s.App, a.Endpoint).state(e.State).number(e.Number).bytes(), nil)
	}
	if known {
		return nil
	}
	return f.expires(s.App, a.Endpoint, e)
}

// leave takes a delivery out of the tables of its state.
func (f *folder) leave(app journal.AppID, ep journal.EndpointID, n uint64, old *Delivery) {
	var k key
	f.txn.Delete(k.endpoint(tableStates, app, ep).state(old.State).number(n).bytes())
	if old.State == journal.DeliveryWaiting {
		f.txn.Delete(k.endpoint(tableDue, app, ep).number(uint64(old.Due)).number(n).bytes())
	}
}

// expires notes when the delivery goes.
func (f *folder) expires(app journal.AppID, ep journal.EndpointID, e *journal.Attempt) error {
	var k key
	b := k.expiry(f.view.hour(e.Arrived+f.view.retention.Milliseconds())+1, app, ep, e.Number/blockSize)
	lows, ok := f.expiry[string(b)]
	if !ok {
		v, _, err := f.txn.Get(nil, b)
		if err != nil {
			return err
		}
		lows = v
	}
	if f.expiry == nil {
		f.expiry = make(map[string][]byte)
	}
	f.expiry[string(b)] = append(lows, byte(e.Number))
	return nil
}

func (f *folder) replay(app journal.AppID, a *journal.Attempts) error {
	e := &a.Entries[0]
	if e.State == journal.DeliveryHeld {
		return fmt.Errorf("callbacks: %w: state of a replay", journal.ErrCorrupt)
	}
	r := Replay{Recorded: a.Millis, State: e.State, At: e.Position, Sent: e.Number, Failed: e.Attempts}
	var k key
	f.txn.Set(k.endpoint(tableReplays, app, a.Endpoint).raw(a.Replay[:]).bytes(), r.append(nil))
	return nil
}

// finish writes what was gathered.
func (f *folder) finish() {
	var k key
	for at, p := range f.progress {
		f.txn.Set(k.endpoint(tableEndpoints, at.app, at.ep).bytes(), p.append(nil))
	}
	for at, lows := range f.expiry {
		f.txn.Set([]byte(at), lows)
	}
}

// AppTables is part of [projections.PerApp].
func (v *View) AppTables() []byte {
	return []byte{tableEndpoints, tableDeliveries, tableDue, tableStates, tableReplays}
}
