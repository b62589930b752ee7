package kms

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/singleflight"
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
	DefaultTombstones  = 30 * 24 * time.Hour
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
	// Tombstones is how long an app's row tells when the key of an epoch was
	// destroyed; that it was, follows from its id for ever. Default 30 days.
	Tombstones time.Duration
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
	cfg       Config
	pageLimit int
	flights   singleflight.Group
	calls     chan struct{} // one token for each call of a provider under way

	ctx  context.Context //nolint:containedctx // ends with the keyring; background work and shared loads run under it
	stop context.CancelFunc
	wg   sync.WaitGroup // of begin

	dataKeys atomic.Int64 // in all apps
	pages    atomic.Int64 // in all apps

	mu        sync.RWMutex // guards what follows
	closed    bool
	apps      map[string]*appKeys
	negative  map[string]failure
	providers []*knownProvider
	primary   Provider // wraps the keys of new apps

	dirty *nameSet // rows that changed, for the goroutine that follows them
}

// failure is an error kept for a while, so that it is not asked for again.
type failure struct {
	err   error
	until time.Time
}

const (
	negativeLife      = 30 * time.Second // of what a retry does not change
	negativeRetryLife = time.Second      // of what it may
	parallelCalls     = 32               // of providers, at a time
)

// NewKeyring starts a keyring, and following the changes of its rows. It calls
// no provider. Close it to end its background work and to drop its keys.
func NewKeyring(cfg Config) (*Keyring, error) {
	if cfg.Region == "" || cfg.Provider == nil || cfg.Rows == nil {
		return nil, fmt.Errorf("%w: a keyring needs a region, a provider and rows", ErrInput)
	}
	if err := (Context{Region: cfg.Region, App: "a", Purpose: PurposeApp}).Validate(); err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	cfg.Soft = cmp.Or(cfg.Soft, DefaultSoft)
	cfg.Hard = cmp.Or(cfg.Hard, DefaultHard)
	cfg.MaxApps = cmp.Or(cfg.MaxApps, DefaultMaxApps)
	cfg.MaxDataKeys = cmp.Or(cfg.MaxDataKeys, DefaultMaxDataKeys)
	cfg.MaxPages = cmp.Or(cfg.MaxPages, DefaultMaxPages)
	cfg.MaxSeals = cmp.Or(cfg.MaxSeals, DefaultMaxSeals)
	cfg.CallTimeout = cmp.Or(cfg.CallTimeout, DefaultCallTimeout)
	cfg.Tombstones = cmp.Or(cfg.Tombstones, DefaultTombstones)
	if cfg.Soft < 0 || cfg.Hard < cfg.Soft || cfg.Hard > MaxHard || cfg.MaxApps < 1 || cfg.MaxDataKeys < 1 ||
		cfg.MaxPages < 1 || cfg.CallTimeout < 0 {
		return nil, fmt.Errorf("%w: soft limit %v, hard limit %v (at most %v), maxima %d, %d, %d, call time-out %v",
			ErrInput, cfg.Soft, cfg.Hard, MaxHard, cfg.MaxApps, cfg.MaxDataKeys, cfg.MaxPages, cfg.CallTimeout)
	}
	ctx, stop := context.WithCancel(context.Background())
	k := &Keyring{
		cfg: cfg, pageLimit: pageLimit, calls: make(chan struct{}, parallelCalls), ctx: ctx, stop: stop,
		apps: map[string]*appKeys{}, negative: map[string]failure{}, primary: cfg.Provider, dirty: newNameSet(),
	}
	for _, p := range append([]Provider{cfg.Provider}, cfg.Others...) {
		k.providers = append(k.providers, &knownProvider{Provider: p})
	}
	k.wg.Go(k.watch)
	k.wg.Go(k.follow)
	return k, nil
}

// CreateApp makes the keys of an app under Config.Provider, or what SetPrimary
// put in its place, and returns when its row is durable. It does nothing when the
// app exists; ErrAppDestroyed when its keys were destroyed.
func (k *Keyring) CreateApp(ctx context.Context, app string) error {
	k.mu.RLock()
	primary := k.primary
	k.mu.RUnlock()
	return k.createApp(ctx, app, primary)
}

// Sealer returns the data key for sealing an event of the subject in the epoch,
// making the keys of both where they do not exist. The hot path, a key in
// memory, allocates nothing. The key is to be used at once and not to be kept:
// only asking again notices erasure and revocation.
func (k *Keyring) Sealer(ctx context.Context, app string, e Epoch, subject Tag) (*DataKey, error) {
	if a := k.cached(app); a != nil {
		if key := a.sealer(e.Class, e.From.Unix(), subject); key != nil {
			return key, nil
		}
	}
	return k.makeSealer(ctx, app, e, subject)
}

