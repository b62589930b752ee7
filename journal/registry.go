package journal

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"golang.org/x/sync/singleflight"

	"github.com/cofferdb/coffer/kms"
)

const (
	appRow         = "app."
	appRowVersion  = 1
	purposePrivate = "app-private"

	// maxCachedApps bounds the apps in memory, at about 300 bytes each.
	maxCachedApps = 10_000
	// maxUnknownApps bounds what is remembered about ids that no app has.
	maxUnknownApps = 1_000
	// appFresh is how long an app is taken from memory. The watch tells of
	// changes at once; this is for the time in which a watch is broken.
	appFresh = time.Minute
	// unknownFresh is the same for ids that no app has.
	unknownFresh = 5 * time.Second
	// loadTimeout bounds a load that several callers wait for.
	loadTimeout = 10 * time.Second

	maxAppName = 200
)

// A Registry knows the apps of one region. Their rows are durable before they
// count; an app's name and certificates are sealed under the app's own key.
type Registry struct {
	region  Region
	plans   []Plan
	rows    kms.Rows
	keyring *kms.Keyring
	now     func() time.Time
	loads   singleflight.Group

	// apps has the apps in memory: AppID → *cachedApp. Each append and each
	// record that is opened looks here, so reading takes no lock.
	apps sync.Map

	mu      sync.Mutex // guards what follows, and changes of apps
	size    int        // of apps
	unknown map[AppID]time.Time
	// changes counts evictions: a load that began before one must not store
	// what it read.
	changes uint64
}

type cachedApp struct {
	app   App
	route atomic.Pointer[route] // made when the app is first appended to or opened from
	stale atomic.Bool           // set by a timer: reading the clock would cost more than the look-up
}

// appRecord is an app's row.
type appRecord struct {
	Version    int       `json:"version"`
	Account    string    `json:"account,omitzero"`
	Region     string    `json:"region"`
	Plan       string    `json:"plan"`
	Generation uint16    `json:"generation"`
	Shard      int       `json:"shard"`
	Created    time.Time `json:"created"`
	Disabled   bool      `json:"disabled,omitzero"`
	OnRecall   OnRecall  `json:"on_recall,omitzero"`
	Private    []byte    `json:"private"`

	// After a plan change.
	Previous *routeRecord `json:"previous,omitzero"`
	Moved    time.Time    `json:"moved,omitzero"`
	Opened   uint64       `json:"opened,omitzero"`
	Closed   uint64       `json:"closed,omitzero"`
}

type routeRecord struct {
	Plan       string `json:"plan"`
	Shard      int    `json:"shard"`
	Generation uint16 `json:"generation"`
	Sealed     uint64 `json:"sealed,omitzero"`
}

// appPrivate is the sealed part of an app's row.
type appPrivate struct {
	Name         string   `json:"name"`
	Certificates []string `json:"certificates"`
}

func newRegistry(region Region, plans []Plan, rows kms.Rows, keyring *kms.Keyring, now func() time.Time) *Registry {
	if now == nil {
		now = time.Now
	}
	return &Registry{
		region: region, plans: plans, rows: rows, keyring: keyring, now: now,
		unknown: map[AppID]time.Time{},
	}
}

// Create makes an app with its keys. It returns once the app is durable;
// [ErrAppExists] when there is one with the id of the spec.
func (r *Registry) Create(ctx context.Context, spec AppSpec) (App, error) {
	app, err := r.newApp(spec)
	if err != nil {
		return App{}, fmt.Errorf("create app: %w", err)
	}
	if err := r.keyring.CreateApp(ctx, app.ID.String()); err != nil {
		return App{}, fmt.Errorf("create app %s: keys: %w", app.ID, err)
	}
	value, err := r.encode(ctx, app)
	if err != nil {
		return App{}, fmt.Errorf("create app %s: %w", app.ID, err)
	}
	if _, err := r.rows.Create(ctx, appRow+app.ID.String(), value); err != nil {
		if errors.Is(err, kms.ErrRowConflict) {
			return App{}, fmt.Errorf("create app %s: %w", app.ID, ErrAppExists)
		}
		return App{}, fmt.Errorf("create app %s: %w", app.ID, err)
	}
	r.evict(app.ID)
	return app, nil
}

