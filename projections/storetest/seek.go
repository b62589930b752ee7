package storetest

import (
	"fmt"
	"math/rand/v2"
	"sort"
	"testing"

	"github.com/cofferdb/coffer/projections"
)

// testSeek moves cursors to keys that are there and that are not, in order and
// not, and mixes that with Next.
func testSeek(t *testing.T, s projections.Store) {
	const keys, first, last = 400, 20, 380 // the cursor's range is within
	name := func(n int) string { return fmt.Sprintf("k%04d", n) }
	for part := range 4 { // the store may have them in several places
		update(t, s, func(txn projections.Txn) {
			for n := part; n < keys; n += 4 {
				txn.Set([]byte(name(2*n)), []byte(fmt.Sprint(n)))
			}
		})
	}
	random := rand.New(rand.NewPCG(3, 4)) //nolint:gosec // places, not secrets
	places := make([]int, 300)
	for i := range places {
		places[i] = random.IntN(2*keys + 10)
	}
	ascending, descending := append([]int(nil), places...), append([]int(nil), places...)
	sort.Ints(ascending)
	sort.Sort(sort.Reverse(sort.IntSlice(descending)))
	for _, order := range [][]int{ascending, descending, places} {
		for _, reverse := range []bool{false, true} {
			view(t, s, func(r projections.Reader) {
				c := r.Iterate([]byte(name(2*first)), []byte(name(2*last)), reverse)
				defer c.Close()
				for i, place := range order {
					want := min(max((place+1)/2, first), last) // the first that is not below
					step := 1
					if reverse {
						want, step = max(min(place/2, last-1), first-1), -1
					}
					ok := c.Seek([]byte(name(place)))
					for range i % 3 { // and then go on
						if ok {
							want += step
							ok = c.Next()
						}
					}
					there := first <= want && want < last
					switch {
					case ok != there:
						t.Fatalf("Seek(%s), reverse %t: %t, want %t", name(place), reverse, ok, there)
					case ok && (string(c.Key()) != name(2*want) || string(c.Value()) != fmt.Sprint(want)):
						t.Fatalf("Seek(%s), reverse %t: %s %s, want %s", name(place), reverse, c.Key(), c.Value(), name(2*want))
					}
				}
				if err := c.Close(); err != nil {
					t.Errorf("Close: %v", err)
				}
				if c.Seek([]byte(name(2 * first))) {
					t.Error("Seek after Close is true")
				}
				empty := r.Iterate([]byte("k"), []byte("k"), reverse)
				if empty.Seek([]byte("k")) {
					t.Error("Seek in an empty range is true")
				}
				if err := empty.Close(); err != nil {
					t.Errorf("Close: %v", err)
				}
			})
		}
	}
}
