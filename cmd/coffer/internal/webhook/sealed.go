package webhook

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/go-jose/go-jose/v4"
)

// ErrKey means that a JSON Web Key cannot be sealed to. Give the public part of
// an RSA key of 2,048 to 8,192 bits, or of a key on P-256, P-384 or P-521.
var ErrKey = errors.New("webhook: unusable public key")

const (
	maxKey  = 8 << 10 // bytes of a JSON Web Key
	minBits = 2048
	maxBits = 8192
)

// Recipient is the public key of an endpoint's owner, to which bodies are sealed
// as compact JWE (RFC 7516): ECDH-ES, RSA-OAEP-256 or RSA-OAEP for the key (RFC
// 7518, 4), AES-256-GCM for the content.
type Recipient struct {
	key jose.Recipient
}

// ParseRecipient reads a public JSON Web Key (RFC 7517). Its `alg`, when there is
// one, chooses the algorithm; its `kid` is sent along. A private key is refused.
func ParseRecipient(key []byte) (*Recipient, error) {
	if len(key) > maxKey {
		return nil, fmt.Errorf("%w: more than %d bytes", ErrKey, maxKey)
	}
	var jwk jose.JSONWebKey
	if err := json.Unmarshal(key, &jwk); err != nil {
		return nil, fmt.Errorf("%w: not a JSON Web Key", ErrKey)
	}
	if !jwk.IsPublic() {
		return nil, fmt.Errorf("%w: it is not a public key; the private part stays with its owner", ErrKey)
	}
	if jwk.Use != "" && jwk.Use != "enc" {
		return nil, fmt.Errorf("%w: its use is %q, not enc", ErrKey, jwk.Use)
	}
	algorithm, err := algorithmOf(jwk)
	if err != nil {
		return nil, err
	}
	r := &Recipient{key: jose.Recipient{Algorithm: algorithm, Key: jwk.Key, KeyID: jwk.KeyID}}
	if _, err := r.encrypter(""); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKey, err)
	}
	return r, nil
}

func algorithmOf(jwk jose.JSONWebKey) (jose.KeyAlgorithm, error) {
	asked := jose.KeyAlgorithm(jwk.Algorithm)
	switch key := jwk.Key.(type) {
	case *ecdsa.PublicKey:
		if asked == "" || asked == jose.ECDH_ES {
			return jose.ECDH_ES, nil
		}
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits < minBits || bits > maxBits {
			return "", fmt.Errorf("%w: an RSA key of %d bits", ErrKey, bits)
		}
		switch asked {
		case "", jose.RSA_OAEP_256:
			return jose.RSA_OAEP_256, nil
		case jose.RSA_OAEP:
			return jose.RSA_OAEP, nil
		default:
		}
	default:
		return "", fmt.Errorf("%w: neither RSA nor P-256, P-384 or P-521", ErrKey)
	}
	return "", fmt.Errorf("%w: the algorithm %q is not ECDH-ES, RSA-OAEP-256 or RSA-OAEP", ErrKey, asked)
}

// KeyID is the key's `kid`.
func (r *Recipient) KeyID() string { return r.key.KeyID }

func (r *Recipient) encrypter(contentType jose.ContentType) (jose.Encrypter, error) {
	return jose.NewEncrypter(jose.A256GCM, r.key, (&jose.EncrypterOptions{}).WithContentType(contentType))
}

// Seal returns a body of a media type, which becomes the header `cty`, as a compact
// JWE. Each call makes a new content key.
func (r *Recipient) Seal(body []byte, mediaType string) (string, error) {
	encrypter, err := r.encrypter(jose.ContentType(mediaType))
	if err != nil {
		return "", fmt.Errorf("webhook: seal a body: %w", err)
	}
	sealed, err := encrypter.Encrypt(body)
	if err != nil {
		return "", fmt.Errorf("webhook: seal a body: %w", err)
	}
	return sealed.CompactSerialize()
}
