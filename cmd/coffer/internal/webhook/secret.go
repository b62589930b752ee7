// Package webhook signs and verifies what is posted to the owners of endpoints,
// as Standard Webhooks 1.0 says.
//
// The signed text is `id.timestamp.body`, the time that of the attempt in
// seconds since 1970. A secret is symmetric (`whsec_`, HMAC-SHA256, signature
// `v1`) or asymmetric (`whsk_`, Ed25519, signature `v1a`; the owner is given the
// public key, `whpk_`). While a secret is being replaced a message carries a
// signature of each, separated by spaces, and is good if one of them is.
//
// Symmetric signatures are made and checked by the project's own Go library;
// Ed25519, which that library lacks, by the standard library.
package webhook

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
)

// ErrSecret means that a text is not a secret or public key of Standard
// Webhooks. Take one that an endpoint was given.
var ErrSecret = errors.New("webhook: malformed secret")

// Kind is the kind of a secret.
type Kind string

// The kinds of secrets.
const (
	Symmetric  Kind = "hmac"
	Asymmetric Kind = "ed25519"
)

const (
	secretPrefix  = "whsec_"
	privatePrefix = "whsk_"
	publicPrefix  = "whpk_"

	newSecret = 32 // bytes
	minSecret = 24
	maxSecret = 64
)

// Secret signs, verifies, or only verifies if it is a public key.
type Secret struct {
	key     []byte // symmetric
	private ed25519.PrivateKey
	public  ed25519.PublicKey
	hmac    *standardwebhooks.Webhook
}

// NewSecret makes a secret.
func NewSecret(kind Kind) (*Secret, error) {
	seed := make([]byte, newSecret)
	_, _ = rand.Read(seed) // never fails, it ends the process
	switch kind {
	case Symmetric:
		return symmetric(seed)
	case Asymmetric:
		return private(seed), nil
	}
	return nil, fmt.Errorf("%w: no kind %q", ErrSecret, kind)
}

// ParseSecret reads a secret or a public key.
func ParseSecret(text string) (*Secret, error) {
	prefix, encoded, _ := strings.Cut(text, "_")
	raw, err := base64.StdEncoding.Strict().DecodeString(encoded)
	if err != nil || strings.ContainsAny(encoded, "\r\n") { // which the decoder would skip
		return nil, fmt.Errorf("%w: not base64", ErrSecret)
	}
	switch prefix + "_" {
	case secretPrefix:
		return symmetric(raw)
	case privatePrefix:
		if len(raw) == ed25519.PrivateKeySize {
			s := private(raw[:ed25519.SeedSize])
			if !s.private.Equal(ed25519.PrivateKey(raw)) {
				return nil, fmt.Errorf("%w: the halves of the key do not belong together", ErrSecret)
			}
			return s, nil
		}
		if len(raw) == ed25519.SeedSize {
			return private(raw), nil
		}
	case publicPrefix:
		if len(raw) == ed25519.PublicKeySize {
			return &Secret{public: raw}, nil
		}
	}
	return nil, fmt.Errorf("%w: it has neither prefix and length of a secret nor those of a public key", ErrSecret)
}

func symmetric(key []byte) (*Secret, error) {
	if len(key) < minSecret || len(key) > maxSecret {
		return nil, fmt.Errorf("%w: a secret has %d to %d bytes", ErrSecret, minSecret, maxSecret)
	}
	hmac, err := standardwebhooks.NewWebhookRaw(key)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSecret, err)
	}
	return &Secret{key: key, hmac: hmac}, nil
}

func private(seed []byte) *Secret {
	key := ed25519.NewKeyFromSeed(seed)
	return &Secret{private: key, public: key.Public().(ed25519.PublicKey)} //nolint:forcetypeassert // documented
}

// Kind returns the kind of the secret.
func (s *Secret) Kind() Kind {
	if s.hmac != nil {
		return Symmetric
	}
	return Asymmetric
}

// Reveal returns the text that [ParseSecret] reads. It is secret, unless the
// secret is a public key.
func (s *Secret) Reveal() string {
	switch {
	case s.hmac != nil:
		return secretPrefix + base64.StdEncoding.EncodeToString(s.key)
	case s.private != nil:
		return privatePrefix + base64.StdEncoding.EncodeToString(s.private)
	}
	return s.Verifier()
}

// Verifier returns what the owner of the endpoint verifies with: the secret
// itself if it is symmetric, the public key otherwise.
func (s *Secret) Verifier() string {
	if s.hmac != nil {
		return s.Reveal()
	}
	return publicPrefix + base64.StdEncoding.EncodeToString(s.public)
}

// String keeps the secret out of logs.
func (s *Secret) String() string { return string(s.Kind()) + " secret" }

// GoString does for %#v what String does for others.
func (s *Secret) GoString() string { return s.String() }
