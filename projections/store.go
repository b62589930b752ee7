package projections

import "context"

// A Store is a set of ordered keys with values: what views are kept in. Keys
// are compared as bytes and have at least one. Key 0x00… belongs to the [Runner], the others to the
// projections by their first byte, see [Projection].
//
// An implementation passes the suite of package storetest.
type Store interface {
	// View calls fn with a consistent snapshot, taken at fn's first read at
	// the latest. The Reader, its cursors and what they return are valid until
	// fn returns. fn must not wait for a slow peer: a snapshot pins what has
	// been replaced since.
	View(fn func(Reader) error) error

	// Update calls fn with a transaction and commits it if fn returns nil:
	// all of it or, after a crash too, nothing. Transactions run one after
	// the other, so fn sees everything that was committed before. What is
	// committed is visible to every later View. It need not have reached the
	// disk, but a later commit never survives a crash that an earlier one did
	// not: the journal is the truth, and what is lost of a view is read again
	// from the checkpoint that was lost with it.
	//
	// fn must not call the Store.
	Update(fn func(Txn) error) error

	// Close makes what was committed durable and releases the store. No call
	// may be under way or follow.
	Close() error
}

// An Eraser is a Store that keeps what was replaced until it happens to write its
// files anew.
type Eraser interface {
	// Erase returns once no file of the store has anything that keys had before
	// their present values. Readers that are under way may hold it up.
	Erase(ctx context.Context, keys ...[]byte) error
}

// A Reader reads from a snapshot, or from a transaction including its own
// writes. It is for one goroutine.
type Reader interface {
	// Get appends the value of key to dst. ok tells whether the key is there;
	// if it is not, dst is returned as it was.
	Get(dst, key []byte) (value []byte, ok bool, err error)

	// Iterate returns a cursor before the first key of [from, to), or with
	// reverse before its last. A nil to is the end of all keys. In a
	// transaction the cursor does not see writes made after the call.
	Iterate(from, to []byte, reverse bool) Cursor
}

// A Cursor walks over keys in order.
//
//	c := r.Iterate(from, to, false)
//	defer c.Close()
//	for c.Next() {
//		use(c.Key(), c.Value())
//	}
//	return c.Close()
type Cursor interface {
	// Next moves to the next key and reports whether there is one. It is
	// false at the end of the range and after an error: Close tells which.
	Next() bool
	// Seek moves to the first key that is not before key, in the cursor's
	// direction, and reports whether there is one, as Next does. Next goes on
	// from there. Keys sought in the cursor's direction, one after the other,
	// cost less than as many look-ups by Get; others are allowed.
	Seek(key []byte) bool
	// Key returns the current key, valid until the next call of Next, Seek or
	// Close. The caller must not change it.
	Key() []byte
	// Value returns the current value, as Key does.
	Value() []byte
	// Close releases the cursor and returns the error that ended it, if one
	// did. It can be called again.
	Close() error
}

// A Txn is a transaction. Its writes copy what they are given; one that fails
// makes [Store.Update] fail.
type Txn interface {
	Reader
	// Set gives key a value, which may be empty.
	Set(key, value []byte)
	// Delete removes key, if it is there.
	Delete(key []byte)
	// DeleteRange removes the keys of [from, to). Its cost does not grow with
	// their number.
	DeleteRange(from, to []byte)
}