// Prepare makes and loads the keys that sealing events of the subjects in the
// epoch takes, new ones of one page in one write. It is optional: Sealer does
// the same one by one. Subjects that were erased are no error here.
func (k *Keyring) Prepare(ctx context.Context, app string, e Epoch, subjects []Tag) error {
	if err := e.check(); err != nil {
		return err
	}
	return k.withApp(ctx, app, func(a *appKeys) error {
		if _, err := a.findEpoch(ctx, e); err != nil {
			return err
		}
		return a.ensureSubjects(ctx, subjects)
	})
}

// Opener returns the data key for opening an envelope with the epoch and
// subject of its header. The key is to be used at once and not to be kept.
func (k *Keyring) Opener(ctx context.Context, app string, epoch uint32, subject Tag) (*DataKey, error) {
	if a := k.cached(app); a != nil {
		if key := a.dataKey(dataID{epoch, subject}); key != nil {
			return key, nil
		}
	}
	return k.makeOpener(ctx, app, epoch, subject)
}

// Tagger returns what makes the tags of an app. It may be kept, though not
// longer than the app is to be readable.
func (k *Keyring) Tagger(ctx context.Context, app string) (*Tagger, error) {
	a := k.cached(app)
	if a == nil {
		var err error
		if a, err = k.app(ctx, app); err != nil {
			return nil, err
		}
	}
	a.touch()
	return a.tagger, nil
}

// SealBlob seals a small secret of the app, which only OpenBlob with the same
// purpose opens. It stays readable when the app key is replaced.
func (k *Keyring) SealBlob(ctx context.Context, app, purpose string, plaintext []byte) (blob []byte, err error) {
	err = k.withApp(ctx, app, func(a *appKeys) error {
		return a.withKeys(func(keys *ciphers) error {
			blob = sealBlob(keys.blob, k.cfg.Region, app, purpose, plaintext)
			return nil
		})
	})
	return blob, err
}

// OpenBlob opens what SealBlob sealed. It returns ErrEnvelope or
// ErrAuthentication for anything else.
func (k *Keyring) OpenBlob(ctx context.Context, app, purpose string, blob []byte) (plaintext []byte, err error) {
	err = k.withApp(ctx, app, func(a *appKeys) error {
		return a.withKeys(func(keys *ciphers) (err error) {
			plaintext, err = openBlob(keys.blob, k.cfg.Region, app, purpose, blob)
			return err
		})
	})
	return plaintext, err
}

// Evict drops the keys of an app from this process's memory.
func (k *Keyring) Evict(app string) {
	if a := k.cached(app); a != nil {
		k.evict(a)
	}
}

// Status tells how the keyring is.
func (k *Keyring) Status() Status {
	s := Status{DataKeys: int(k.dataKeys.Load()), Pages: int(k.pages.Load())}
	k.mu.RLock()
	defer k.mu.RUnlock()
	s.Apps = len(k.apps)
	var latest time.Time
	for _, a := range k.apps {
		since, at, err := a.degradation()
		if err == nil {
			continue
		}
		s.Degraded++
		if s.Since.IsZero() || since.Before(s.Since) {
			s.Since = since
		}
		if at.After(latest) {
			latest, s.Err = at, err
		}
	}
	return s
}

// Close ends background work, waits for it, and drops every key. It does not
// close providers.
func (k *Keyring) Close() error {
	k.mu.Lock()
	if k.closed {
		k.mu.Unlock()
		return nil
	}
	k.closed = true
	apps := slices.Collect(maps.Values(k.apps))
	k.mu.Unlock()
	k.stop()
	for _, a := range apps {
		k.evict(a)
	}
	k.wg.Wait()
	return nil
}

// begin lets background work start, unless the keyring is closed.
func (k *Keyring) begin() bool {
	k.mu.RLock()
	defer k.mu.RUnlock()
	if k.closed {
		return false
	}
	k.wg.Add(1)
	return true
}

// background runs f unless the keyring is closed, with the time of one call.
func (k *Keyring) background(f func(context.Context)) {
	if !k.begin() {
		return
	}
	go func() {
		defer k.wg.Done()
		ctx, cancel := context.WithTimeout(k.ctx, k.cfg.CallTimeout)
		defer cancel()
		f(ctx)
	}()
}

// share runs f once for all callers that ask for key meanwhile. The end of
// ctx ends the wait of its caller only.
func share[T any](ctx context.Context, k *Keyring, key string, f func(context.Context) (T, error)) (T, error) {
	var none T
	ch := k.flights.DoChan(key, func() (any, error) { //nolint:contextcheck // shared with callers whose contexts end later
		if !k.begin() {
			return none, ErrClosed
		}
		defer k.wg.Done()
		ctx, cancel := context.WithTimeout(k.ctx, k.cfg.CallTimeout)
		defer cancel()
		return f(ctx)
	})
	select {
	case r := <-ch:
		if r.Err != nil {
			if k.ctx.Err() != nil {
				return none, ErrClosed
			}
			return none, r.Err
		}
		return r.Val.(T), nil //nolint:errcheck,forcetypeassert // f returned it
	case <-ctx.Done():
		return none, fmt.Errorf("wait for keys: %w", ctx.Err())
	}
}
