package keys

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cofferdb/coffer/kms"
)

// AppInventory is what wraps the key of one app.
type AppInventory struct {
	App       string `json:"app"`
	Destroyed bool   `json:"destroyed,omitempty"`
	Keys      []struct {
		Generation uint32    `json:"generation"`
		Wraps      []WrapRef `json:"wraps"`
	} `json:"keys"`
	// Epochs are those of one app that was asked for: what has a key, and what had
	// one until lately.
	Epochs []EpochRef `json:"epochs,omitempty"`
}

// EpochRef is an epoch of an app without its key.
type EpochRef struct {
	ID    uint32 `json:"id"`
	Class string `json:"class"`
	// Expires is when the last of what it seals ends, and its key is destroyed;
	// Destroyed when that was done.
	Expires   time.Time `json:"expires,omitzero"`
	Destroyed time.Time `json:"destroyed,omitzero"`
}

// WrapRef names a wrap without its blob.
type WrapRef struct {
	Provider  string    `json:"provider"`
	Key       string    `json:"key"`
	Version   string    `json:"version"`
	WrappedAt time.Time `json:"wrapped_at"`
}

// Inventory yields every app and what wraps its key, in the order of the ids. It
// calls no provider.
func (a *Admin) Inventory(ctx context.Context, yield func(AppInventory) error) error {
	w := worker{Admin: a}
	apps, err := w.apps(ctx)
	if err != nil {
		return err
	}
	for _, app := range apps {
		item, err := a.inventory(ctx, app)
		switch {
		case errors.Is(err, kms.ErrAppUnknown):
			continue // it has gone meanwhile
		case err != nil:
			return err
		}
		if err := yield(item); err != nil {
			return err
		}
	}
	return nil
}

func (a *Admin) inventory(ctx context.Context, app string) (AppInventory, error) {
	item := AppInventory{App: app}
	keys, err := a.keyring.AppKeys(ctx, app)
	if errors.Is(err, kms.ErrAppDestroyed) {
		item.Destroyed = true
		return item, nil
	}
	if err != nil {
		return item, err
	}
	for _, key := range keys {
		entry := struct {
			Generation uint32    `json:"generation"`
			Wraps      []WrapRef `json:"wraps"`
		}{Generation: key.Generation}
		for _, w := range key.Wraps {
			entry.Wraps = append(entry.Wraps, WrapRef{Provider: w.Provider, Key: w.Key, Version: w.Version, WrappedAt: w.WrappedAt})
		}
		item.Keys = append(item.Keys, entry)
	}
	return item, nil
}

// InventoryOf returns what wraps the key of one app, with its epochs. It calls no
// provider. An app that the keyring does not have is [ErrNoApp].
func (a *Admin) InventoryOf(ctx context.Context, app string) (AppInventory, error) {
	item, err := a.inventory(ctx, app)
	switch {
	case errors.Is(err, kms.ErrAppUnknown), errors.Is(err, kms.ErrInput):
		return item, ErrNoApp
	case err != nil || item.Destroyed:
		return item, err
	}
	epochs, err := a.keyring.Epochs(ctx, app)
	if err != nil {
		return item, err
	}
	for _, e := range epochs {
		item.Epochs = append(item.Epochs, EpochRef{ID: e.ID, Class: e.Class, Expires: e.Expires, Destroyed: e.Destroyed})
	}
	return item, nil
}

// KEKStatus is a key encryption key and what depends on it.
type KEKStatus struct {
	kms.Identity

	Primary     bool             `json:"primary"` // wraps the keys of new apps
	Configured  bool             `json:"configured"`
	Description *kms.Description `json:"description,omitempty"`
	Error       string           `json:"error,omitempty"` // class, when it does not answer
	Versions    map[string]int   `json:"versions"`        // wraps by the version that made them
	Oldest      time.Time        `json:"oldest,omitzero"` // of its wraps
}

// Unknown is a setting whose KEK has not answered since the start.
type Unknown struct {
	Setting string `json:"setting"`
	Error   string `json:"error"` // class
}

// Status is how the keys of a region stand.
type Status struct {
	Region  string      `json:"region"`
	Apps    int         `json:"apps"`
	KEKs    []KEKStatus `json:"keks"`
	Unknown []Unknown   `json:"unknown"`        // settings whose KEK is not known yet
	Cached  int         `json:"cached_apps"`    // in this process
	Bridged int         `json:"bridged_apps"`   // of those, used past their revalidation
	Since   time.Time   `json:"since,omitzero"` // when the first of them became so
	Job     *Job        `json:"job,omitempty"`  // the latest
	Backups []Backup    `json:"backups"`
}

