package history

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections"
)

// New returns the view in a store.
func New(cfg Config) (*View, error) {
	if cfg.Store == nil {
		return nil, errors.New("history: a view needs a store")
	}
	plans := cfg.Plans
	if plans == nil {
		plans = journal.DefaultPlans()
	}
	if cfg.Hour == 0 {
		cfg.Hour = time.Hour
	}
	if cfg.Hour < time.Second || cfg.Hour > time.Hour || cfg.Hour%time.Second != 0 {
		return nil, fmt.Errorf("history: an hour of %v: whole seconds up to an hour", cfg.Hour)
	}
	v := &View{
		store: cfg.Store, hours: hours(cfg.Hour.Milliseconds()),
		retention: make(map[string]time.Duration), applied: make(map[string]uint64),
	}
	for _, p := range plans {
		if err := p.Validate(); err != nil {
			return nil, fmt.Errorf("history: %w", err)
		}
		v.retention[p.ID] = p.Retention
	}
	return v, nil
}

// Name is part of [projections.Projection].
func (v *View) Name() string { return "history" }

// Format is part of [projections.Projection].
//
// The width of what it calls an hour is a part of it: with another one, the keys
// would stand for other times.
func (v *View) Format() uint32 {
	if v.hours == hours(time.Hour.Milliseconds()) {
		return format
	}
	return format | uint32(v.hours/1000)<<formatBits //nolint:gosec // at most an hour
}

// Tables is part of [projections.Projection].
func (v *View) Tables() []byte {
	return []byte{
		tableEvents, tableConversations, tableByConv, tableIDs, tableUsers,
		tableTargets, tableTimes, tableExpiry, tableMoves, tableTrimmed,
	}
}

// Gate is part of [projections.Gated].
func (v *View) Gate(err error) {
	if err == nil {
		v.gate.Store(nil)
		return
	}
	v.gate.Store(&gateError{err})
}

// open returns the error that keeps readers out.
func (v *View) open() error {
	if g := v.gate.Load(); g != nil {
		return fmt.Errorf("history: %w", g.err)
	}
	return nil
}

// Advanced is part of [projections.Follower].
func (v *View) Advanced(stream string, sequence uint64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.applied[stream] = sequence
}

// Applied returns the last sequence of the stream that the view has. It is part
// of [journal.Index].
func (v *View) Applied(stream string) uint64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.applied[stream]
}

// Apply is part of [projections.Projection].
func (v *View) Apply(_ context.Context, txn projections.Txn, stream string, batch []journal.Sealed) error {
	w := writer{
		hours:  v.hours,
		txn:    txn,
		times:  make(map[timeKey]span),
		expiry: make(map[expiryKey][]byte),
	}
	for i := range batch {
		s := &batch[i]
		retention, ok := v.retention[s.Plan]
		if !ok {
			return recordError(stream, s, fmt.Errorf("the plan %q is not in the table", s.Plan))
		}
		if err := v.role(&w, s, retention); err != nil {
			return recordError(stream, s, err)
		}
	}
	return w.flush()
}

// role applies a record as what it is.
func (v *View) role(w *writer, s *journal.Sealed, retention time.Duration) error {
	switch s.Role {
	case journal.RoleOpen:
		return w.opened(s)
	case journal.RoleClose:
		return w.closed(s)
	case journal.RoleCopy:
		before, ok := v.retention[s.From]
		if !ok {
			return fmt.Errorf("the plan %q is not in the table", s.From)
		}
		return w.copied(s, before, retention)
	case journal.RoleEvent:
		return w.apply(s, retention)
	default:
		return nil // seals are the runner's
	}
}

func recordError(stream string, s *journal.Sealed, err error) error {
	if errors.Is(err, projections.ErrCorrupt) || errors.Is(err, projections.ErrUnavailable) {
		return err // of the store, not of the record
	}
	return &projections.RecordError{
		Projection: "history", Stream: stream, Sequence: s.Sequence,
		App: s.App, Position: s.Position, Err: err,
	}
}

// A writer applies one batch. It keeps the values that every event changes, and
// writes them once at the end.
type writer struct {
	txn    projections.Txn
	hours  hours
	times  map[timeKey]span
	expiry map[expiryKey][]byte // what is to be appended
	key    key
	value  []byte // scratch for what is written
	stored []byte // scratch for what is read
}

type timeKey struct {
	app  journal.AppID
	hour uint32
}

func (w *writer) get(key []byte) ([]byte, bool, error) {
	v, ok, err := w.txn.Get(w.stored[:0], key)
	w.stored = v
	return v, ok, err
}

