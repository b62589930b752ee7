package kms_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/cofferdb/coffer/kms"
)

// seedRows returns rows that the keyring wrote, by prefix of their names.
func seedRows(f *testing.F, prefix string) [][]byte {
	f.Helper()
	w := newWorld(f)
	k := w.process(f)
	w.create(f, k)
	k.SetPageLimit(1500)
	for i := range 30 {
		seal(f, k, day(i%3), subject(i), "x")
	}
	if err := k.EraseSubject(f.Context(), app, subject(3)); err != nil {
		f.Fatal(err)
	}
	if _, err := k.DestroyEpochs(f.Context(), app, day(0).Expires); err != nil {
		f.Fatal(err)
	}
	var seeds [][]byte
	for _, name := range w.rows.Names() {
		if strings.HasPrefix(name, prefix) {
			row, err := w.rows.Load(f.Context(), name)
			if err != nil {
				f.Fatal(err)
			}
			seeds = append(seeds, row.Value)
		}
	}
	if len(seeds) == 0 {
		f.Fatal("no seeds")
	}
	return seeds
}

// What is accepted encodes to bytes that are accepted and encode the same.
func stable(t *testing.T, value []byte, decode func([]byte) ([]byte, error)) {
	once, err := decode(value)
	if err != nil {
		if !errors.Is(err, kms.ErrKeyringCorrupt) {
			t.Fatalf("%v, want ErrKeyringCorrupt", err)
		}
		return
	}
	twice, err := decode(once)
	if err != nil || !bytes.Equal(once, twice) {
		t.Fatalf("%s\nencodes as\n%s\nthen as\n%s\n%v", value, once, twice, err)
	}
}

func FuzzDecodePage(f *testing.F) {
	for _, seed := range seedRows(f, "sub.") {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		stable(t, value, func(b []byte) ([]byte, error) { return kms.DecodePage("", b) })
	})
}

func FuzzDecodeAppRow(f *testing.F) {
	for _, seed := range seedRows(f, "app.") {
		f.Add(seed)
		again, err := kms.DecodeAppRow("eu", app, seed)
		if err != nil || !bytes.Equal(again, seed) {
			f.Fatalf("what the keyring wrote encodes differently: %v", err)
		}
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		stable(t, value, func(b []byte) ([]byte, error) { return kms.DecodeAppRow("eu", app, b) })
	})
}

// A row that was damaged is an error that says so, never another key.
func TestDamagedRows(t *testing.T) {
	w := newWorld(t)
	k := w.process(t)
	w.create(t, k)
	env := seal(t, k, day(0), subject(0), "x")
	for _, name := range w.rows.Names() {
		row, err := w.rows.Load(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		for i := range row.Value {
			bad := bytes.Clone(row.Value)
			bad[i] ^= 1
			rows := *w
			rows.rows = w.rows.Clone(name, bad)
			got, err := open(t.Context(), rows.process(t), env)
			harmless := err == nil && got == "x" // a date, for instance
			if !harmless && !errors.Is(err, kms.ErrKeyringCorrupt) && !errors.Is(err, kms.ErrKeyUnknown) &&
				!errors.Is(err, kms.ErrMismatch) && !errors.Is(err, kms.ErrNotFound) && !errors.Is(err, kms.ErrVersionRetired) {
				t.Fatalf("%s, byte %d (%q): %q, %v", name, i, row.Value[max(0, i-10):min(len(row.Value), i+10)], got, err)
			}
			if err == nil && got != "x" {
				t.Fatalf("%s, byte %d: opened %q", name, i, got)
			}
		}
	}
}
