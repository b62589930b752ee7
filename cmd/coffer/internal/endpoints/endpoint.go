// Package endpoints keeps the webhook endpoints of a region's apps: rows of the
// registry whose URLs, headers and secrets are sealed under the app's key
// (docs/format/callbacks.md).
package endpoints

import (
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/textproto"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/net/http/httpguts"

	"github.com/cofferdb/coffer/cmd/coffer/internal/agora"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

var (
	// ErrNotFound means that the app has no endpoint with the id.
	ErrNotFound = errors.New("endpoint not found")
	// ErrInvalid means that a setting breaks a rule. Correct it; the
	// [*SettingError] says which.
	ErrInvalid = errors.New("invalid endpoint")
	// ErrTooMany means that the app has as many endpoints as it may. Delete one.
	ErrTooMany = errors.New("too many endpoints")
	// ErrChanged means that somebody else has changed the endpoint meanwhile.
	// Read it again.
	ErrChanged = errors.New("the endpoint was changed meanwhile")
)

// A SettingError names the member of an endpoint that is wrong.
type SettingError struct {
	Pointer string // JSON pointer
	Detail  string
}

// Error returns the pointer and the detail.
func (e *SettingError) Error() string { return e.Pointer + ": " + e.Detail }

// Unwrap returns [ErrInvalid].
func (e *SettingError) Unwrap() error { return ErrInvalid }

// Mode is what a request to an endpoint carries.
type Mode string

// The modes.
const (
	Thin   Mode = "thin"   // ids and positions; the default
	Full   Mode = "full"   // the event
	Sealed Mode = "sealed" // the event as a JWE for the endpoint's key
	Agora  Mode = "agora"  // the event in the form of Agora Chat's post-send callbacks
)

// State is whether an endpoint gets anything.
type State string

// The states.
const (
	Enabled    State = "enabled"
	Disabled   State = "disabled"
	Unverified State = "unverified" // it has not answered its verification
)

// Reason is why an endpoint is not enabled.
type Reason string

// The reasons.
const (
	ReasonVerification Reason = "verification" // it did not give the challenge back
	ReasonCaller       Reason = "caller"       // by a request
	ReasonGone         Reason = "gone"         // it answered 410
	ReasonFailing      Reason = "failing"      // nothing had succeeded for too long
)

// Limits of an endpoint.
const (
	MaxPerApp      = 100
	MaxURL         = 2048
	MaxHeaders     = 16
	MaxFilters     = 100
	MaxConcurrency = 64
	MaxBatch       = 100
	MaxRate        = 100_000

	DefaultConcurrency = 8
)

// Key is a secret. It prints as [redacted].
type Key string

// Format writes [redacted], whatever the verb.
func (Key) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte("[redacted]")) } // fmt.State never fails

// LogValue is [redacted].
func (Key) LogValue() slog.Value { return slog.StringValue("[redacted]") }

// A Secret signs requests: whsec_ and base64 for HMAC-SHA256, whsk_ and base64
// for Ed25519.
type Secret struct {
	Key     Key       `json:"key"`
	Created time.Time `json:"created"`
	// Until is when a secret that was replaced stops signing; zero for the
	// newest.
	Until time.Time `json:"until,omitzero"`
}

// Private is the sealed part of an endpoint.
type Private struct {
	URL         string            `json:"url"`
	Description string            `json:"description,omitzero"`
	Headers     map[string]string `json:"headers,omitempty"`
	// Secrets has the newest first.
	Secrets []Secret `json:"secrets"`
	// Encryption is the public key of sealed bodies, a JWK.
	Encryption string `json:"encryption,omitzero"`
	// Certificate and CertificateKey are what Coffer shows in mutual TLS, PEM.
	Certificate    string `json:"certificate,omitzero"`
	CertificateKey Key    `json:"certificate_key,omitzero"`
	// Agora is what bodies of that mode need.
	Agora AgoraSettings `json:"agora,omitzero"`
	// Conversations and Users are the filters as they were given; Endpoint has
	// their tags.
	Conversations []string `json:"conversations,omitempty"`
	Users         []string `json:"users,omitempty"`
}

// AgoraSettings is what the mode agora signs its bodies with, in its own way.
type AgoraSettings struct {
	AppKey string `json:"appkey,omitzero"` // begins each callId
	Secret Key    `json:"secret,omitzero"`
}

// An Endpoint is where an app's events are sent.
type Endpoint struct {
	App journal.AppID
	ID  journal.EndpointID

	State   State
	Reason  Reason
	Since   time.Time // of State
	Created time.Time

	Mode        Mode
	Ordered     bool // one after the other within a conversation
	Rate        int  // deliveries a second, at most; 0: no limit
	Concurrency int  // requests at a time, at most; 0: DefaultConcurrency
	Batch       int  // events in a request, at most; 0: 1
	AskedOnly   bool // it gets no events; it may be asked before they are stored
	Types       []journal.Type
	// ConversationTags and UserTags select events; empty is all. An event is
	// sent when each filter that is not empty names it.
	ConversationTags, UserTags []kms.Tag
	// After is the app's last position when the endpoint was made.
	After journal.Position
	// Untold is what Coffer did by itself and has not told the app yet.
	Untold *Notice

	Private

	revision uint64
}

// A Notice is that Coffer has disabled an endpoint.
type Notice struct {
	Reason Reason    `json:"reason"`
	Since  time.Time `json:"since"`
}

// Revision grows with every change of the endpoint.
func (e *Endpoint) Revision() uint64 { return e.revision }

// IDText returns the id as callers see it.
func (e *Endpoint) IDText() string { return FormatID(e.ID) }

// FormatID returns an endpoint's id as text.
func FormatID(id journal.EndpointID) string { return hex.EncodeToString(id[:]) }

