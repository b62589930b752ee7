package kms

import (
	"context"
	"crypto/cipher"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"log/slog"
	"time"

	mathrand "math/rand/v2"
)

// errStale says that an app in memory was evicted, or is older than its rows:
// load it again. It does not leave this package.
var errStale = errors.New("kms: app in memory is out of date")

const maxAttempts = 16 // of what others may keep changing

// cached returns the app if it is in memory.
func (k *Keyring) cached(app string) *appKeys {
	k.mu.RLock()
	a := k.apps[app]
	k.mu.RUnlock()
	return a
}

// withApp runs f with the app's keys, and again with newer ones if they turn
// out to be out of date.
func (k *Keyring) withApp(ctx context.Context, app string, f func(*appKeys) error) error {
	for range maxAttempts {
		a, err := k.app(ctx, app)
		if err != nil {
			return err
		}
		if err := f(a); !errors.Is(err, errStale) {
			return err
		}
		k.evict(a)
	}
	return fmt.Errorf("%w: app %s: its rows name app keys they do not hold", ErrKeyringCorrupt, app)
}

// app returns the app's keys, loading them when they are not in memory.
func (k *Keyring) app(ctx context.Context, app string) (*appKeys, error) {
	if err := checkApp(app); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("load keys of app %s: %w", app, err)
	}
	k.mu.RLock()
	a, f, closed := k.apps[app], k.negative[app], k.closed
	k.mu.RUnlock()
	switch {
	case closed:
		return nil, ErrClosed
	case a != nil:
		return a, nil
	case f.err != nil && time.Now().Before(f.until):
		return nil, f.err
	}
	return share(ctx, k, "app:"+app, func(ctx context.Context) (*appKeys, error) {
		if a := k.cached(app); a != nil {
			return a, nil
		}
		a, err := k.load(ctx, app)
		if err != nil {
			err = fmt.Errorf("load keys of app %s: %w", app, err)
			k.refuse(app, err)
			return nil, err
		}
		if !k.admit(a) { //nolint:contextcheck // revalidation outlives the load
			a.close()
			return nil, ErrClosed
		}
		return a, nil
	})
}

// refuse keeps an error, so that the app is not loaded again at once.
func (k *Keyring) refuse(app string, err error) {
	life := negativeLife
	if Retryable(err) || Class(err) == nil && !errors.Is(err, ErrAppUnknown) && !errors.Is(err, ErrAppDestroyed) {
		life = negativeRetryLife
	}
	now := time.Now()
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.negative) >= k.cfg.MaxApps {
		for app, f := range k.negative {
			if now.After(f.until) {
				delete(k.negative, app)
			}
		}
		for app := range k.negative {
			if len(k.negative) < k.cfg.MaxApps {
				break
			}
			delete(k.negative, app)
		}
	}
	k.negative[app] = failure{err: err, until: now.Add(life)}
}

func (k *Keyring) forgive(app string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.negative, app)
}

// admit puts a loaded app into memory, and another out if there are too many.
func (k *Keyring) admit(a *appKeys) bool {
	k.mu.Lock()
	if k.closed {
		k.mu.Unlock()
		return false
	}
	var out []*appKeys
	for len(k.apps) >= k.cfg.MaxApps {
		victim := k.victim()
		delete(k.apps, victim.name)
		out = append(out, victim)
	}
	k.apps[a.name] = a
	delete(k.negative, a.name)
	k.mu.Unlock()
	for _, v := range out {
		v.close()
	}
	a.schedule(k.softLife())
	return true
}

// victim picks an app to drop: one that was not used lately if the few looked
// at have one. The caller holds mu.
func (k *Keyring) victim() *appKeys {
	var victim *appKeys
	looked := 0
	for _, a := range k.apps { // in random order
		victim = a
		if looked++; looked == 16 || !a.used.Load() {
			break
		}
	}
	return victim
}

// evict drops an app from memory.
func (k *Keyring) evict(a *appKeys) {
	k.mu.Lock()
	if k.apps[a.name] == a {
		delete(k.apps, a.name)
	}
	k.mu.Unlock()
	a.close()
}

