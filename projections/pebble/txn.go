package pebble

import (
	"bytes"
	"fmt"
	"hash/maphash"

	crdb "github.com/cockroachdb/pebble/v2"

	"github.com/cofferdb/coffer/projections"
)

// txn gathers writes and hands them to the database at the end.
//
// Pebble's own indexed batch keeps a sorted index of the writes, which half the
// time of a commit went into; a projection rarely iterates over what it has
// just written, but often asks for a key. So the writes are kept in a hash
// table, and only a cursor that needs them makes an indexed batch.
type txn struct {
	store  *Store
	reader reader
	arena  []byte  // keys and values
	ops    []op    // writes of single keys in order; those overwritten are dead
	table  []int32 // hash table of places in ops, plus 1; a power of two long
	live   int     // taken slots of table
	ranges []span  // deleted ranges
	seed   maphash.Seed
	merged []*crdb.Batch // made for cursors
	ended  bool
}

type op struct {
	key, value span // places in arena
	hash       uint64
	kind       opKind
}

type opKind uint8

const (
	opDead opKind = iota
	opSet
	opDelete
)

type span struct{ from, mid, to int } // mid separates the two keys of a range

func (t *txn) begin(s *Store) {
	t.store = s
	t.reader = reader{store: s}
	t.arena, t.ops, t.ranges = t.arena[:0], t.ops[:0], t.ranges[:0]
	if t.table == nil {
		t.table = make([]int32, 4096)
		t.seed = maphash.MakeSeed()
	} else {
		clear(t.table)
	}
	t.live, t.ended = 0, false
}

func (t *txn) end() {
	t.reader.close()
	for _, b := range t.merged {
		_ = b.Close() // a batch in memory
	}
	t.merged, t.ended = nil, true
	// One huge transaction must not hold its memory for ever.
	if cap(t.arena) > 32<<20 {
		t.arena, t.ops, t.table = nil, nil, nil
	}
}

func (t *txn) bytes(s span) []byte { return t.arena[s.from:s.to:s.to] }

func (t *txn) put(b []byte) span {
	from := len(t.arena)
	t.arena = append(t.arena, b...)
	return span{from: from, to: len(t.arena)}
}

// find returns the slot of the key in the table: taken by it, or free.
func (t *txn) find(hash uint64, key []byte) int {
	mask := len(t.table) - 1
	for i := int(hash) & mask; ; i = (i + 1) & mask {
		n := t.table[i]
		if n == 0 {
			return i
		}
		if o := &t.ops[n-1]; o.hash == hash && bytes.Equal(t.bytes(o.key), key) {
			return i
		}
	}
}

func (t *txn) write(kind opKind, key, value []byte) {
	if t.ended {
		panic(errEnded)
	}
	if 2*t.live >= len(t.table) {
		t.grow()
	}
	hash := maphash.Bytes(t.seed, key)
	slot := t.find(hash, key)
	o := op{kind: kind, hash: hash}
	if n := t.table[slot]; n != 0 {
		old := &t.ops[n-1]
		o.key, old.kind = old.key, opDead
	} else {
		o.key = t.put(key)
		t.live++
	}
	o.value = t.put(value)
	t.ops = append(t.ops, o)
	t.table[slot] = int32(len(t.ops))
}

func (t *txn) grow() {
	old := t.table
	t.table = make([]int32, 2*len(old))
	mask := len(t.table) - 1
	for _, n := range old {
		if n == 0 {
			continue
		}
		i := int(t.ops[n-1].hash) & mask
		for t.table[i] != 0 {
			i = (i + 1) & mask
		}
		t.table[i] = n
	}
}

func (t *txn) Set(key, value []byte) { t.write(opSet, key, value) }
func (t *txn) Delete(key []byte)     { t.write(opDelete, key, nil) }

