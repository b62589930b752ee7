package kms

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"sync"
)

// What follows is for administration: none of it is needed to seal and open.
// Every change is a compare-and-set of a row and may be repeated, also by
// another process at the same time.

// AppKey is an app key as its row has it. An app has one, and two while the key
// is being replaced.
type AppKey struct {
	Generation uint32
	Wraps      []Wrap // in the order in which they are tried
}

// Apps yields the names of the apps in the keyring, in any order. Those whose
// keys were destroyed are among them.
func (k *Keyring) Apps(ctx context.Context) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		for name, err := range k.cfg.Rows.List(ctx, "app.") {
			if err != nil {
				yield("", fmt.Errorf("list apps: %w", err))
				return
			}
			if !yield(strings.TrimPrefix(name, "app."), nil) {
				return
			}
		}
	}
}

// AppKeys returns the wraps of an app's key. It calls no provider.
func (k *Keyring) AppKeys(ctx context.Context, app string) ([]AppKey, error) {
	keys, errs := k.AppsKeys(ctx, []string{app})
	return keys[0], errs[0]
}

// AppsKeys is AppKeys of many apps, each with an error of its own.
func (k *Keyring) AppsKeys(ctx context.Context, apps []string) ([][]AppKey, []error) {
	keys := make([][]AppKey, len(apps))
	rows, _, errs := k.loadRows(ctx, apps)
	for i, row := range rows {
		if row == nil {
			continue
		}
		keys[i] = make([]AppKey, len(row.Keys))
		for j, r := range row.Keys {
			keys[i][j] = AppKey{Generation: r.Generation, Wraps: r.Wraps}
		}
	}
	return keys, errs
}

// CreateAppUnder is CreateApp under the provider of an identity.
func (k *Keyring) CreateAppUnder(ctx context.Context, app string, id Identity) error {
	p, err := k.provider(ctx, id)
	if err != nil {
		return err
	}
	return k.createApp(ctx, app, p)
}

// AddWrap wraps the app's key under one more provider, unwraps it again to
// compare, and adds it to the row as the last to be tried. It returns false
// when the row has such a wrap already.
func (k *Keyring) AddWrap(ctx context.Context, app string, id Identity) (added bool, err error) {
	if err := checkApp(app); err != nil {
		return false, err
	}
	p, err := k.provider(ctx, id)
	if err != nil {
		return false, fmt.Errorf("add wrap of app %s: %w", app, err)
	}
	row, _, err := k.loadRow(ctx, app)
	if err != nil {
		return false, err
	}
	wraps := map[uint32]Wrap{}
	for _, r := range row.Keys {
		if _, ok := r.wrapOf(id); ok {
			continue
		}
		raw, err := k.unwrapAny(ctx, app, r)
		if err != nil {
			return false, fmt.Errorf("add wrap of app %s: %w", app, err)
		}
		w, err := k.wrapVerified(ctx, app, p, r, raw)
		clear(raw)
		if err != nil {
			return false, fmt.Errorf("add wrap of app %s: %w", app, err)
		}
		wraps[r.Generation] = w
	}
	if len(wraps) == 0 {
		return false, nil
	}
	_, _, err = k.changeRow(ctx, app, func(row *appRow) (bool, error) {
		added = false
		for i, r := range row.Keys {
			w, made := wraps[r.Generation]
			if _, there := r.wrapOf(id); made && !there {
				row.Keys[i].Wraps = append(row.Keys[i].Wraps, w)
				added = true
			}
		}
		return added, nil
	})
	if err != nil {
		return false, fmt.Errorf("add wrap of app %s: %w", app, err)
	}
	return added, nil
}

// wrapVerified wraps a key and unwraps it again, comparing it with what the row
// has committed to.
func (k *Keyring) wrapVerified(ctx context.Context, app string, p Provider, r appKeyRow, raw []byte) (w Wrap, err error) {
	err = k.call(ctx, func() (err error) {
		w, err = p.Wrap(ctx, k.binding(app), raw)
		return err
	})
	if err != nil {
		return Wrap{}, err
	}
	again, err := k.unwrapOne(ctx, app, r, w)
	clear(again)
	return w, err
}

func (r appKeyRow) wrapOf(id Identity) (Wrap, bool) {
	i := slices.IndexFunc(r.Wraps, func(w Wrap) bool { return w.Identity() == id })
	if i < 0 {
		return Wrap{}, false
	}
	return r.Wraps[i], true
}

// PreferWrap lets the wrap of an identity be tried first, from the next load of
// each process on. An app without one is ErrNotFound.
func (k *Keyring) PreferWrap(ctx context.Context, app string, id Identity) error {
	if err := checkApp(app); err != nil {
		return err
	}
	_, _, err := k.changeRow(ctx, app, func(row *appRow) (bool, error) {
		changed := false
		for i, r := range row.Keys {
			w, ok := r.wrapOf(id)
			if !ok {
				return false, &Error{Op: "prefer", Provider: id.Provider, Key: id.Key, Class: ErrNotFound, Detail: "the app has no such wrap"}
			}
			if r.Wraps[0].Identity() != id {
				others := slices.DeleteFunc(slices.Clone(r.Wraps), func(w Wrap) bool { return w.Identity() == id })
				row.Keys[i].Wraps = append([]Wrap{w}, others...)
				changed = true
			}
		}
		return changed, nil
	})
	return err
}

// DropWrap removes the wrap of an identity, after it has unwrapped the key by
// another one; ErrLastWrap when none works. It returns false when the row has
// no such wrap.
func (k *Keyring) DropWrap(ctx context.Context, app string, id Identity) (dropped bool, err error) {
	if err := checkApp(app); err != nil {
		return false, err
	}
	row, _, err := k.loadRow(ctx, app)
	if err != nil {
		return false, err
	}
	works := map[uint32]Identity{}
	for _, r := range row.Keys {
		var failed error
		for _, w := range r.Wraps {
			if w.Identity() == id {
				continue
			}
			raw, err := k.unwrapOne(ctx, app, r, w)
			clear(raw)
			if err == nil {
				works[r.Generation] = w.Identity()
				break
			}
			failed = err
		}
		if _, ok := works[r.Generation]; !ok {
			return false, fmt.Errorf("drop wrap of app %s: %w", app, errors.Join(ErrLastWrap, failed))
		}
	}
	_, _, err = k.changeRow(ctx, app, func(row *appRow) (bool, error) {
		dropped = false
		for i, r := range row.Keys {
			if _, ok := r.wrapOf(id); !ok {
				continue
			}
			if _, ok := r.wrapOf(works[r.Generation]); !ok {
				return false, fmt.Errorf("drop wrap of app %s: %w: the others have changed meanwhile", app, ErrLastWrap)
			}
			row.Keys[i].Wraps = slices.DeleteFunc(r.Wraps, func(w Wrap) bool { return w.Identity() == id })
			dropped = true
		}
		return dropped, nil
	})
	return dropped && err == nil, err
}

// each runs f for 0 to n-1, as many at a time as calls may be.
func (k *Keyring) each(n int, f func(int)) {
	var wg sync.WaitGroup
	next := make(chan int)
	for range min(n, parallelCalls) {
		wg.Go(func() {
			for i := range next {
				f(i)
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
}
