package webhook

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

var noon = time.Unix(1_700_000_000, 0)

// TestKnownSignatures: made with the secrets of each kind by other programs
// (openssl dgst -sha256 -mac HMAC, openssl pkeyutl -sign -rawin).
func TestKnownSignatures(t *testing.T) {
	for secret, want := range map[string]string{
		"whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=": "v1,rkwp5YuvdrMkcu0ZhuMsXoTg44mHAr1Q0+FFgFpXsjY=",
		"whsk_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=":  "v1a,7/ikAH6npe+scKL49rRDBCP75HbvoOpbUom1uCC+mq540+OryC5hXA9kR+dftYOPu+QI5dnuOQVsKPAHMAimBw==",
	} {
		parsed, err := ParseSecret(secret)
		header := make(http.Header)
		if err != nil || Sign(header, "msg_1", noon, []byte(`{"a":1}`), parsed) != nil {
			t.Fatal(err)
		}
		if got := header.Get(HeaderSignature); got != want {
			t.Errorf("%s signs %s, want %s", parsed, got, want)
		}
	}
}

// TestRotation: while a secret is being replaced, whoever has the old one or the
// new one accepts the message, and nobody else.
func TestRotation(t *testing.T) {
	for _, kind := range []Kind{Symmetric, Asymmetric} {
		older, newer, other := must(NewSecret(kind))(t), must(NewSecret(kind))(t), must(NewSecret(kind))(t)
		header := make(http.Header)
		body := []byte("the body")
		if err := Sign(header, "id-1", noon, body, newer, older); err != nil {
			t.Fatal(err)
		}
		for _, s := range []*Secret{older, newer} {
			verifier := must(ParseSecret(s.Verifier()))(t)
			if err := verifier.Verify(header, body, noon); err != nil {
				t.Errorf("%s: %v", kind, err)
			}
			for what, change := range map[string]func(http.Header) ([]byte, time.Time){
				"body":         func(http.Header) ([]byte, time.Time) { return []byte("the bodY"), noon },
				"id":           func(h http.Header) ([]byte, time.Time) { h.Set(HeaderID, "id-2"); return body, noon },
				"time":         func(h http.Header) ([]byte, time.Time) { h.Set(HeaderTimestamp, "1700000001"); return body, noon },
				"no time":      func(h http.Header) ([]byte, time.Time) { h.Del(HeaderTimestamp); return body, noon },
				"no signature": func(h http.Header) ([]byte, time.Time) { h.Del(HeaderSignature); return body, noon },
				"another version": func(h http.Header) ([]byte, time.Time) {
					h.Set(HeaderSignature, strings.ReplaceAll(h.Get(HeaderSignature), "v1", "v9"))
					return body, noon
				},
				"too late":        func(http.Header) ([]byte, time.Time) { return body, noon.Add(Tolerance + time.Second) },
				"before its time": func(http.Header) ([]byte, time.Time) { return body, noon.Add(-Tolerance - time.Second) },
				"a cut signature": func(h http.Header) ([]byte, time.Time) {
					h.Set(HeaderSignature, h.Get(HeaderSignature)[:20])
					return body, noon
				},
				"too many of them": func(h http.Header) ([]byte, time.Time) {
					h.Set(HeaderSignature, strings.Repeat("v1a,AA== ", 5000))
					return body, noon
				},
			} {
				changed := header.Clone()
				if b, at := change(changed); !errors.Is(verifier.Verify(changed, b, at), ErrSignature) {
					t.Errorf("%s: with another %s it is accepted", kind, what)
				}
			}
		}
		if err := other.Verify(header, body, noon); !errors.Is(err, ErrSignature) {
			t.Errorf("%s: another secret: %v", kind, err)
		}
	}
}

// must returns what a call gave, or ends the test.
func must(s *Secret, err error) func(t *testing.T) *Secret {
	return func(t *testing.T) *Secret {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
}

func TestSecrets(t *testing.T) {
	for _, kind := range []Kind{Symmetric, Asymmetric} {
		s := must(NewSecret(kind))(t)
		again := must(ParseSecret(s.Reveal()))(t)
		if again.Reveal() != s.Reveal() || again.Verifier() != s.Verifier() || again.Kind() != kind {
			t.Errorf("%s does not come back", kind)
		}
		for _, printed := range []string{fmt.Sprint(s), fmt.Sprintf("%v %+v %#v %s", s, s, s, s)} {
			if strings.Contains(printed, s.Reveal()[8:]) {
				t.Error("a secret was printed")
			}
		}
		if kind == Asymmetric && strings.Contains(s.Verifier(), "whsk_") {
			t.Error("the private key is given away")
		}
	}
	for _, bad := range []string{
		"", "whsec_", "whsec_c2hvcnQ=", "whsec_!!!", "whpk_AAAA", "whsk_AAAA", "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=",
		"whsk_" + strings.Repeat("A", 84) + "AA==", "whsec_" + strings.Repeat("AAAA", 22), "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=\n",
	} {
		if s, err := ParseSecret(bad); !errors.Is(err, ErrSecret) {
			t.Errorf("%q: %v %v", bad, s, err)
		}
	}
	public := must(ParseSecret(must(NewSecret(Asymmetric))(t).Verifier()))(t)
	if err := Sign(make(http.Header), "id", noon, nil, public); !errors.Is(err, ErrSecret) {
		t.Errorf("a public key signs: %v", err)
	}
	if err := Sign(make(http.Header), "id", noon, nil); !errors.Is(err, ErrSecret) {
		t.Errorf("nobody signs: %v", err)
	}
	if _, err := NewSecret("md5"); !errors.Is(err, ErrSecret) {
		t.Error(err)
	}
}

func FuzzVerify(f *testing.F) {
	f.Add("id", "1700000000", "v1,AAAA v1a,AAAA", []byte("{}"))
	f.Add("", "x", "v1a,"+strings.Repeat("A", 88), []byte{})
	symmetric, _ := ParseSecret("whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=")
	asymmetric, _ := ParseSecret("whsk_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=")
	f.Fuzz(func(t *testing.T, id, at, signature string, body []byte) {
		header := http.Header{HeaderID: {id}, HeaderTimestamp: {at}, HeaderSignature: {signature}}
		for _, s := range []*Secret{symmetric, asymmetric} {
			if err := s.Verify(header, body, noon); err != nil && !errors.Is(err, ErrSignature) {
				t.Fatalf("an error of another kind: %v", err)
			}
			good := make(http.Header)
			if id == "" || strings.Contains(id, ".") {
				continue
			}
			if err := Sign(good, id, noon, body, s); err != nil {
				t.Fatal(err)
			}
			if err := s.Verify(good, body, noon); err != nil {
				t.Fatalf("its own signature: %v", err)
			}
			if err := s.Verify(good, append(bytes.Clone(body), 'x'), noon); err == nil {
				t.Fatal("a longer body is accepted")
			}
		}
	})
}
