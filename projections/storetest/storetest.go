// Package storetest is the conformance suite of [projections.Store]. Each
// implementation runs it in its tests.
package storetest

import (
	"bytes"
	"fmt"
	"slices"
	"testing"

	"github.com/cofferdb/coffer/projections"
)

// Run runs the suite. open opens the store that belongs to t, empty at the
// first call; after [projections.Store.Close] it is called again and must find
// what was committed.
func Run(t *testing.T, open func(t *testing.T) projections.Store) {
	t.Helper()
	for _, test := range []struct {
		name string
		run  func(*testing.T, projections.Store)
	}{
		{"Empty", testEmpty},
		{"SetGet", testSetGet},
		{"GetAppends", testGetAppends},
		{"ArgumentsAreCopied", testCopies},
		{"OddKeys", testOddKeys},
		{"LargeValues", testLargeValues},
		{"Iterate", testIterate},
		{"Seek", testSeek},
		{"CursorClose", testCursorClose},
		{"DeleteRange", testDeleteRange},
		{"OwnWrites", testOwnWrites},
		{"OwnWritesOrder", testOwnWritesOrder},
		{"CursorIgnoresLaterWrites", testCursorIsStable},
		{"ErrorRollsBack", testErrorRollsBack},
		{"PanicRollsBack", testPanicRollsBack},
		{"Snapshot", testSnapshot},
		{"UpdatesAreSerial", testSerial},
		{"ReadersBesideWriters", testConcurrent},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := open(t)
			t.Cleanup(func() {
				if err := s.Close(); err != nil {
					t.Errorf("Close: %v", err)
				}
			})
			test.run(t, s)
		})
	}
	t.Run("Durable", func(t *testing.T) { testDurable(t, open) })
	t.Run("Model", func(t *testing.T) { testModel(t, open) })
}

type pair struct{ key, value string }

func update(t testing.TB, s projections.Store, fn func(projections.Txn)) {
	t.Helper()
	if err := s.Update(func(txn projections.Txn) error { fn(txn); return nil }); err != nil {
		t.Fatalf("Update: %v", err)
	}
}

func view(t testing.TB, s projections.Store, fn func(projections.Reader)) {
	t.Helper()
	if err := s.View(func(r projections.Reader) error { fn(r); return nil }); err != nil {
		t.Fatalf("View: %v", err)
	}
}

// scan returns what a cursor over the range gives. "" as to is the open end.
func scan(t testing.TB, r projections.Reader, from, to string, reverse bool) []pair {
	t.Helper()
	var end []byte
	if to != "" {
		end = []byte(to)
	}
	c := r.Iterate([]byte(from), end, reverse)
	var got []pair
	for c.Next() {
		got = append(got, pair{string(c.Key()), string(c.Value())})
	}
	if err := c.Close(); err != nil {
		t.Fatalf("Close of a cursor: %v", err)
	}
	return got
}

func wantGet(t testing.TB, r projections.Reader, key, want string) {
	t.Helper()
	v, ok, err := r.Get(nil, []byte(key))
	if err != nil || !ok || string(v) != want {
		t.Errorf("Get(%q) = %q, %v, %v; want %q", key, v, ok, err, want)
	}
}

func wantAbsent(t testing.TB, r projections.Reader, key string) {
	t.Helper()
	v, ok, err := r.Get(nil, []byte(key))
	if err != nil || ok || len(v) > 0 {
		t.Errorf("Get(%q) = %q, %v, %v; want nothing", key, v, ok, err)
	}
}

func wantScan(t testing.TB, r projections.Reader, from, to string, want ...pair) {
	t.Helper()
	if got := scan(t, r, from, to, false); !slices.Equal(got, want) {
		t.Errorf("[%q, %q) = %q, want %q", from, to, got, want)
	}
	slices.Reverse(want)
	if got := scan(t, r, from, to, true); !slices.Equal(got, want) {
		t.Errorf("[%q, %q) in reverse = %q, want %q", from, to, got, want)
	}
}

