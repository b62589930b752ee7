package pebble

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cofferdb/coffer/projections"
)

// history is a sequence of transactions whose number is kept in the store, so
// that any content can be judged: it must be that after exactly so many.
type history struct{ steps int }

func key(i int) []byte { return fmt.Appendf(nil, "k%05d", i) }

// value is not compressible and differs for each transaction.
func value(step, i int) []byte {
	b := make([]byte, 600)
	r := rand.NewChaCha8([32]byte{byte(step), byte(step >> 8), byte(i), byte(i >> 8)})
	r.Read(b)
	return b
}

func (h history) apply(step int, set func(k, v []byte), del func(from, to []byte)) {
	for i := range 3 {
		n := (step*7 + i*131) % 1500
		set(key(n), value(step, n))
	}
	if step%50 == 49 {
		del(key(step%1500), key(step%1500+20))
	}
}

func (h history) write(t testing.TB, s *Store) {
	t.Helper()
	for step := range h.steps {
		err := s.Update(func(txn projections.Txn) error {
			h.apply(step, txn.Set, txn.DeleteRange)
			txn.Set([]byte("n"), binary.BigEndian.AppendUint64(nil, uint64(step+1)))
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// state is what the store has to have after the first n transactions.
func (h history) state(n int) map[string][]byte {
	m := make(map[string][]byte)
	for step := range n {
		h.apply(step, func(k, v []byte) { m[string(k)] = v }, func(from, to []byte) {
			maps.DeleteFunc(m, func(k string, _ []byte) bool { return k >= string(from) && k < string(to) })
		})
	}
	return m
}

// check reads everything, by cursor both ways and by key. It returns how many
// transactions the store has, or an error; it fails the test if the store
// answers with anything that it never contained.
func (h history) check(t testing.TB, s *Store) (n int, err error) {
	t.Helper()
	err = s.View(func(r projections.Reader) error {
		v, ok, err := r.Get(nil, []byte("n"))
		if err != nil {
			return err
		}
		if ok {
			n = int(binary.BigEndian.Uint64(v))
		}
		want := h.state(n)
		for _, reverse := range []bool{false, true} {
			got := make(map[string][]byte)
			c := r.Iterate([]byte("k"), []byte("l"), reverse)
			for c.Next() {
				got[string(c.Key())] = bytes.Clone(c.Value())
			}
			if err := c.Close(); err != nil {
				return err
			}
			if !maps.EqualFunc(got, want, bytes.Equal) {
				t.Errorf("the store says %d transactions and has another content (%d keys, want %d)", n, len(got), len(want))
			}
		}
		for i := range 1500 {
			v, ok, err := r.Get(nil, key(i))
			if err != nil {
				return err
			}
			if w, there := want[string(key(i))]; ok != there || !bytes.Equal(v, w) {
				t.Errorf("key %d is another", i)
			}
		}
		return nil
	})
	return n, err
}

// written returns a folder that holds h, closed.
func (h history) written(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "views")
	s := open(t, small(dir))
	h.write(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestDamagedFiles flips a byte in, cuts and deletes each file of a store. The
// store must refuse, or have the content of some earlier moment as a whole.
func TestDamagedFiles(t *testing.T) {
	h := history{steps: 1200}
	dir := h.written(t)
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	tables, refused, older := 0, 0, 0
	for _, file := range files {
		name := filepath.Base(file)
		info, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		flips := 4
		if strings.HasSuffix(name, ".sst") {
			tables++
		}
		if strings.HasPrefix(name, "MANIFEST") {
			flips = 40
		}
		damage := map[string]func(path string) error{
			"deleted": os.Remove,
		}
		if size := info.Size(); size > 0 {
			damage["cut"] = func(path string) error { return os.Truncate(path, rng.Int64N(size)) }
			damage["emptied"] = func(path string) error { return os.Truncate(path, 0) }
			for i := range flips {
				at := rng.Int64N(size)
				damage[fmt.Sprintf("flip %d at %d", i, at)] = func(path string) error {
					b, err := os.ReadFile(path)
					if err != nil {
						return err
					}
					b[at] ^= 1 << rng.IntN(8)
					return os.WriteFile(path, b, 0o600)
				}
			}
		}
		for _, kind := range slices.Sorted(maps.Keys(damage)) {
			copied := filepath.Join(t.TempDir(), "copy")
			if err := os.CopyFS(copied, os.DirFS(dir)); err != nil {
				t.Fatal(err)
			}
			if err := damage[kind](filepath.Join(copied, name)); err != nil {
				t.Fatal(err)
			}
			n, err := h.openAndCheck(t, copied)
			switch {
			case t.Failed():
				t.Fatalf("%s %s", name, kind)
			case errors.Is(err, projections.ErrCorrupt):
				refused++
			case err != nil:
				t.Fatalf("%s %s: %v, want ErrCorrupt", name, kind, err)
			case n < h.steps:
				older++
			}
		}
	}
	t.Logf("%d files of which %d tables: refused %d times, an older state %d times", len(files), tables, refused, older)
	if tables < 2 || refused < 5*tables {
		t.Errorf("the test has lost its grip: %d tables, %d refusals", tables, refused)
	}
}

func (h history) openAndCheck(t *testing.T, dir string) (int, error) {
	s, err := Open(small(dir))
	if err != nil {
		return 0, err
	}
	n, err := h.check(t, s)
	if err == nil {
		// What was read was right; a compaction may still meet the damage.
		err = s.db.Compact(t.Context(), []byte{0}, []byte{0xff}, false)
		err = s.fail(err)
	}
	if errors.Is(err, projections.ErrCorrupt) {
		if verr := s.View(func(projections.Reader) error { return nil }); !errors.Is(verr, projections.ErrCorrupt) {
			t.Errorf("View after damage was found: %v, want ErrCorrupt", verr)
		}
		if uerr := s.Update(func(projections.Txn) error { return nil }); !errors.Is(uerr, projections.ErrCorrupt) {
			t.Errorf("Update after damage was found: %v, want ErrCorrupt", uerr)
		}
	}
	if cerr := s.Close(); cerr != nil && err == nil {
		err = cerr
	}
	return n, err
}

// TestKilled copies the folder of a store that is being written, which is what
// a killed process leaves: the copy must be some earlier moment as a whole.
func TestKilled(t *testing.T) {
	h := history{steps: 2500}
	dir := filepath.Join(t.TempDir(), "views")
	s := open(t, small(dir))
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.write(t, s)
	}()
	kept := 0
	for round := 0; ; round++ {
		ended := false
		select {
		case <-done:
			ended = true
		default:
		}
		copied := filepath.Join(t.TempDir(), "copy")
		if !copyLive(t, dir, copied) {
			continue // a file went away in the middle: no moment in time
		}
		n, err := h.openAndCheck(t, copied)
		if err != nil && !errors.Is(err, projections.ErrCorrupt) {
			t.Fatalf("round %d: %v", round, err)
		}
		if err == nil && n > 0 {
			kept++
		}
		if ended {
			break
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	n, err := h.openAndCheck(t, dir)
	if err != nil || n != h.steps {
		t.Errorf("after Close: %d transactions, %v; want %d", n, err, h.steps)
	}
	if kept == 0 {
		t.Error("no copy had a transaction in it")
	}
}

// copyLive copies the manifest first: tables are only added to it after they
// are complete, so what it names is there unless a compaction removed it.
func copyLive(t *testing.T, from, to string) bool {
	t.Helper()
	names, err := fs.Glob(os.DirFS(from), "*")
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(names, func(a, b string) int {
		return strings.Compare(b, a) // marker, OPTIONS, MANIFEST, …, tables
	})
	if err := os.MkdirAll(to, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		b, err := os.ReadFile(filepath.Join(from, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(to, name), b, 0o600)
		}
		if err != nil {
			return false
		}
	}
	return true
}
