package kms

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"testing"
)

func testKey(fill byte) []byte { return bytes.Repeat([]byte{fill}, KeySize) }

func testDataKey(tb testing.TB, region, app string, epoch uint32, subject Tag) *DataKey {
	tb.Helper()
	k, err := DeriveDataKey(region, app, epoch, subject, testKey(1), testKey(2))
	if err != nil {
		tb.Fatal(err)
	}
	return k
}

func TestEnvelopeRoundTrip(t *testing.T) {
	k := testDataKey(t, "eu", "app", 7, Tag{9})
	for _, size := range []int{0, 1, 300, 1024, 70_000} {
		plaintext, aad := make([]byte, size), make([]byte, size/3)
		rand.Read(plaintext)
		prefix := []byte("kept")
		env := k.Seal(bytes.Clone(prefix), aad, plaintext)
		if !bytes.HasPrefix(env, prefix) || len(env) != len(prefix)+size+Overhead {
			t.Fatalf("size %d: envelope of %d bytes", size, len(env))
		}
		env = env[len(prefix):]
		h, err := ParseHeader(env)
		if err != nil || h != k.Header() || h.Epoch != 7 || h.Subject != (Tag{9}) {
			t.Fatalf("header %+v, %v", h, err)
		}
		got, err := k.Open(bytes.Clone(prefix), aad, env)
		if err != nil || !bytes.Equal(got, append(prefix, plaintext...)) {
			t.Fatalf("size %d: opened %d bytes, %v", size, len(got), err)
		}
	}
}

// Every bit of an envelope counts, and so does every bit of what it is bound to.
func TestEnvelopeFlippedBits(t *testing.T) {
	k := testDataKey(t, "eu", "app", 7, Tag{9})
	aad, plaintext := []byte("bound to this"), []byte("the message")
	env := k.Seal(nil, aad, plaintext)
	for i := range len(env) * 8 {
		bad := bytes.Clone(env)
		bad[i/8] ^= 1 << (i % 8)
		want := ErrAuthentication
		switch {
		case i/8 < offEpoch:
			want = ErrEnvelope
		case i/8 < HeaderSize:
			want = ErrKeyMismatch
		}
		if got, err := k.Open(nil, aad, bad); !errors.Is(err, want) || got != nil {
			t.Fatalf("bit %d: %q, %v, want %v", i, got, err, want)
		}
	}
	for i := range len(aad) * 8 {
		bad := bytes.Clone(aad)
		bad[i/8] ^= 1 << (i % 8)
		if _, err := k.Open(nil, bad, env); !errors.Is(err, ErrAuthentication) {
			t.Fatalf("additional data, bit %d: %v", i, err)
		}
	}
	for n := range env {
		if _, err := k.Open(nil, aad, env[:n]); err == nil {
			t.Fatalf("accepted the first %d bytes", n)
		}
	}
	if _, err := k.Open(nil, aad, append(env, 0)); !errors.Is(err, ErrAuthentication) {
		t.Fatalf("accepted a byte more: %v", err)
	}
}

func TestEnvelopeSwapped(t *testing.T) {
	aad := []byte("aad")
	env := testDataKey(t, "eu", "app", 7, Tag{9}).Seal(nil, aad, []byte("the message"))
	other, err := DeriveDataKey("eu", "app", 7, Tag{9}, testKey(1), testKey(3))
	if err != nil {
		t.Fatal(err)
	}
	for name, k := range map[string]*DataKey{
		"region":      testDataKey(t, "sg", "app", 7, Tag{9}),
		"app":         testDataKey(t, "eu", "app2", 7, Tag{9}),
		"split names": testDataKey(t, "eua", "pp", 7, Tag{9}),
		"epoch":       testDataKey(t, "eu", "app", 8, Tag{9}),
		"subject":     testDataKey(t, "eu", "app", 7, Tag{8}),
		"key":         other,
	} {
		if _, err := k.Open(nil, aad, env); !errors.Is(err, ErrKeyMismatch) {
			t.Errorf("another %s: %v, want ErrKeyMismatch", name, err)
		}
		// Claiming the other's header does not help.
		forged := append(k.Header().Append(nil), env[HeaderSize:]...)
		if _, err := k.Open(nil, aad, forged); !errors.Is(err, ErrAuthentication) {
			t.Errorf("another %s, header replaced: %v, want ErrAuthentication", name, err)
		}
	}
}

func TestEnvelopeAllocations(t *testing.T) {
	if RaceDetector {
		t.Skip("skipped: the race detector allocates; run the test without -race")
	}
	k := testDataKey(t, "eu", "app", 7, Tag{9})
	aad, plaintext := make([]byte, 200), make([]byte, 1024)
	dst := make([]byte, 0, len(plaintext)+Overhead)
	out := make([]byte, 0, len(plaintext))
	env := k.Seal(nil, aad, plaintext)
	if n := testing.AllocsPerRun(200, func() { k.Seal(dst, aad, plaintext) }); n != 0 {
		t.Errorf("Seal allocates %v times", n)
	}
	if n := testing.AllocsPerRun(200, func() {
		if _, err := k.Open(out, aad, env); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("Open allocates %v times", n)
	}
	tagger := newTagger(testKey(5))
	if n := testing.AllocsPerRun(200, func() { tagger.Tag(KindSubject, "a user id of usual length") }); n != 0 {
		t.Errorf("Tag allocates %v times", n)
	}
}

func TestDataKeyPrintsNothing(t *testing.T) {
	k := testDataKey(t, "eu", "app", 7, Tag{9})
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%d"} {
		for _, secret := range []any{k, newTagger(testKey(5))} {
			if s := fmt.Sprintf(verb, secret); s != "[redacted]" {
				t.Errorf("%s prints %.200s", verb, s)
			}
		}
	}
}

