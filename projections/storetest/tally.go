package storetest

import "github.com/cofferdb/coffer/projections"

// Tally is a store that counts what transactions cost, for tests of what must not cost
// more as a view grows.
type Tally struct {
	projections.Store

	// Read counts the keys that were looked up or walked over, Written the bytes of
	// keys and values that were set, removed, or bound a range that was.
	Read, Written int
}

// Update is part of [projections.Store].
func (t *Tally) Update(fn func(projections.Txn) error) error {
	return t.Store.Update(func(txn projections.Txn) error { return fn(tallied{txn, t}) })
}

type tallied struct {
	projections.Txn

	t *Tally
}

func (t tallied) Get(dst, key []byte) ([]byte, bool, error) {
	t.t.Read++
	return t.Txn.Get(dst, key)
}

func (t tallied) Iterate(from, to []byte, reverse bool) projections.Cursor {
	return talliedCursor{t.Txn.Iterate(from, to, reverse), t.t}
}

func (t tallied) Set(key, value []byte) {
	t.t.Written += len(key) + len(value)
	t.Txn.Set(key, value)
}

func (t tallied) Delete(key []byte) {
	t.t.Written += len(key)
	t.Txn.Delete(key)
}

func (t tallied) DeleteRange(from, to []byte) {
	t.t.Written += len(from) + len(to)
	t.Txn.DeleteRange(from, to)
}

type talliedCursor struct {
	projections.Cursor

	t *Tally
}

func (c talliedCursor) Next() bool {
	c.t.Read++
	return c.Cursor.Next()
}

func (c talliedCursor) Seek(key []byte) bool {
	c.t.Read++
	return c.Cursor.Seek(key)
}
