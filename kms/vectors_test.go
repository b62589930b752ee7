package kms

import (
	"bytes"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

const vectorFile = "../docs/format/vectors/envelope.json"

// hexBytes are written in hex.
type hexBytes []byte

func (h hexBytes) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, h), nil }

func (h *hexBytes) UnmarshalText(b []byte) error {
	*h = make([]byte, hex.DecodedLen(len(b)))
	_, err := hex.Decode(*h, b)
	return err
}

type vectors struct {
	Comment   string           `json:"comment"`
	Envelopes []envelopeVector `json:"envelopes"`
	Refused   []refusedVector  `json:"refused"`
	Tags      []tagVector      `json:"tags"`
	MACs      []macVector      `json:"macs"`
	Wrapped   []wrappedVector  `json:"wrapped_keys"`
	Blobs     []blobVector     `json:"blobs"`
}

type envelopeVector struct {
	Name       string   `json:"name"`
	Region     string   `json:"region"`
	App        string   `json:"app"`
	Epoch      uint32   `json:"epoch"`
	Subject    Tag      `json:"subject"`
	EpochKey   hexBytes `json:"epoch_key"`
	SubjectKey hexBytes `json:"subject_key"`
	DataKey    hexBytes `json:"data_key"`
	KeyID      hexBytes `json:"key_id"`
	AAD        hexBytes `json:"aad"`
	Plaintext  hexBytes `json:"plaintext"`
	Envelope   hexBytes `json:"envelope"`
}

type refusedVector struct {
	Name     string   `json:"name"`
	Key      int      `json:"key"` // index of the entry of envelopes whose keys are used
	AAD      hexBytes `json:"aad"`
	Envelope hexBytes `json:"envelope"`
	Error    string   `json:"error"` // "envelope", "key mismatch" or "authentication"
}

type tagVector struct {
	TagKey hexBytes `json:"tag_key"`
	Kind   string   `json:"kind"`
	ID     string   `json:"id"`
	Tag    Tag      `json:"tag"`
}

type macVector struct {
	TagKey  hexBytes `json:"tag_key"`
	Purpose string   `json:"purpose"`
	Message hexBytes `json:"message"`
	MAC     hexBytes `json:"mac"`
}

type wrappedVector struct {
	Name    string   `json:"name"`
	AppKey  hexBytes `json:"app_key"`
	Region  string   `json:"region"`
	App     string   `json:"app"`
	Kind    string   `json:"kind"`
	ID      hexBytes `json:"id"`
	Key     hexBytes `json:"key"`
	Wrapped hexBytes `json:"wrapped"`
}

type blobVector struct {
	BlobKey   hexBytes `json:"blob_key"`
	Region    string   `json:"region"`
	App       string   `json:"app"`
	Purpose   string   `json:"purpose"`
	Plaintext hexBytes `json:"plaintext"`
	Blob      hexBytes `json:"blob"`
}

func loadVectors(tb testing.TB) vectors {
	tb.Helper()
	b, err := os.ReadFile(vectorFile)
	if err != nil {
		tb.Fatal(err)
	}
	var v vectors
	if err := json.Unmarshal(b, &v, json.RejectUnknownMembers(true)); err != nil {
		tb.Fatal(err)
	}
	return v
}