func (w *writer) apply(s *journal.Sealed, retention time.Duration) error {
	h, envelope, err := journal.ParseRecord(s.Record)
	if err != nil {
		return err
	}
	eh, err := kms.ParseHeader(envelope)
	if err != nil {
		return err
	}
	v, ok, err := w.get(w.key.id(s.App, h.Event))
	if err != nil {
		return err
	}
	awaited := false
	if ok {
		p, err := parsePlace(v)
		if err != nil {
			return err
		}
		if p.kind != 0 {
			return nil // the first event with an id stands
		}
		awaited = true
	}
	w.value = place{kind: h.Type, position: s.Position, conversation: h.Conversation}.append(w.value[:0])
	w.txn.Set(w.key.id(s.App, h.Event), w.value)

	e := event{stored: s.Stored.UnixMilli(), record: s.Record}
	if s.Role == journal.RoleCopy {
		e.copied = s.Generation
	}
	w.index(s, &h, eh.Subject, e, retention)
	switch h.Type {
	case journal.MessageSent:
		err = w.message(s, &h, &e, awaited)
	case journal.MessageEdited, journal.MessageRecalled:
		err = w.change(s, &h, &e)
	default:
		// Nothing else changes a message.
	}
	if err != nil {
		return err
	}
	w.setEvent(s.App, s.Position, e)
	return nil
}

// index writes the keys that lead to the event.
func (w *writer) index(s *journal.Sealed, h *journal.Header, sender kms.Tag, e event, retention time.Duration) {
	w.value = append(w.value[:0], byte(h.Type))
	if !isZero(h.Conversation) {
		w.txn.Set(w.key.indexed(tableByConv, s.App, h.Conversation, s.Position), w.value)
	}
	w.txn.Set(w.key.indexed(tableUsers, s.App, sender, s.Position), w.value)
	if !isZero(h.Peer) && h.Peer != sender {
		w.txn.Set(w.key.indexed(tableUsers, s.App, h.Peer, s.Position), w.value)
	}

	at := timeKey{s.App, w.hours.of(h.Millis)}
	t, ok := w.times[at]
	if !ok {
		t = span{low: maxPosition}
	}
	t.low, t.high, t.count = min(t.low, s.Position), max(t.high, s.Position), t.count+1
	w.times[at] = t

	end := w.hours.of(e.clock()+retention.Milliseconds()) + 1
	x := expiryKey{hour: end, app: s.App, block: uint64(s.Position) >> 8}
	w.expiry[x] = append(w.expiry[x], byte(s.Position))
}

func isZero(t kms.Tag) bool { return t == kms.Tag{} }

func (w *writer) setEvent(app journal.AppID, p journal.Position, e event) {
	w.value = e.append(w.value[:0])
	w.txn.Set(w.key.event(app, p), w.value)
}

func (w *writer) setFolded(app journal.AppID, conversation kms.Tag, p journal.Position, f folded) {
	w.value = f.append(w.value[:0])
	w.txn.Set(w.key.indexed(tableConversations, app, conversation, p), w.value)
}

// message writes a message, folded with what came before it.
func (w *writer) message(s *journal.Sealed, h *journal.Header, e *event, awaited bool) error {
	f := folded{stored: e.stored, copied: e.copied, first: s.Record}
	if awaited && !isZero(h.Conversation) {
		if err := w.foldAwaited(s.App, h, &f); err != nil {
			return err
		}
	}
	if f.flags&flagRecalled != 0 {
		if err := e.bury(); err != nil {
			return err
		}
		f.first = e.record
	}
	if !isZero(h.Conversation) {
		w.setFolded(s.App, h.Conversation, s.Position, f)
	}
	return nil
}

// A change is an entry of table G: an edit or a recall.
type change struct {
	kind         journal.Type
	position     journal.Position
	conversation kms.Tag
}

// changes returns the edits and recalls of a target in its own conversation.
func (w *writer) changes(app journal.AppID, target, conversation kms.Tag) ([]change, error) {
	var prefix, from, to key
	lo, hi := spanOf(prefix.app(tableTargets, app).tag(target).bytes(), 0, 0, &from, &to)
	c := w.txn.Iterate(lo, hi, false)
	defer c.Close()
	var list []change
	for c.Next() {
		p, err := lastPosition(c.Key())
		if err != nil {
			return nil, err
		}
		v := c.Value()
		if len(v) != 17 {
			return nil, damaged("change", len(v))
		}
		ch := change{kind: journal.Type(v[0]), position: p}
		copy(ch.conversation[:], v[1:])
		if ch.conversation == conversation {
			list = append(list, ch)
		}
	}
	return list, c.Close()
}

// load returns an event of table E; it is valid until the next load.
func (w *writer) load(app journal.AppID, p journal.Position) (event, bool, error) {
	v, ok, err := w.get(w.key.event(app, p))
	if err != nil || !ok {
		return event{}, false, err
	}
	e, err := parseEvent(v)
	return e, err == nil, err
}

