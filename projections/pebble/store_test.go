package pebble

import (
	"errors"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// small makes the tests reach disk: memory tables fill and compactions run.
func small(dir string) Options {
	return Options{Dir: dir, MemTable: 256 << 10, Cache: 1 << 20, table: 128 << 10}
}

func open(t testing.TB, o Options) *Store {
	t.Helper()
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestConformance(t *testing.T) {
	dirs := make(map[string]string) // by test, so that a store can be opened again
	storetest.Run(t, func(t *testing.T) projections.Store {
		if dirs[t.Name()] == "" {
			dirs[t.Name()] = filepath.Join(t.TempDir(), "views")
		}
		return open(t, small(dirs[t.Name()]))
	})
}

func TestLocked(t *testing.T) {
	dir := t.TempDir()
	s := open(t, small(dir))
	if second, err := Open(small(dir)); !errors.Is(err, projections.ErrLocked) {
		t.Errorf("second Open = %v, %v; want ErrLocked", second, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := open(t, small(dir)).Close(); err != nil {
		t.Fatal(err)
	}
}
