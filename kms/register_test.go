package kms_test

import (
	"errors"
	"testing"

	"github.com/cofferdb/coffer/kms"
)

// TestRegisterSubject: a subject that was erased and registered again has a new
// key. What it sealed before stays erased, in every process, and says so; it can
// be erased again; one that was not erased keeps its key.
func TestRegisterSubject(t *testing.T) {
	w := newWorld(t)
	a, b := w.process(t), w.process(t)
	w.create(t, a)
	before, other := seal(t, a, day(0), subject(0), "before"), seal(t, a, day(0), subject(1), "kept")
	wantOpen(t, b, before, "before")
	register := func(k *kms.Keyring, s kms.Tag, want bool) {
		t.Helper()
		if got, err := k.RegisterSubject(t.Context(), app, s); err != nil || got != want {
			t.Errorf("registered: %v %v, want %v", got, err, want)
		}
	}
	register(a, subject(1), false)
	register(a, subject(9), false) // never seen
	if err := a.EraseSubject(t.Context(), app, subject(0)); err != nil {
		t.Fatal(err)
	}
	// In one stride, so that b may see both changes as one.
	register(a, subject(0), true)
	register(a, subject(0), false)
	after := seal(t, a, day(0), subject(0), "after")
	gone := func(k *kms.Keyring, env []byte) bool {
		_, err := open(t.Context(), k, env)
		return errors.Is(err, kms.ErrSubjectErased)
	}
	if !gone(a, before) {
		t.Error("what was sealed before the erasure can be read, or is called damaged")
	}
	eventually(t, "another process has the new key", func() bool {
		text, err := open(t.Context(), b, after)
		return err == nil && text == "after"
	})
	fresh := w.process(t)
	for _, k := range []*kms.Keyring{a, b, fresh} {
		if !gone(k, before) {
			t.Error("the old key is back")
		}
		wantOpen(t, k, after, "after")
		wantOpen(t, k, other, "kept")
		wantOpen(t, k, seal(t, k, day(1), subject(0), "next"), "next")
	}
	// An envelope that never was the subject's is damage all the same.
	swapped := append([]byte(nil), other...)
	swapped[30] ^= 1 // of the key id
	if _, err := open(t.Context(), a, swapped); !errors.Is(err, kms.ErrKeyMismatch) {
		t.Errorf("another key id of a subject that was not erased: %v", err)
	}
	// Replacing the app key keeps the date of the erasure.
	if _, err := a.ReplaceAppKey(t.Context(), app); err != nil {
		t.Fatal(err)
	}
	last := w.process(t)
	if !gone(last, before) {
		t.Error("after the app key was replaced the erasure is forgotten")
	}
	wantOpen(t, last, after, "after")
	if err := a.EraseSubject(t.Context(), app, subject(0)); err != nil {
		t.Fatal(err)
	}
	if !gone(a, after) || !gone(a, before) {
		t.Error("the second erasure leaves something")
	}
	if _, err := a.Sealer(t.Context(), app, day(0), subject(0)); !errors.Is(err, kms.ErrSubjectErased) {
		t.Errorf("sealing after the second erasure: %v", err)
	}
	if _, err := a.RegisterSubject(t.Context(), "noapp", subject(0)); !errors.Is(err, kms.ErrAppUnknown) {
		t.Errorf("in an unknown app: %v", err)
	}
}