func testEmpty(t *testing.T, s projections.Store) {
	view(t, s, func(r projections.Reader) {
		wantAbsent(t, r, "a")
		wantScan(t, r, "", "")
		wantScan(t, r, "a", "b")
	})
	update(t, s, func(projections.Txn) {})
	update(t, s, func(txn projections.Txn) {
		wantAbsent(t, txn, "a")
		wantScan(t, txn, "", "")
		txn.Delete([]byte("a"))
		txn.DeleteRange([]byte("a"), []byte("z"))
	})
}

func testSetGet(t *testing.T, s projections.Store) {
	update(t, s, func(txn projections.Txn) {
		txn.Set([]byte("a"), []byte("1"))
		txn.Set([]byte("b"), nil)
		txn.Set([]byte("c"), []byte("3"))
		txn.Set([]byte("c"), []byte("4"))
	})
	view(t, s, func(r projections.Reader) {
		wantGet(t, r, "a", "1")
		wantGet(t, r, "b", "") // there, with an empty value
		wantGet(t, r, "c", "4")
		wantAbsent(t, r, "aa")
		wantGet(t, r, "a", "1") // again: look-ups may go back
	})
	update(t, s, func(txn projections.Txn) {
		txn.Set([]byte("a"), []byte("5"))
		txn.Delete([]byte("c"))
		txn.Delete([]byte("d"))
	})
	view(t, s, func(r projections.Reader) {
		wantGet(t, r, "a", "5")
		wantAbsent(t, r, "c")
		wantScan(t, r, "", "", pair{"a", "5"}, pair{"b", ""})
	})
}

func testGetAppends(t *testing.T, s projections.Store) {
	check := func(r projections.Reader) {
		dst := make([]byte, 0, 16)
		dst = append(dst, "x"...)
		v, ok, err := r.Get(dst, []byte("a"))
		if err != nil || !ok || string(v) != "x1" {
			t.Errorf("Get = %q, %v, %v", v, ok, err)
		}
		if &v[0] != &dst[0] {
			t.Error("Get left a slice that had room")
		}
		v, ok, err = r.Get(dst, []byte("b"))
		if err != nil || ok || string(v) != "x" {
			t.Errorf("Get of nothing = %q, %v, %v", v, ok, err)
		}
	}
	update(t, s, func(txn projections.Txn) {
		txn.Set([]byte("a"), []byte("1"))
		check(txn)
	})
	view(t, s, check)
	update(t, s, func(txn projections.Txn) { check(txn) })
}

func testCopies(t *testing.T, s projections.Store) {
	key, value := []byte("a"), []byte("1")
	from, to := []byte("m"), []byte("n")
	update(t, s, func(txn projections.Txn) { txn.Set([]byte("m1"), nil) })
	update(t, s, func(txn projections.Txn) {
		txn.Set(key, value)
		key[0], value[0] = 'b', '2'
		txn.Set(key, value)
		key[0], value[0] = 'c', '3'
		txn.Delete(key)
		key[0] = 'a'
		txn.DeleteRange(from, to)
		from[0], to[0] = 'a', 'z'
		v, _, _ := txn.Get(nil, key)
		v[0] = 'x'
	})
	view(t, s, func(r projections.Reader) {
		wantScan(t, r, "", "", pair{"a", "1"}, pair{"b", "2"})
	})
}

func testOddKeys(t *testing.T, s projections.Store) {
	keys := []string{
		"\x00", "\x00\x00", "\x00\xff", "a", "a\x00", "a\x00\x00", "a\xff", "b",
		"\xfe\xff\xff", "\xff", "\xff\xff", string(bytes.Repeat([]byte("k"), 200)), "\xff\xff\xff\x01",
	}
	slices.Sort(keys)
	var want []pair
	update(t, s, func(txn projections.Txn) {
		for i, k := range keys {
			txn.Set([]byte(k), fmt.Appendf(nil, "%d", i))
			want = append(want, pair{k, fmt.Sprint(i)})
		}
	})
	view(t, s, func(r projections.Reader) {
		for _, p := range want {
			wantGet(t, r, p.key, p.value)
		}
		for i := range want {
			wantScan(t, r, want[i].key, "", slices.Clone(want[i:])...)
			wantScan(t, r, "", want[i].key, slices.Clone(want[:i])...)
		}
	})
}

