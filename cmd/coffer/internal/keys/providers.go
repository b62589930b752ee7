package keys

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/cofferdb/coffer/kms"
)

const providersRow = "providers"

// providerSet is the row "providers": which KEKs the region uses beside the
// configured ones, and which of all wraps new apps' keys.
type providerSet struct {
	Settings []string      `json:"settings"`
	Primary  *kms.Identity `json:"primary,omitempty"`
	// Own are KEKs that single apps were moved to. A migration of the region
	// leaves those apps where they are.
	Own []kms.Identity `json:"own,omitempty"`
}

// opened is the provider of a setting and, once it has answered, its name.
type opened struct {
	provider kms.Provider
	id       kms.Identity
	known    bool
}

// settlement is how far the providers are known.
type settlement struct {
	done   bool             // the primary is known, and so is everything else
	failed map[string]error // settings that could not be opened or do not answer
	told   string
}

// Primary names the KEK that wraps the keys of new apps; zero while it is not
// known.
func (a *Admin) Primary() kms.Identity {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.primary
}

func (a *Admin) provider(id kms.Identity) (kms.Provider, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p, ok := a.providers[id]
	return p, ok
}

func (a *Admin) identities() []kms.Identity {
	a.mu.Lock()
	defer a.mu.Unlock()
	ids := make([]kms.Identity, 0, len(a.providers))
	for id := range a.providers {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, func(x, y kms.Identity) int { return strings.Compare(x.String(), y.String()) })
	return ids
}

// Settle finds out what the KEKs are called and which of them is the primary. It
// returns nil when the primary is known: only then may apps be created, for
// after a migration they must not go under the KEK that was left.
func (a *Admin) Settle(ctx context.Context) error {
	a.mu.Lock()
	done := a.state.done
	a.mu.Unlock()
	if done {
		return nil
	}
	select {
	case <-a.settling:
		defer func() { a.settling <- struct{}{} }()
	case <-ctx.Done():
		return fmt.Errorf("key providers: %w", context.Cause(ctx))
	}
	var set providerSet
	if _, err := loadJSON(ctx, a.rows, providersRow, &set); err != nil && !errors.Is(err, kms.ErrRowNotFound) {
		return fmt.Errorf("key providers: %w", err)
	}
	failed := map[string]error{}
	own, err := a.describeConfigured(ctx)
	if err != nil {
		failed[a.setting] = err
	}
	for _, setting := range slices.Concat(a.others, set.Settings) {
		if err := a.expect(ctx, setting); err != nil {
			failed[setting] = err
		}
	}
	a.mu.Lock()
	a.state.failed = failed
	a.mu.Unlock()
	want := own
	if set.Primary != nil {
		want, err = *set.Primary, nil
		if _, known := a.provider(want); !known {
			// One of those that failed, or one that no setting names any more.
			err = &kms.Error{Op: "describe", Provider: want.Provider, Key: want.Key, Class: kms.ErrNotFound, Detail: "no setting names this KEK"}
			for _, why := range failed {
				err = why
			}
		}
	}
	if err != nil {
		return fmt.Errorf("key providers: %w", err)
	}
	if want != a.Primary() {
		if err := a.usePrimary(ctx, want); err != nil {
			return err
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.state.done = len(failed) == 0
	return nil
}

// unsettle lets the next Settle read the row again.
func (a *Admin) unsettle() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.state.done = false
}

// unanswered returns the settings whose KEK is not known yet, and why.
func (a *Admin) unanswered() map[string]error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.state.failed
}

func (a *Admin) describeConfigured(ctx context.Context) (kms.Identity, error) {
	d, err := a.configured.Describe(ctx)
	if err != nil {
		return kms.Identity{}, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.providers[d.Identity()] == nil {
		a.providers[d.Identity()] = a.configured
	}
	return d.Identity(), nil
}

// strayed reports whether the configuration's own KEK is not the primary.
func (a *Admin) strayed() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.providers[a.primary] != nil && a.providers[a.primary] != a.configured
}

// expect opens the provider of a setting that is in use: the keyring may use it
// also when it does not answer now.
func (a *Admin) expect(ctx context.Context, setting string) error {
	a.mu.Lock()
	o := a.opened[setting]
	a.mu.Unlock()
	if o == nil {
		p, err := a.open(ctx, setting)
		if err != nil {
			return err
		}
		a.keyring.AddProviderLater(p)
		o = &opened{provider: p}
		a.mu.Lock()
		a.opened[setting] = o
		a.closers = append(a.closers, p)
		a.mu.Unlock()
	}
	a.mu.Lock()
	known := o.known
	a.mu.Unlock()
	if known {
		return nil
	}
	d, err := o.provider.Describe(ctx)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	o.id, o.known = d.Identity(), true
	if a.providers[o.id] == nil {
		a.providers[o.id] = o.provider
	}
	return nil
}

