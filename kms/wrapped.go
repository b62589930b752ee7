package kms

import (
	"crypto/cipher"
	"encoding/binary"
	"fmt"
)

// What an app key wraps, as the additional data of a wrapped key names it.
const (
	kindTagKey     = "tag"
	kindBlobKey    = "blob"
	kindEpochKey   = "epoch"
	kindSubjectKey = "subject"
)

const (
	wrappedVersion = 1
	wrappedHeader  = 5 // version and generation
	wrappedSize    = wrappedHeader + 12 + KeySize + 16

	blobMagic    = 0xC2
	blobVersion  = 1
	blobHeader   = 2
	blobOverhead = blobHeader + 12 + 16
)

// sealKey wraps a key with an app key: version, generation of the app key,
// nonce, ciphertext, tag. docs/format/keyring.md is normative.
func sealKey(aead cipher.AEAD, region, app string, generation uint32, kind string, id, key []byte) []byte {
	out := make([]byte, wrappedHeader, wrappedSize)
	out[0] = wrappedVersion
	binary.BigEndian.PutUint32(out[1:], generation)
	return aead.Seal(out, nil, key, keyAAD(region, app, generation, kind, id))
}

// wrappedGeneration reads which app key a wrapped key needs.
func wrappedGeneration(blob []byte) (uint32, error) {
	if len(blob) != wrappedSize || blob[0] != wrappedVersion {
		return 0, fmt.Errorf("%w: a wrapped key of %d bytes", ErrKeyringCorrupt, len(blob))
	}
	return binary.BigEndian.Uint32(blob[1:]), nil
}

// openKey unwraps what sealKey wrapped. The caller zeroes the key.
func openKey(aead cipher.AEAD, region, app string, kind string, id, blob []byte) ([]byte, error) {
	generation, err := wrappedGeneration(blob)
	if err != nil {
		return nil, err
	}
	key, err := aead.Open(make([]byte, 0, KeySize), nil, blob[wrappedHeader:], keyAAD(region, app, generation, kind, id))
	if err != nil {
		return nil, fmt.Errorf("%w: the %s key fails authentication", ErrKeyringCorrupt, kind)
	}
	return key, nil
}

func keyAAD(region, app string, generation uint32, kind string, id []byte) []byte {
	b := make([]byte, 0, 160)
	b = appendString(b, "coffer/v1 key")
	b = appendString(b, region)
	b = appendString(b, app)
	b = binary.BigEndian.AppendUint32(b, generation)
	b = appendString(b, kind)
	return appendString(b, string(id))
}

func epochID(id uint32) []byte { return binary.BigEndian.AppendUint32(nil, id) }

func sealBlob(aead cipher.AEAD, region, app, purpose string, plaintext []byte) []byte {
	out := make([]byte, blobHeader, blobOverhead+len(plaintext))
	out[0], out[1] = blobMagic, blobVersion
	return aead.Seal(out, nil, plaintext, blobAAD(region, app, purpose))
}

func openBlob(aead cipher.AEAD, region, app, purpose string, blob []byte) ([]byte, error) {
	if len(blob) < blobOverhead || blob[0] != blobMagic || blob[1] != blobVersion {
		return nil, fmt.Errorf("%w: a sealed secret of %d bytes", ErrEnvelope, len(blob))
	}
	plaintext, err := aead.Open(nil, nil, blob[blobHeader:], blobAAD(region, app, purpose))
	if err != nil {
		return nil, ErrAuthentication
	}
	return plaintext, nil
}

func blobAAD(region, app, purpose string) []byte {
	b := make([]byte, 0, 160)
	b = append(b, blobMagic, blobVersion)
	b = appendString(b, "coffer/v1 blob")
	b = appendString(b, region)
	b = appendString(b, app)
	return appendString(b, purpose)
}