// foldAwaited folds the edits and recalls that came before their target: the
// first recall, or else the newest edit.
func (w *writer) foldAwaited(app journal.AppID, h *journal.Header, f *folded) error {
	list, err := w.changes(app, h.Event, h.Conversation)
	if err != nil {
		return err
	}
	var use change
	for _, ch := range list {
		if use.kind == journal.MessageRecalled {
			break
		}
		if ch.kind == journal.MessageRecalled || ch.position > use.position {
			use = ch
		}
	}
	if use.kind == 0 {
		return nil
	}
	e, ok, err := w.load(app, use.position)
	if err != nil || !ok {
		return err // an edit that has expired is gone
	}
	f.changed = use.position
	f.second = append([]byte(nil), e.record...)
	if use.kind != journal.MessageRecalled {
		f.flags |= flagEdited
		return nil
	}
	f.flags |= flagRecalled
	return w.buryEdits(app, list)
}

// buryEdits leaves a tombstone of each edit of a recalled message: it has the
// message's content.
func (w *writer) buryEdits(app journal.AppID, list []change) error {
	for _, ch := range list {
		if ch.kind != journal.MessageEdited {
			continue
		}
		e, ok, err := w.load(app, ch.position)
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		if err := e.bury(); err != nil {
			return err
		}
		w.setEvent(app, ch.position, e)
	}
	return nil
}

// change folds an edit or a recall into its target, or notes it for when the
// target comes.
func (w *writer) change(s *journal.Sealed, h *journal.Header, e *event) error {
	if isZero(h.Target) {
		return nil
	}
	w.value = append(w.value[:0], byte(h.Type))
	w.value = append(w.value, h.Conversation[:]...)
	w.txn.Set(w.key.indexed(tableTargets, s.App, h.Target, s.Position), w.value)

	v, ok, err := w.get(w.key.id(s.App, h.Target))
	if err != nil {
		return err
	}
	var target place
	if ok {
		if target, err = parsePlace(v); err != nil {
			return err
		}
	}
	if target.kind == 0 {
		target.position = max(target.position, s.Position)
		w.value = target.append(w.value[:0])
		w.txn.Set(w.key.id(s.App, h.Target), w.value)
		return nil
	}
	if target.kind != journal.MessageSent || target.conversation != h.Conversation || isZero(h.Conversation) {
		return nil
	}
	v, ok, err = w.get(w.key.indexed(tableConversations, s.App, target.conversation, target.position))
	if err != nil {
		return err
	}
	if !ok {
		return damaged("missing message", 0)
	}
	f, err := parseFolded(v)
	if err != nil {
		return err
	}
	if h.Type == journal.MessageEdited {
		return w.edit(s, target, f, e)
	}
	return w.recall(s, h, target, f)
}

func (w *writer) edit(s *journal.Sealed, target place, f folded, e *event) error {
	if f.flags&flagRecalled != 0 {
		return e.bury()
	}
	if s.Position < f.changed {
		return nil // an older edit that came later
	}
	f.flags |= flagEdited
	f.changed, f.second = s.Position, s.Record
	w.setFolded(s.App, target.conversation, target.position, f)
	return nil
}

func (w *writer) recall(s *journal.Sealed, h *journal.Header, target place, f folded) error {
	if f.flags&flagRecalled != 0 && f.changed < s.Position {
		return nil // the first recall stands
	}
	before := f.flags
	if before&flagRecalled == 0 {
		e := event{stored: f.stored, copied: f.copied, record: f.first}
		if err := e.bury(); err != nil {
			return err
		}
		w.setEvent(s.App, target.position, e)
	}
	f.flags = flagRecalled
	f.changed, f.first, f.second = s.Position, f.first[:journal.HeaderSize], s.Record
	w.setFolded(s.App, target.conversation, target.position, f)
	if before&flagEdited == 0 {
		return nil
	}
	list, err := w.changes(s.App, h.Target, target.conversation)
	if err != nil {
		return err
	}
	return w.buryEdits(s.App, list)
}

// flush writes what was gathered of the tables T and X.
func (w *writer) flush() error {
	for at, add := range w.times {
		k := w.key.time(at.app, at.hour)
		v, ok, err := w.get(k)
		if err != nil {
			return err
		}
		if ok {
			old, err := parseSpan(v)
			if err != nil {
				return err
			}
			add.low, add.high, add.count = min(add.low, old.low), max(add.high, old.high), add.count+old.count
		}
		w.value = add.append(w.value[:0])
		w.txn.Set(k, w.value)
	}
	for x, add := range w.expiry {
		k := w.key.expiry(x)
		v, _, err := w.get(k)
		if err != nil {
			return err
		}
		w.value = append(append(w.value[:0], v...), add...)
		w.txn.Set(k, w.value)
	}
	return nil
}
