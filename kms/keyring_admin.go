package kms

import (
	"bytes"
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
	if err := checkApp(app); err != nil {
		return nil, err
	}
	row, _, err := k.loadRow(ctx, app)
	if err != nil {
		return nil, err
	}
	keys := make([]AppKey, len(row.Keys))
	for i, r := range row.Keys {
		keys[i] = AppKey{Generation: r.Generation, Wraps: r.Wraps}
	}
	return keys, nil
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

// Rewrapped is what RewrapApps did with one app.
type Rewrapped struct {
	App     string
	Wrap    Wrap // the present wrap of the current app key, where Err is nil
	Skipped bool // nothing was to be done: no wrap of the identity, or the latest version already
	Err     error
}

// RewrapApps wraps the keys of apps again, under the latest version of the KEK
// that made their wraps under an identity: in one call of the provider, whose
// limits set how many apps to give (500 is safe for all). Each new wrap is
// unwrapped and compared before it replaces the old one, and the row is read
// back before it counts. Results are in the order of the apps; the error is of
// the whole call. Where rows can be written in groups, the bytes of the wraps
// that were replaced are overwritten soon after the call and not before its end.
//
// It changes who can unwrap app keys. It does not change the keys: after a leak
// of those, ReplaceAppKey, a new epoch and sealing again are what helps.
func (k *Keyring) RewrapApps(ctx context.Context, id Identity, apps []string) ([]Rewrapped, error) {
	p, err := k.provider(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("rewrap: %w", err)
	}
	var now Description
	if err := k.call(ctx, func() (err error) { now, err = p.Describe(ctx); return err }); err != nil {
		return nil, fmt.Errorf("rewrap: %w", err)
	}
	results := make([]Rewrapped, len(apps))
	rows := make([]*appRow, len(apps))
	revisions := make([]uint64, len(apps))
	k.each(len(apps), func(i int) {
		results[i].App = apps[i]
		if results[i].Err = checkApp(apps[i]); results[i].Err == nil {
			rows[i], revisions[i], results[i].Err = k.loadRow(ctx, apps[i])
		}
	})
	type place struct{ app, key int }
	var items []RewrapItem
	var places []place
	for i, row := range rows {
		if row == nil {
			continue
		}
		results[i].Skipped = true
		for j, r := range row.Keys {
			w, ok := r.wrapOf(id)
			results[i].Wrap = w
			if !ok || now.Version != "" && w.Version == now.Version {
				continue
			}
			results[i].Skipped = false
			items = append(items, RewrapItem{Context: k.binding(apps[i]), Wrap: w})
			places = append(places, place{i, j})
		}
	}
	if len(items) == 0 {
		return results, nil
	}
	var wraps []RewrapResult
	if err := k.call(ctx, func() (err error) { wraps, err = p.Rewrap(ctx, items); return err }); err != nil {
		return nil, fmt.Errorf("rewrap: %w", err)
	}
	if len(wraps) != len(items) {
		return nil, fmt.Errorf("rewrap: %w", &Error{Op: "rewrap", Provider: id.Provider, Key: id.Key, Class: ErrUnavailable, Detail: "another number of results than of items"})
	}
	errs := make([]error, len(items))
	var storing sync.WaitGroup // of one group, while the next one is verified
	for from := 0; from < len(items); from += storeAtOnce {
		part := items[from:min(from+storeAtOnce, len(items))]
		k.each(len(part), func(n int) {
			n += from
			i, j := places[n].app, places[n].key
			if errs[n] = wraps[n].Err; errs[n] == nil {
				errs[n] = k.verifyWrap(ctx, apps[i], rows[i].Keys[j], items[n].Wrap, wraps[n].Wrap)
			}
		})
		var changes []wrapChange
		for n := from; n < from+len(part); n++ {
			if errs[n] == nil {
				i, j := places[n].app, places[n].key
				changes = append(changes, wrapChange{item: n, app: apps[i], row: rows[i], revision: revisions[i], key: j, old: items[n].Wrap, now: wraps[n].Wrap})
			}
		}
		storing.Wait()
		storing.Go(func() { k.storeWraps(ctx, changes, errs) })
	}
	storing.Wait()
	for n, err := range errs {
		i, j := places[n].app, places[n].key
		if err != nil {
			results[i].Err = fmt.Errorf("rewrap key of app %s: %w", apps[i], err)
		} else if j == len(rows[i].Keys)-1 {
			results[i].Wrap = wraps[n].Wrap
		}
	}
	return results, nil
}

// storeAtOnce is how many rows are written together.
const storeAtOnce = 125

// wrapChange is a wrap that takes the place of another in an app's row.
type wrapChange struct {
	item     int // whose error it is
	app      string
	row      *appRow
	revision uint64
	key      int // index in row.Keys
	old, now Wrap
}

func (c wrapChange) generation() uint32 { return c.row.Keys[c.key].Generation }

// verifyWrap refuses a wrap that is not under the same KEK, or of another key.
func (k *Keyring) verifyWrap(ctx context.Context, app string, r appKeyRow, old, w Wrap) error {
	if w.Identity() != old.Identity() {
		return &Error{Op: "rewrap", Provider: w.Provider, Key: w.Key, Class: ErrMismatch, Detail: "the wrap came back under another key"}
	}
	raw, err := k.unwrapOne(ctx, app, r, w)
	clear(raw)
	return err
}

// storeWraps puts wraps that were verified into their rows, and reads those
// back: in one group where Rows can, and one by one what is left.
func (k *Keyring) storeWraps(ctx context.Context, changes []wrapChange, errs []error) {
	if group, ok := k.cfg.Rows.(RowsGroup); ok {
		changes = k.storeGroup(ctx, group, changes, errs)
	}
	k.each(len(changes), func(n int) {
		c := changes[n]
		if errs[c.item] = k.replaceWrap(ctx, c); errs[c.item] == nil {
			errs[c.item] = k.readBack(ctx, c)
		}
	})
}

// storeGroup returns the changes that it did not do: of rows with two keys, and
// of those that were changed by others meanwhile.
func (k *Keyring) storeGroup(ctx context.Context, group RowsGroup, changes []wrapChange, errs []error) (left []wrapChange) {
	var updates []RowUpdate
	var grouped []wrapChange
	for _, c := range changes {
		if len(c.row.Keys) > 1 {
			left = append(left, c)
			continue
		}
		row := c.row.clone()
		wraps := row.Keys[c.key].Wraps
		wraps[slices.IndexFunc(wraps, func(w Wrap) bool { return w.Identity() == c.old.Identity() })] = c.now
		value, err := encodeAppRow(row)
		if err != nil {
			errs[c.item] = err
			continue
		}
		updates = append(updates, RowUpdate{Name: appRowName(c.app), Value: value, Revision: c.revision})
		grouped = append(grouped, c)
	}
	failed := group.UpdateGroup(ctx, updates)
	var stored []wrapChange
	for n, c := range grouped {
		switch {
		case failed[n] == nil:
			stored = append(stored, c)
		case errors.Is(failed[n], ErrRowConflict):
			left = append(left, c)
		default:
			errs[c.item] = fmt.Errorf("write app row: %w", failed[n])
		}
	}
	k.each(len(stored), func(n int) { errs[stored[n].item] = k.readBack(ctx, stored[n]) })
	return left
}

// replaceWrap puts a wrap in the place of an old one.
func (k *Keyring) replaceWrap(ctx context.Context, c wrapChange) error {
	_, _, err := k.changeRow(ctx, c.app, func(row *appRow) (bool, error) {
		for i := range row.Keys {
			for j, have := range row.Keys[i].Wraps {
				if row.Keys[i].Generation == c.generation() && have.Identity() == c.old.Identity() && bytes.Equal(have.Blob, c.old.Blob) {
					row.Keys[i].Wraps[j] = c.now
					return true, nil
				}
			}
		}
		return false, ErrRowConflict // another has rewrapped or dropped it: repeating finds nothing to do
	})
	return err
}

// readBack returns an error unless the row has the wrap.
func (k *Keyring) readBack(ctx context.Context, c wrapChange) error {
	row, _, err := k.loadRow(ctx, c.app)
	if err != nil {
		return fmt.Errorf("read back: %w", err)
	}
	for _, have := range row.Keys {
		got, ok := have.wrapOf(c.now.Identity())
		if have.Generation == c.generation() && ok && bytes.Equal(got.Blob, c.now.Blob) {
			return nil
		}
	}
	return fmt.Errorf("read back: %w", ErrRowConflict)
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
