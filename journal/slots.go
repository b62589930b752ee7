package journal

import (
	"encoding/binary"

	"github.com/cofferdb/coffer/kms"
)

const (
	// slotBlock is how many slots are made at a time: they live and die about
	// together.
	slotBlock = 64
	// leastBuckets is the size of a table that is not empty; a power of two.
	leastBuckets = 1 << 10
)

// slotTable finds slots by their tags: a hash table with open addressing and
// linear probing, of which a tag, being a keyed hash itself, needs no other
// hash. It holds no pointers but those to its blocks. A slot stays where it is,
// and is good for as long as somebody has it, whether it is in the table or not.
type slotTable struct {
	// buckets are empty (0), or have 31 bits of the slot's tag, a bit that is
	// set, and the slot's number. At most half are in use.
	buckets []uint64
	used    int

	// Slots are numbered from 0 on, and over again after 2^32. The blocks are
	// those from number base on, which is a multiple of slotBlock; one of which
	// nothing is left in the table is nil.
	blocks []*slots
	base   uint32
	next   uint32
}

type slots struct {
	of   [slotBlock]slot
	left int // in the table, or not yet in use
}

// fingerprint returns the 32 bits of a tag that a bucket has.
func fingerprint(tag *kms.Tag) uint32 { return binary.BigEndian.Uint32(tag[:]) | 1<<31 }

// at returns a slot that is in the table.
func (t *slotTable) at(number uint32) *slot {
	i := number - t.base
	return &t.blocks[i/slotBlock].of[i%slotBlock]
}

// insert adds a slot for a tag, unless there is one: then it returns that, and
// false.
func (t *slotTable) insert(tag kms.Tag) (*slot, bool) {
	if 2*t.used >= len(t.buckets) {
		t.grow()
	}
	p, mask := fingerprint(&tag), uint32(len(t.buckets)-1) //nolint:gosec // at most 2^32 slots have numbers
	i := p & mask
	for ; t.buckets[i] != 0; i = (i + 1) & mask {
		if b := t.buckets[i]; uint32(b>>32) == p {
			if s := t.at(uint32(b)); s.tag == tag {
				return s, false
			}
		}
	}
	n := t.next
	if t.next++; n%slotBlock == 0 {
		if len(t.blocks) == 0 {
			t.base = n
		}
		t.blocks = append(t.blocks, &slots{left: slotBlock})
	}
	s := t.at(n)
	s.tag, s.number = tag, n
	t.buckets[i] = uint64(p)<<32 | uint64(n)
	t.used++
	return s, true
}

// remove takes a slot out of the table, if it is in it.
func (t *slotTable) remove(s *slot) {
	if t.used == 0 {
		return
	}
	mask := uint32(len(t.buckets) - 1) //nolint:gosec // see insert
	p := fingerprint(&s.tag)
	want := uint64(p)<<32 | uint64(s.number)
	i := p & mask
	for ; t.buckets[i] != want; i = (i + 1) & mask {
		if t.buckets[i] == 0 {
			return
		}
	}
	// What is behind it, and could stand here, moves up.
	for j := (i + 1) & mask; t.buckets[j] != 0; j = (j + 1) & mask {
		home := uint32(t.buckets[j]>>32) & mask
		if (j-home)&mask >= (j-i)&mask {
			t.buckets[i] = t.buckets[j]
			i = j
		}
	}
	t.buckets[i] = 0
	t.used--
	t.free(s.number)
}

// free drops the blocks of which nothing is left.
func (t *slotTable) free(number uint32) {
	i := (number - t.base) / slotBlock
	if t.blocks[i].left--; t.blocks[i].left > 0 {
		return
	}
	t.blocks[i] = nil
	n := 0
	for n < len(t.blocks) && t.blocks[n] == nil {
		n++
	}
	if n > 0 {
		rest := copy(t.blocks, t.blocks[n:])
		clear(t.blocks[rest:])
		t.blocks = t.blocks[:rest]
		t.base += uint32(n * slotBlock) //nolint:gosec // see insert
	}
}

func (t *slotTable) grow() {
	old := t.buckets
	t.buckets = make([]uint64, max(2*len(old), leastBuckets))
	mask := uint32(len(t.buckets) - 1) //nolint:gosec // see insert
	for _, b := range old {
		if b == 0 {
			continue
		}
		i := uint32(b>>32) & mask
		for t.buckets[i] != 0 {
			i = (i + 1) & mask
		}
		t.buckets[i] = b
	}
}
