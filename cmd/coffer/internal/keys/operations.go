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
		item := AppInventory{App: app}
		keys, err := a.keyring.AppKeys(ctx, app)
		switch {
		case errors.Is(err, kms.ErrAppDestroyed):
			item.Destroyed = true
		case err != nil:
			return err
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
		if err := yield(item); err != nil {
			return err
		}
	}
	return nil
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

// Status is how the keys of a region stand.
type Status struct {
	Region  string      `json:"region"`
	Apps    int         `json:"apps"`
	KEKs    []KEKStatus `json:"keks"`
	Cached  int         `json:"cached_apps"`    // in this process
	Bridged int         `json:"bridged_apps"`   // of those, used past their revalidation
	Since   time.Time   `json:"since,omitzero"` // when the first of them became so
	Job     *Job        `json:"job,omitempty"`  // the latest
	Backups []Backup    `json:"backups"`
}

// Status counts what wraps what, and asks every KEK how it is.
func (a *Admin) Status(ctx context.Context, region string) (Status, error) {
	s := Status{Region: region, Backups: []Backup{}}
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

// Retire ends the versions of a KEK before the given one, or the whole KEK when
// before is empty, and returns once the provider confirms it. It refuses with
// ErrNeeded, naming what needs them, while one row or one kept backup does.
func (a *Admin) Retire(ctx context.Context, actor string, id kms.Identity, before string, dryRun bool) (Retirement, error) {
	r := Retirement{Identity: id, Before: before}
	p, ok := a.provider(id)
	if !ok {
		return r, fmt.Errorf("%w: no KEK %s is configured", ErrSpec, id)
	}
	retirer, ok := p.(kms.Retirer)
	if !ok {
		return r, fmt.Errorf("%w: retire %s", ErrNotSupported, id)
	}
	if before == "" && id == a.Primary() {
		return r, fmt.Errorf("%w: %s wraps the keys of new apps", ErrNeeded, id)
	}
	if err := a.uses(ctx, &r); err != nil {
		return r, err
	}
	if r.Needed > 0 {
		return r, fmt.Errorf("%w: %s by %d", ErrNeeded, id, r.Needed)
	}
	if dryRun {
		return r, nil
	}
	err := a.recorded(ctx, actor, "keys.retire", "kek:"+id.String(), map[string]string{"before": before}, func() error {
		return retirer.Retire(ctx, before)
	})
	if err != nil {
		return r, err
	}
	r.Done = true
	return r, nil
}

// uses counts what needs the versions that are to end.
func (a *Admin) uses(ctx context.Context, r *Retirement) error {
	r.Uses = []Use{}
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

// Backup is a kept copy of the keyring's rows. While it is kept, what wraps the
// keys in it must stay able to unwrap, or restoring it gives nothing.
type Backup struct {
	ID    string    `json:"id"`
	Made  time.Time `json:"made"`
	Until time.Time `json:"until"` // when the copy is destroyed
	Wraps []WrapRef `json:"wraps"` // the distinct wrappers, without times
}

const (
	backupPrefix   = "backup."
	maxBackupLife  = 400 * 24 * time.Hour
	maxBackupIDLen = 64
)

// AddBackup registers a copy of the keyring that is about to be made.
func (a *Admin) AddBackup(ctx context.Context, actor, id string, until time.Time) (Backup, error) {
	now := a.now().UTC()
	b := Backup{ID: id, Made: now, Until: until.UTC(), Wraps: []WrapRef{}}
	valid := len(id) > 0 && len(id) <= maxBackupIDLen && !strings.ContainsFunc(id, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-'
	})
	switch {
	case !valid:
		return b, fmt.Errorf("%w: a backup's id is 1 to %d of a-z, 0-9 and -", ErrSpec, maxBackupIDLen)
	case !until.After(now) || until.After(now.Add(maxBackupLife)):
		return b, fmt.Errorf("%w: a backup is kept until a time within %d days", ErrSpec, maxBackupLife/(24*time.Hour))
	}
	err := a.Inventory(ctx, func(app AppInventory) error {
		for _, key := range app.Keys {
			for _, w := range key.Wraps {
				w.WrappedAt = time.Time{}
				if !slices.Contains(b.Wraps, w) {
					b.Wraps = append(b.Wraps, w)
				}
			}
		}
		return nil
	})
	if err != nil {
		return b, err
	}
	return b, a.recorded(ctx, actor, "keys.backup_registered", "backup:"+id, nil, func() error {
		_, err := storeJSON(ctx, a.rows, backupPrefix+id, b, 0)
		if errors.Is(err, kms.ErrRowConflict) {
			return fmt.Errorf("%w: there is a backup %s", ErrSpec, id)
		}
		return err
	})
}

// Backups returns the registered copies that are still kept.
func (a *Admin) Backups(ctx context.Context) ([]Backup, error) {
	backups := []Backup{}
	for name, err := range a.rows.List(ctx, backupPrefix) {
		if err != nil {
			return nil, fmt.Errorf("list backups: %w", err)
		}
		var b Backup
		if _, err := loadJSON(ctx, a.rows, name, &b); err != nil {
			if errors.Is(err, kms.ErrRowNotFound) {
				continue
			}
			return nil, err
		}
		if b.Until.After(a.now()) {
			backups = append(backups, b)
		}
	}
	slices.SortFunc(backups, func(x, y Backup) int { return strings.Compare(x.ID, y.ID) })
	return backups, nil
}

// Finding is something that Doctor saw.
type Finding struct {
	Level  string `json:"level"` // ok, warning, problem
	Check  string `json:"check"`
	Detail string `json:"detail"`
}

// Doctor looks for what an operator should do something about.
func (a *Admin) Doctor(ctx context.Context, region string) ([]Finding, error) {
	s, err := a.Status(ctx, region)
	if err != nil {
		return nil, err
	}
	var out []Finding
	say := func(level, check, format string, args ...any) {
		out = append(out, Finding{Level: level, Check: check, Detail: fmt.Sprintf(format, args...)})
	}
	for _, kek := range s.KEKs {
		name, wraps := kek.Identity.String(), 0
		for _, n := range kek.Versions {
			wraps += n
		}
		switch {
		case !kek.Configured:
			say("problem", "kek", "%d wraps are under %s, which no setting names: add it to the configuration", wraps, name)
		case kek.Error != "":
			say("problem", "kek", "%s: %s", name, kek.Error)
		case kek.Description.State != kms.StateEnabled:
			say("problem", "kek", "%s is %s", name, kek.Description.State)
		default:
			behind := wraps - kek.Versions[kek.Description.Version]
			if behind > 0 {
				say("warning", "kek", "%s: %d of %d wraps are under older versions than %s: rewrap", name, behind, wraps, kek.Description.Version)
			} else {
				say("ok", "kek", "%s: %d wraps, all under version %s", name, wraps, kek.Description.Version)
			}
		}
	}
	if s.Bridged > 0 {
		say("warning", "cache", "%d app keys are used past their revalidation since %s", s.Bridged, s.Since.UTC().Format(time.RFC3339))
	}
	if s.Job != nil && s.Job.State != Done {
		level := "warning"
		if s.Job.State == Failed || s.Job.State == Stopped {
			level = "problem"
		}
		say(level, "job", "%s %s is %s: %s", s.Job.Kind, s.Job.ID, s.Job.State, s.Job.Error)
	}
	return out, nil
}