// shrink makes room for data keys and pages, by dropping those not used lately.
func (k *Keyring) shrink() {
	k.mu.RLock()
	apps := make([]*appKeys, 0, len(k.apps))
	for _, a := range k.apps { // in random order
		apps = append(apps, a)
	}
	k.mu.RUnlock()
	enough := func() bool { return int(k.dataKeys.Load()) <= k.cfg.MaxDataKeys*9/10 }
	for _, a := range apps {
		if enough() {
			return
		}
		a.turn()
	}
	for _, a := range apps {
		if enough() {
			return
		}
		a.thin(enough)
	}
}

// softLife is the time until a revalidation: jittered, so that apps loaded
// together are not revalidated together.
func (k *Keyring) softLife() time.Duration { return jitter(k.cfg.Soft, 0.2) }

// jitter spreads d by a part to both sides.
func jitter(d time.Duration, part float64) time.Duration {
	return time.Duration(float64(d) * (1 - part + 2*part*mathrand.Float64())) //nolint:gosec // no secret
}

// load reads the app's row and unwraps its keys.
func (k *Keyring) load(ctx context.Context, app string) (*appKeys, error) {
	row, revision, err := k.loadRow(ctx, app)
	if err != nil {
		return nil, err
	}
	started := time.Now()
	keys := &ciphers{app: map[uint32]cipher.AEAD{}, current: row.generation()}
	for _, r := range row.Keys {
		aead, err := k.unwrapApp(ctx, app, r)
		if err != nil {
			return nil, err
		}
		keys.app[r.Generation] = aead
	}
	blobKey, err := keys.open(k.cfg.Region, app, kindBlobKey, nil, row.BlobKey)
	if err != nil {
		return nil, corruptIfStale(err)
	}
	defer clear(blobKey)
	if keys.blob, err = newAEAD(blobKey); err != nil {
		return nil, err
	}
	tagKey, err := keys.open(k.cfg.Region, app, kindTagKey, nil, row.TagKey)
	if err != nil {
		return nil, corruptIfStale(err)
	}
	return &appKeys{
		ring: k, name: app, tagger: newTagger(tagKey), keys: keys, row: row, revision: revision, version: 1,
		young: map[dataID]*DataKey{}, leaves: map[string]*page{}, ahead: map[epochRef]*time.Timer{},
		hardAt: started.Add(k.cfg.Hard),
	}, nil
}

func corruptIfStale(err error) error {
	if errors.Is(err, errStale) {
		return fmt.Errorf("%w: the row needs an app key it does not hold", ErrKeyringCorrupt)
	}
	return err
}

// loadRow reads the app's row.
func (k *Keyring) loadRow(ctx context.Context, app string) (*appRow, uint64, error) {
	r, err := k.cfg.Rows.Load(ctx, appRowName(app))
	return k.readRow(app, r, err)
}

// readRow makes sense of what was loaded.
func (k *Keyring) readRow(app string, r Row, err error) (*appRow, uint64, error) {
	switch {
	case errors.Is(err, ErrRowNotFound):
		return nil, 0, fmt.Errorf("%w: %s", ErrAppUnknown, app)
	case err != nil:
		return nil, 0, fmt.Errorf("load app row: %w", err)
	}
	row, err := decodeAppRow(k.cfg.Region, app, r.Value)
	if err != nil {
		return nil, 0, err
	}
	if !row.Destroyed.IsZero() {
		return nil, 0, fmt.Errorf("%w: %s", ErrAppDestroyed, app)
	}
	return row, r.Revision, nil
}

// unwrapApp makes the cipher of an app key.
func (k *Keyring) unwrapApp(ctx context.Context, app string, r appKeyRow) (cipher.AEAD, error) {
	raw, err := k.unwrapAny(ctx, app, r)
	if err != nil {
		return nil, err
	}
	defer clear(raw)
	return newAEAD(raw)
}

