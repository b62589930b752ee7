package kms

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
)

// Sizes in bytes, as docs/format/envelope.md has them.
const (
	HeaderSize = 56                   // of what precedes the nonce
	Overhead   = HeaderSize + 12 + 16 // by which an envelope is longer than its plaintext
)

const (
	envelopeMagic   = 0xC0
	envelopeVersion = 1
	suiteGCM        = 1 // AES-256-GCM with a random nonce, HKDF-SHA256 commitment
	offEpoch        = 4
	offSubject      = 8
	offKeyID        = 24
)

// Header is the part of an envelope that can be read without a key.
type Header struct {
	Epoch   uint32
	Subject Tag
	KeyID   [32]byte // identifies the data key, and commits to it
}

// ParseHeader reads the header of an envelope. An envelope of another version,
// suite or flags, or too short to be one, is ErrEnvelope.
func ParseHeader(env []byte) (Header, error) {
	var h Header
	switch {
	case len(env) < Overhead:
		return h, fmt.Errorf("%w: %d bytes, the shortest has %d", ErrEnvelope, len(env), Overhead)
	case env[0] != envelopeMagic:
		return h, fmt.Errorf("%w: it starts with 0x%02x", ErrEnvelope, env[0])
	case env[1] != envelopeVersion:
		return h, fmt.Errorf("%w: version %d", ErrEnvelope, env[1])
	case env[2] != suiteGCM:
		return h, fmt.Errorf("%w: suite %d", ErrEnvelope, env[2])
	case env[3] != 0:
		return h, fmt.Errorf("%w: flags 0x%02x", ErrEnvelope, env[3])
	}
	h.Epoch = binary.BigEndian.Uint32(env[offEpoch:])
	copy(h.Subject[:], env[offSubject:])
	copy(h.KeyID[:], env[offKeyID:])
	return h, nil
}

// Append appends the 56 bytes of the header.
func (h Header) Append(dst []byte) []byte {
	dst = append(dst, envelopeMagic, envelopeVersion, suiteGCM, 0)
	dst = binary.BigEndian.AppendUint32(dst, h.Epoch)
	dst = append(dst, h.Subject[:]...)
	return append(dst, h.KeyID[:]...)
}

// DataKey seals and opens the envelopes of one app, epoch and subject. It is
// safe for concurrent use, and prints as [redacted].
type DataKey struct {
	aead   cipher.AEAD
	head   [HeaderSize]byte
	header Header
	sealed atomic.Uint64 // envelopes sealed by this process

	// successor marks the key of a subject that was erased and registered again:
	// another key id of its epoch is that of the key before, which is gone.
	successor bool
}

// DeriveDataKey derives a data key from the keys of an epoch and of a subject,
// KeySize bytes each.
func DeriveDataKey(region, app string, epoch uint32, subject Tag, epochKey, subjectKey []byte) (*DataKey, error) {
	if len(epochKey) != KeySize || len(subjectKey) != KeySize {
		return nil, fmt.Errorf("%w: deriving a data key takes two keys of %d bytes", ErrInput, KeySize)
	}
	var secret [2 * KeySize]byte
	copy(secret[:], epochKey)
	copy(secret[KeySize:], subjectKey)
	defer clear(secret[:])
	info := make([]byte, 0, 96)
	info = appendString(info, "coffer/v1 data")
	info = appendString(info, region)
	info = appendString(info, app)
	info = binary.BigEndian.AppendUint32(info, epoch)
	key, err := hkdf.Key(sha256.New, secret[:], nil, string(info), KeySize)
	if err != nil {
		return nil, fmt.Errorf("derive data key: %w", err)
	}
	defer clear(key)
	id, err := commitment(key)
	if err != nil {
		return nil, err
	}
	aead, err := newAEAD(key)
	if err != nil {
		return nil, err
	}
	k := &DataKey{aead: aead, header: Header{Epoch: epoch, Subject: subject, KeyID: id}}
	k.header.Append(k.head[:0])
	runtime.AddCleanup(k, wipe, any(aead))
	return k, nil
}

// commitment identifies a key, and commits to it: finding two keys with the
// same one means finding a collision of HMAC-SHA256.
func commitment(key []byte) ([32]byte, error) {
	id, err := hkdf.Key(sha256.New, key, nil, "coffer/v1 commit", KeySize)
	if err != nil {
		return [32]byte{}, fmt.Errorf("derive key id: %w", err)
	}
	return [32]byte(id), nil
}

// newAEAD makes an AES-256-GCM that chooses its nonces, the only kind that the
// FIPS 140-3 mode of the toolchain lets seal.
func newAEAD(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("make cipher: %w", err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	wipe(block)
	if err != nil {
		return nil, fmt.Errorf("make cipher: %w", err)
	}
	return aead, nil
}

// Header returns the header of the envelopes this key seals.
func (k *DataKey) Header() Header { return k.header }

// Seal appends the envelope of plaintext to dst. The additional data aad is
// bound to it and not kept. It allocates nothing when dst has room for
// len(plaintext)+Overhead bytes; plaintext and dst must not overlap.
func (k *DataKey) Seal(dst, aad, plaintext []byte) []byte {
	s := takeScratch()
	s.b = append(append(s.b[:0], k.head[:]...), aad...)
	dst = append(dst, k.head[:]...)
	dst = k.aead.Seal(dst, nil, plaintext, s.b)
	s.put()
	k.sealed.Add(1)
	runtime.KeepAlive(k)
	return dst
}

// Open appends the plaintext of an envelope to dst, and returns nil with an
// error: ErrEnvelope, ErrKeyMismatch, ErrSubjectErased (sealed before the subject
// was erased and registered again) or ErrAuthentication. It allocates nothing
// when dst has room; envelope and dst must not overlap.
func (k *DataKey) Open(dst, aad, envelope []byte) ([]byte, error) {
	h, err := ParseHeader(envelope)
	if err != nil {
		return nil, err
	}
	if h != k.header {
		if k.successor && h.Epoch == k.header.Epoch && h.Subject == k.header.Subject {
			return nil, ErrSubjectErased
		}
		return nil, ErrKeyMismatch
	}
	s := takeScratch()
	s.b = append(append(s.b[:0], envelope[:HeaderSize]...), aad...)
	dst, err = k.aead.Open(dst, nil, envelope[HeaderSize:], s.b)
	s.put()
	runtime.KeepAlive(k)
	if err != nil {
		return nil, ErrAuthentication
	}
	return dst, nil
}

// Format writes [redacted], whatever the verb.
func (*DataKey) Format(f fmt.State, _ rune) { redact(f) }

// LogValue is [redacted].
func (*DataKey) LogValue() slog.Value { return slog.StringValue(redacted) }

const redacted = "[redacted]"

func redact(f fmt.State) { _, _ = f.Write([]byte(redacted)) } // fmt.State never fails

// scratch is room for additional data, which escapes into the cipher.
type scratch struct{ b []byte }

// A pool is the one global of the package: it holds no state.
var scratchPool = sync.Pool{New: func() any { return &scratch{b: make([]byte, 0, 512)} }} //nolint:gochecknoglobals // see above

func takeScratch() *scratch {
	return scratchPool.Get().(*scratch) //nolint:errcheck,forcetypeassert // the pool holds nothing else
}

func (s *scratch) put() {
	if cap(s.b) <= 64<<10 {
		scratchPool.Put(s)
	}
}