// Status counts what wraps what, and asks every KEK how it is.
func (a *Admin) Status(ctx context.Context, region string) (Status, error) {
	s := Status{Region: region, KEKs: []KEKStatus{}, Unknown: []Unknown{}, Backups: []Backup{}}
	if err := a.Settle(ctx); err != nil && ctx.Err() != nil {
		return s, err
	}
	for setting, why := range a.unanswered() {
		s.Unknown = append(s.Unknown, Unknown{Setting: setting, Error: classOf(why)})
	}
	slices.SortFunc(s.Unknown, func(x, y Unknown) int { return strings.Compare(x.Setting, y.Setting) })
	keks := map[kms.Identity]*KEKStatus{}
	for _, id := range a.identities() {
		keks[id] = &KEKStatus{Identity: id, Configured: true, Primary: id == a.Primary(), Versions: map[string]int{}}
	}
	err := a.Inventory(ctx, func(app AppInventory) error {
		if app.Destroyed {
			return nil
		}
		s.Apps++
		for _, key := range app.Keys {
			for _, w := range key.Wraps {
				id := kms.Identity{Provider: w.Provider, Key: w.Key}
				kek := keks[id]
				if kek == nil {
					kek = &KEKStatus{Identity: id, Versions: map[string]int{}}
					keks[id] = kek
				}
				kek.Versions[w.Version]++
				if kek.Oldest.IsZero() || w.WrappedAt.Before(kek.Oldest) {
					kek.Oldest = w.WrappedAt
				}
			}
		}
		return nil
	})
	if err != nil {
		return s, err
	}
	for id, kek := range keks {
		if p, ok := a.provider(id); ok {
			if d, err := p.Describe(ctx); err != nil {
				kek.Error = classOf(err)
			} else {
				kek.Description = &d
			}
		}
		s.KEKs = append(s.KEKs, *kek)
	}
	slices.SortFunc(s.KEKs, func(x, y KEKStatus) int { return strings.Compare(x.Identity.String(), y.Identity.String()) })
	cache := a.keyring.Status()
	s.Cached, s.Bridged, s.Since = cache.Apps, cache.Degraded, cache.Since
	jobs, err := a.Jobs(ctx)
	if err != nil {
		return s, err
	}
	if len(jobs) > 0 {
		s.Job = &jobs[0]
	}
	if s.Backups, err = a.Backups(ctx); err != nil {
		return s, err
	}
	return s, nil
}

// Rotate makes a new version of the primary KEK. New wraps use it; a rewrap job
// brings the old ones under it.
func (a *Admin) Rotate(ctx context.Context, actor string) (version string, err error) {
	if err := a.Settle(ctx); err != nil {
		return "", err
	}
	id := a.Primary()
	p, _ := a.provider(id)
	r, ok := p.(kms.Rotator)
	if !ok {
		return "", fmt.Errorf("%w: rotate %s", ErrNotSupported, id)
	}
	err = a.recorded(ctx, actor, "keys.rotate", "kek:"+id.String(), nil, func() (err error) {
		version, err = r.Rotate(ctx)
		return err
	})
	return version, err
}

// Use is something that needs a version of a KEK.
type Use struct {
	App    string `json:"app,omitempty"`
	Backup string `json:"backup,omitempty"`
	Wrap   string `json:"wrap"` // PROVIDER:KEY#VERSION
}

// Retirement is what Retire found or did.
type Retirement struct {
	kms.Identity

	Before string `json:"before,omitempty"` // empty: the whole KEK
	Needed int    `json:"needed"`
	Uses   []Use  `json:"uses"` // some of what needs it
	Done   bool   `json:"done"`
}

// maxUses is how much of what needs a key is named.
const maxUses = 20

// disabler is a provider that can disable its KEK as a whole.
type disabler interface {
	Disable(ctx context.Context) error
}

// Retire ends the versions of a KEK before the given one, and returns once the
// provider confirms it. With no version it retires the whole KEK: disables it
// where the provider can do that, and takes its setting away. It refuses with
// ErrNeeded, naming what needs them, while one row or one kept backup does.
func (a *Admin) Retire(ctx context.Context, actor string, id kms.Identity, before string, dryRun bool) (Retirement, error) {
	r := Retirement{Identity: id, Before: before, Uses: []Use{}}
	if err := a.Settle(ctx); err != nil {
		return r, err
	}
	p, ok := a.provider(id)
	if !ok {
		return r, fmt.Errorf("%w: no KEK %s is configured", ErrSpec, id)
	}
	retirer, ok := p.(kms.Retirer)
	if before != "" && !ok {
		return r, fmt.Errorf("%w: retire versions of %s", ErrNotSupported, id)
	}
	if before == "" && id == a.Primary() {
		return r, fmt.Errorf("%w: %s wraps the keys of new apps", ErrNeeded, id)
	}
	if err := a.idle(ctx); err != nil {
		return r, err
	}
	if err := a.uses(ctx, &r); err != nil {
		return r, err
	}
	if dryRun {
		return r, nil
	}
	if r.Needed > 0 {
		return r, fmt.Errorf("%w: %s by %d", ErrNeeded, id, r.Needed)
	}
	detail := map[string]string{"before": before}
	if before == "" {
		detail = map[string]string{"whole": "true"}
	}
	err := a.recorded(ctx, actor, "keys.retire", "kek:"+id.String(), detail, func() error {
		if before == "" {
			if d, ok := p.(disabler); ok {
				if err := d.Disable(ctx); err != nil {
					return err
				}
			}
			return a.forget(ctx, id)
		}
		if err := retirer.Retire(ctx, before); errors.Is(err, kms.ErrInput) {
			return fmt.Errorf("%w: retire versions of %s: %w", ErrNotSupported, id, err)
		} else if err != nil {
			return err
		}
		return confirmed(ctx, p, id, before)
	})
	if err != nil {
		return r, err
	}
	r.Done = true
	return r, nil
}

