package kms

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash"
	"runtime"
	"sync"
)

// Context binds a wrapped key to its use: a provider unwraps a key only with
// the context it was wrapped with. Its parts show in audit logs of key
// management services, so they are opaque names, never personal data.
type Context struct {
	Region  string
	App     string
	Purpose string
}

// PurposeApp is the purpose of an app key.
const PurposeApp = "app-key"

const maxContextPart = 128

// Validate returns ErrInput unless every part has 1 to 128 bytes of printable
// ASCII.
func (c Context) Validate() error {
	for _, part := range [...]string{c.Region, c.App, c.Purpose} {
		if part == "" || len(part) > maxContextPart {
			return fmt.Errorf("%w: a part of the binding context has %d bytes", ErrInput, len(part))
		}
		for i := range len(part) {
			if part[i] < 0x20 || part[i] > 0x7e {
				return fmt.Errorf("%w: a part of the binding context is not printable ASCII", ErrInput)
			}
		}
	}
	return nil
}

// Encode returns the one encoding of c: "coffer/v1 context" and its parts, each
// after its length in four bytes. Providers that bind bytes bind these.
func (c Context) Encode() []byte {
	b := make([]byte, 0, 64)
	b = appendString(b, "coffer/v1 context")
	b = appendString(b, c.Region)
	b = appendString(b, c.App)
	return appendString(b, c.Purpose)
}

// Tag stands for an id outside ciphertext: the first 16 bytes of a keyed hash.
// Without the app's tag key it tells nothing of the id.
type Tag [16]byte

// String is the tag in 32 hex digits.
func (t Tag) String() string { return hex.EncodeToString(t[:]) }

// ParseTag reads 32 lower-case hex digits.
func ParseTag(s string) (Tag, error) {
	var t Tag
	if err := t.UnmarshalText([]byte(s)); err != nil {
		return Tag{}, err
	}
	return t, nil
}

// MarshalText writes 32 hex digits.
func (t Tag) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, t[:]), nil }

// UnmarshalText reads 32 lower-case hex digits.
func (t *Tag) UnmarshalText(b []byte) error {
	if len(b) != 2*len(t) {
		return fmt.Errorf("%w: a tag has 32 hex digits", ErrInput)
	}
	for _, c := range b {
		if c >= 'A' && c <= 'F' {
			return fmt.Errorf("%w: a tag is in lower case", ErrInput)
		}
	}
	if _, err := hex.Decode(t[:], b); err != nil {
		return fmt.Errorf("%w: a tag has 32 hex digits", ErrInput)
	}
	return nil
}

// Kinds of ids that have tags.
const (
	KindEvent        = "event"
	KindConversation = "conversation"
	KindSubject      = "subject"
)

// Tagger makes the tags of one app. It is safe for concurrent use.
type Tagger struct {
	pool sync.Pool // of *tagState
}

type tagState struct {
	mac hash.Hash
	buf []byte
	sum [sha256.Size]byte
}

// newTagger takes over key, and zeroes it once the tagger is unreachable.
func newTagger(key []byte) *Tagger {
	t := &Tagger{}
	t.pool.New = func() any {
		return &tagState{mac: hmac.New(sha256.New, key), buf: make([]byte, 0, 256)}
	}
	runtime.AddCleanup(t, func(key []byte) { clear(key) }, key)
	return t
}

// Tag returns the tag of an id. It does not allocate.
func (t *Tagger) Tag(kind, id string) Tag {
	s := t.state()
	s.buf = appendString(s.buf[:0], "coffer/v1 tag")
	s.buf = appendString(s.buf, kind)
	s.buf = appendString(s.buf, id)
	s.finish()
	tag := Tag(s.sum[:16])
	t.pool.Put(s)
	return tag
}

// MAC returns a keyed hash of msg for one purpose, for comparing what may not
// be kept.
func (t *Tagger) MAC(purpose string, msg []byte) [32]byte {
	s := t.state()
	s.buf = appendString(s.buf[:0], "coffer/v1 mac")
	s.buf = appendString(s.buf, purpose)
	s.buf = binary.BigEndian.AppendUint32(s.buf, uint32(len(msg))) //nolint:gosec // messages are far below 4 GiB
	s.mac.Reset()
	s.mac.Write(s.buf)
	s.mac.Write(msg)
	s.mac.Sum(s.sum[:0])
	sum := s.sum
	t.pool.Put(s)
	return sum
}

// Format writes [redacted], whatever the verb.
func (*Tagger) Format(f fmt.State, _ rune) { redact(f) }

func (t *Tagger) state() *tagState {
	s := t.pool.Get().(*tagState) //nolint:errcheck,forcetypeassert // the pool holds nothing else
	return s
}

func (s *tagState) finish() {
	s.mac.Reset()
	s.mac.Write(s.buf)
	s.mac.Sum(s.sum[:0])
	clear(s.buf) // the id
}

// appendString appends s after its length, in four bytes, big-endian.
func appendString(b []byte, s string) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(s))) //nolint:gosec // strings are far below 4 GiB
	return append(b, s...)
}