func TestVectors(t *testing.T) {
	v := loadVectors(t)
	if len(v.Envelopes) < 3 || len(v.Refused) < 8 || len(v.Tags) < 3 || len(v.MACs) < 1 || len(v.Wrapped) < 4 || len(v.Blobs) < 1 {
		t.Fatal("vectors are missing")
	}
	keys := make([]*DataKey, len(v.Envelopes))
	for i, e := range v.Envelopes {
		k, err := DeriveDataKey(e.Region, e.App, e.Epoch, e.Subject, e.EpochKey, e.SubjectKey)
		if err != nil {
			t.Fatal(err)
		}
		keys[i] = k
		if id := k.Header().KeyID; !bytes.Equal(id[:], e.KeyID) {
			t.Errorf("%s: key id %x", e.Name, id)
		}
		if id, err := commitment(e.DataKey); err != nil || !bytes.Equal(id[:], e.KeyID) {
			t.Errorf("%s: the key id of data_key is %x", e.Name, id)
		}
		if got, err := k.Open(nil, e.AAD, e.Envelope); err != nil || !bytes.Equal(got, e.Plaintext) {
			t.Errorf("%s: %q, %v", e.Name, got, err)
		}
	}
	classes := map[string]error{"envelope": ErrEnvelope, "key mismatch": ErrKeyMismatch, "authentication": ErrAuthentication}
	for _, r := range v.Refused {
		if _, err := keys[r.Key].Open(nil, r.AAD, r.Envelope); classes[r.Error] == nil || !errors.Is(err, classes[r.Error]) {
			t.Errorf("%s: %v, want %s", r.Name, err, r.Error)
		}
	}
	for _, g := range v.Tags {
		if got := newTagger(bytes.Clone(g.TagKey)).Tag(g.Kind, g.ID); got != g.Tag {
			t.Errorf("tag of %s %q is %s", g.Kind, g.ID, got)
		}
	}
	for _, m := range v.MACs {
		if got := newTagger(bytes.Clone(m.TagKey)).MAC(m.Purpose, m.Message); !bytes.Equal(got[:], m.MAC) {
			t.Errorf("code for %s is %x", m.Purpose, got)
		}
	}
	for _, w := range v.Wrapped {
		aead, err := newAEAD(w.AppKey)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := openKey(aead, w.Region, w.App, w.Kind, w.ID, w.Wrapped); err != nil || !bytes.Equal(got, w.Key) {
			t.Errorf("%s: %v", w.Name, err)
		}
	}
	for _, b := range v.Blobs {
		aead, err := newAEAD(b.BlobKey)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := openBlob(aead, b.Region, b.App, b.Purpose, b.Blob); err != nil || !bytes.Equal(got, b.Plaintext) {
			t.Errorf("blob for %s: %q, %v", b.Purpose, got, err)
		}
		if _, err := openBlob(aead, b.Region, b.App, b.Purpose+"x", b.Blob); !errors.Is(err, ErrAuthentication) {
			t.Errorf("blob for another purpose: %v", err)
		}
	}
}

// A program in another language, with stock AES-GCM and HKDF, opens the same
// vectors from the normative document alone.
func TestVectorsInPython(t *testing.T) {
	script, err := filepath.Abs("../docs/format/open_vectors.py")
	if err != nil {
		t.Fatal(err)
	}
	python, err := exec.LookPath("python3")
	if err == nil {
		err = exec.CommandContext(t.Context(), python, "-c", "import cryptography").Run()
	}
	if err != nil {
		const reason = "skipped: needs python3 with the package cryptography; install it with pip install cryptography"
		if os.Getenv("COFFER_TEST_REQUIRE") == "all" {
			t.Fatal(reason)
		}
		t.Skip(reason)
	}
	out, err := exec.CommandContext(t.Context(), python, script).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	v := loadVectors(t)
	if want := len(v.Envelopes); !strings.Contains(string(out), "opened") || want == 0 {
		t.Fatalf("the script says: %s", out)
	}
	t.Logf("%s", out)

	// A script that accepts anything would prove nothing: damage each kind.
	damaged := filepath.Join(t.TempDir(), "envelope.json")
	v.Envelopes[0].Envelope[HeaderSize+14] ^= 1
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(damaged, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), python, script, damaged).CombinedOutput(); err == nil {
		t.Fatalf("the script accepts a damaged envelope: %s", out)
	}
}

//nolint:gochecknoglobals // a flag of the test binary
var update = flag.Bool("update", false, "write new test vectors")