// ParseID parses what [FormatID] returns, and nothing else.
func ParseID(s string) (journal.EndpointID, error) {
	var id journal.EndpointID
	if len(s) != 2*len(id) || strings.Trim(s, "0123456789abcdef") != "" {
		return id, fmt.Errorf("%w: the id is not 32 hex digits", ErrNotFound)
	}
	_, err := hex.Decode(id[:], []byte(s))
	return id, err
}

// NewID returns a random id.
func NewID() journal.EndpointID {
	var id journal.EndpointID
	_, _ = rand.Read(id[:]) // never fails; it ends the process instead
	return id
}

// Signing returns the secrets that sign now, the newest first.
func (e *Endpoint) Signing(now time.Time) []Secret {
	out := make([]Secret, 0, len(e.Secrets))
	for _, s := range e.Secrets {
		if s.Until.IsZero() || now.Before(s.Until) {
			out = append(out, s)
		}
	}
	return out
}

// check refuses settings that cannot be used. Whether the URL may be called is
// not decided here.
func (e *Endpoint) check() error {
	switch {
	case len(e.URL) == 0 || len(e.URL) > MaxURL:
		return &SettingError{"/url", fmt.Sprintf("it has 1 to %d bytes", MaxURL)}
	case len(e.Description) > 200 || !utf8.ValidString(e.Description) || strings.ContainsFunc(e.Description, func(r rune) bool { return r < 0x20 || r == 0x7f }):
		return &SettingError{"/description", "it is UTF-8 of at most 200 bytes without control characters"}
	case !slices.Contains([]Mode{Thin, Full, Sealed, Agora}, e.Mode):
		return &SettingError{"/mode", "it is thin, full, sealed or agora"}
	case e.Mode == Sealed && e.Encryption == "":
		return &SettingError{"/encryption", "sealed bodies need a public key"}
	case e.Rate < 0 || e.Rate > MaxRate:
		return &SettingError{"/rate", fmt.Sprintf("it is 0 to %d deliveries a second", MaxRate)}
	case e.Concurrency < 0 || e.Concurrency > MaxConcurrency:
		return &SettingError{"/concurrency", fmt.Sprintf("it is 1 to %d", MaxConcurrency)}
	case e.Batch < 0 || e.Batch > MaxBatch:
		return &SettingError{"/batch", fmt.Sprintf("it is 1 to %d", MaxBatch)}
	case len(e.Types) > MaxFilters || len(e.Conversations) > MaxFilters || len(e.Users) > MaxFilters:
		return &SettingError{"", fmt.Sprintf("a filter has at most %d values", MaxFilters)}
	case (e.Certificate == "") != (e.CertificateKey == ""):
		return &SettingError{"/certificate_key", "a certificate and its key go together"}
	}
	if e.Certificate != "" {
		if _, err := tls.X509KeyPair([]byte(e.Certificate), []byte(e.CertificateKey)); err != nil {
			return &SettingError{"/certificate", "it is a certificate in PEM, and certificate_key its private key"}
		}
	}
	if e.Mode == Agora {
		if err := e.checkAgora(); err != nil {
			return err
		}
	}
	return e.checkHeaders()
}

// checkAgora refuses what that mode has no form for. An endpoint of it that names
// no types gets those that have one.
func (e *Endpoint) checkAgora() error {
	printable := func(s string, most int) bool {
		return s != "" && len(s) <= most && !strings.ContainsFunc(s, func(r rune) bool { return r <= 0x20 || r >= 0x7f })
	}
	if len(e.Types) == 0 {
		e.Types = agora.Types()
	}
	switch {
	case e.Batch > 1:
		return &SettingError{"/batch", "a request of the mode agora carries one event"}
	case !printable(e.Agora.AppKey, 128):
		return &SettingError{"/agora_appkey", "the mode agora has one: 1 to 128 printable characters of ASCII"}
	case !printable(string(e.Agora.Secret), 128):
		return &SettingError{"/agora_secret", "the mode agora has one: 1 to 128 printable characters of ASCII"}
	}
	for _, t := range e.Types {
		if !slices.Contains(agora.Types(), t) {
			return &SettingError{"/types", "the mode agora has no form for " + t.String()}
		}
	}
	return nil
}

func (e *Endpoint) checkHeaders() error {
	if len(e.Headers) > MaxHeaders {
		return &SettingError{"/headers", fmt.Sprintf("at most %d", MaxHeaders)}
	}
	size := 0
	seen := make(map[string]bool, len(e.Headers))
	for name, value := range e.Headers {
		size += len(name) + len(value)
		canonical := textproto.CanonicalMIMEHeaderKey(name)
		switch {
		case !httpguts.ValidHeaderFieldName(name) || !httpguts.ValidHeaderFieldValue(value):
			return &SettingError{"/headers", "a name or a value is not one of HTTP"}
		case strings.HasPrefix(canonical, "Webhook-") || strings.HasPrefix(canonical, "Proxy-") || slices.Contains(reserved(), canonical):
			return &SettingError{"/headers", "Coffer sets " + canonical + " itself"}
		case seen[canonical]:
			return &SettingError{"/headers", canonical + " is there twice"}
		}
		seen[canonical] = true
	}
	if size > 4<<10 {
		return &SettingError{"/headers", "at most 4 KiB in all"}
	}
	return nil
}

// reserved names the headers that an endpoint cannot set.
func reserved() []string {
	return []string{
		"Host", "Content-Length", "Content-Type", "Content-Encoding", "Transfer-Encoding", "Connection", "Upgrade",
		"Te", "Trailer", "Keep-Alive", "Expect", "User-Agent", http.CanonicalHeaderKey("Content-Digest"),
	}
}
