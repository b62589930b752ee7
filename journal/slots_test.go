package journal

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"github.com/cofferdb/coffer/kms"
)

// TestSlotTable compares the table with a map, over insertions and removals in
// any order, with tags that collide and numbers that begin again.
func TestSlotTable(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for _, first := range []uint32{0, 1<<32 - 20*slotBlock} {
		table := slotTable{next: first}
		model := map[kms.Tag]*slot{}
		var order []*slot
		for step := range 200_000 {
			var tag kms.Tag
			binary.BigEndian.PutUint32(tag[:], random.Uint32N(300)*0x00010001) // of which many share a bucket
			tag[15] = byte(random.UintN(20))
			if random.UintN(100) < 50+uint(step/10_000%2)*10 {
				s, ok := table.insert(tag)
				switch known := model[tag]; {
				case known == nil && (!ok || s.tag != tag || s.millis != 0):
					t.Fatalf("step %d: a free tag is refused, or its slot is another: %+v", step, *s)
				case known != nil && (ok || s != known):
					t.Fatalf("step %d: a taken tag is given away, or its slot is another", step)
				case known == nil:
					s.millis = 1 + int64(step)
					model[tag] = s
					order = append(order, s)
				}
			} else if len(order) > 0 {
				i := 0 // mostly the oldest, as it is in use
				if random.UintN(10) == 0 {
					i = random.IntN(len(order))
				}
				s := order[i]
				order = append(order[:i], order[i+1:]...)
				table.remove(s)
				table.remove(s) // which does nothing
				if s.tag != (kms.Tag{}) && model[s.tag] != s {
					t.Fatalf("step %d: a removed slot was written to", step)
				}
				delete(model, s.tag)
			}
			if table.used != len(model) {
				t.Fatalf("step %d: %d slots, want %d", step, table.used, len(model))
			}
		}
		for _, s := range model {
			if got := table.at(s.number); got != s {
				t.Fatal("a slot is not where its number says")
			}
		}
		for _, s := range order {
			table.remove(s)
		}
		if table.used != 0 || len(table.blocks) > 1 {
			t.Errorf("%d slots and %d blocks are left of nothing", table.used, len(table.blocks))
		}
	}
}