// With -update this writes the vectors anew. Published vectors are kept: do it
// only for a new version of the format.
func TestWriteVectors(t *testing.T) {
	if !*update {
		return
	}
	var v vectors
	v.Comment = "Test vectors of docs/format/envelope.md and keyring.md. Binary values are in hex. Keys are for tests only."
	app := "03" + strings.Repeat("5a", 15)
	seq := func(from byte) []byte {
		b := make([]byte, KeySize)
		for i := range b {
			b[i] = from + byte(i)
		}
		return b
	}
	tagger := newTagger(seq(0x80))
	for _, in := range []struct {
		name, plaintext, aad string
		epoch                uint32
		user                 string
	}{
		{"empty plaintext, no additional data", "", "", 1, "alice"},
		{"an event", `{"specversion":"1.0","id":"e1","type":"message.sent"}`, "caller's additional data", 1, "alice"},
		{"the app itself as subject, last epoch", "operational", "\x00\x01\x02", 0xffffffff, ""},
		{"a long one", strings.Repeat("0123456789abcdef", 100), strings.Repeat("a", 300), 258, "bob"},
	} {
		e := envelopeVector{
			Name: in.name, Region: "eu", App: app, Epoch: in.epoch, Subject: tagger.Tag(KindSubject, in.user),
			EpochKey: seq(byte(in.epoch)), SubjectKey: seq(0x40), AAD: hexBytes(in.aad), Plaintext: hexBytes(in.plaintext),
		}
		k, err := DeriveDataKey(e.Region, e.App, e.Epoch, e.Subject, e.EpochKey, e.SubjectKey)
		if err != nil {
			t.Fatal(err)
		}
		id := k.Header().KeyID
		e.KeyID = id[:]
		e.DataKey = dataKeyBytes(t, e)
		e.Envelope = k.Seal(nil, e.AAD, e.Plaintext)
		v.Envelopes = append(v.Envelopes, e)
	}
	base := v.Envelopes[1]
	refuse := func(name, class string, aad []byte, edit func([]byte) []byte) {
		v.Refused = append(v.Refused, refusedVector{Name: name, Key: 1, AAD: aad, Envelope: edit(bytes.Clone(base.Envelope)), Error: class})
	}
	flip := func(i int) func([]byte) []byte { return func(b []byte) []byte { b[i] ^= 1; return b } }
	refuse("magic", "envelope", base.AAD, flip(0))
	refuse("version", "envelope", base.AAD, func(b []byte) []byte { b[1] = 2; return b })
	refuse("suite", "envelope", base.AAD, func(b []byte) []byte { b[2] = 2; return b })
	refuse("flags", "envelope", base.AAD, flip(3))
	refuse("too short", "envelope", base.AAD, func(b []byte) []byte { return b[:Overhead-1] })
	refuse("epoch", "key mismatch", base.AAD, flip(offEpoch+3))
	refuse("subject", "key mismatch", base.AAD, flip(offSubject))
	refuse("key id", "key mismatch", base.AAD, flip(offKeyID))
	refuse("nonce", "authentication", base.AAD, flip(HeaderSize))
	refuse("ciphertext", "authentication", base.AAD, flip(HeaderSize+12))
	refuse("tag", "authentication", base.AAD, flip(len(base.Envelope)-1))
	refuse("a byte more", "authentication", base.AAD, func(b []byte) []byte { return append(b, 0) })
	refuse("additional data", "authentication", []byte("other additional data"), func(b []byte) []byte { return b })
	refuse("another envelope's body", "authentication", base.AAD, func(b []byte) []byte {
		return append(b[:HeaderSize], v.Envelopes[0].Envelope[HeaderSize:]...)
	})
	for _, in := range [][2]string{{KindEvent, "e1"}, {KindConversation, "alice,bob"}, {KindSubject, "alice"}, {KindSubject, ""}} {
		v.Tags = append(v.Tags, tagVector{TagKey: seq(0x80), Kind: in[0], ID: in[1], Tag: tagger.Tag(in[0], in[1])})
	}
	mac := tagger.MAC("event body", []byte("message"))
	v.MACs = append(v.MACs, macVector{TagKey: seq(0x80), Purpose: "event body", Message: []byte("message"), MAC: mac[:]})
	appKey, err := newAEAD(seq(0x20))
	if err != nil {
		t.Fatal(err)
	}
	alice := tagger.Tag(KindSubject, "alice")
	for _, in := range []struct {
		kind string
		id   []byte
	}{{kindTagKey, nil}, {kindBlobKey, nil}, {kindEpochKey, epochID(1)}, {kindSubjectKey, alice[:]}} {
		v.Wrapped = append(v.Wrapped, wrappedVector{
			Name: in.kind + " key", AppKey: seq(0x20), Region: "eu", App: app, Kind: in.kind, ID: in.id, Key: seq(0x60),
			Wrapped: sealKey(appKey, "eu", app, 1, in.kind, in.id, seq(0x60)),
		})
	}
	blobKey, err := newAEAD(seq(0x30))
	if err != nil {
		t.Fatal(err)
	}
	v.Blobs = append(v.Blobs, blobVector{
		BlobKey: seq(0x30), Region: "eu", App: app, Purpose: "certificate", Plaintext: []byte("a secret"),
		Blob: sealBlob(blobKey, "eu", app, "certificate", []byte("a secret")),
	})
	b, err := json.Marshal(v, jsontext.WithIndent("  "))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(vectorFile, append(b, '\n'), 0o644); err != nil { //nolint:gosec // published
		t.Fatal(err)
	}
}

// dataKeyBytes derives what DataKey does not show, the long way round.
func dataKeyBytes(t *testing.T, e envelopeVector) []byte {
	t.Helper()
	info := appendString(nil, "coffer/v1 data")
	info = appendString(info, e.Region)
	info = appendString(info, e.App)
	info = append(info, epochID(e.Epoch)...)
	key, err := hkdf.Key(sha256.New, append(bytes.Clone(e.EpochKey), e.SubjectKey...), nil, string(info), KeySize)
	if err != nil {
		t.Fatal(err)
	}
	return key
}
