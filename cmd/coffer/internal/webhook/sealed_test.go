package webhook

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"
)

func jwk(t testing.TB, key any, algorithm string) []byte {
	t.Helper()
	encoded, err := (&jose.JSONWebKey{Key: key, KeyID: "key-1", Algorithm: algorithm}).MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	return encoded
}

func TestSealed(t *testing.T) {
	onP256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	onP521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	withRSA, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		key         crypto.Signer
		asked, want string
	}{
		{onP256, "", "ECDH-ES"}, {onP521, "ECDH-ES", "ECDH-ES"}, {withRSA, "", "RSA-OAEP-256"}, {withRSA, "RSA-OAEP", "RSA-OAEP"},
	} {
		r, err := ParseRecipient(jwk(t, tt.key.Public(), tt.asked))
		if err != nil || r.KeyID() != "key-1" {
			t.Fatal(err)
		}
		body := []byte("canary " + tt.want)
		first, err := r.Seal(body, "application/cloudevents+json")
		if err != nil || strings.Count(first, ".") != 4 {
			t.Fatalf("%q %v", first, err)
		}
		if second, err := r.Seal(body, "application/cloudevents+json"); err != nil || second == first {
			t.Errorf("%s: the same key twice: %v", tt.want, err)
		}
		parsed, err := jose.ParseEncryptedCompact(first, []jose.KeyAlgorithm{jose.KeyAlgorithm(tt.want)}, []jose.ContentEncryption{jose.A256GCM})
		if err != nil {
			t.Fatal(err)
		}
		if opened, err := parsed.Decrypt(tt.key); err != nil || string(opened) != string(body) {
			t.Errorf("%s: %q %v", tt.want, opened, err)
		}
		if _, err := parsed.Decrypt(other); err == nil {
			t.Errorf("%s: another key opens it", tt.want)
		}
	}
	short := &rsa.PublicKey{N: new(big.Int).SetBit(big.NewInt(1), 1023, 1), E: 65537}
	edwards, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for what, key := range map[string][]byte{
		"a private key": jwk(t, onP256, ""), "a symmetric key": jwk(t, []byte("0123456789abcdef0123456789abcdef"), ""), "a short key": jwk(t, short, ""),
		"a key for signatures": jwk(t, edwards, ""), "another algorithm": jwk(t, withRSA.Public(), "RSA1_5"), "of the other kind": jwk(t, onP256.Public(), "RSA-OAEP"),
		"key agreement with wrapping": jwk(t, onP256.Public(), "ECDH-ES+A256KW"), "no JSON": []byte("{"), "nothing": nil,
		"too long": []byte(`{"kty":"EC","x":"` + strings.Repeat("A", maxKey) + `"}`), "off the curve": []byte(`{"kty":"EC","crv":"P-256","x":"AAAA","y":"AAAA"}`),
	} {
		if _, err := ParseRecipient(key); !errors.Is(err, ErrKey) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func FuzzParseRecipient(f *testing.F) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(jwk(f, key.Public(), ""))
	f.Add([]byte(`{"kty":"RSA","n":"AQAB","e":"AQAB"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := ParseRecipient(data)
		if err != nil {
			if !errors.Is(err, ErrKey) {
				t.Fatalf("an error of another kind: %v", err)
			}
			return
		}
		if _, err := r.Seal([]byte("x"), "application/cloudevents+json"); err != nil {
			t.Fatalf("an accepted key does not seal: %v", err)
		}
	})
}

// TestPrivateKey: what is sealed to a key is opened with it and with no other,
// and not when it was changed.
func TestPrivateKey(t *testing.T) {
	withRSA, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	made, err := NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	read, err := ParsePrivateKey(jwk(t, withRSA, "RSA-OAEP"))
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range []*PrivateKey{made, read} {
		public, err := k.Public()
		if err != nil {
			t.Fatal(err)
		}
		r, err := ParseRecipient(public)
		if err != nil {
			t.Fatal(err)
		}
		sealed, err := r.Seal([]byte("canary"), "application/cloudevents+json")
		if err != nil {
			t.Fatal(err)
		}
		if opened, err := k.Open(sealed); err != nil || string(opened) != "canary" {
			t.Errorf("%q, %v", opened, err)
		}
		i := len(sealed) - 10 // within the tag
		changed := sealed[:i] + string(sealed[i]^1) + sealed[i+1:]
		for name, refused := range map[string]string{"changed": changed, "cut": sealed[:40], "nothing": ""} {
			if _, err := k.Open(refused); !errors.Is(err, ErrSealed) {
				t.Errorf("%s: %v", name, err)
			}
		}
		if other := map[bool]*PrivateKey{true: read, false: made}[k == made]; other != nil {
			if _, err := other.Open(sealed); !errors.Is(err, ErrSealed) {
				t.Errorf("another key: %v", err)
			}
		}
		if text := fmt.Sprintf("%v %+v %#v", k, k, k); text != "[redacted] [redacted] [redacted]" {
			t.Errorf("it prints as %s", text)
		}
	}
	for _, text := range [][]byte{jwk(t, withRSA.Public(), ""), []byte("{}"), []byte("x"), nil} {
		if _, err := ParsePrivateKey(text); !errors.Is(err, ErrKey) {
			t.Errorf("%.20s: %v", text, err)
		}
	}
}
