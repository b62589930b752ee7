package pebble

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/cofferdb/coffer/projections"
)

// TestFilesOfOneTable writes two tables, one whose keys only rise and one whose
// keys are anywhere: no file has keys of both, and the first is not rewritten with
// the second.
func TestFilesOfOneTable(t *testing.T) {
	t.Parallel()
	s := open(t, small(t.TempDir()))
	defer s.Close()
	random := rand.New(rand.NewPCG(5, 6)) //nolint:gosec // a test
	value := make([]byte, 500)
	for i := range 100 {
		err := s.Update(func(txn projections.Txn) error {
			for j := range 100 {
				txn.Set(binary.BigEndian.AppendUint64([]byte{'j'}, uint64(100*i+j)), value)
				txn.Set(binary.BigEndian.AppendUint64([]byte{'k'}, random.Uint64()), value)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	levels, err := s.db.SSTables()
	if err != nil {
		t.Fatal(err)
	}
	var files [256]int
	for _, level := range levels {
		for _, f := range level {
			first, last := f.Smallest.UserKey, f.Largest.UserKey
			if first[0] != last[0] && !f.Largest.IsExclusiveSentinel() {
				t.Errorf("a file has keys from %x to %x", first, last)
			}
			files[first[0]]++
		}
	}
	if files['j'] == 0 || files['k'] == 0 {
		t.Errorf("files of the tables: %d and %d", files['j'], files['k'])
	}
}

// brokenFile fails from its n-th write on.
type brokenFile struct {
	vfs.File

	writes int
}

var errBroken = errors.New("the disk is full")

func (f *brokenFile) Write(b []byte) (int, error) {
	if f.writes--; f.writes < 0 {
		return 0, errBroken
	}
	return f.File.Write(b)
}

// TestGather writes pieces of every size: what is on disk is what was written, and
// a write that fails is not forgotten by the time that the file is synced.
func TestGather(t *testing.T) {
	t.Parallel()
	memory := vfs.NewMem()
	f, err := gathering{memory}.Create("000001.sst", vfs.WriteCategoryUnspecified)
	if err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(7, 8)) //nolint:gosec // a test
	var want []byte
	for i := range 200 {
		b := bytes.Repeat([]byte{byte(i)}, random.IntN(20<<10))
		if i%50 == 49 {
			b = bytes.Repeat([]byte{byte(i)}, gatherSize+random.IntN(gatherSize))
		}
		want = append(want, b...)
		if n, err := f.Write(b); n != len(b) || err != nil {
			t.Fatal(n, err)
		}
		if i%70 == 69 {
			if _, err := f.SyncTo(int64(len(want)) / 2); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
	if f, err = memory.Open("000001.sst"); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want)+1)
	if n, _ := f.ReadAt(got, 0); !bytes.Equal(got[:n], want) {
		t.Errorf("%d bytes of %d, or others, are in the file", n, len(want))
	}
	_ = f.Close()

	for writes := range 3 {
		under, err := memory.Create("000002.sst", vfs.WriteCategoryUnspecified)
		if err != nil {
			t.Fatal(err)
		}
		f := &gatheredFile{File: &brokenFile{File: under, writes: writes}, room: make([]byte, 0, gatherSize)}
		failed := false
		for range 4 * gatherSize / (16 << 10) {
			if _, err := f.Write(make([]byte, 16<<10)); errors.Is(err, errBroken) {
				failed = true
			} else if failed {
				t.Error("what came behind a failed write was taken")
			}
		}
		if err := f.Sync(); !errors.Is(err, errBroken) {
			t.Errorf("after a write that failed, Sync = %v", err)
		}
		if err := f.Close(); !errors.Is(err, errBroken) {
			t.Errorf("after a write that failed, Close = %v", err)
		}
	}
}
