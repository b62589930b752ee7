package kms

import (
	"context"
	"fmt"
	"log/slog"
	"time"
)

// Defaults of [Config].
const (
	DefaultSoft        = 15 * time.Minute
	DefaultHard        = 4 * time.Hour
	MaxHard            = 24 * time.Hour
	DefaultMaxApps     = 10_000
	DefaultMaxDataKeys = 65_536
	DefaultMaxPages    = 2_048
	DefaultMaxSeals    = 1 << 30
	DefaultCallTimeout = 10 * time.Second
)

// Config configures a [Keyring]. Region, Provider and Rows are required; the
// zero value of every other field is the default named with it.
type Config struct {
	Region   string     // bound into every key and envelope
	Provider Provider   // wraps the keys of new apps
	Others   []Provider // also unwrap: former, future, or tenants' own providers
	Rows     Rows
	Log      *slog.Logger     // default: discarded
	Now      func() time.Time // default time.Now; decides when epochs end, never how long a key is cached

	// Soft is how long after it was loaded, give or take a fifth, an app key is
	// unwrapped again, to notice a revocation. Default 15 min.
	Soft time.Duration
	// Hard is how long after it was last unwrapped an app key may be used while
	// the provider is throttled or unavailable: the outage that is bridged, and
	// the longest lag of a revocation. Default 4 h, at most 24 h.
	Hard time.Duration

	MaxApps     int // app keys in memory, default 10,000
	MaxDataKeys int // data keys in memory, about 1.3 kB each, default 65,536
	MaxPages    int // pages of wrapped subject keys in memory, at most 24 kB each, default 2,048
	// MaxSeals is how many envelopes this process seals with one data key before
	// it starts another epoch in the same class and time. The default, 2^30,
	// keeps four processes within the 2^32 that NIST SP 800-38D allows.
	MaxSeals uint64
	// CallTimeout limits one call of a provider, and of Rows, that several
	// callers may be waiting for. Default 10 s.
	CallTimeout time.Duration
}

// Epoch says which epoch key an event is sealed with: the one of (Class, From)
// in the app's row, made when there is none, with the app's next id.
type Epoch struct {
	Class   string    // for instance the plan and its generation
	From    time.Time // first instant of the epoch, a whole second
	Until   time.Time // first instant after it
	Expires time.Time // when its last event has expired and its key may be destroyed
}

// Status tells how the keyring is, for readiness and metrics.
type Status struct {
	Apps     int       // app keys in memory
	DataKeys int       // data keys in memory
	Pages    int       // pages in memory
	Degraded int       // app keys served past their revalidation, because the provider does not answer
	Since    time.Time // when the first of them became so
	Err      error     // the latest failure that made one so
}

// Keyring finds, makes, caches and destroys the keys of apps. It is safe for
// concurrent use, also by several processes on the same rows.
type Keyring struct {
	cfg Config
}

// NewKeyring starts a keyring. It calls no provider. Close it to end its
// background work and to drop its keys.
func NewKeyring(cfg Config) (*Keyring, error) {
	if cfg.Region == "" || cfg.Provider == nil || cfg.Rows == nil {
		return nil, fmt.Errorf("%w: a keyring needs a region, a provider and rows", ErrInput)
	}
	return &Keyring{cfg: cfg}, nil
}

// CreateApp makes the keys of an app, and returns when its row is durable. It
// does nothing when the app exists; ErrAppDestroyed when its keys were
// destroyed.
func (k *Keyring) CreateApp(ctx context.Context, app string) error { return ErrClosed }

// Sealer returns the data key for sealing an event of the subject in the epoch,
// making the keys of both where they do not exist. The hot path, a key in
// memory, allocates nothing. The key is to be used at once and not to be kept:
// only asking again notices erasure and revocation.
func (k *Keyring) Sealer(ctx context.Context, app string, e Epoch, subject Tag) (*DataKey, error) {
	return nil, ErrClosed
}

// Prepare makes and loads the keys that sealing events of the subjects in the
// epoch takes, new ones of one page in one write. It is optional: Sealer does
// the same one by one.
func (k *Keyring) Prepare(ctx context.Context, app string, e Epoch, subjects []Tag) error {
	return ErrClosed
}

// Opener returns the data key for opening an envelope with the epoch and
// subject of its header. The key is to be used at once and not to be kept.
func (k *Keyring) Opener(ctx context.Context, app string, epoch uint32, subject Tag) (*DataKey, error) {
	return nil, ErrClosed
}

// Tagger returns what makes the tags of an app.
func (k *Keyring) Tagger(ctx context.Context, app string) (*Tagger, error) { return nil, ErrClosed }

// SealBlob seals a small secret of the app, which only OpenBlob with the same
// purpose opens. It stays readable when the app key is replaced.
func (k *Keyring) SealBlob(ctx context.Context, app, purpose string, plaintext []byte) ([]byte, error) {
	return nil, ErrClosed
}

// OpenBlob opens what SealBlob sealed.
func (k *Keyring) OpenBlob(ctx context.Context, app, purpose string, blob []byte) ([]byte, error) {
	return nil, ErrClosed
}

// EraseSubject destroys the key of a subject, for ever: it returns once no row
// holds it any more. Repeat it after an error; erasing twice is no error.
func (k *Keyring) EraseSubject(ctx context.Context, app string, subject Tag) error { return ErrClosed }

// DestroyEpochs destroys the keys of the app's epochs that had expired by now,
// and returns how many.
func (k *Keyring) DestroyEpochs(ctx context.Context, app string, now time.Time) (int, error) {
	return 0, ErrClosed
}

// DestroyApp destroys every key of an app, for ever. Repeat it after an error.
func (k *Keyring) DestroyApp(ctx context.Context, app string) error { return ErrClosed }

// Evict drops the keys of an app from this process's memory.
func (k *Keyring) Evict(app string) {}

// Status tells how the keyring is.
func (k *Keyring) Status() Status { return Status{} }

// Close ends background work and drops every key. It does not close providers.
func (k *Keyring) Close() error { return nil }
