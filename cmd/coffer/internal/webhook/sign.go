package webhook

import (
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// The headers of a message.
const (
	HeaderID        = "Webhook-Id"
	HeaderTimestamp = "Webhook-Timestamp"
	HeaderSignature = "Webhook-Signature"
)

// Tolerance is how far the time of a message may lie from the receiver's.
const Tolerance = 5 * time.Minute

// ErrSignature means that a message is not what the secret's owner signed, or is
// too old or too new. Do not act on it.
var ErrSignature = errors.New("webhook: signature refused")

const maxSignatures = 16 // of a message that is looked at

// Sign sets the headers of a message: its id, the time of this attempt, and a
// signature of each secret, the newest first.
func Sign(header http.Header, id string, at time.Time, body []byte, secrets ...*Secret) error {
	signatures := make([]string, 0, len(secrets))
	for _, s := range secrets {
		signature, err := s.sign(id, at, body)
		if err != nil {
			return err
		}
		signatures = append(signatures, signature)
	}
	if len(signatures) == 0 || id == "" || strings.Contains(id, ".") {
		return fmt.Errorf("%w: a message needs an id without a full stop, and a secret", ErrSecret)
	}
	header.Set(HeaderID, id)
	header.Set(HeaderTimestamp, strconv.FormatInt(at.Unix(), 10))
	header.Set(HeaderSignature, strings.Join(signatures, " "))
	return nil
}

func (s *Secret) sign(id string, at time.Time, body []byte) (string, error) {
	switch {
	case s.hmac != nil:
		return s.hmac.Sign(id, at, body)
	case s.private != nil:
		return "v1a," + base64.StdEncoding.EncodeToString(ed25519.Sign(s.private, signed(id, at, body))), nil
	}
	return "", fmt.Errorf("%w: a public key does not sign", ErrSecret)
}

func signed(id string, at time.Time, body []byte) []byte {
	text := make([]byte, 0, len(id)+len(body)+24)
	text = append(append(text, id...), '.')
	text = append(strconv.AppendInt(text, at.Unix(), 10), '.')
	return append(text, body...)
}

// Verify checks a message with a secret or a public key, at a time.
func (s *Secret) Verify(header http.Header, body []byte, now time.Time) error {
	id := header.Get(HeaderID)
	seconds, err := strconv.ParseInt(header.Get(HeaderTimestamp), 10, 64)
	if id == "" || err != nil {
		return fmt.Errorf("%w: headers are missing or malformed", ErrSignature)
	}
	at := time.Unix(seconds, 0)
	if at.Before(now.Add(-Tolerance)) || at.After(now.Add(Tolerance)) {
		return fmt.Errorf("%w: its time is more than %s from now", ErrSignature, Tolerance)
	}
	if s.hmac != nil {
		if err := s.hmac.VerifyIgnoringTimestamp(body, header); err != nil {
			return fmt.Errorf("%w: no signature fits", ErrSignature)
		}
		return nil
	}
	for i, signature := range strings.Fields(header.Get(HeaderSignature)) {
		version, encoded, _ := strings.Cut(signature, ",")
		if version != "v1a" || i >= maxSignatures {
			continue
		}
		raw, err := base64.StdEncoding.DecodeString(encoded)
		if err == nil && ed25519.Verify(s.public, signed(id, at, body), raw) {
			return nil
		}
	}
	return fmt.Errorf("%w: no signature fits", ErrSignature)
}
