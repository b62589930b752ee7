package storetest

import (
	"errors"
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/cofferdb/coffer/projections"
)

// testModel runs random transactions, some of them given up, and restarts,
// against a map.
func testModel(t *testing.T, open func(*testing.T) projections.Store) {
	s := open(t)
	defer func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	}()
	// Few and short keys, so that writes meet.
	key := rapid.StringOfN(rapid.RuneFrom([]rune("ab\x00")), 1, 4, -1)
	value := rapid.StringOfN(rapid.RuneFrom([]rune("xyz")), 0, 8, -1)
	rapid.Check(t, func(rt *rapid.T) {
		update(t, s, func(txn projections.Txn) { txn.DeleteRange(nil, nil) })
		model := make(map[string]string)
		for range rapid.IntRange(1, 8).Draw(rt, "transactions") {
			next := maps.Clone(model)
			giveUp := rapid.IntRange(0, 4).Draw(rt, "give up") == 0
			err := s.Update(func(txn projections.Txn) error {
				for range rapid.IntRange(0, 12).Draw(rt, "steps") {
					modelStep(t, rt, txn, next, key, value)
				}
				if giveUp {
					return errTest
				}
				return nil
			})
			if giveUp != errors.Is(err, errTest) || !giveUp && err != nil {
				rt.Fatalf("Update: %v", err)
			}
			if !giveUp {
				model = next
			}
			view(t, s, func(r projections.Reader) {
				compare(t, rt, r, model, key.Draw(rt, "from"), key.Draw(rt, "to"))
			})
			if rapid.IntRange(0, 40).Draw(rt, "restart") == 0 {
				if err := s.Close(); err != nil {
					rt.Fatalf("Close: %v", err)
				}
				s = open(t)
			}
		}
	})
}

func modelStep(t *testing.T, rt *rapid.T, txn projections.Txn, model map[string]string, key, value *rapid.Generator[string]) {
	k := key.Draw(rt, "key")
	switch rapid.IntRange(0, 5).Draw(rt, "step") {
	case 0, 1:
		v := value.Draw(rt, "value")
		txn.Set([]byte(k), []byte(v))
		model[k] = v
	case 2:
		txn.Delete([]byte(k))
		delete(model, k)
	case 3:
		to := key.Draw(rt, "to")
		txn.DeleteRange([]byte(k), []byte(to))
		maps.DeleteFunc(model, func(at, _ string) bool { return k <= at && at < to })
	case 4:
		v, ok, err := txn.Get(nil, []byte(k))
		want, there := model[k]
		if err != nil || ok != there || string(v) != want {
			rt.Fatalf("Get(%q) = %q, %v, %v; want %q, %v", k, v, ok, err, want, there)
		}
	case 5:
		compare(t, rt, txn, model, k, key.Draw(rt, "to"))
	}
}

func compare(t *testing.T, rt *rapid.T, r projections.Reader, model map[string]string, from, to string) {
	var want []pair
	for _, k := range slices.Sorted(maps.Keys(model)) {
		if from <= k && k < to {
			want = append(want, pair{k, model[k]})
		}
	}
	if got := scan(t, r, from, to, false); !slices.Equal(got, want) {
		rt.Fatalf("[%q, %q) = %q, want %q", from, to, got, want)
	}
	slices.Reverse(want)
	if got := scan(t, r, from, to, true); !slices.Equal(got, want) {
		rt.Fatalf("[%q, %q) in reverse = %q, want %q", from, to, got, want)
	}
}
