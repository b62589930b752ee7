// Package signing holds a region's signing key: an Ed25519 key with which the
// region signs what others keep, as JSON Web Signatures (RFC 7515, EdDSA of RFC
// 8037). It is made at first use and kept in the registry, sealed under the
// keyring entry [Entry], so that rotating and moving key encryption keys covers
// it like an app's.
package signing

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"sync"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/kms"
)

// Entry is the name in the keyring under which the key is sealed. No app has it:
// their names are hex digits.
const Entry = "coffer-region"

const (
	rowName = "signing"
	purpose = "signing-key"
	version = 1
)

// ErrSignature means that a text was not signed by this region's key, or not as
// what it is presented as. Do not act on it.
var ErrSignature = errors.New("signing: signature refused")

// ErrCorrupt means that the row of the signing key is damaged.
var ErrCorrupt = errors.New("signing: the key's row is damaged")

// row is the registry's row of the key.
type row struct {
	Version int    `json:"version"`
	Public  []byte `json:"public"`
	Private []byte `json:"private"` // a blob of the keyring over the seed
}

// Key signs for a region. Its methods may be called concurrently.
type Key struct {
	rows    kms.Rows
	keyring *kms.Keyring

	mu  sync.Mutex
	key ed25519.PrivateKey // nil until it is needed
}

// New returns the region's key. It loads nothing yet.
func New(rows kms.Rows, keyring *kms.Keyring) *Key { return &Key{rows: rows, keyring: keyring} }

// Public returns the public key as a JSON Web Key, with its thumbprint (RFC
// 7638) as its id.
func (k *Key) Public(ctx context.Context) (jose.JSONWebKey, error) {
	key, err := k.load(ctx)
	if err != nil {
		return jose.JSONWebKey{}, err
	}
	return public(key)
}

func public(key ed25519.PrivateKey) (jose.JSONWebKey, error) {
	jwk := jose.JSONWebKey{Key: key.Public(), Algorithm: string(jose.EdDSA), Use: "sig"}
	thumbprint, err := jwk.Thumbprint(crypto.SHA256)
	if err != nil {
		return jwk, fmt.Errorf("signing: %w", err)
	}
	jwk.KeyID = base64.RawURLEncoding.EncodeToString(thumbprint)
	return jwk, nil
}

// Sign returns a compact JWS over the JSON of a value. kind goes into the header
// as typ, so that one kind of text cannot be presented as another.
func (k *Key) Sign(ctx context.Context, kind string, value any) (string, error) {
	key, err := k.load(ctx)
	if err != nil {
		return "", err
	}
	jwk, err := public(key)
	if err != nil {
		return "", err
	}
	payload, err := json.Marshal(value, json.Deterministic(true))
	if err != nil {
		return "", fmt.Errorf("signing: %w", err)
	}
	options := (&jose.SignerOptions{}).WithType(jose.ContentType(kind)).WithHeader("kid", jwk.KeyID)
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.EdDSA, Key: key}, options)
	if err != nil {
		return "", fmt.Errorf("signing: %w", err)
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		return "", fmt.Errorf("signing: %w", err)
	}
	return signed.CompactSerialize()
}

// Verify checks a text of [Key.Sign] and decodes its value.
func (k *Key) Verify(ctx context.Context, kind, text string, into any) error {
	key, err := k.load(ctx)
	if err != nil {
		return err
	}
	signed, err := jose.ParseSignedCompact(text, []jose.SignatureAlgorithm{jose.EdDSA})
	if err != nil {
		return fmt.Errorf("%w: not a compact JWS", ErrSignature)
	}
	payload, err := signed.Verify(key.Public())
	if err != nil {
		return fmt.Errorf("%w: another key's, or changed", ErrSignature)
	}
	if typ := signed.Signatures[0].Protected.ExtraHeaders[jose.HeaderType]; typ != kind {
		return fmt.Errorf("%w: it is not of the kind %s", ErrSignature, kind)
	}
	if err := json.Unmarshal(payload, into); err != nil {
		return fmt.Errorf("%w: its content cannot be read", ErrSignature)
	}
	return nil
}

// load returns the key, made when there is none. Of two processes that make one
// at once, one is kept.
func (k *Key) load(ctx context.Context) (ed25519.PrivateKey, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.key != nil {
		return k.key, nil
	}
	stored, err := k.rows.Load(ctx, rowName)
	if errors.Is(err, kms.ErrRowNotFound) {
		if err := k.create(ctx); err != nil && !errors.Is(err, kms.ErrRowConflict) {
			return nil, err
		}
		stored, err = k.rows.Load(ctx, rowName)
	}
	if err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	var r row
	if err := json.Unmarshal(stored.Value, &r, json.RejectUnknownMembers(true)); err != nil || r.Version != version {
		return nil, ErrCorrupt
	}
	seed, err := k.keyring.OpenBlob(ctx, Entry, purpose, r.Private)
	if err != nil {
		return nil, fmt.Errorf("signing: open the key: %w", err)
	}
	defer clear(seed)
	if len(seed) != ed25519.SeedSize {
		return nil, ErrCorrupt
	}
	key := ed25519.NewKeyFromSeed(seed)
	if !key.Public().(ed25519.PublicKey).Equal(ed25519.PublicKey(r.Public)) { //nolint:forcetypeassert // documented
		return nil, ErrCorrupt
	}
	k.key = key
	return key, nil
}

func (k *Key) create(ctx context.Context) error {
	if err := k.keyring.CreateApp(ctx, Entry); err != nil {
		return fmt.Errorf("signing: make the key: %w", err)
	}
	seed := make([]byte, ed25519.SeedSize)
	_, _ = rand.Read(seed) // never fails, it ends the process
	defer clear(seed)
	blob, err := k.keyring.SealBlob(ctx, Entry, purpose, seed)
	if err != nil {
		return fmt.Errorf("signing: seal the key: %w", err)
	}
	r := row{Version: version, Public: ed25519.NewKeyFromSeed(seed).Public().(ed25519.PublicKey), Private: blob} //nolint:forcetypeassert // documented
	value, err := json.Marshal(r, json.Deterministic(true))
	if err != nil {
		return fmt.Errorf("signing: %w", err)
	}
	_, err = k.rows.Create(ctx, rowName, value)
	return err
}
