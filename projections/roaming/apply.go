package roaming

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections"
)

// Apply is part of [projections.Projection].
func (v *View) Apply(_ context.Context, txn projections.Txn, stream string, batch []journal.Sealed) error {
	w := writer{txn: txn, ends: make(map[indexEnd]journal.Position), rows: make(map[rowKey]*dirtyRow)}
	if err := w.lookForAwaited(); err != nil {
		return err
	}
	for i := range batch {
		s := &batch[i]
		retention, ok := v.retention[s.Plan]
		err := error(nil)
		if !ok {
			err = fmt.Errorf("the plan %q is not in the table", s.Plan)
		} else {
			w.stored = s.Stored.UnixMilli()
			w.until = untilOf(w.stored, retention)
			err = v.role(&w, s)
		}
		if err != nil {
			return recordError(stream, s, err)
		}
	}
	return w.flush()
}

// untilOf is when something that arrived at a time has left the retention,
// rounded up so that what goes together lies together: to an hour, or less when
// the retention is short.
func untilOf(stored int64, retention time.Duration) int64 {
	b := max(min(time.Hour, retention/72).Milliseconds(), 1)
	end := stored + retention.Milliseconds()
	return (end+b-1)/b*b + b
}

func recordError(stream string, s *journal.Sealed, err error) error {
	if errors.Is(err, projections.ErrCorrupt) || errors.Is(err, projections.ErrUnavailable) {
		return err // of the store, not of the record
	}
	return &projections.RecordError{
		Projection: name, Stream: stream, Sequence: s.Sequence,
		App: s.App, Position: s.Position, Err: err,
	}
}

// A writer applies one batch.
type writer struct {
	txn           projections.Txn
	stored, until int64                         // of the record
	ends          map[indexEnd]journal.Position // what table h gets at the end
	rows          map[rowKey]*dirtyRow          // rows that the batch has touched
	awaits        bool                          // a recall has come before its message
	key           key
	value         []byte // scratch for what is written
	found         []byte // scratch for what is read
}

type rowKey struct {
	app                journal.AppID
	conversation, user kms.Tag
}

// A dirtyRow is a row as it will be written: the same few users send most of a
// batch, and a row is read and written once.
type dirtyRow struct {
	row

	fresh   bool
	changed bool
	expires []int64 // the times at which a part of it goes
}

// lookForAwaited finds out whether messages need to look for earlier recalls of
// themselves, which is rare.
func (w *writer) lookForAwaited() error {
	var from, to key
	c := w.txn.Iterate(from.table(tableAwaited).bytes(), to.table(tableAwaited+1).bytes(), false)
	defer c.Close()
	w.awaits = c.Next()
	return c.Close()
}

type indexEnd struct {
	until        int64
	app          journal.AppID
	conversation kms.Tag
}

func (w *writer) get(key []byte) ([]byte, bool, error) {
	v, ok, err := w.txn.Get(w.found[:0], key)
	w.found = v
	return v, ok, err
}

func isZero(t kms.Tag) bool { return t == kms.Tag{} }

func (w *writer) apply(s *journal.Sealed) error {
	h, envelope, err := journal.ParseRecord(s.Record)
	if err != nil {
		return err
	}
	eh, err := kms.ParseHeader(envelope)
	if err != nil {
		return err
	}
	sender := eh.Subject
	switch h.Type {
	case journal.UserErased:
		return w.forget(s.App, h.Peer)
	case journal.InboxAcked:
		return w.acknowledge(s, &h, sender)
	default:
		// The others say nothing without a conversation.
	}
	if isZero(h.Conversation) {
		return nil
	}
	switch h.Type {
	case journal.MemberJoined, journal.MemberLeft:
		return w.membership(s, &h, sender)
	case journal.MessageSent, journal.MessageEdited, journal.MessageRecalled:
		first, err := w.event(s, &h, sender)
		if err != nil || !first {
			return err
		}
	case journal.ReceiptDelivered, journal.ReceiptRead:
		if err := w.receipt(s, &h, sender); err != nil {
			return err
		}
	default:
		// Nothing else is shown to users.
		return nil
	}
	read := journal.Position(0)
	if h.Type == journal.MessageSent {
		read = s.Position
	}
	if err := w.touch(s, h.Conversation, sender, read); err != nil {
		return err
	}
	if !isZero(h.Peer) && h.Peer != sender {
		return w.touch(s, h.Conversation, h.Peer, 0)
	}
	return nil
}

