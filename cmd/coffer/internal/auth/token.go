package auth

import (
	"bytes"
	"compress/zlib"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// Bounds of a token. Real ones are about 200 characters and 150 bytes.
const (
	MaxTokenLength  = 4096             // characters of the text form
	MaxTokenContent = 4096             // bytes after inflating
	MaxLifetime     = 24 * time.Hour   // issue to expiry
	MaxSkew         = 60 * time.Second // how far in the future a token may be issued
)

const (
	tokenVersion = "007"
	maxExpire    = uint32(MaxLifetime / time.Second)
)

// Service types of the format and the privileges of the chat service.
const (
	serviceRTC  = 1
	serviceRTM  = 2
	serviceChat = 5

	privilegeUser = 1
	privilegeApp  = 2
)

var (
	// ErrMalformed means that the text is not an AccessToken2: the caller
	// should send a token as its token library made it.
	ErrMalformed = errors.New("malformed token")
	// ErrSignature means that no certificate of the app made this token: the
	// caller should sign with a current certificate of the app it names.
	ErrSignature = errors.New("token signature does not match")
	// ErrExpired means that the token, or its chat privilege, is past its
	// time: the caller should ask its app's backend for a new one.
	ErrExpired = errors.New("token expired")
	// ErrNotYetValid means that the token is issued in the future by more
	// than MaxSkew: the caller should set the clock of the issuing machine.
	ErrNotYetValid = errors.New("token not yet valid")
	// ErrLifetime means that the token asks to live longer than MaxLifetime:
	// the caller should issue it with at most 86,400 seconds.
	ErrLifetime = errors.New("token lifetime over 24 hours")
	// ErrPrivilege means that the token is genuine but grants no chat
	// privilege that fits its user id: the caller should build it with
	// privilege 2 and no user (app) or privilege 1 and a user (user).
	ErrPrivilege = errors.New("token has no chat privilege")
)

// Claims is what a verified token says.
type Claims struct {
	AppID   string
	User    string    // empty for the app's backend
	App     bool      // the app's backend: chat privilege 2
	Expires time.Time // the earlier of the token's and the privilege's expiry
}

// Token is a decoded token whose signature has not been checked. Its app id
// may be used to find certificates and for nothing else.
type Token struct {
	AppID string

	signature []byte
	signed    []byte // what the signature covers
	issued    uint32
	expire    uint32
	salt      uint32
	services  []byte // from n_services to the end; read only after the signature
}

// Parse decodes the text form of a token, without believing it. It returns
// ErrMalformed for everything that does not have the form.
func Parse(text string) (*Token, error) {
	if len(text) > MaxTokenLength {
		return nil, fmt.Errorf("%w: longer than %d characters", ErrMalformed, MaxTokenLength)
	}
	body, ok := strings.CutPrefix(text, tokenVersion)
	if !ok {
		return nil, fmt.Errorf("%w: version is not %s", ErrMalformed, tokenVersion)
	}
	content, err := inflate(body)
	if err != nil {
		return nil, err
	}
	return parseContent(content)
}

func inflate(body string) ([]byte, error) {
	// The standard decoder skips line breaks, which would give one token many
	// spellings.
	if strings.ContainsAny(body, "\r\n") {
		return nil, fmt.Errorf("%w: line break in base64", ErrMalformed)
	}
	packed, err := base64.StdEncoding.Strict().DecodeString(body)
	if err != nil {
		return nil, fmt.Errorf("%w: not base64", ErrMalformed)
	}
	source := bytes.NewReader(packed)
	inflater, err := takeInflater(source)
	if err != nil {
		return nil, fmt.Errorf("%w: not zlib", ErrMalformed)
	}
	defer inflaters.Put(inflater)
	content, err := io.ReadAll(io.LimitReader(inflater, MaxTokenContent+1))
	if err != nil {
		return nil, fmt.Errorf("%w: damaged zlib stream", ErrMalformed)
	}
	if len(content) > MaxTokenContent {
		return nil, fmt.Errorf("%w: inflates to more than %d bytes", ErrMalformed, MaxTokenContent)
	}
	if source.Len() != 0 {
		return nil, fmt.Errorf("%w: bytes after the zlib stream", ErrMalformed)
	}
	return content, nil
}

// inflaters holds used zlib readers: a new one costs 40 kB, for a token of 150
// bytes. They keep no state that the next token could see.
var inflaters sync.Pool //nolint:gochecknoglobals // a pool, see above

func takeInflater(source io.Reader) (io.ReadCloser, error) {
	used, ok := inflaters.Get().(io.ReadCloser)
	if !ok {
		return zlib.NewReader(source)
	}
	resetter, ok := used.(zlib.Resetter)
	if !ok {
		return zlib.NewReader(source)
	}
	if err := resetter.Reset(source, nil); err != nil {
		return nil, err
	}
	return used, nil
}

func parseContent(content []byte) (*Token, error) {
	r := reader{rest: content}
	t := &Token{signature: r.bytes()}
	t.signed = r.rest
	t.AppID = string(r.bytes())
	t.issued, t.expire, t.salt = r.u32(), r.u32(), r.u32()
	t.services = r.rest
	if r.short || len(t.signature) != sha256.Size {
		return nil, fmt.Errorf("%w: truncated", ErrMalformed)
	}
	return t, nil
}

// Verify checks the token against the certificates of the app it names and at
// the time now. The order is: signature, form of what was signed, lifetime,
// time, privilege; so nothing is learned from a token one did not sign.
//
// More than one certificate is accepted so that the old one keeps working
// while an app changes to the next.
func (t *Token) Verify(certificates []string, now time.Time) (Claims, error) {
	match := 0
	for _, c := range certificates {
		// No early exit: the time taken does not tell which one matched.
		if hmac.Equal(sign(c, t.issued, t.salt, t.signed), t.signature) {
			match = 1
		}
	}
	if match == 0 {
		return Claims{}, ErrSignature
	}
	chat, err := parseServices(t.services)
	if err != nil {
		return Claims{}, err
	}
	if t.expire > maxExpire {
		return Claims{}, ErrLifetime
	}
	// 64 bits: issue_ts + expire overflows the format's 32.
	at := now.Unix()
	if int64(t.issued) > at+int64(MaxSkew/time.Second) {
		return Claims{}, ErrNotYetValid
	}
	expires := int64(t.issued) + int64(t.expire)
	if at > expires {
		return Claims{}, ErrExpired
	}
	granted, ok := chat.granted()
	if !ok {
		return Claims{}, ErrPrivilege
	}
	until := int64(t.issued) + int64(granted.expire)
	if at > until {
		return Claims{}, fmt.Errorf("%w: its chat privilege", ErrExpired)
	}
	return Claims{
		AppID:   t.AppID,
		User:    chat.user,
		App:     granted.kind == privilegeApp,
		Expires: time.Unix(min(expires, until), 0).UTC(),
	}, nil
}

type privilege struct {
	kind   uint16
	expire uint32
}

type chatService struct {
	user       string
	privileges []privilege
}

// granted returns the one privilege that counts. A user id and the app's
// privilege do not go together: such a token speaks for the user alone.
func (s chatService) granted() (privilege, bool) {
	want := uint16(privilegeApp)
	if s.user != "" {
		want = privilegeUser
	}
	for _, p := range s.privileges {
		if p.kind == want {
			return p, true
		}
	}
	return privilege{}, false
}

func parseServices(b []byte) (chatService, error) {
	var chat chatService
	r := reader{rest: b}
	last := -1
	for n := int(r.u16()); n > 0 && !r.short; n-- {
		kind := r.u16()
		// The builders sort by type, so ascending also means: no service twice.
		if int(kind) <= last {
			return chat, fmt.Errorf("%w: services repeated or out of order", ErrMalformed)
		}
		last = int(kind)
		privileges, err := parsePrivileges(&r)
		if err != nil {
			return chat, err
		}
		switch kind {
		case serviceChat:
			chat = chatService{user: string(r.bytes()), privileges: privileges}
		case serviceRTC:
			r.bytes()
			r.bytes()
		case serviceRTM:
			r.bytes()
		default:
			// Its fields have an unknown length, so what follows cannot be read.
			return chat, fmt.Errorf("%w: unknown service type %d", ErrMalformed, kind)
		}
	}
	if r.short {
		return chat, fmt.Errorf("%w: truncated", ErrMalformed)
	}
	if len(r.rest) != 0 {
		return chat, fmt.Errorf("%w: trailing bytes", ErrMalformed)
	}
	return chat, nil
}

func parsePrivileges(r *reader) ([]privilege, error) {
	var list []privilege
	last := -1
	for n := int(r.u16()); n > 0 && !r.short; n-- {
		p := privilege{kind: r.u16(), expire: r.u32()}
		if int(p.kind) <= last {
			return nil, fmt.Errorf("%w: privileges repeated or out of order", ErrMalformed)
		}
		last = int(p.kind)
		list = append(list, p)
	}
	return list, nil
}

// sign is HMAC(HMAC(LE32(issued), certificate) keyed by LE32(salt), signed):
// the format derives a key from the certificate with the two numbers as keys.
func sign(certificate string, issued, salt uint32, signed []byte) []byte {
	k1 := mac(binary.LittleEndian.AppendUint32(nil, issued), []byte(certificate))
	key := mac(binary.LittleEndian.AppendUint32(nil, salt), k1)
	return mac(key, signed)
}

// mac is HMAC-SHA256. HMAC pads a short key with zeros to the hash's block, so
// padding it here changes nothing, except that FIPS 140-only mode, which
// refuses keys under 112 bits, lets the format's 32-bit "keys" pass.
func mac(key, message []byte) []byte {
	padded := make([]byte, max(len(key), sha256.BlockSize))
	copy(padded, key)
	h := hmac.New(sha256.New, padded)
	h.Write(message)
	return h.Sum(nil)
}

// reader reads the format's little-endian fields. After a read past the end
// short is set and every further read gives a zero value.
type reader struct {
	rest  []byte
	short bool
}

func (r *reader) take(n int) []byte {
	if r.short || len(r.rest) < n {
		r.short, r.rest = true, nil
		return make([]byte, min(n, 4))
	}
	b := r.rest[:n:n]
	r.rest = r.rest[n:]
	return b
}

func (r *reader) u16() uint16 { return binary.LittleEndian.Uint16(r.take(2)) }
func (r *reader) u32() uint32 { return binary.LittleEndian.Uint32(r.take(4)) }

func (r *reader) bytes() []byte {
	n := int(r.u16())
	if r.short {
		return nil
	}
	return r.take(n)
}