// openSetting opens a provider once that answers, and lets the keyring use it.
func (a *Admin) openSetting(ctx context.Context, setting string) (kms.Identity, error) {
	a.mu.Lock()
	o := a.opened[setting]
	a.mu.Unlock()
	if o != nil {
		if err := a.expect(ctx, setting); err != nil {
			return kms.Identity{}, err
		}
		return o.id, nil
	}
	p, err := a.open(ctx, setting)
	if err != nil {
		return kms.Identity{}, err
	}
	id, err := a.keyring.AddProvider(ctx, p)
	if err != nil {
		return kms.Identity{}, errors.Join(err, p.Close())
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	// A second one of the same KEK, by another spelling or by another caller at
	// the same time, stays open beside the first: the keyring may hold it.
	a.closers = append(a.closers, p)
	if a.opened[setting] == nil {
		a.opened[setting] = &opened{provider: p, id: id, known: true}
	}
	if a.providers[id] == nil {
		a.providers[id] = p
	}
	return id, nil
}

func (a *Admin) usePrimary(ctx context.Context, id kms.Identity) error {
	// The keyring may know it by another client of the same KEK, or not yet.
	if p, ok := a.provider(id); ok {
		if _, err := a.keyring.AddProvider(ctx, p); err != nil {
			return fmt.Errorf("primary key provider: %w", err)
		}
	}
	if err := a.keyring.SetPrimary(ctx, id); err != nil {
		return fmt.Errorf("primary key provider: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.primary = id
	return nil
}

// changeProviders changes the row by compare-and-set. Every process follows.
func (a *Admin) changeProviders(ctx context.Context, change func(*providerSet) bool) error {
	for {
		var set providerSet
		revision, err := loadJSON(ctx, a.rows, providersRow, &set)
		if err != nil && !errors.Is(err, kms.ErrRowNotFound) {
			return fmt.Errorf("key providers: %w", err)
		}
		if !change(&set) {
			return nil
		}
		_, err = storeJSON(ctx, a.rows, providersRow, set, revision)
		if err == nil {
			return nil
		}
		if !errors.Is(err, kms.ErrRowConflict) {
			return fmt.Errorf("key providers: %w", err)
		}
	}
}

// adopt makes the row name a setting, and its KEK either the one for new apps or
// one that is an app's own.
func (a *Admin) adopt(ctx context.Context, setting string, id kms.Identity, primary bool) error {
	err := a.changeProviders(ctx, func(set *providerSet) (changed bool) {
		if !slices.Contains(set.Settings, setting) {
			set.Settings, changed = append(set.Settings, setting), true
		}
		regional := id == a.Primary() || set.Primary != nil && *set.Primary == id
		switch own := slices.Contains(set.Own, id); {
		case primary && (set.Primary == nil || *set.Primary != id || own):
			set.Primary, changed = &id, true
			set.Own = slices.DeleteFunc(set.Own, func(o kms.Identity) bool { return o == id })
		case !primary && !own && !regional:
			set.Own, changed = append(set.Own, id), true
		}
		return changed
	})
	if err != nil || !primary {
		return err
	}
	return a.usePrimary(ctx, id)
}

// own returns the KEKs that single apps were moved to.
func (a *Admin) own(ctx context.Context) ([]kms.Identity, error) {
	var set providerSet
	if _, err := loadJSON(ctx, a.rows, providersRow, &set); err != nil && !errors.Is(err, kms.ErrRowNotFound) {
		return nil, fmt.Errorf("key providers: %w", err)
	}
	return set.Own, nil
}

// forget takes the settings of a KEK out of the row.
func (a *Admin) forget(ctx context.Context, id kms.Identity) error {
	a.mu.Lock()
	var settings []string
	for setting, o := range a.opened {
		if o.known && o.id == id {
			settings = append(settings, setting)
			delete(a.opened, setting)
		}
	}
	delete(a.providers, id)
	a.mu.Unlock()
	return a.changeProviders(ctx, func(set *providerSet) bool {
		before := len(set.Settings) + len(set.Own)
		set.Settings = slices.DeleteFunc(set.Settings, func(s string) bool { return slices.Contains(settings, s) })
		set.Own = slices.DeleteFunc(set.Own, func(o kms.Identity) bool { return o == id })
		return len(set.Settings)+len(set.Own) != before
	})
}
