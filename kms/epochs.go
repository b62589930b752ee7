package kms

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"time"
)

// makeSealer is Sealer's way when the data key is not in memory or used up.
func (k *Keyring) makeSealer(ctx context.Context, app string, e Epoch, subject Tag) (key *DataKey, err error) {
	if err := e.check(); err != nil {
		return nil, err
	}
	err = k.withApp(ctx, app, func(a *appKeys) error {
		for range maxAttempts {
			_, _, version := a.present()
			epoch, err := a.findEpoch(ctx, e)
			if err != nil {
				return err
			}
			id := dataID{epoch.ID, subject}
			if full := a.dataKey(id); full != nil && full.sealed.Load() >= k.cfg.MaxSeals {
				if epoch, err = a.makeEpoch(ctx, e, epoch.ID); err != nil {
					return err
				}
				id.epoch = epoch.ID
			}
			subjectKey, err := a.subjectKey(ctx, subject, true)
			if err != nil {
				return err
			}
			made, err := a.derive(id, epoch.Key, subjectKey)
			if err != nil {
				return err
			}
			var kept bool
			if key, kept = a.keep(id, made, version); kept {
				a.recent.Store(&epochRef{e.Class, e.From.Unix(), id.epoch})
				return nil
			}
		}
		return errStale
	})
	return key, err
}

// makeOpener is Opener's way when the data key is not in memory.
func (k *Keyring) makeOpener(ctx context.Context, app string, epoch uint32, subject Tag) (key *DataKey, err error) {
	err = k.withApp(ctx, app, func(a *appKeys) error {
		id := dataID{epoch, subject}
		for range maxAttempts {
			_, _, version := a.present()
			epochKey, err := a.epochKey(ctx, epoch)
			if err != nil {
				return err
			}
			subjectKey, err := a.subjectKey(ctx, subject, false)
			if err != nil {
				return err
			}
			made, err := a.derive(id, epochKey, subjectKey)
			if err != nil {
				return err
			}
			var kept bool
			if key, kept = a.keep(id, made, version); kept {
				return nil
			}
		}
		return errStale
	})
	return key, err
}

// epochKey returns the wrapped key of an epoch.
func (a *appKeys) epochKey(ctx context.Context, id uint32) ([]byte, error) {
	row, _, _ := a.present()
	if id >= row.NextEpoch {
		// Another process may have made it: read the row, at least once by a
		// load that began after this call.
		for range 2 {
			if err := a.refresh(ctx); err != nil {
				return nil, err
			}
			if row, _, _ = a.present(); id < row.NextEpoch {
				break
			}
		}
	}
	e, ok := row.epochByID(id)
	switch {
	case id >= row.NextEpoch || id == 0:
		return nil, fmt.Errorf("%w: epoch %d of app %s", ErrKeyUnknown, id, a.name)
	case !ok || len(e.Key) == 0:
		return nil, fmt.Errorf("%w: epoch %d of app %s", ErrEpochDestroyed, id, a.name)
	}
	return e.Key, nil
}

// refresh reads the app's row.
func (a *appKeys) refresh(ctx context.Context) error {
	_, err := share(ctx, a.ring, "row:"+a.name, func(ctx context.Context) (struct{}, error) {
		row, revision, err := a.ring.loadRow(ctx, a.name)
		if err != nil {
			return struct{}{}, err
		}
		return struct{}{}, a.install(row, revision)
	})
	return err
}

// findEpoch returns the epoch of the caller's class and time, made if there is
// none.
func (a *appKeys) findEpoch(ctx context.Context, e Epoch) (epochRow, error) {
	row, _, _ := a.present()
	got, ok := row.epoch(e.Class, e.From.Unix())
	var err error
	if !ok || e.Expires.After(got.Expires) && !got.Expires.IsZero() && len(got.Key) > 0 {
		if got, err = a.makeEpoch(ctx, e, 0); err != nil {
			return epochRow{}, err
		}
	}
	if len(got.Key) == 0 {
		return epochRow{}, fmt.Errorf("%w: epoch %d of app %s", ErrEpochDestroyed, got.ID, a.name)
	}
	a.plan(e) //nolint:contextcheck // what it plans outlives the caller
	return got, nil
}

// makeEpoch returns an epoch of the class and time whose id is greater than
// after, from the row as it is now or made anew, and lets it expire no earlier
// than the caller's.
func (a *appKeys) makeEpoch(ctx context.Context, e Epoch, after uint32) (epochRow, error) {
	k := a.ring
	key := fmt.Sprintf("epoch:%s:%s:%d:%d:%d", a.name, e.Class, e.From.Unix(), e.Expires.Unix(), after)
	return share(ctx, k, key, func(ctx context.Context) (epochRow, error) {
		var made epochRow
		err := a.change(ctx, func(row *appRow) (bool, error) {
			if got, ok := row.epoch(e.Class, e.From.Unix()); ok && got.ID > after {
				made = got
				if len(got.Key) == 0 || !e.Expires.After(got.Expires) || got.Expires.IsZero() {
					return false, nil
				}
				made.Expires = e.Expires.UTC()
				row.Epochs[slices.IndexFunc(row.Epochs, func(r epochRow) bool { return r.ID == got.ID })] = made
				return true, nil
			}
			if !e.Expires.IsZero() && !k.cfg.Now().Before(e.Expires) {
				return false, fmt.Errorf("%w: all of it has expired", ErrEpochDestroyed)
			}
			if row.NextEpoch == math.MaxUint32 {
				return false, fmt.Errorf("%w: app %s has used up its epochs", ErrInput, a.name)
			}
			made = epochRow{ID: row.NextEpoch, Class: e.Class, From: e.From.UTC(), Until: e.Until.UTC(), Expires: e.Expires.UTC()}
			if e.Expires.IsZero() {
				made.Expires = time.Time{}
			}
			err := a.withKeys(func(keys *ciphers) error {
				made.Key = k.randomKey(keys.app[keys.current], a.name, keys.current, kindEpochKey, epochID(made.ID))
				return nil
			})
			row.NextEpoch++
			row.Epochs = append(row.Epochs, made)
			return true, err
		})
		if err != nil {
			return epochRow{}, fmt.Errorf("make epoch of app %s: %w", a.name, err)
		}
		return made, nil
	})
}

