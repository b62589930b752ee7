package journal

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"time"
)

// An AppID names an app. Byte 0 is the number of the app's region, which never
// changes; the rest is random. As text it is 32 lower-case hex digits.
type AppID [16]byte

// ParseAppID parses 32 lower-case hex digits.
func ParseAppID(s string) (AppID, error) {
	var id AppID
	if err := parseHex16(id[:], s); err != nil {
		return AppID{}, fmt.Errorf("app id: %w", err)
	}
	if id[0] == 0 {
		return AppID{}, fmt.Errorf("app id: %w: no region has the number 0", ErrInvalid)
	}
	return id, nil
}

// NewAppID returns a random id in the region with the given number.
func NewAppID(region byte) AppID {
	var id AppID
	rand.Read(id[:]) // never fails; it ends the process instead
	id[0] = region
	return id
}

// Region returns the number of the app's region.
func (id AppID) Region() byte { return id[0] }

// IsZero reports whether the id is unset.
func (id AppID) IsZero() bool { return id == AppID{} }

// String returns the 32 hex digits.
func (id AppID) String() string { return hex.EncodeToString(id[:]) }

// AppendText appends the 32 hex digits to dst. It never fails.
func (id AppID) AppendText(dst []byte) ([]byte, error) { return hex.AppendEncode(dst, id[:]), nil }

// MarshalText returns the 32 hex digits.
func (id AppID) MarshalText() ([]byte, error) { return id.AppendText(nil) }

// UnmarshalText parses the 32 hex digits.
func (id *AppID) UnmarshalText(text []byte) error {
	parsed, err := ParseAppID(string(text))
	if err != nil {
		return err
	}
	*id = parsed
	return nil
}

// parseHex16 is strict: encoding/hex would accept upper-case digits, and an id
// with two spellings is two ids to whoever compares strings.
func parseHex16(dst []byte, s string) error {
	if len(s) != 2*len(dst) {
		return fmt.Errorf("%w: not %d hex digits", ErrInvalid, 2*len(dst))
	}
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return fmt.Errorf("%w: not %d lower-case hex digits", ErrInvalid, 2*len(dst))
		}
	}
	_, err := hex.Decode(dst, []byte(s))
	return err
}

// A Certificate is the secret with which an app's backend signs its tokens. It
// prints as "[redacted]" in every form; [Certificate.Reveal] gives the secret.
type Certificate [16]byte

// ParseCertificate parses 32 lower-case hex digits.
func ParseCertificate(s string) (Certificate, error) {
	var c Certificate
	if err := parseHex16(c[:], s); err != nil {
		return Certificate{}, fmt.Errorf("certificate: %w", err)
	}
	return c, nil
}

// NewCertificate returns a random certificate.
func NewCertificate() Certificate {
	var c Certificate
	rand.Read(c[:]) // never fails; it ends the process instead
	return c
}

const redacted = "[redacted]"

// Reveal returns the secret: 32 hex digits.
func (c Certificate) Reveal() string { return hex.EncodeToString(c[:]) }

// String returns "[redacted]".
func (c Certificate) String() string { return redacted }

// GoString returns "[redacted]".
func (c Certificate) GoString() string { return redacted }

// Format writes "[redacted]" whatever the verb: %x would print the bytes.
func (c Certificate) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, redacted) }

// MarshalText returns "[redacted]": a certificate is written into no document
// by accident.
func (c Certificate) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// An App is what the registry knows about an app.
type App struct {
	ID AppID
	// Name is for people. It is sealed in the registry.
	Name string
	// Account is the opaque id of the owning account.
	Account string
	// Region is the id of the region; it never changes.
	Region string
	// Plan is the id of the current plan.
	Plan string
	// Generation is the route generation of the current plan, see [Position].
	Generation uint16
	// Shard is the shard of the plan's streams that the app writes to.
	Shard int
	// Previous is where the app wrote before its last plan change; zero when it
	// has never changed its plan.
	Previous Route
	// Moved is when the plan was changed last.
	Moved time.Time
	// Opened and Closed are the sequences, in the stream of the current plan, of
	// the markers between which the last plan change copied; 0 until then.
	Opened, Closed uint64
	// Certificates holds one or, while it is being rotated, two certificates,
	// newest first. They are sealed in the registry.
	Certificates []Certificate
	// Created is when the app was made.
	Created time.Time
	// Disabled is set by an operator.
	Disabled bool
	// OnRecall says what a recall does beyond hiding the message.
	OnRecall OnRecall
}

// OnRecall says what a recall does beyond hiding the message in every view.
type OnRecall string

// What a recall does.
const (
	// RecallHides: the sealed bytes stay until they expire. The default, as is "".
	RecallHides OnRecall = "hide"
	// RecallErases: they are overwritten in the journal and in the views.
	RecallErases OnRecall = "erase"
)

// A Route is a stream that an app wrote to.
type Route struct {
	Plan       string
	Shard      int
	Generation uint16
	// Sealed is the sequence of the app's seal in the stream, 0 until it is
	// there. What follows it does not count.
	Sealed uint64
}

// moving reports whether the app's current stream is not open to it yet.
func (a App) moving() bool { return a.Previous.Plan != "" && a.Opened == 0 }

// AppSpec is what an app is made from.
type AppSpec struct {
	// ID is chosen by the registry when zero. One that is given must carry the
	// region's number.
	ID AppID
	// Name is for people: valid UTF-8, at most 200 bytes, may be empty.
	Name string
	// Account is the opaque id of the owning account, an id as events have it.
	Account string
	// Plan is the id of a plan; required.
	Plan string
	// Certificate is made when zero.
	Certificate Certificate
}