func (r *Registry) newApp(spec AppSpec) (App, error) {
	plan, ok := findPlan(r.plans, spec.Plan)
	if !ok {
		return App{}, fmt.Errorf("plan %q: %w", spec.Plan, ErrUnknownPlan)
	}
	if spec.ID.IsZero() {
		spec.ID = NewAppID(r.region.Number)
	}
	if spec.ID.Region() != r.region.Number {
		return App{}, fmt.Errorf("app %s: %w", spec.ID, ErrWrongRegion)
	}
	if spec.Certificate == (Certificate{}) {
		spec.Certificate = NewCertificate()
	}
	if spec.Account != "" {
		if err := checkAt("/account", spec.Account, idOfEvent); err != nil {
			return App{}, err
		}
	}
	if err := checkName(spec.Name); err != nil {
		return App{}, err
	}
	return App{
		ID:           spec.ID,
		Name:         spec.Name,
		Account:      spec.Account,
		Region:       r.region.ID,
		Plan:         plan.ID,
		Shard:        shardOf(spec.ID, plan),
		Certificates: []Certificate{spec.Certificate},
		Created:      r.now().UTC().Truncate(time.Millisecond),
	}, nil
}

func checkName(name string) error {
	switch {
	case len(name) > maxAppName:
		return tooLarge("/name", fmt.Sprintf("a name must not be longer than %d bytes", maxAppName))
	case !utf8.ValidString(name):
		return invalid("/name", "a name must be valid UTF-8")
	}
	for _, c := range name {
		if c < 0x20 || 0x7f <= c && c < 0xa0 || isBidi(c) || isInvisible(c) {
			return invalid("/name", "a name must not contain control, invisible or direction characters")
		}
	}
	return nil
}

func findPlan(plans []Plan, id string) (Plan, bool) {
	i := slices.IndexFunc(plans, func(p Plan) bool { return p.ID == id })
	if i < 0 {
		return Plan{}, false
	}
	return plans[i], true
}

// shardOf spreads apps by their random id.
func shardOf(id AppID, plan Plan) int {
	return int(binary.BigEndian.Uint32(id[12:]) % uint32(plan.shards()))
}

// App returns an app, usually from memory. [ErrUnknownApp] and [ErrWrongRegion]
// say why there is none. A disabled app is returned with Disabled set. The
// certificates are shared; do not change them.
func (r *Registry) App(ctx context.Context, id AppID) (App, error) {
	if id.Region() != r.region.Number {
		return App{}, fmt.Errorf("app %s: %w", id, ErrWrongRegion)
	}
	if app := r.cached(id); app != nil {
		return app.app, nil
	}
	r.mu.Lock()
	missed, unknown := r.unknown[id]
	r.mu.Unlock()
	if unknown && time.Since(missed) < unknownFresh {
		return App{}, fmt.Errorf("app %s: %w", id, ErrUnknownApp)
	}
	return r.loadShared(ctx, id)
}

// cached returns an app that is in memory and fresh, or nil.
func (r *Registry) cached(id AppID) *cachedApp {
	if v, ok := r.apps.Load(id); ok {
		if app := v.(*cachedApp); !app.stale.Load() { //nolint:errcheck,forcetypeassert // nothing else is stored
			return app
		}
	}
	return nil
}

// loadShared makes one load for all who wait; a caller who gives up does not
// end it. It is a function of its own because the id that it captures is moved
// to the heap.
func (r *Registry) loadShared(ctx context.Context, id AppID) (App, error) {
	flight := r.loads.DoChan(string(id[:]), func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), loadTimeout)
		defer cancel()
		return r.loadCached(ctx, id)
	})
	select {
	case <-ctx.Done():
		return App{}, fmt.Errorf("app %s: %w", id, ctx.Err())
	case result := <-flight:
		if result.Err != nil {
			return App{}, result.Err
		}
		return result.Val.(App), nil //nolint:errcheck,forcetypeassert // loadCached returns nothing else
	}
}