// place looks an event up in table e.
func (w *writer) place(app journal.AppID, event kms.Tag) (place, bool, error) {
	v, ok, err := w.get(w.key.id(app, event))
	if err != nil || !ok {
		return place{}, false, err
	}
	p, err := parsePlace(v)
	return p, err == nil, err
}

func (w *writer) setPlace(s *journal.Sealed, h *journal.Header) {
	w.value = place{h.Type, s.Position, h.Conversation}.append(w.value[:0])
	w.txn.Set(w.key.id(s.App, h.Event), w.value)
}

func (w *writer) setEntry(app journal.AppID, conversation kms.Tag, p journal.Position, e entry) {
	w.value = e.append(w.value[:0])
	w.txn.Set(w.key.index(app, conversation, p), w.value)
}

// event writes a message, an edit or a recall, unless it is there: first is
// false then.
func (w *writer) event(s *journal.Sealed, h *journal.Header, sender kms.Tag) (first bool, err error) {
	if _, ok, err := w.place(s.App, h.Event); err != nil || ok {
		return false, err
	}
	w.setPlace(s, h)
	e := entry{kind: h.Type, clock: min(h.Millis, w.stored), sender: sender, event: h.Event}
	switch h.Type {
	case journal.MessageSent:
		if !w.awaits {
			break
		}
		_, recalled, err := w.get(w.key.awaited(s.App, h.Event, h.Conversation))
		if err != nil {
			return false, err
		}
		if recalled {
			e.flags |= flagRecalled
		}
	case journal.MessageRecalled:
		if err := w.recall(s.App, h); err != nil {
			return false, err
		}
	default:
		// An edit changes nothing here.
	}
	w.setEntry(s.App, h.Conversation, s.Position, e)
	end := indexEnd{w.until, s.App, h.Conversation}
	w.ends[end] = max(w.ends[end], s.Position)
	return true, nil
}

// recall flags the message, or notes the recall for when the message comes.
func (w *writer) recall(app journal.AppID, h *journal.Header) error {
	p, ok, err := w.place(app, h.Target)
	if err != nil {
		return err
	}
	if !ok {
		w.awaits = true
		w.txn.Set(w.key.awaited(app, h.Target, h.Conversation), nil)
		w.txn.Set(w.key.expiry(w.until, expireAwaited, app).tag(h.Target).tag(h.Conversation).bytes(), nil)
		return nil
	}
	if p.kind != journal.MessageSent || p.conversation != h.Conversation {
		return nil
	}
	e, ok, err := w.load(app, p)
	if err != nil || !ok {
		return err
	}
	e.flags |= flagRecalled
	w.setEntry(app, p.conversation, p.position, e)
	return nil
}

// load returns the entry of a place.
func (w *writer) load(app journal.AppID, p place) (entry, bool, error) {
	v, ok, err := w.get(w.key.index(app, p.conversation, p.position))
	if err != nil || !ok {
		return entry{}, false, err
	}
	e, err := parseEntry(v)
	return e, err == nil, err
}

// receipt counts a receipt of a message, once per user.
func (w *writer) receipt(s *journal.Sealed, h *journal.Header, user kms.Tag) error {
	p, ok, err := w.place(s.App, h.Target)
	if err != nil || !ok || p.kind != journal.MessageSent || p.conversation != h.Conversation {
		return err
	}
	if h.Type == journal.ReceiptRead {
		if err := w.touch(s, h.Conversation, user, p.position); err != nil {
			return err
		}
	}
	e, ok, err := w.load(s.App, p)
	if err != nil || !ok || e.sender == user {
		return err
	}
	v, ok, err := w.get(w.key.receipts(s.App, p.conversation, p.position).tag(user).bytes())
	if err != nil {
		return err
	}
	before := byte(0)
	if ok {
		if len(v) != 1 {
			return damaged("receipt", len(v))
		}
		before = v[0]
	}
	bits := before | bitDelivered
	if h.Type == journal.ReceiptRead {
		bits |= bitRead
	}
	if bits == before {
		return nil
	}
	if before&bitDelivered == 0 {
		e.delivered++
	}
	if bits&^before&bitRead != 0 {
		e.read++
	}
	w.value = append(w.value[:0], bits)
	w.txn.Set(w.key.receipts(s.App, p.conversation, p.position).tag(user).bytes(), w.value)
	w.setEntry(s.App, p.conversation, p.position, e)
	return nil
}

