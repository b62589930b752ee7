package kms

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// DestroyClasses destroys the keys of the app's epochs whose class gone reports,
// whether they have expired or not, and returns how many: of those that ended by
// the given time, of all with the zero time. What is sealed under them must not
// be needed any more. It calls no provider, and may be repeated.
func (k *Keyring) DestroyClasses(ctx context.Context, app string, gone func(class string) bool, ended time.Time) (int, error) {
	if err := checkApp(app); err != nil {
		return 0, err
	}
	destroyed := 0
	row, revision, err := k.changeRow(ctx, app, func(row *appRow) (bool, error) {
		destroyed = 0
		now := k.cfg.Now().UTC().Truncate(time.Second)
		for i, e := range row.Epochs {
			if len(e.Key) > 0 && gone(e.Class) && (ended.IsZero() || !ended.Before(e.Until)) {
				row.Epochs[i].Key, row.Epochs[i].Destroyed = nil, now
				destroyed++
			}
		}
		return destroyed > 0, nil
	})
	if err != nil {
		return 0, fmt.Errorf("destroy epochs of app %s: %w", app, err)
	}
	if a := k.cached(app); a != nil && a.install(row, revision) != nil {
		k.evict(a)
	}
	return destroyed, nil
}

// Classes returns the classes of the app's epochs that still have a key, each
// once, in the order of their names.
func (k *Keyring) Classes(ctx context.Context, app string) ([]string, error) {
	if err := checkApp(app); err != nil {
		return nil, err
	}
	row, _, err := k.loadRow(ctx, app)
	if err != nil {
		return nil, fmt.Errorf("epochs of app %s: %w", app, err)
	}
	var classes []string
	for _, e := range row.Epochs {
		if len(e.Key) > 0 {
			classes = append(classes, e.Class)
		}
	}
	slices.Sort(classes)
	return slices.Compact(classes), nil
}

// An EpochState is what the keyring knows of an epoch of an app.
type EpochState struct {
	ID    uint32
	Class string
	// Expires is when the last of what it seals has expired; zero for an epoch
	// that does not end.
	Expires time.Time
	// Destroyed is when its key was destroyed; zero while it has one.
	Destroyed time.Time
}

// Epochs returns the epochs in the app's row, in the order in which they were
// made: those that have a key, and those whose key was destroyed within
// [Config].Tombstones. It calls no provider.
func (k *Keyring) Epochs(ctx context.Context, app string) ([]EpochState, error) {
	if err := checkApp(app); err != nil {
		return nil, err
	}
	row, _, err := k.loadRow(ctx, app)
	if err != nil {
		return nil, fmt.Errorf("epochs of app %s: %w", app, err)
	}
	states := make([]EpochState, 0, len(row.Epochs))
	for _, e := range row.Epochs {
		states = append(states, EpochState{ID: e.ID, Class: e.Class, Expires: e.Expires, Destroyed: e.Destroyed})
	}
	return states, nil
}