// change edits the app's row by compare-and-set, and installs what it became.
// edit returns whether it changed anything; it may be called several times.
func (a *appKeys) change(ctx context.Context, edit func(*appRow) (bool, error)) error {
	row, revision, err := a.ring.changeRow(ctx, a.name, func(row *appRow) (bool, error) {
		a.mu.RLock()
		stale := a.keys == nil || row.generation() != a.keys.current
		a.mu.RUnlock()
		if stale {
			return false, errStale
		}
		return edit(row)
	})
	if err != nil {
		return err
	}
	return a.install(row, revision)
}

// changeRow edits an app's row by compare-and-set, and returns what it became.
func (k *Keyring) changeRow(ctx context.Context, app string, edit func(*appRow) (bool, error)) (*appRow, uint64, error) {
	for attempt := range maxAttempts {
		row, revision, err := k.loadRow(ctx, app)
		if err != nil {
			return nil, 0, err
		}
		row = row.clone()
		changed, err := edit(row)
		if err != nil || !changed {
			return row, revision, err
		}
		value, err := encodeAppRow(row)
		if err != nil {
			return nil, 0, err
		}
		revision, err = k.cfg.Rows.Update(ctx, appRowName(app), value, revision)
		switch {
		case err == nil:
			return row, revision, nil
		case !errors.Is(err, ErrRowConflict):
			return nil, 0, fmt.Errorf("write app row: %w", err)
		}
		if err := pause(ctx, attempt); err != nil {
			return nil, 0, err
		}
	}
	return nil, 0, fmt.Errorf("write app row: %w", ErrRowConflict)
}

// pause waits a little after a conflict, longer each time.
func pause(ctx context.Context, attempt int) error {
	t := time.NewTimer(jitter(time.Millisecond<<min(attempt, 6), 0.5))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait after a conflict: %w", ctx.Err())
	}
}

// plan lets the next epoch be made ahead, when less than a tenth of the current
// one remains. Epochs of the past have no next one to be made.
func (a *appKeys) plan(e Epoch) {
	k := a.ring
	now := k.cfg.Now()
	if !now.Before(e.Until) || now.Before(e.From) {
		return
	}
	ref := epochRef{class: e.Class, from: e.From.Unix()}
	length := e.Until.Sub(e.From)
	wait := e.Until.Sub(now) - length/10
	wait = max(0, wait) + jitter(length/40, 1) // not all apps at one moment
	next := Epoch{Class: e.Class, From: e.Until, Until: e.Until.Add(length)}
	if !e.Expires.IsZero() {
		next.Expires = e.Expires.Add(length)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.keys == nil || a.ahead[ref] != nil {
		return
	}
	a.ahead[ref] = time.AfterFunc(wait, func() {
		k.background(func(ctx context.Context) {
			if _, err := a.makeEpoch(ctx, next, 0); err != nil && !errors.Is(err, errStale) {
				k.cfg.Log.WarnContext(ctx, "next epoch not made ahead", slog.String("app", a.name), slog.Any("error", err))
				a.mu.Lock()
				delete(a.ahead, ref) // the next Sealer that misses plans again
				a.mu.Unlock()
			}
		})
	})
	for other, t := range a.ahead {
		if other.from < ref.from && other.class == ref.class {
			t.Stop()
			delete(a.ahead, other)
		}
	}
}

// DestroyEpochs destroys the keys of the app's epochs that had expired by now,
// and returns how many. It calls no provider.
func (k *Keyring) DestroyEpochs(ctx context.Context, app string, now time.Time) (int, error) {
	if err := checkApp(app); err != nil {
		return 0, err
	}
	destroyed := 0
	row, revision, err := k.changeRow(ctx, app, func(row *appRow) (bool, error) {
		destroyed = 0
		for i, e := range row.Epochs {
			if len(e.Key) > 0 && !e.Expires.IsZero() && !now.Before(e.Expires) {
				row.Epochs[i].Key, row.Epochs[i].Destroyed = nil, now.UTC().Truncate(time.Second)
				destroyed++
			}
		}
		old := len(row.Epochs)
		row.Epochs = slices.DeleteFunc(row.Epochs, func(e epochRow) bool {
			return !e.Destroyed.IsZero() && now.Sub(e.Destroyed) > k.cfg.Tombstones
		})
		return destroyed > 0 || len(row.Epochs) < old, nil
	})
	if err != nil {
		return 0, fmt.Errorf("destroy epochs of app %s: %w", app, err)
	}
	if a := k.cached(app); a != nil && a.install(row, revision) != nil {
		k.evict(a)
	}
	return destroyed, nil
}
