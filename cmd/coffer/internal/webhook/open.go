package webhook

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"mime"

	"github.com/go-jose/go-jose/v4"
)

// TypeSealed is the Content-Type of a sealed body.
const TypeSealed = "application/jose"

// ErrSealed means that a sealed body cannot be opened with the key: it is for
// another, or was changed. Do not act on it.
var ErrSealed = errors.New("webhook: the sealed body cannot be opened")

// IsSealed reports whether a Content-Type is that of a sealed body.
func IsSealed(contentType string) bool {
	kind, _, err := mime.ParseMediaType(contentType)
	return err == nil && kind == TypeSealed
}

// PrivateKey opens what was sealed to its public part.
type PrivateKey struct{ jwk jose.JSONWebKey }

// NewPrivateKey makes a key on P-256.
func NewPrivateKey() (*PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making a key: %w", err)
	}
	return &PrivateKey{jose.JSONWebKey{Key: key, Use: "enc", Algorithm: string(jose.ECDH_ES)}}, nil
}

// ParsePrivateKey reads a private JSON Web Key.
func ParsePrivateKey(text []byte) (*PrivateKey, error) {
	if len(text) > maxKey {
		return nil, fmt.Errorf("%w: more than %d bytes", ErrKey, maxKey)
	}
	k := &PrivateKey{}
	if err := json.Unmarshal(text, &k.jwk); err != nil || k.jwk.IsPublic() || !k.jwk.Valid() {
		return nil, fmt.Errorf("%w: not a private JSON Web Key", ErrKey)
	}
	public, err := k.Public()
	if err != nil {
		return nil, err
	}
	if _, err := ParseRecipient(public); err != nil {
		return nil, err
	}
	return k, nil
}

// Public is the key that [ParseRecipient] reads.
func (k *PrivateKey) Public() ([]byte, error) {
	text, err := k.jwk.Public().MarshalJSON()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKey, err)
	}
	return text, nil
}

// String keeps the key out of logs.
func (*PrivateKey) String() string { return "[redacted]" }

// GoString does for %#v what String does for others.
func (*PrivateKey) GoString() string { return "[redacted]" }

// Open opens a compact JWE that [Recipient.Seal] made.
func (k *PrivateKey) Open(body string) ([]byte, error) {
	sealed, err := jose.ParseEncryptedCompact(body,
		[]jose.KeyAlgorithm{jose.ECDH_ES, jose.RSA_OAEP_256, jose.RSA_OAEP}, []jose.ContentEncryption{jose.A256GCM})
	if err != nil {
		return nil, fmt.Errorf("%w: it is not a JWE of the kinds that are sent", ErrSealed)
	}
	opened, err := sealed.Decrypt(k.jwk.Key)
	if err != nil {
		return nil, ErrSealed
	}
	return opened, nil
}