// DeleteRange notes the range. Earlier writes inside it are dead, so it does not
// matter that commit puts the ranges in front of the rest.
func (t *txn) DeleteRange(from, to []byte) {
	if t.ended {
		panic(errEnded)
	}
	if to != nil && bytes.Compare(from, to) >= 0 {
		return
	}
	if len(from) == 0 {
		// No key is empty. Built with the race detector, and so with its own
		// checks, Pebble v2.1.7 forgets a range that begins with the empty key
		// when the database is opened again, and others with it.
		from = []byte{0}
	}
	for i := range t.ops {
		o := &t.ops[i]
		if inRange(t.bytes(o.key), from, to) {
			o.kind = opDead
		}
	}
	s := t.put(from)
	s.mid = s.to
	if to == nil {
		// Pebble has no open range. No key of a view is as long.
		to = bytes.Repeat([]byte{0xff}, 256)
	}
	s.to = t.put(to).to
	t.ranges = append(t.ranges, s)
}

func inRange(key, from, to []byte) bool {
	return bytes.Compare(key, from) >= 0 && (to == nil || bytes.Compare(key, to) < 0)
}

func (t *txn) rangeKeys(s span) (from, to []byte) { return t.arena[s.from:s.mid], t.arena[s.mid:s.to] }

func (t *txn) Get(dst, key []byte) ([]byte, bool, error) {
	if n := t.table[t.find(maphash.Bytes(t.seed, key), key)]; n != 0 {
		if o := &t.ops[n-1]; o.kind == opSet {
			return append(dst, t.bytes(o.value)...), true, nil
		}
		return dst, false, nil
	}
	for _, s := range t.ranges {
		if from, to := t.rangeKeys(s); inRange(key, from, to) {
			return dst, false, nil
		}
	}
	return t.reader.Get(dst, key)
}

func (t *txn) Iterate(from, to []byte, reverse bool) projections.Cursor {
	if !t.touches(from, to) {
		return t.reader.Iterate(from, to, reverse)
	}
	b := t.store.db.NewIndexedBatch()
	t.merged = append(t.merged, b)
	if err := t.fill(b); err != nil {
		c := &cursor{store: t.store}
		c.end(err)
		return c
	}
	return newCursor(t.store, func(o *crdb.IterOptions) (*crdb.Iterator, bool, error) {
		it, err := b.NewIter(o)
		return it, true, err
	}, from, to, reverse)
}

// touches reports whether the transaction has written into the range.
func (t *txn) touches(from, to []byte) bool {
	for i := range t.ops {
		if o := &t.ops[i]; o.kind != opDead && inRange(t.bytes(o.key), from, to) {
			return true
		}
	}
	for _, s := range t.ranges {
		if f, u := t.rangeKeys(s); (to == nil || bytes.Compare(f, to) < 0) && bytes.Compare(from, u) < 0 {
			return true
		}
	}
	return false
}

// fill writes the transaction into a batch: the ranges, then the keys by their
// first byte. Within a table the keys of a batch mostly rise, and the memory
// table inserts in order about twice as fast as across tables.
func (t *txn) fill(b *crdb.Batch) error {
	for _, s := range t.ranges {
		from, to := t.rangeKeys(s)
		if err := b.DeleteRange(from, to, nil); err != nil {
			return fmt.Errorf("delete range: %w", err)
		}
	}
	var heads, tails [256]int32 // lists through next, by first byte
	next := make([]int32, len(t.ops))
	for i := range t.ops {
		o := &t.ops[i]
		if o.kind == opDead {
			continue
		}
		first := byte(0)
		if o.key.to > o.key.from {
			first = t.arena[o.key.from]
		}
		if heads[first] == 0 {
			heads[first] = int32(i) + 1
		} else {
			next[tails[first]-1] = int32(i) + 1
		}
		tails[first] = int32(i) + 1
	}
	for _, n := range heads {
		for ; n != 0; n = next[n-1] {
			o := &t.ops[n-1]
			var err error
			if o.kind == opSet {
				err = b.Set(t.bytes(o.key), t.bytes(o.value), nil)
			} else {
				err = b.Delete(t.bytes(o.key), nil)
			}
			if err != nil {
				return fmt.Errorf("write: %w", err)
			}
		}
	}
	return nil
}

func (t *txn) commit() error {
	if len(t.ops) == 0 && len(t.ranges) == 0 {
		return nil
	}
	b := t.store.db.NewBatchWithSize(len(t.arena) + 16*len(t.ops))
	defer b.Close()
	if err := t.fill(b); err != nil {
		return err
	}
	return b.Commit(crdb.NoSync)
}