// row returns the row of a user in a conversation, new if there is none.
func (w *writer) row(app journal.AppID, conversation, user kms.Tag) (*dirtyRow, error) {
	k := rowKey{app, conversation, user}
	if r := w.rows[k]; r != nil {
		return r, nil
	}
	v, ok, err := w.get(w.key.member(app, conversation, user))
	if err != nil {
		return nil, err
	}
	r := &dirtyRow{fresh: !ok}
	if ok {
		if r.row, err = parseRow(v); err != nil {
			return nil, err
		}
	}
	w.rows[k] = r
	return r, nil
}

// note marks a row as changed. A part of it goes at until.
func (r *dirtyRow) note(until int64) {
	r.changed = true
	if n := len(r.expires); n == 0 || r.expires[n-1] != until {
		r.expires = append(r.expires, until)
	}
}

// flushRows writes the rows, and beside a new one the key that finds it by the
// user.
func (w *writer) flushRows() {
	for k, r := range w.rows {
		if !r.changed {
			continue
		}
		w.value = r.append(w.value[:0])
		w.txn.Set(w.key.member(k.app, k.conversation, k.user), w.value)
		if r.fresh {
			w.txn.Set(w.key.ofUser(k.app, k.user, k.conversation), nil)
		}
		for _, until := range r.expires {
			w.txn.Set(w.key.expiry(until, expireRow, k.app).tag(k.conversation).tag(k.user).bytes(), nil)
		}
	}
	clear(w.rows)
}

// touch notes that a user is sender or recipient of an event, and that it has
// read up to a position.
func (w *writer) touch(s *journal.Sealed, conversation, user kms.Tag, read journal.Position) error {
	r, err := w.row(s.App, conversation, user)
	if err != nil {
		return err
	}
	if r.took.until != w.until {
		r.note(w.until)
	}
	r.changed = true
	r.took = mark{position: max(r.took.position, s.Position), stored: max(r.took.stored, w.stored), until: max(r.took.until, w.until)}
	r.read = max(r.read, read)
	return nil
}

// membership notes who joined or left.
func (w *writer) membership(s *journal.Sealed, h *journal.Header, user kms.Tag) error {
	if _, ok, err := w.place(s.App, h.Event); err != nil || ok {
		return err
	}
	w.setPlace(s, h)
	w.txn.Set(w.key.expiry(w.until, expireID, s.App).tag(h.Event).bytes(), nil)
	r, err := w.row(s.App, h.Conversation, user)
	if err != nil {
		return err
	}
	if r.member.position > s.Position {
		return nil // what a change of plan copies keeps its position
	}
	r.member = mark{h.Type, s.Position, w.stored, w.until}
	r.note(w.until)
	return nil
}

// acknowledge moves a user's inbox forward.
func (w *writer) acknowledge(s *journal.Sealed, h *journal.Header, user kms.Tag) error {
	p, ok, err := w.place(s.App, h.Target)
	if err != nil || !ok {
		return err
	}
	v, ok, err := w.get(w.key.ack(s.App, user))
	if err != nil {
		return err
	}
	var a ack
	if ok {
		if a, err = parseAck(v); err != nil {
			return err
		}
	}
	if p.position < a.position || p.position == a.position && w.until <= a.until {
		return nil
	}
	w.value = ack{p.position, w.stored, w.until}.append(w.value[:0])
	w.txn.Set(w.key.ack(s.App, user), w.value)
	w.txn.Set(w.key.expiry(w.until, expireAck, s.App).tag(user).bytes(), nil)
	return nil
}

// forget deletes what is kept of an erased user.
func (w *writer) forget(app journal.AppID, user kms.Tag) error {
	w.flushRows() // what follows looks for them
	var prefix, to key
	from := prefix.table(tableOfUser).app(app).tag(user).bytes()
	c := w.txn.Iterate(from, past(from, &to), false)
	defer c.Close()
	for c.Next() {
		if len(c.Key()) != 1+appSize+2*tagSize {
			return damaged("key", len(c.Key()))
		}
		w.txn.Delete(w.key.member(app, lastTag(c.Key()), user))
	}
	if err := c.Close(); err != nil {
		return err
	}
	w.txn.DeleteRange(from, past(from, &to))
	w.txn.Delete(w.key.ack(app, user))
	return nil
}

// flush writes what was gathered.
func (w *writer) flush() error {
	w.flushRows()
	for end, position := range w.ends {
		k := w.key.expiry(end.until, expireIndex, end.app).tag(end.conversation).bytes()
		v, ok, err := w.get(k)
		if err != nil {
			return err
		}
		if ok {
			if len(v) != 8 {
				return damaged("expiry", len(v))
			}
			position = max(position, lastPosition(v))
		}
		var room key
		w.txn.Set(k, room.number(uint64(position)).bytes())
	}
	return nil
}
