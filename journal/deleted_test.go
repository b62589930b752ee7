package journal

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// TestDeletedSpans: what was noted is what is read, whatever was noted, and in
// whatever order.
func TestDeletedSpans(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		deleted := map[uint64]bool{}
		rows := map[string][]span{}
		for range rapid.IntRange(1, 4).Draw(t, "calls") {
			var spans []span
			for range rapid.IntRange(1, 20).Draw(t, "spans") {
				first := rapid.Uint64Range(1, 3*deletedSpan).Draw(t, "first")
				s := span{first, first + rapid.Uint64Range(0, 50).Draw(t, "more")}
				spans = append(spans, s)
				for seq := s.First; seq <= s.Last; seq++ {
					deleted[seq] = true
				}
			}
			for _, part := range chunked(mergeSpans(slices.Clone(spans))) {
				name := fmt.Sprint(part[0].First / deletedSpan)
				merged := mergeSpans(slices.Concat(rows[name], part))
				parsed, err := parseSpans(appendSpans(nil, merged))
				if err != nil || !slices.Equal(parsed, merged) {
					t.Fatalf("%v becomes %v, %v", merged, parsed, err)
				}
				rows[name] = parsed
			}
		}
		count := 0
		for name, spans := range rows {
			for _, s := range spans {
				if fmt.Sprint(s.First/deletedSpan) != name || fmt.Sprint(s.Last/deletedSpan) != name {
					t.Fatalf("row %s has %v", name, s)
				}
				for seq := s.First; seq <= s.Last; seq++ {
					if !deleted[seq] {
						t.Fatalf("%d was not deleted", seq)
					}
					count++
				}
			}
		}
		if count != len(deleted) {
			t.Fatalf("%d sequences in the rows, %d were deleted", count, len(deleted))
		}
	})
}

// FuzzDeletedSpans: what is accepted is encoded again as it was.
func FuzzDeletedSpans(f *testing.F) {
	f.Add(appendSpans(nil, []span{{1, 3}, {7, 7}, {1000, 2000}}))
	f.Add(appendSpans(nil, nil))
	f.Add([]byte{1, 0, 1})
	f.Fuzz(func(t *testing.T, value []byte) {
		spans, err := parseSpans(value)
		if err != nil {
			return
		}
		for i, s := range spans {
			if s.Last < s.First || i > 0 && s.First <= spans[i-1].Last+1 {
				t.Fatalf("%v", spans)
			}
		}
		again, err := parseSpans(appendSpans(nil, spans))
		if err != nil || !slices.Equal(again, spans) {
			t.Fatalf("%v becomes %v, %v", spans, again, err)
		}
	})
}

func TestSpansBefore(t *testing.T) {
	for _, c := range []struct {
		end  uint64
		want string
		n    int
	}{{100, "[{1 3} {5 5} {8 10}]", 7}, {10, "[{1 3} {5 5} {8 9}]", 6}, {8, "[{1 3} {5 5}]", 4}, {5, "[{1 3}]", 3}, {1, "[]", 0}} {
		spans, n := spansBefore([]span{{1, 3}, {5, 5}, {8, 10}}, 7, c.end)
		if fmt.Sprint(spans) != c.want || n != c.n {
			t.Errorf("before %d: %v, %d", c.end, spans, n)
		}
	}
}