// unwrapAny unwraps an app key by the first of its wraps that works. An outage
// among the failures prevails, because it leaves the answer open.
func (k *Keyring) unwrapAny(ctx context.Context, app string, r appKeyRow) ([]byte, error) {
	var first, open error
	for _, w := range r.Wraps {
		raw, err := k.unwrapOne(ctx, app, r, w)
		if err == nil {
			return raw, nil
		}
		if first == nil {
			first = err
		}
		if open == nil && bridged(err) {
			open = err
		}
	}
	if open != nil {
		return nil, open
	}
	return nil, first
}

// unwrapOne unwraps an app key by one wrap, and compares it with what the row
// has committed to.
func (k *Keyring) unwrapOne(ctx context.Context, app string, r appKeyRow, w Wrap) ([]byte, error) {
	p, err := k.provider(ctx, w.Identity())
	if err != nil {
		return nil, err
	}
	return k.unwrapBy(ctx, p, app, r, w)
}

// unwrapBy is unwrapOne, given the provider of the wrap.
func (k *Keyring) unwrapBy(ctx context.Context, p Provider, app string, r appKeyRow, w Wrap) ([]byte, error) {
	var raw []byte
	err := k.call(ctx, func() (err error) {
		raw, err = p.Unwrap(ctx, k.binding(app), w)
		return err
	})
	if err != nil {
		return nil, err
	}
	check, err := commitment(raw)
	if err != nil {
		return nil, err
	}
	if subtle.ConstantTimeCompare(check[:], r.Check) != 1 {
		clear(raw)
		return nil, &Error{Op: "unwrap", Provider: w.Provider, Key: w.Key, Class: ErrMismatch, Detail: "the service returned another key"}
	}
	return raw, nil
}

func (k *Keyring) binding(app string) Context {
	return Context{Region: k.cfg.Region, App: app, Purpose: PurposeApp}
}

// call runs one call of a provider, when its turn has come.
func (k *Keyring) call(ctx context.Context, f func() error) error {
	select {
	case k.calls <- struct{}{}:
		defer func() { <-k.calls }()
		return f()
	case <-ctx.Done():
		return &Error{Op: "wait", Provider: "keyring", Class: ErrUnavailable, Cause: ctx.Err()}
	}
}

// createApp makes the app's row.
func (k *Keyring) createApp(ctx context.Context, app string, p Provider) error {
	if err := checkApp(app); err != nil {
		return err
	}
	if _, _, err := k.loadRow(ctx, app); !errors.Is(err, ErrAppUnknown) {
		return err
	}
	var raw []byte
	var w Wrap
	err := k.call(ctx, func() (err error) {
		raw, w, err = p.Generate(ctx, k.binding(app))
		return err
	})
	if err != nil {
		return fmt.Errorf("create keys of app %s: %w", app, err)
	}
	defer clear(raw)
	aead, err := newAEAD(raw)
	if err != nil {
		return err
	}
	defer wipe(aead)
	check, err := commitment(raw)
	if err != nil {
		return err
	}
	row := &appRow{
		Format: rowFormat, App: app, Region: k.cfg.Region, NextEpoch: 1,
		Keys:    []appKeyRow{{Generation: 1, Check: check[:], Wraps: []Wrap{w}}},
		TagKey:  k.randomKey(aead, app, 1, kindTagKey, nil),
		BlobKey: k.randomKey(aead, app, 1, kindBlobKey, nil),
	}
	value, err := encodeAppRow(row)
	if err != nil {
		return err
	}
	_, err = k.cfg.Rows.Create(ctx, appRowName(app), value)
	if errors.Is(err, ErrRowConflict) {
		_, _, err = k.loadRow(ctx, app) // another was first
	}
	if err != nil {
		return fmt.Errorf("create keys of app %s: %w", app, err)
	}
	k.forgive(app)
	k.cfg.Log.InfoContext(ctx, "app keys created", slog.String("app", app), slog.Any("wrap", w))
	return nil
}

// randomKey makes a key and returns it wrapped.
func (k *Keyring) randomKey(aead cipher.AEAD, app string, generation uint32, kind string, id []byte) []byte {
	var raw [KeySize]byte
	defer clear(raw[:])
	_, _ = rand.Read(raw[:]) // never fails: crypto/rand ends the program instead
	return sealKey(aead, k.cfg.Region, app, generation, kind, id, raw[:])
}
