package kms

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
)

const (
	// rewrapAtOnce is how many keys are given to the provider in one call, and
	// written together.
	rewrapAtOnce = 250
	// rewrapBatches is how many such batches are under way: one at the provider,
	// one that is verified, one that is written.
	rewrapBatches = 3
)

// Rewrapped is what RewrapApps did with one app.
type Rewrapped struct {
	App     string
	Wrap    Wrap // the present wrap of the current app key, where Err is nil
	Skipped bool // nothing was to be done: no wrap of the identity, or the latest version already
	Err     error
}

// RewrapApps wraps the keys of apps again, under the latest version of the KEK
// that made their wraps under an identity. Each new wrap is unwrapped and
// compared before it replaces the old one, and the row is read back before it
// counts. Results are in the order of the apps; the error is of the whole call.
// Some thousands of apps in a call keep the provider busy from end to end. Where
// rows can be written in groups, the bytes of the wraps that were replaced are
// gone after [Keyring.EraseReplaced].
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
	for i, app := range apps {
		results[i].App = app
	}
	var wg sync.WaitGroup
	var mu sync.Mutex // guards next, done and failed
	var next, done int
	var failed error // of a call; what is not begun then is not begun any more
	for range min(rewrapBatches, (len(apps)+rewrapAtOnce-1)/rewrapAtOnce) {
		wg.Go(func() {
			for {
				mu.Lock()
				from := next
				next = min(next+rewrapAtOnce, len(apps))
				b := &rewrapBatch{results: results[from:next]}
				end := failed != nil || len(b.results) == 0
				if end {
					next = from
				}
				mu.Unlock()
				if end {
					return
				}
				err := k.rewrapBatch(ctx, p, id, now, b)
				mu.Lock()
				if err == nil {
					done++
				} else {
					b.fail(err)
					failed = err
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if failed != nil && done == 0 {
		return nil, fmt.Errorf("rewrap: %w", failed)
	}
	(&rewrapBatch{results: results[next:]}).fail(failed)
	return results, nil
}

// EraseReplaced returns once the bytes of the wraps that RewrapApps has replaced
// are gone from the disk.
func (k *Keyring) EraseReplaced(ctx context.Context) error {
	group, ok := k.cfg.Rows.(RowsGroup)
	if !ok {
		return nil // each was when it was replaced
	}
	if err := group.EraseReplaced(ctx); err != nil {
		return fmt.Errorf("erase replaced rows: %w", err)
	}
	return nil
}

// rewrapBatch is some apps on their way: all but the results is of each key that
// is to be wrapped again.
type rewrapBatch struct {
	items   []RewrapItem
	wraps   []RewrapResult
	changes []wrapChange
	places  []int // index in results
	errs    []error
	results []Rewrapped
}

// fail gives every app of a batch the error of a call.
func (b *rewrapBatch) fail(err error) {
	for i := range b.results {
		b.results[i].Err = fmt.Errorf("rewrap: %w", err)
	}
}

// rewrapBatch loads the rows of a batch, has their keys wrapped again, verifies
// and stores them. The error is of a call for the whole batch.
func (k *Keyring) rewrapBatch(ctx context.Context, p Provider, id Identity, now Description, b *rewrapBatch) error {
	apps := make([]string, len(b.results))
	for i, r := range b.results {
		apps[i] = r.App
	}
	rows, revisions, errs := k.loadRows(ctx, apps)
	for i, row := range rows {
		b.results[i].Err, b.results[i].Skipped = errs[i], row != nil
		if row == nil {
			continue
		}
		for j, r := range row.Keys {
			w, ok := r.wrapOf(id)
			b.results[i].Wrap = w
			if !ok || now.Version != "" && w.Version == now.Version {
				continue
			}
			b.results[i].Skipped = false
			b.places = append(b.places, i)
			b.changes = append(b.changes, wrapChange{item: len(b.items), app: apps[i], row: row, revision: revisions[i], key: j, old: w})
			b.items = append(b.items, RewrapItem{Context: k.binding(apps[i]), Wrap: w})
		}
	}
	b.errs = make([]error, len(b.items))
	if len(b.items) == 0 {
		return nil
	}
	if err := k.call(ctx, func() (err error) { b.wraps, err = p.Rewrap(ctx, b.items); return err }); err != nil {
		return err
	}
	if len(b.wraps) != len(b.items) {
		return &Error{Op: "rewrap", Provider: id.Provider, Key: id.Key, Class: ErrUnavailable, Detail: "another number of results than of items"}
	}
	k.each(len(b.items), func(n int) {
		c := b.changes[n]
		if b.errs[n] = b.wraps[n].Err; b.errs[n] == nil {
			b.errs[n] = k.verifyWrap(ctx, c.app, c.row.Keys[c.key], c.old, b.wraps[n].Wrap)
		}
	})
	var changes []wrapChange
	for n, c := range b.changes {
		if b.errs[n] == nil {
			c.now = b.wraps[n].Wrap
			changes = append(changes, c)
		}
	}
	k.storeWraps(ctx, changes, b.errs)
	for n, err := range b.errs {
		c, r := b.changes[n], &b.results[b.places[n]]
		if err != nil {
			r.Err = fmt.Errorf("rewrap key of app %s: %w", c.app, err)
		} else if c.key == len(c.row.Keys)-1 {
			r.Wrap = b.wraps[n].Wrap
		}
	}
	return nil
}

// loadRows reads the rows of apps: in one group where Rows can. A row that has an
// error is nil.
func (k *Keyring) loadRows(ctx context.Context, apps []string) (rows []*appRow, revisions []uint64, errs []error) {
	rows, revisions, errs = make([]*appRow, len(apps)), make([]uint64, len(apps)), make([]error, len(apps))
	var names []string
	var places []int
	for i, app := range apps {
		if errs[i] = checkApp(app); errs[i] == nil {
			names, places = append(names, appRowName(app)), append(places, i)
		}
	}
	if group, ok := k.cfg.Rows.(RowsGroup); ok && len(names) > 1 {
		loaded, failed := group.LoadGroup(ctx, names)
		for n, i := range places {
			rows[i], revisions[i], errs[i] = k.readRow(apps[i], loaded[n], failed[n])
		}
		return rows, revisions, errs
	}
	k.each(len(places), func(n int) {
		i := places[n]
		rows[i], revisions[i], errs[i] = k.loadRow(ctx, apps[i])
	})
	return rows, revisions, errs
}

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
	for n, c := range grouped {
		switch {
		case failed[n] == nil: // and read again
		case errors.Is(failed[n], ErrRowConflict):
			left = append(left, c)
		default:
			errs[c.item] = fmt.Errorf("write app row: %w", failed[n])
		}
	}
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