func testLargeValues(t *testing.T, s projections.Store) {
	value := func(i int) []byte { return bytes.Repeat([]byte{byte(i), byte(i + 1), 7}, 400_000) }
	update(t, s, func(txn projections.Txn) {
		for i := range 4 {
			txn.Set([]byte{'v', byte(i)}, value(i))
		}
	})
	view(t, s, func(r projections.Reader) {
		c := r.Iterate([]byte("v"), []byte("w"), false)
		defer c.Close()
		for i := range 4 {
			if !c.Next() || !bytes.Equal(c.Value(), value(i)) {
				t.Fatalf("value %d is another", i)
			}
		}
	})
}

func testIterate(t *testing.T, s projections.Store) {
	var all []pair
	update(t, s, func(txn projections.Txn) {
		for i := range 1000 {
			p := pair{fmt.Sprintf("k%04d", i), fmt.Sprint(i)}
			all = append(all, p)
			txn.Set([]byte(p.key), []byte(p.value))
		}
	})
	cut := func(i, j int) []pair { return slices.Clone(all[i:j]) }
	view(t, s, func(r projections.Reader) {
		wantScan(t, r, "", "", cut(0, 1000)...)
		wantScan(t, r, "k", "l", cut(0, 1000)...)
		wantScan(t, r, "k0010", "k0020", cut(10, 20)...)
		wantScan(t, r, "k0010a", "k0020a", cut(11, 21)...)
		wantScan(t, r, "k0010", "k0010")
		wantScan(t, r, "k0020", "k0010")
		wantScan(t, r, "a", "b")
		wantScan(t, r, "z", "")
		wantScan(t, r, "k0999", "", cut(999, 1000)...)

		// Two cursors and look-ups at once do not disturb each other.
		a, b := r.Iterate([]byte("k"), nil, false), r.Iterate([]byte("k"), nil, true)
		defer a.Close()
		defer b.Close()
		for i := range 1000 {
			if !a.Next() || !b.Next() || string(a.Key()) != all[i].key || string(b.Key()) != all[999-i].key {
				t.Fatalf("cursors differ at %d", i)
			}
			wantGet(t, r, all[(i*7)%1000].key, all[(i*7)%1000].value)
		}
	})
}

func testCursorClose(t *testing.T, s projections.Store) {
	update(t, s, func(txn projections.Txn) {
		txn.Set([]byte("a"), nil)
		txn.Set([]byte("b"), nil)
	})
	view(t, s, func(r projections.Reader) {
		unused := r.Iterate([]byte("a"), nil, false)
		early := r.Iterate([]byte("a"), nil, false)
		if !early.Next() {
			t.Error("no first key")
		}
		ended := r.Iterate([]byte("a"), nil, false)
		for ended.Next() {
		}
		if ended.Next() {
			t.Error("Next after the end is true")
		}
		for _, c := range []projections.Cursor{unused, early, ended} {
			for range 2 {
				if err := c.Close(); err != nil {
					t.Errorf("Close: %v", err)
				}
			}
		}
		if early.Next() {
			t.Error("Next after Close is true")
		}
	})
}

func testDeleteRange(t *testing.T, s projections.Store) {
	fill := func() {
		update(t, s, func(txn projections.Txn) {
			for _, k := range []string{"a", "b", "b\x00", "c", "\xff\xff"} {
				txn.Set([]byte(k), []byte(k))
			}
		})
	}
	for _, test := range []struct {
		from, to string
		want     []string
	}{
		{"b", "c", []string{"a", "c", "\xff\xff"}},
		{"b", "b", []string{"a", "b", "b\x00", "c", "\xff\xff"}},
		{"c", "b", []string{"a", "b", "b\x00", "c", "\xff\xff"}},
		{"b\x00", "", []string{"a", "b"}},
		{"", "b", []string{"b", "b\x00", "c", "\xff\xff"}},
		{"", "", nil},
	} {
		fill()
		var to []byte
		if test.to != "" {
			to = []byte(test.to)
		}
		update(t, s, func(txn projections.Txn) { txn.DeleteRange([]byte(test.from), to) })
		view(t, s, func(r projections.Reader) {
			var got []string
			for _, p := range scan(t, r, "", "", false) {
				got = append(got, p.key)
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("after DeleteRange(%q, %q): %q, want %q", test.from, test.to, got, test.want)
			}
		})
	}
}