func (r *Registry) loadCached(ctx context.Context, id AppID) (App, error) {
	r.mu.Lock()
	before := r.changes
	r.mu.Unlock()
	if app := r.cached(id); app != nil {
		return app.app, nil // a load ended between the caller's look and this one
	}
	app, _, err := r.load(ctx, id)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.changes != before {
		return app, err
	}
	r.drop(id)
	switch {
	case err == nil:
		// A random one goes: no list to keep, and no scan can push out all.
		r.apps.Range(func(other, _ any) bool {
			if r.size < maxCachedApps {
				return false
			}
			r.drop(other.(AppID)) //nolint:errcheck,forcetypeassert // nothing else is stored
			return true
		})
		entry := &cachedApp{app: app}
		time.AfterFunc(appFresh, func() { entry.stale.Store(true) })
		r.apps.Store(id, entry)
		r.size++
	case errors.Is(err, ErrUnknownApp):
		for other := range r.unknown {
			if len(r.unknown) < maxUnknownApps {
				break
			}
			delete(r.unknown, other)
		}
		r.unknown[id] = time.Now()
	}
	return app, err
}

func (r *Registry) load(ctx context.Context, id AppID) (App, uint64, error) {
	row, err := r.rows.Load(ctx, appRow+id.String())
	if errors.Is(err, kms.ErrRowNotFound) {
		return App{}, 0, fmt.Errorf("app %s: %w", id, ErrUnknownApp)
	}
	if err != nil {
		return App{}, 0, fmt.Errorf("load app %s: %w", id, err)
	}
	app, err := r.decode(ctx, id, row.Value)
	if err != nil {
		return App{}, 0, fmt.Errorf("load app %s: %w", id, err)
	}
	return app, row.Revision, nil
}

// Apps yields every app of the region, in any order. An app that cannot be read
// is yielded as an error, and the others follow.
func (r *Registry) Apps(ctx context.Context) iter.Seq2[App, error] {
	return func(yield func(App, error) bool) {
		for name, err := range r.rows.List(ctx, appRow) {
			if err != nil {
				yield(App{}, fmt.Errorf("list apps: %w", err))
				return
			}
			id, err := ParseAppID(strings.TrimPrefix(name, appRow))
			if err != nil {
				if !yield(App{}, fmt.Errorf("list apps: row %s: %w", name, ErrCorrupt)) {
					return
				}
				continue
			}
			app, _, err := r.load(ctx, id)
			if errors.Is(err, ErrUnknownApp) {
				continue // deleted since it was listed
			}
			if !yield(app, err) {
				return
			}
		}
	}
}

// RotateCertificate gives the app a new certificate and keeps the one before
// beside it, so that tokens signed with it stay good until
// [Registry.WithdrawCertificate]. An app with two is [ErrRotating].
func (r *Registry) RotateCertificate(ctx context.Context, id AppID) (App, error) {
	return r.update(ctx, id, func(app *App) error {
		if len(app.Certificates) > 1 {
			return fmt.Errorf("app %s: %w", id, ErrRotating)
		}
		app.Certificates = []Certificate{NewCertificate(), app.Certificates[0]}
		return nil
	})
}

// WithdrawCertificate drops every certificate but the newest.
func (r *Registry) WithdrawCertificate(ctx context.Context, id AppID) (App, error) {
	return r.update(ctx, id, func(app *App) error {
		app.Certificates = app.Certificates[:1:1]
		return nil
	})
}

// SetDisabled disables or enables an app.
func (r *Registry) SetDisabled(ctx context.Context, id AppID, disabled bool) (App, error) {
	return r.update(ctx, id, func(app *App) error {
		app.Disabled = disabled
		return nil
	})
}

// SetOnRecall says what recalls in an app do from now on.
func (r *Registry) SetOnRecall(ctx context.Context, id AppID, on OnRecall) (App, error) {
	switch on {
	case RecallHides:
		on = "" // rows are as they were without the setting
	case RecallErases:
	default:
		return App{}, fmt.Errorf("app %s: %w: a recall hides or erases", id, ErrInvalid)
	}
	return r.update(ctx, id, func(app *App) error {
		app.OnRecall = on
		return nil
	})
}

