package kms

import (
	"context"
	"log/slog"
	"time"
)

// KeySize is the size in bytes of every symmetric key of this package.
const KeySize = 32

// MaxBlob is the longest Wrap.Blob, in bytes, that a provider makes or looks at.
const MaxBlob = 8 << 10

// Provider is a key management service holding one key encryption key (KEK),
// which never leaves it. Implementations are safe for concurrent use, and pass
// the suite kmstest.RunProvider.
//
// Every method returns errors as *[Error], with one of the closed set of
// classes, and returns when ctx ends. A provider does not cache keys. It may
// retry within the deadline of ctx, and only what [Retryable] allows.
type Provider interface {
	// Describe asks the service for the present state of the KEK.
	Describe(ctx context.Context) (Description, error)
	// Generate makes a key of KeySize random bytes and wraps it.
	Generate(ctx context.Context, binding Context) (key []byte, w Wrap, err error)
	// Wrap wraps a key of KeySize bytes under the latest version of the KEK.
	Wrap(ctx context.Context, binding Context, key []byte) (Wrap, error)
	// Unwrap returns the key in w. The binding must be the one given when w was
	// made; with another the error is ErrMismatch.
	Unwrap(ctx context.Context, binding Context, w Wrap) ([]byte, error)
	// Rewrap wraps the keys of items again under the latest version of the KEK,
	// inside the service where it can. The results are in the order of the
	// items, each with its own error; the error returned is of the whole call,
	// and then there are no results.
	Rewrap(ctx context.Context, items []RewrapItem) ([]RewrapResult, error)
	// Close ends what the provider runs in the background.
	Close() error
}

// Rotator is a Provider which can make a new version of its KEK.
type Rotator interface {
	// Rotate makes a new version, which new wraps use from then on. Older
	// versions stay able to unwrap.
	Rotate(ctx context.Context) (version string, err error)
}

// Retirer is a Provider which can end versions of its KEK.
type Retirer interface {
	// Retire makes every version before the given one unable to unwrap, and
	// returns once the service has confirmed that. It cannot be undone
	// everywhere: check first that nothing is wrapped by them.
	Retire(ctx context.Context, beforeVersion string) error
}

// Wrap is a key, wrapped by a provider. It is kept as JSON in rows.
type Wrap struct {
	Provider  string    `json:"provider"` // "local", "vault" or "awskms"
	Key       string    `json:"key"`      // identity of the KEK: ARN, HOST/MOUNT/KEY, id of a key file
	Version   string    `json:"version"`  // of the KEK
	Blob      []byte    `json:"blob"`
	WrappedAt time.Time `json:"wrapped_at"`
}

// Identity names the KEK that made w.
func (w Wrap) Identity() Identity { return Identity{Provider: w.Provider, Key: w.Key} }

// LogValue leaves out the blob.
func (w Wrap) LogValue() slog.Value {
	return slog.GroupValue(slog.String("provider", w.Provider), slog.String("key", w.Key), slog.String("version", w.Version))
}

// String leaves out the blob.
func (w Wrap) String() string { return w.Provider + ":" + w.Key + "#" + w.Version }

// GoString leaves out the blob.
func (w Wrap) GoString() string { return w.String() }

// Identity names a KEK among all providers.
type Identity struct {
	Provider string `json:"provider"`
	Key      string `json:"key"`
}

// String is PROVIDER:KEY.
func (id Identity) String() string { return id.Provider + ":" + id.Key }

// State is what a provider says about its KEK.
type State string

// The states of a KEK. A key in any other than StateEnabled neither wraps nor
// unwraps.
const (
	StateEnabled         State = "enabled"
	StateDisabled        State = "disabled"
	StatePendingDeletion State = "pending_deletion"
)

// Description is the answer of Provider.Describe.
type Description struct {
	Provider     string `json:"provider"`
	Key          string `json:"key"`                   // as in Wrap.Key
	Version      string `json:"version"`               // which new wraps use
	MinVersion   string `json:"min_version,omitempty"` // the oldest able to unwrap, empty where versions never end
	State        State  `json:"state"`
	Region       string `json:"region,omitempty"` // of the service, in its own words
	NativeRewrap bool   `json:"native_rewrap"`    // Rewrap does not bring keys into this process
}

// Identity names the KEK described.
func (d Description) Identity() Identity { return Identity{Provider: d.Provider, Key: d.Key} }

// RewrapItem is one key for Provider.Rewrap.
type RewrapItem struct {
	Context Context
	Wrap    Wrap
}

// RewrapResult is what became of a RewrapItem: a Wrap under the latest version,
// or an error.
type RewrapResult struct {
	Wrap Wrap
	Err  error
}

// Call is one request to a key management service, given to the Observe
// function of a provider's options when it has ended: for counting, audit and
// metrics. A retry is a call of its own. It holds no key and no blob.
type Call struct {
	Provider  string
	Key       string
	Operation string // describe, generate, wrap, unwrap, rewrap, rotate, retire, login
	RequestID string // the service's own, empty where it has none
	Items     int    // keys in the request
	Duration  time.Duration
	Err       error // nil, or *Error
}
