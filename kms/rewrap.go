package kms

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
)

const (
	// rewrapAtOnce is how many keys are given to the provider in one call.
	rewrapAtOnce = 250
	// rewrapBatches is how many such batches are on their way to the provider, and
	// how many at most are written together.
	rewrapBatches = 2
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
	r := &rewrapRun{
		ring: k, provider: p, id: id, now: now, results: make([]Rewrapped, len(apps)),
		wrapped: make(chan *wrapChange, rewrapAtOnce), verified: make(chan *rewrapBatch, rewrapBatches),
	}
	for i, app := range apps {
		r.results[i].App = app
	}
	return r.run(ctx)
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

// rewrapRun is one call of RewrapApps. Batches go from one stage to the next, so
// that the provider always has keys to unwrap: while some are verified, the next
// ones are loaded and wrapped, and the ones before are written.
type rewrapRun struct {
	ring     *Keyring
	provider Provider
	id       Identity
	now      Description
	results  []Rewrapped
	wrapped  chan *wrapChange  // to be verified
	verified chan *rewrapBatch // to be written

	mu     sync.Mutex // guards what follows
	next   int        // the first of results that is not begun
	done   int        // batches without an error of a call
	failed error      // of a call: what is not begun then is not begun any more
}

// rewrapBatch is the keys of some apps that are to be wrapped again.
type rewrapBatch struct {
	results []Rewrapped // of the apps
	changes []wrapChange
	left    atomic.Int64 // changes that are not verified yet
}

// wrapChange is a wrap that takes the place of another in an app's row.
type wrapChange struct {
	batch    *rewrapBatch
	result   *Rewrapped // of the app
	row      *appRow
	revision uint64
	key      int // index in row.Keys
	old, now Wrap
	err      error
}

func (c *wrapChange) app() string { return c.result.App }

func (c *wrapChange) generation() uint32 { return c.row.Keys[c.key].Generation }

func (r *rewrapRun) run(ctx context.Context) ([]Rewrapped, error) {
	var wrapping, verifying, storing sync.WaitGroup
	for range rewrapBatches {
		wrapping.Go(func() { r.wrap(ctx) })
	}
	for range min(parallelCalls, len(r.results)) {
		verifying.Go(func() { r.verify(ctx) })
	}
	storing.Go(func() { r.store(ctx) })
	wrapping.Wait()
	close(r.wrapped)
	verifying.Wait()
	close(r.verified)
	storing.Wait()
	if r.failed != nil && r.done == 0 {
		return nil, fmt.Errorf("rewrap: %w", r.failed)
	}
	fail(r.results[r.next:], r.failed)
	return r.results, nil
}

// fail gives apps the error of a call.
func fail(results []Rewrapped, err error) {
	for i := range results {
		results[i].Err = fmt.Errorf("rewrap: %w", err)
	}
}

// begin returns the next apps, nil when there are none or a call has failed.
func (r *rewrapRun) begin() *rewrapBatch {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.failed != nil || r.next == len(r.results) {
		return nil
	}
	from := r.next
	r.next = min(from+rewrapAtOnce, len(r.results))
	return &rewrapBatch{results: r.results[from:r.next]}
}

// wrap loads batches and has their keys wrapped again.
func (r *rewrapRun) wrap(ctx context.Context) {
	for b := r.begin(); b != nil; b = r.begin() {
		err := r.wrapBatch(ctx, b)
		r.mu.Lock()
		if err == nil {
			r.done++
		} else {
			fail(b.results, err)
			r.failed = err
		}
		r.mu.Unlock()
		if err != nil {
			return
		}
		for i := range b.changes {
			r.wrapped <- &b.changes[i]
		}
	}
}

// wrapBatch loads the rows of a batch and has their keys wrapped again. The error
// is of a call for the whole batch.
func (r *rewrapRun) wrapBatch(ctx context.Context, b *rewrapBatch) error {
	apps := make([]string, len(b.results))
	for i := range apps {
		apps[i] = b.results[i].App
	}
	rows, revisions, errs := r.ring.loadRows(ctx, apps)
	b.changes = make([]wrapChange, 0, len(apps))
	items := make([]RewrapItem, 0, len(apps))
	for i, row := range rows {
		result := &b.results[i]
		result.Err, result.Skipped = errs[i], row != nil
		if row == nil {
			continue
		}
		for j, key := range row.Keys {
			w, ok := key.wrapOf(r.id)
			result.Wrap = w
			if !ok || r.now.Version != "" && w.Version == r.now.Version {
				continue
			}
			result.Skipped = false
			b.changes = append(b.changes, wrapChange{batch: b, result: result, row: row, revision: revisions[i], key: j, old: w})
			items = append(items, RewrapItem{Context: r.ring.binding(apps[i]), Wrap: w})
		}
	}
	if len(items) == 0 {
		return nil
	}
	var wraps []RewrapResult
	if err := r.ring.call(ctx, func() (err error) { wraps, err = r.provider.Rewrap(ctx, items); return err }); err != nil {
		return err
	}
	if len(wraps) != len(items) {
		return &Error{Op: "rewrap", Provider: r.id.Provider, Key: r.id.Key, Class: ErrUnavailable, Detail: "another number of results than of items"}
	}
	for i, w := range wraps {
		b.changes[i].now, b.changes[i].err = w.Wrap, w.Err
	}
	b.left.Store(int64(len(b.changes)))
	return nil
}

// verify unwraps keys and compares them, and hands a batch on with its last one.
func (r *rewrapRun) verify(ctx context.Context) {
	for c := range r.wrapped {
		if c.err == nil {
			c.err = r.verifyWrap(ctx, c)
		}
		if c.batch.left.Add(-1) == 0 {
			r.verified <- c.batch
		}
	}
}

// verifyWrap refuses a wrap that is not under the same KEK, or of another key.
func (r *rewrapRun) verifyWrap(ctx context.Context, c *wrapChange) error {
	if c.now.Identity() != c.old.Identity() {
		return &Error{Op: "rewrap", Provider: c.now.Provider, Key: c.now.Key, Class: ErrMismatch, Detail: "the wrap came back under another key"}
	}
	raw, err := r.ring.unwrapBy(ctx, r.provider, c.app(), c.row.Keys[c.key], c.now)
	clear(raw)
	return err
}

// store writes batches into their rows: those together that were verified while
// others were written.
func (r *rewrapRun) store(ctx context.Context) {
	for b := range r.verified {
		batches := []*rewrapBatch{b}
		for len(batches) < rewrapBatches && len(r.verified) > 0 {
			batches = append(batches, <-r.verified) // only this goroutine takes from it
		}
		var changes []*wrapChange
		for _, b := range batches {
			for i := range b.changes {
				if b.changes[i].err == nil {
					changes = append(changes, &b.changes[i])
				}
			}
		}
		r.ring.storeWraps(ctx, changes)
		for _, b := range batches {
			for _, c := range b.changes {
				if c.err != nil {
					c.result.Err = fmt.Errorf("rewrap key of app %s: %w", c.app(), c.err)
				} else if c.key == len(c.row.Keys)-1 {
					c.result.Wrap = c.now
				}
			}
		}
	}
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

// storeWraps puts wraps that were verified into their rows, and reads those
// back: in one group where Rows can, and one by one what is left.
func (k *Keyring) storeWraps(ctx context.Context, changes []*wrapChange) {
	if group, ok := k.cfg.Rows.(RowsGroup); ok {
		changes = k.storeGroup(ctx, group, changes)
	}
	k.each(len(changes), func(n int) {
		c := changes[n]
		if c.err = k.replaceWrap(ctx, c); c.err == nil {
			c.err = k.readBack(ctx, c)
		}
	})
}

// storeGroup returns the changes that it did not do: of rows with two keys, and
// of those that were changed by others meanwhile.
func (k *Keyring) storeGroup(ctx context.Context, group RowsGroup, changes []*wrapChange) (left []*wrapChange) {
	updates := make([]RowUpdate, 0, len(changes))
	grouped := make([]*wrapChange, 0, len(changes))
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
			c.err = err
			continue
		}
		updates = append(updates, RowUpdate{Name: appRowName(c.app()), Value: value, Revision: c.revision})
		grouped = append(grouped, c)
	}
	failed := group.UpdateGroup(ctx, updates)
	for n, c := range grouped {
		switch {
		case failed[n] == nil: // and read again
		case errors.Is(failed[n], ErrRowConflict):
			left = append(left, c)
		default:
			c.err = fmt.Errorf("write app row: %w", failed[n])
		}
	}
	return left
}

// replaceWrap puts a wrap in the place of an old one.
func (k *Keyring) replaceWrap(ctx context.Context, c *wrapChange) error {
	_, _, err := k.changeRow(ctx, c.app(), func(row *appRow) (bool, error) {
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
func (k *Keyring) readBack(ctx context.Context, c *wrapChange) error {
	row, _, err := k.loadRow(ctx, c.app())
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