func testOwnWrites(t *testing.T, s projections.Store) {
	update(t, s, func(txn projections.Txn) {
		for _, k := range []string{"a", "b", "c", "d"} {
			txn.Set([]byte(k), []byte("old"))
		}
	})
	update(t, s, func(txn projections.Txn) {
		txn.Set([]byte("b"), []byte("new"))
		txn.Set([]byte("bb"), []byte("new"))
		txn.Delete([]byte("c"))
		wantGet(t, txn, "a", "old")
		wantGet(t, txn, "b", "new")
		wantGet(t, txn, "bb", "new")
		wantAbsent(t, txn, "c")
		wantScan(t, txn, "", "", pair{"a", "old"}, pair{"b", "new"}, pair{"bb", "new"}, pair{"d", "old"})
		wantScan(t, txn, "d", "", pair{"d", "old"})
		txn.DeleteRange([]byte("b"), []byte("c"))
		wantAbsent(t, txn, "b")
		wantAbsent(t, txn, "bb")
		wantScan(t, txn, "", "", pair{"a", "old"}, pair{"d", "old"})
		txn.Set([]byte("c"), []byte("again"))
		wantGet(t, txn, "c", "again")
		wantScan(t, txn, "b", "z", pair{"c", "again"}, pair{"d", "old"})
	})
	view(t, s, func(r projections.Reader) {
		wantScan(t, r, "", "", pair{"a", "old"}, pair{"c", "again"}, pair{"d", "old"})
	})
}

// testOwnWritesOrder has the writes of one key and ranges over it in each order.
func testOwnWritesOrder(t *testing.T, s projections.Store) {
	type step struct {
		name string
		do   func(projections.Txn)
	}
	steps := []step{
		{"set1", func(txn projections.Txn) { txn.Set([]byte("k"), []byte("1")) }},
		{"set2", func(txn projections.Txn) { txn.Set([]byte("k"), []byte("2")) }},
		{"delete", func(txn projections.Txn) { txn.Delete([]byte("k")) }},
		{"range", func(txn projections.Txn) { txn.DeleteRange([]byte("k"), []byte("l")) }},
	}
	result := func(before string, list ...step) string {
		for _, s := range list {
			switch s.name {
			case "set1":
				before = "1"
			case "set2":
				before = "2"
			default:
				before = ""
			}
		}
		return before
	}
	for _, before := range []string{"", "0"} {
		for _, a := range steps {
			for _, b := range steps {
				for _, c := range steps {
					update(t, s, func(txn projections.Txn) {
						if before == "" {
							txn.Delete([]byte("k"))
						} else {
							txn.Set([]byte("k"), []byte(before))
						}
					})
					want := result(before, a, b, c)
					check := func(r projections.Reader) {
						if want == "" {
							wantAbsent(t, r, "k")
							wantScan(t, r, "k", "l")
						} else {
							wantGet(t, r, "k", want)
							wantScan(t, r, "k", "l", pair{"k", want})
						}
					}
					update(t, s, func(txn projections.Txn) {
						a.do(txn)
						b.do(txn)
						c.do(txn)
						check(txn)
					})
					view(t, s, check)
					if t.Failed() {
						t.Fatalf("after %q, %s, %s, %s", before, a.name, b.name, c.name)
					}
				}
			}
		}
	}
}

func testCursorIsStable(t *testing.T, s projections.Store) {
	update(t, s, func(txn projections.Txn) { txn.Set([]byte("a"), nil) })
	update(t, s, func(txn projections.Txn) {
		txn.Set([]byte("b"), nil)
		c := txn.Iterate([]byte("a"), nil, false)
		txn.Set([]byte("c"), nil)
		txn.Delete([]byte("b"))
		n := 0
		for c.Next() {
			n++
		}
		if err := c.Close(); err != nil || n != 2 {
			t.Errorf("the cursor saw %d keys, %v; want the 2 of when it was made", n, err)
		}
	})
}