// confirmed asks the provider whether the versions before one have ended.
func confirmed(ctx context.Context, p kms.Provider, id kms.Identity, before string) error {
	d, err := p.Describe(ctx)
	if err != nil {
		return err
	}
	if d.MinVersion != before && older(d.MinVersion, before) {
		return &kms.Error{Op: "retire", Provider: id.Provider, Key: id.Key, Class: kms.ErrUnavailable, Detail: "the provider does not confirm it"}
	}
	return nil
}

// idle refuses while a job that may make wraps is under way.
func (a *Admin) idle(ctx context.Context) error {
	var cur current
	if _, err := loadJSON(ctx, a.rows, currentRow, &cur); err != nil {
		if errors.Is(err, kms.ErrRowNotFound) {
			return nil
		}
		return err
	}
	j, err := a.loadJob(ctx, cur.ID)
	if errors.Is(err, ErrNoJob) {
		return nil
	}
	if err != nil {
		return err
	}
	if !j.Ended() && !j.DryRun && j.Kind != Verify {
		return fmt.Errorf("%w: %s %s", ErrBusy, j.Kind, j.ID)
	}
	return nil
}

// uses counts what needs the versions that are to end.
func (a *Admin) uses(ctx context.Context, r *Retirement) error {
	add := func(u Use) {
		r.Needed++
		if len(r.Uses) < maxUses {
			r.Uses = append(r.Uses, u)
		}
	}
	err := a.Inventory(ctx, func(app AppInventory) error {
		for _, key := range app.Keys {
			for _, w := range key.Wraps {
				if (kms.Identity{Provider: w.Provider, Key: w.Key}) == r.Identity && older(w.Version, r.Before) {
					add(Use{App: app.App, Wrap: wrapName(w)})
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	backups, err := a.Backups(ctx)
	if err != nil {
		return err
	}
	for _, b := range backups {
		for _, w := range b.Wraps {
			if (kms.Identity{Provider: w.Provider, Key: w.Key}) == r.Identity && older(w.Version, r.Before) {
				add(Use{Backup: b.ID, Wrap: wrapName(w)})
			}
		}
	}
	return nil
}

func wrapName(w WrapRef) string { return w.Provider + ":" + w.Key + "#" + w.Version }

// older reports whether a wrap of a version stops working when the versions
// before another end. Versions that are no numbers have no order: any other one
// counts as older.
func older(version, before string) bool {
	if before == "" {
		return true
	}
	v, verr := strconv.ParseUint(version, 10, 64)
	b, berr := strconv.ParseUint(before, 10, 64)
	if verr != nil || berr != nil {
		return version != before
	}
	return v < b
}

// Shred destroys every key of an app, for ever: nothing it has stored can be
// opened again, in backups of the data either.
func (a *Admin) Shred(ctx context.Context, actor, app string) error {
	return a.recorded(ctx, actor, "keys.shredded", "app:"+app, nil, func() error { return a.keyring.DestroyApp(ctx, app) })
}

// ShredSubject destroys the key of one subject of an app, for ever: nothing that
// was sealed under it can be opened again, in backups of the data either. The
// record names the subject by its tag.
func (a *Admin) ShredSubject(ctx context.Context, actor, app string, subject kms.Tag) error {
	detail := map[string]string{"subject": subject.String()}
	return a.recorded(ctx, actor, "keys.shredded", "app:"+app, detail, func() error {
		return a.keyring.EraseSubject(ctx, app, subject)
	})
}

// Configured asks every KEK of the region how it is, the primary first. Unlike
// [Admin.Status] it counts nothing, so it costs a request for each KEK.
func (a *Admin) Configured(ctx context.Context) []KEKStatus {
	_ = a.Settle(ctx) // what does not answer is told as such
	var out []KEKStatus
	for _, id := range a.identities() {
		kek := KEKStatus{Identity: id, Configured: true, Primary: id == a.Primary()}
		if p, ok := a.provider(id); ok {
			if d, err := p.Describe(ctx); err != nil {
				kek.Error = classOf(err)
			} else {
				kek.Description = &d
			}
		}
		out = append(out, kek)
	}
	slices.SortStableFunc(out, func(x, y KEKStatus) int {
		switch {
		case x.Primary == y.Primary:
			return 0
		case x.Primary:
			return -1
		}
		return 1
	})
	return out
}
