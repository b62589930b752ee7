package pebble

import (
	"errors"
	"fmt"

	crdb "github.com/cockroachdb/pebble/v2"

	"github.com/cofferdb/coffer/projections"
)

// iterable is a snapshot, a database or an indexed batch.
type iterable interface {
	NewIter(*crdb.IterOptions) (*crdb.Iterator, error)
}

// reader reads from a snapshot or a database. Look-ups share one iterator.
type reader struct {
	store  *Store
	source iterable
	points *crdb.Iterator
}

func (r *reader) close() {
	if r.points != nil {
		_ = r.points.Close() // its error was returned by the look-up that met it
		r.points = nil
	}
}

// Get appends the value of key to dst. It does not use Pebble's own Get, which
// ignores the filters of the last level, where most of the data is: there every
// question for something absent would read a block.
func (r *reader) Get(dst, key []byte) ([]byte, bool, error) {
	if r.points == nil {
		var err error
		r.points, err = r.source.NewIter(&crdb.IterOptions{UseL6Filters: true})
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
	return newCursor(r.store, r.source, from, to, reverse)
}

// cursor walks over a range.
type cursor struct {
	store   *Store
	it      *crdb.Iterator
	value   []byte
	err     error
	reverse bool
	started bool
	done    bool
}

func newCursor(s *Store, source iterable, from, to []byte, reverse bool) *cursor {
	c := &cursor{store: s, reverse: reverse}
	if len(from) == 0 {
		from = nil
	}
	if to != nil && len(to) == 0 {
		c.done = true // nothing lies before the empty key
		return c
	}
	var err error
	c.it, err = source.NewIter(&crdb.IterOptions{LowerBound: from, UpperBound: to})
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
	c.started = true
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
		err := c.it.Close()
		c.it = nil
		c.done = true
		if err != nil && c.err == nil {
			c.err = fmt.Errorf("iterate: %w", c.store.fail(err))
		}
	}
	return c.err
}

var errEnded = errors.New("view store: the transaction has ended")