// update changes an app's row by compare-and-set. It returns once the change
// is durable and the bytes of the old row are gone. What an app is by its id it
// stays: nothing moves it to another region.
func (r *Registry) update(ctx context.Context, id AppID, change func(*App) error) (App, error) {
	if id.Region() != r.region.Number {
		return App{}, fmt.Errorf("app %s: %w", id, ErrWrongRegion)
	}
	for {
		app, revision, err := r.load(ctx, id)
		if err != nil {
			return App{}, err
		}
		if err := change(&app); err != nil {
			return App{}, err
		}
		app.ID, app.Region = id, r.region.ID
		value, err := r.encode(ctx, app)
		if err != nil {
			return App{}, fmt.Errorf("update app %s: %w", id, err)
		}
		_, err = r.rows.Update(ctx, appRow+id.String(), value, revision)
		r.evict(id)
		switch {
		case errors.Is(err, kms.ErrRowConflict):
			continue // another process was faster: decide again
		case err != nil:
			return App{}, fmt.Errorf("update app %s: %w", id, err)
		}
		return app, nil
	}
}

func (r *Registry) encode(ctx context.Context, app App) ([]byte, error) {
	private := appPrivate{Name: app.Name}
	for _, c := range app.Certificates {
		private.Certificates = append(private.Certificates, c.Reveal())
	}
	plain, err := json.Marshal(private)
	if err != nil {
		return nil, fmt.Errorf("encode its row: %w", err)
	}
	sealed, err := r.keyring.SealBlob(ctx, app.ID.String(), purposePrivate, plain)
	clear(plain)
	if err != nil {
		return nil, fmt.Errorf("seal its certificates: %w", err)
	}
	rec := appRecord{
		Version: appRowVersion, Account: app.Account, Region: app.Region, Plan: app.Plan, Generation: app.Generation,
		Shard: app.Shard, Created: app.Created, Disabled: app.Disabled, Private: sealed, OnRecall: app.OnRecall,
		Moved: app.Moved, Opened: app.Opened, Closed: app.Closed,
	}
	if app.Previous.Plan != "" {
		previous := routeRecord(app.Previous)
		rec.Previous = &previous
	}
	value, err := json.Marshal(rec)
	if err != nil {
		return nil, fmt.Errorf("encode its row: %w", err)
	}
	return value, nil
}

func (r *Registry) decode(ctx context.Context, id AppID, value []byte) (App, error) {
	if _, gone := parseDeleted(value); gone {
		return App{}, fmt.Errorf("%w: %w", ErrUnknownApp, ErrAppDeleted)
	}
	var rec appRecord
	if err := json.Unmarshal(value, &rec, json.RejectUnknownMembers(true)); err != nil {
		return App{}, fmt.Errorf("%w: the row does not parse", ErrCorrupt)
	}
	switch {
	case rec.Version != appRowVersion:
		return App{}, fmt.Errorf("%w: row version %d is not known", ErrCorrupt, rec.Version)
	case rec.Region != r.region.ID:
		return App{}, fmt.Errorf("%w: the row names the region %q", ErrWrongRegion, rec.Region)
	case rec.OnRecall != "" && rec.OnRecall != RecallErases:
		return App{}, fmt.Errorf("%w: what a recall does", ErrCorrupt)
	case rec.Generation > MaxGeneration || rec.Shard < 0 || rec.Previous != nil && rec.Previous.Generation >= rec.Generation:
		return App{}, fmt.Errorf("%w: generation or shard out of range", ErrCorrupt)
	}
	plain, err := r.keyring.OpenBlob(ctx, id.String(), purposePrivate, rec.Private)
	if err != nil {
		return App{}, fmt.Errorf("open its certificates: %w", err)
	}
	defer clear(plain)
	var private appPrivate
	if err := json.Unmarshal(plain, &private); err != nil || len(private.Certificates) == 0 {
		return App{}, fmt.Errorf("%w: the sealed part does not parse", ErrCorrupt)
	}
	app := App{
		ID: id, Name: private.Name, Account: rec.Account, Region: rec.Region, Plan: rec.Plan, Generation: rec.Generation,
		Shard: rec.Shard, Created: rec.Created, Disabled: rec.Disabled, OnRecall: rec.OnRecall,
		Moved: rec.Moved, Opened: rec.Opened, Closed: rec.Closed,
	}
	if rec.Previous != nil {
		app.Previous = Route(*rec.Previous)
	}
	for _, s := range private.Certificates {
		c, err := ParseCertificate(s)
		if err != nil {
			return App{}, fmt.Errorf("%w: a certificate does not parse", ErrCorrupt)
		}
		app.Certificates = append(app.Certificates, c)
	}
	return app, nil
}