func TestDeriveDataKeyInput(t *testing.T) {
	if _, err := DeriveDataKey("eu", "app", 1, Tag{}, testKey(1)[:31], testKey(2)); !errors.Is(err, ErrInput) {
		t.Fatal(err)
	}
}

func TestWipe(t *testing.T) {
	aead, err := newAEAD(testKey(1))
	if err != nil {
		t.Fatal(err)
	}
	before := aead.Seal(nil, nil, []byte("x"), nil)
	if _, err := aead.Open(nil, nil, before, nil); err != nil {
		t.Fatal(err)
	}
	wipe(aead)
	func() {
		defer func() { _ = recover() }() // a cleared cipher may also panic
		if _, err := aead.Open(nil, nil, before, nil); err == nil {
			t.Error("the cipher still works: its key was not cleared")
		}
	}()
}

func TestTags(t *testing.T) {
	a, b := newTagger(testKey(5)), newTagger(testKey(6))
	if again := newTagger(testKey(5)); a.Tag("event", "x") != again.Tag("event", "x") {
		t.Error("tags differ")
	}
	if a.Tag("event", "x") == a.Tag("subject", "x") || a.Tag("event", "x") == b.Tag("event", "x") ||
		a.Tag("even", "tx") == a.Tag("event", "x") {
		t.Error("tags of different things are equal")
	}
	if a.MAC("p", []byte("x")) == a.MAC("q", []byte("x")) {
		t.Error("codes of different purposes are equal")
	}
	tag := a.Tag("event", "x")
	if back, err := ParseTag(tag.String()); err != nil || back != tag {
		t.Error(back, err)
	}
	for _, bad := range []string{"", "ab", strings.Repeat("A", 32), tag.String() + "00", strings.Repeat("g", 32)} {
		if _, err := ParseTag(bad); !errors.Is(err, ErrInput) {
			t.Errorf("accepted %q", bad)
		}
	}
}

func FuzzParseHeader(f *testing.F) {
	seeds := loadVectors(f).Envelopes
	if len(seeds) == 0 {
		f.Fatal("no seeds: the vectors are empty")
	}
	for _, v := range seeds {
		f.Add([]byte(v.Envelope))
	}
	f.Fuzz(func(t *testing.T, env []byte) {
		h, err := ParseHeader(env)
		if err != nil {
			if !errors.Is(err, ErrEnvelope) || h != (Header{}) {
				t.Fatalf("%+v, %v", h, err)
			}
			return
		}
		if again := h.Append(nil); !bytes.Equal(again, env[:HeaderSize]) {
			t.Fatalf("%x encodes as %x", env[:HeaderSize], again)
		}
	})
}

// What Open accepts is what Seal could have made; any change is refused.
func FuzzOpen(f *testing.F) {
	seeds := loadVectors(f).Envelopes
	if len(seeds) == 0 {
		f.Fatal("no seeds: the vectors are empty")
	}
	for _, v := range seeds {
		f.Add([]byte(v.Plaintext), []byte(v.AAD), uint16(3), byte(1))
		f.Add([]byte(v.Plaintext), []byte(v.AAD), uint16(60), byte(0))
	}
	k := testDataKey(f, "eu", "app", 7, Tag{9})
	f.Fuzz(func(t *testing.T, plaintext, aad []byte, at uint16, mask byte) {
		env := k.Seal(nil, aad, plaintext)
		env[int(at)%len(env)] ^= mask
		got, err := k.Open(nil, aad, env)
		if (err == nil) != (mask == 0) {
			t.Fatalf("byte %d changed by %02x: %v", int(at)%len(env), mask, err)
		}
		if err == nil && !bytes.Equal(got, plaintext) {
			t.Fatal("another plaintext")
		}
	})
}

func BenchmarkSeal1K(b *testing.B) {
	k := testDataKey(b, "eu", "app", 7, Tag{9})
	aad, plaintext := make([]byte, 200), make([]byte, 1024)
	dst := make([]byte, 0, len(plaintext)+Overhead)
	b.ReportAllocs()
	for b.Loop() {
		k.Seal(dst, aad, plaintext)
	}
}

func BenchmarkOpen1K(b *testing.B) {
	k := testDataKey(b, "eu", "app", 7, Tag{9})
	aad, plaintext := make([]byte, 200), make([]byte, 1024)
	env := k.Seal(nil, aad, plaintext)
	dst := make([]byte, 0, len(plaintext))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := k.Open(dst, aad, env); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkTag(b *testing.B) {
	tagger := newTagger(testKey(5))
	b.ReportAllocs()
	for b.Loop() {
		tagger.Tag(KindSubject, "a user id of usual length")
	}
}

func BenchmarkDeriveDataKey(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if _, err := DeriveDataKey("eu", "app", 1, Tag{}, testKey(1), testKey(2)); err != nil {
			b.Fatal(err)
		}
	}
}
