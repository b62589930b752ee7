package auth

import (
	"bytes"
	"compress/zlib"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"time"
)

// Spec says what a token to be built should contain.
type Spec struct {
	AppID       string
	Certificate string    // 32 hex digits, as the app's owner got them
	User        string    // empty: a token for the app's backend
	Issued      time.Time // whole seconds are kept
	Lifetime    time.Duration
	Salt        uint32 // any; a random one makes two tokens of one second differ
}

// Build makes a token as Agora's libraries do: one chat service, with the
// privilege of a user or, without one, of the app. The token and its privilege
// expire together. The zlib bytes differ between implementations; the inflated
// content does not.
func Build(s Spec) (string, error) {
	content, err := buildContent(s)
	if err != nil {
		return "", err
	}
	var packed bytes.Buffer
	deflater := zlib.NewWriter(&packed)
	if _, err := deflater.Write(content); err != nil {
		return "", fmt.Errorf("deflating a token: %w", err)
	}
	if err := deflater.Close(); err != nil {
		return "", fmt.Errorf("deflating a token: %w", err)
	}
	return tokenVersion + base64.StdEncoding.EncodeToString(packed.Bytes()), nil
}

func buildContent(s Spec) ([]byte, error) {
	seconds := int64(s.Lifetime / time.Second)
	if seconds < 1 || seconds > int64(maxExpire) {
		return nil, fmt.Errorf("%w: %s is not between 1 second and %s", ErrLifetime, s.Lifetime, MaxLifetime)
	}
	issued := s.Issued.Unix()
	if issued < 0 || issued > 1<<32-1 {
		return nil, fmt.Errorf("%w: issue time does not fit the format", ErrMalformed)
	}
	if len(s.AppID) > 128 || len(s.User) > 255 {
		return nil, fmt.Errorf("%w: app or user id too long", ErrMalformed)
	}
	kind := uint16(privilegeApp)
	if s.User != "" {
		kind = privilegeUser
	}
	le := binary.LittleEndian
	var b []byte
	b = appendString(b, s.AppID)
	b = le.AppendUint32(b, uint32(issued)) //nolint:gosec // checked above
	b = le.AppendUint32(b, uint32(seconds))
	b = le.AppendUint32(b, s.Salt)
	b = le.AppendUint16(b, 1)
	b = le.AppendUint16(b, serviceChat)
	b = le.AppendUint16(b, 1)
	b = le.AppendUint16(b, kind)
	b = le.AppendUint32(b, uint32(seconds))
	b = appendString(b, s.User)
	signature := sign(s.Certificate, uint32(issued), s.Salt, b) //nolint:gosec // checked above
	return append(appendString(nil, string(signature)), b...), nil
}

func appendString(b []byte, s string) []byte {
	b = binary.LittleEndian.AppendUint16(b, uint16(len(s))) //nolint:gosec // bounded by the callers
	return append(b, s...)
}
