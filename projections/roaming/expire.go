package roaming

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections"
)

// expireKeys bounds a transaction of Expire: applying waits for it.
const expireKeys = 4096

// Expire removes what has left the retention of the plan of the stream that it
// came from, by its arrival. It returns the number of events. Its cost is that of
// what it removes, whatever else is stored. Call it from time to time; readers
// are shown what has expired neither before nor after.
func (v *View) Expire(ctx context.Context, now time.Time) (int, error) {
	total := 0
	for {
		if err := ctx.Err(); err != nil {
			return total, err
		}
		e := expirer{now: now.UnixMilli()}
		err := v.store.Update(func(txn projections.Txn) error {
			e.txn = txn
			return e.run()
		})
		if err != nil {
			return total, fmt.Errorf("roaming: expire: %w", err)
		}
		total += e.events
		if e.done {
			return total, nil
		}
	}
}

// An expirer is one transaction of Expire.
type expirer struct {
	txn    projections.Txn
	now    int64
	events int
	keys   int  // looked at
	done   bool // nothing is left
	key    key
	value  []byte
}

// A due is a key of table h whose time has come.
type due struct {
	key, value []byte
	kind       byte
	app        journal.AppID
	rest       []byte
}

func (e *expirer) run() error {
	list, err := e.list()
	if err != nil {
		return err
	}
	for _, d := range list {
		if e.keys >= expireKeys {
			e.done = false
			return nil
		}
		e.keys++
		gone, err := e.remove(d)
		if err != nil {
			return err
		}
		if !gone {
			e.done = false
			return nil // the rest of it in the next transaction
		}
		e.txn.Delete(d.key)
	}
	return nil
}

// list reads what is due, before anything is written.
func (e *expirer) list() ([]due, error) {
	e.done = true
	var from, to key
	c := e.txn.Iterate(from.table(tableExpiry).bytes(), to.table(tableExpiry).number(uint64(e.now)+1).bytes(), false)
	defer c.Close()
	var list []due
	for c.Next() {
		if len(list) == expireKeys {
			e.done = false
			break
		}
		d := due{key: bytes.Clone(c.Key()), value: bytes.Clone(c.Value())}
		if len(d.key) < 10+appSize {
			return nil, damaged("expiry key", len(d.key))
		}
		d.kind, d.app, d.rest = d.key[9], journal.AppID(d.key[10:10+appSize]), d.key[10+appSize:]
		want, ok := map[byte]int{
			expireIndex: tagSize, expireRow: 2 * tagSize, expireAck: tagSize, expireID: tagSize, expireAwaited: 2 * tagSize,
		}[d.kind]
		if !ok || len(d.rest) != want {
			return nil, damaged("expiry key", len(d.key))
		}
		list = append(list, d)
	}
	return list, c.Close()
}

// remove removes what a key stands for; gone is false if there is more of it.
func (e *expirer) remove(d due) (gone bool, err error) {
	first := kms.Tag(d.rest[:tagSize])
	switch d.kind {
	case expireIndex:
		if len(d.value) != 8 {
			return false, damaged("expiry", len(d.value))
		}
		return e.removeIndex(d.app, first, journal.Position(binary.BigEndian.Uint64(d.value)))
	case expireRow:
		return true, e.removeRow(d.app, first, lastTag(d.rest))
	case expireAck:
		return true, e.removeAck(d.app, first)
	case expireID:
		e.txn.Delete(e.key.id(d.app, first))
	case expireAwaited:
		e.txn.Delete(e.key.awaited(d.app, first, lastTag(d.rest)))
	}
	return true, nil
}

// removeIndex removes the events of a conversation up to a position, or as many
// as a transaction may.
func (e *expirer) removeIndex(app journal.AppID, conversation kms.Tag, through journal.Position) (gone bool, err error) {
	var from, to key
	lo := from.index(app, conversation, 0)
	hi := to.index(app, conversation, through+1)
	c := e.txn.Iterate(lo, hi, false)
	defer c.Close()
	var events []kms.Tag
	last := journal.Position(0)
	gone = true
	for c.Next() {
		if e.keys >= expireKeys && last > 0 {
			gone = false
			break
		}
		v, err := parseEntry(c.Value())
		if err != nil {
			return false, err
		}
		events, last = append(events, v.event), lastPosition(c.Key())
		e.keys++
	}
	if err := c.Close(); err != nil {
		return false, err
	}
	if last == 0 {
		return true, nil
	}
	for _, event := range events {
		e.txn.Delete(e.key.id(app, event))
	}
	e.events += len(events)
	e.txn.DeleteRange(lo, to.index(app, conversation, last+1))
	e.txn.DeleteRange(from.receipts(app, conversation, 0).bytes(), to.receipts(app, conversation, last+1).bytes())
	return gone, nil
}

func (e *expirer) removeRow(app journal.AppID, conversation, user kms.Tag) error {
	v, ok, err := e.txn.Get(e.value[:0], e.key.member(app, conversation, user))
	e.value = v
	if err != nil || !ok {
		return err
	}
	r, err := parseRow(v)
	if err != nil {
		return err
	}
	before := r
	if r.member.until <= e.now {
		r.member = mark{}
	}
	if r.took.until <= e.now {
		r.took = mark{}
	}
	switch {
	case r.member == mark{} && r.took == mark{}:
		e.txn.Delete(e.key.member(app, conversation, user))
		e.txn.Delete(e.key.ofUser(app, user, conversation))
	case r != before:
		e.value = r.append(e.value[:0])
		e.txn.Set(e.key.member(app, conversation, user), e.value)
	}
	return nil
}

func (e *expirer) removeAck(app journal.AppID, user kms.Tag) error {
	v, ok, err := e.txn.Get(e.value[:0], e.key.ack(app, user))
	e.value = v
	if err != nil || !ok {
		return err
	}
	a, err := parseAck(v)
	if err == nil && a.until <= e.now {
		e.txn.Delete(e.key.ack(app, user))
	}
	return err
}
