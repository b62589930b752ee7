package pebble

import (
	"bytes"
	"errors"
	"fmt"

	crdb "github.com/cockroachdb/pebble/v2"

	"github.com/cofferdb/coffer/projections"
)

// reader reads from a database. The first iterator that it makes fixes what all
// of them see: the others are clones of it. That costs a third of one of
// Pebble's snapshots, which take the lock that compactions hold.
type reader struct {
	store  *Store
	first  *crdb.Iterator
	points *crdb.Iterator // for look-ups
}

// iter returns an iterator on what the reader sees. owned tells whether the
// caller has to close it; the first one is closed with the reader.
func (r *reader) iter(o *crdb.IterOptions) (it *crdb.Iterator, owned bool, err error) {
	if r.first != nil {
		it, err = r.first.Clone(crdb.CloneOptions{IterOptions: o})
		return it, true, err
	}
	r.first, err = r.store.db.NewIter(o)
	return r.first, false, err
}

func (r *reader) close() {
	// Their errors were returned by the calls that met them.
	if r.points != nil && r.points != r.first {
		_ = r.points.Close()
	}
	if r.first != nil {
		_ = r.first.Close()
	}
	r.first, r.points = nil, nil
}

// Get appends the value of key to dst. It does not use Pebble's own Get, which
// ignores the filters of the last level, where most of the data is: there every
// question for something absent would read a block.
func (r *reader) Get(dst, key []byte) ([]byte, bool, error) {
	if r.points == nil {
		var err error
		r.points, _, err = r.iter(&crdb.IterOptions{UseL6Filters: true})
		if err != nil {
			return dst, false, fmt.Errorf("look up: %w", r.store.fail(err))
		}
	}
	if !r.points.SeekPrefixGE(key) {
		if err := r.points.Error(); err != nil {
			return dst, false, fmt.Errorf("look up: %w", r.store.fail(err))
		}
		return dst, false, nil
	}
	v, err := r.points.ValueAndErr()
	if err != nil {
		return dst, false, fmt.Errorf("look up: %w", r.store.fail(err))
	}
	return append(dst, v...), true, nil
}

// Iterate returns a cursor over [from, to).
func (r *reader) Iterate(from, to []byte, reverse bool) projections.Cursor {
	return newCursor(r.store, r.iter, from, to, reverse)
}

// cursor walks over a range.
type cursor struct {
	store   *Store
	it      *crdb.Iterator
	owned   bool
	value   []byte
	key     []byte // scratch of Seek
	err     error
	reverse bool
	started bool
	done    bool
}

func newCursor(s *Store, iter func(*crdb.IterOptions) (*crdb.Iterator, bool, error), from, to []byte, reverse bool) *cursor {
	c := &cursor{store: s, reverse: reverse}
	if len(from) == 0 {
		from = nil
	}
	if to != nil && (len(to) == 0 || bytes.Compare(from, to) >= 0) {
		c.done = true // an empty range
		return c
	}
	var err error
	c.it, c.owned, err = iter(&crdb.IterOptions{LowerBound: from, UpperBound: to})
	if err != nil {
		c.end(err)
	}
	return c
}

func (c *cursor) end(err error) {
	c.done = true
	if err != nil && c.err == nil {
		c.err = fmt.Errorf("iterate: %w", c.store.fail(err))
	}
}

func (c *cursor) Next() bool {
	if c.done {
		return false
	}
	var ok bool
	switch {
	case !c.started && c.reverse:
		ok = c.it.Last()
	case !c.started:
		ok = c.it.First()
	case c.reverse:
		ok = c.it.Prev()
	default:
		ok = c.it.Next()
	}
	return c.at(ok)
}

// Seek is part of [projections.Cursor]. Pebble goes on from where it is when the
// keys ascend.
func (c *cursor) Seek(key []byte) bool {
	switch {
	case c.it == nil || c.err != nil:
		return false
	case c.reverse:
		c.key = append(append(c.key[:0], key...), 0) // the first key after it
		return c.at(c.it.SeekLT(c.key))
	default:
		return c.at(c.it.SeekGE(key))
	}
}

// at takes the iterator's value, if it stands on one.
func (c *cursor) at(ok bool) bool {
	c.started, c.done = true, false
	if !ok {
		c.end(c.it.Error())
		return false
	}
	v, err := c.it.ValueAndErr()
	if err != nil {
		c.end(err)
		return false
	}
	c.value = v
	return true
}

func (c *cursor) Key() []byte   { return c.it.Key() }
func (c *cursor) Value() []byte { return c.value }

func (c *cursor) Close() error {
	if c.it != nil {
		err := c.it.Error()
		if c.owned {
			err = c.it.Close()
		}
		c.it = nil
		c.end(err)
	}
	return c.err
}

var errEnded = errors.New("view store: the transaction has ended")
