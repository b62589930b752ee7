package kms

import (
	"context"
	"crypto/cipher"
	"errors"
	"fmt"
	"slices"
)

// ReplaceAppKey makes a new app key, wraps the tag key, the blob key, the epoch
// keys and every subject key under it, and removes the old one. No event
// changes. It returns how many keys it has wrapped again. After an error repeat
// it: it goes on where it ended. Other processes seal and open all the while.
//
// The new key is wrapped by every provider that wraps the old one.
func (k *Keyring) ReplaceAppKey(ctx context.Context, app string) (rewrapped int, err error) {
	if err := checkApp(app); err != nil {
		return 0, err
	}
	row, _, err := k.loadRow(ctx, app)
	if err != nil {
		return 0, err
	}
	if len(row.Keys) == 1 {
		if row, rewrapped, err = k.addAppKey(ctx, app, row); err != nil {
			return 0, fmt.Errorf("replace key of app %s: %w", app, err)
		}
	}
	keys := &ciphers{app: map[uint32]cipher.AEAD{}, current: row.generation()}
	for _, r := range row.Keys {
		aead, err := k.unwrapApp(ctx, app, r)
		if err != nil {
			return rewrapped, fmt.Errorf("replace key of app %s: %w", app, err)
		}
		defer wipe(aead)
		keys.app[r.Generation] = aead
	}
	for { // the second pass finds nothing, or the old key stays
		n, err := k.rewrapPages(ctx, app, "", keys)
		rewrapped += n
		if err != nil {
			return rewrapped, fmt.Errorf("replace key of app %s: %w", app, err)
		}
		if n == 0 {
			break
		}
	}
	row, revision, err := k.changeRow(ctx, app, func(row *appRow) (bool, error) {
		if row.generation() != keys.current {
			return false, fmt.Errorf("%w: another replacement is under way", ErrRowConflict)
		}
		for _, blob := range row.wrapped() {
			if g, err := wrappedGeneration(blob); err != nil || g != keys.current {
				return false, fmt.Errorf("%w: the row still needs app key %d", ErrKeyringCorrupt, g)
			}
		}
		if len(row.Keys) == 1 {
			return false, nil
		}
		row.Keys = slices.Clone(row.Keys[len(row.Keys)-1:])
		return true, nil
	})
	if err != nil {
		return rewrapped, fmt.Errorf("replace key of app %s: %w", app, err)
	}
	if a := k.cached(app); a != nil && a.install(row, revision) != nil {
		k.evict(a)
	}
	return rewrapped, nil
}

// wrapped returns every key in the row that an app key wraps.
func (r *appRow) wrapped() [][]byte {
	blobs := [][]byte{r.TagKey, r.BlobKey}
	for _, e := range r.Epochs {
		if len(e.Key) > 0 {
			blobs = append(blobs, e.Key)
		}
	}
	return blobs
}

// addAppKey puts a new app key into the row, and all that the row itself holds
// under it.
func (k *Keyring) addAppKey(ctx context.Context, app string, row *appRow) (*appRow, int, error) {
	old := row.Keys[0]
	oldAEAD, err := k.unwrapApp(ctx, app, old)
	if err != nil {
		return nil, 0, err
	}
	defer wipe(oldAEAD)
	next := appKeyRow{Generation: old.Generation + 1}
	var raw []byte
	defer func() { clear(raw) }()
	for i, w := range old.Wraps {
		p, err := k.provider(ctx, w.Identity())
		if err != nil {
			return nil, 0, err
		}
		if i == 0 {
			err = k.call(ctx, func() (err error) {
				raw, w, err = p.Generate(ctx, k.binding(app))
				return err
			})
			if err != nil {
				return nil, 0, err
			}
			check, err := commitment(raw)
			if err != nil {
				return nil, 0, err
			}
			next.Check = check[:]
			again, err := k.unwrapOne(ctx, app, next, w)
			clear(again)
			if err != nil {
				return nil, 0, err
			}
		} else if w, err = k.wrapVerified(ctx, app, p, next, raw); err != nil {
			return nil, 0, err
		}
		next.Wraps = append(next.Wraps, w)
	}
	nextAEAD, err := newAEAD(raw)
	if err != nil {
		return nil, 0, err
	}
	defer wipe(nextAEAD)
	keys := &ciphers{app: map[uint32]cipher.AEAD{old.Generation: oldAEAD, next.Generation: nextAEAD}, current: next.Generation}
	count := 0
	changed, revision, err := k.changeRow(ctx, app, func(row *appRow) (bool, error) {
		count = 0
		if len(row.Keys) != 1 || row.Keys[0].Generation != old.Generation {
			return false, fmt.Errorf("%w: another replacement was first", ErrRowConflict)
		}
		again := func(kind string, id []byte, blob *[]byte) (err error) {
			count++
			*blob, err = k.rewrapKey(keys, app, kind, id, *blob)
			return err
		}
		err := errors.Join(again(kindTagKey, nil, &row.TagKey), again(kindBlobKey, nil, &row.BlobKey))
		for i := range row.Epochs {
			if e := &row.Epochs[i]; len(e.Key) > 0 {
				err = errors.Join(err, again(kindEpochKey, epochID(e.ID), &e.Key))
			}
		}
		row.Keys = append(row.Keys, next)
		return true, err
	})
	if err != nil {
		return nil, 0, err
	}
	if a := k.cached(app); a != nil && a.install(changed, revision) != nil {
		k.evict(a)
	}
	return changed, count, nil
}

// rewrapKey wraps a key under the current app key.
func (k *Keyring) rewrapKey(keys *ciphers, app, kind string, id, blob []byte) ([]byte, error) {
	raw, err := keys.open(k.cfg.Region, app, kind, id, blob)
	if err != nil {
		return nil, corruptIfStale(err)
	}
	defer clear(raw)
	return keys.seal(k.cfg.Region, app, kind, id, raw), nil
}

// rewrapPages wraps the subject keys of a page and those below it under the
// current app key, and returns how many. A page that has the current generation
// can no longer be written by a process that only knows the old key: that is
// why pages that do not exist are made.
func (k *Keyring) rewrapPages(ctx context.Context, app, path string, keys *ciphers) (int, error) {
	for attempt := range maxAttempts {
		if err := ctx.Err(); err != nil {
			return 0, fmt.Errorf("rewrap subject keys: %w", err)
		}
		p, err := k.loadPage(ctx, app, path)
		if err != nil {
			return 0, err
		}
		if p.Split {
			total := 0
			for _, digit := range hexDigits {
				n, err := k.rewrapPages(ctx, app, path+string(digit), keys)
				total += n
				if err != nil {
					return total, err
				}
			}
			return total, nil
		}
		n, next, err := k.rewrapPage(app, p, keys)
		if err != nil || next == nil {
			return 0, err
		}
		value, err := encodePage(next)
		if err != nil {
			return 0, err
		}
		next.revision, err = k.storePage(ctx, app, path, p.revision, value)
		if err == nil {
			if a := k.cached(app); a != nil {
				_, _ = a.keepPage(path, next) // one that is out of date reads it when it needs it
			}
			return n, nil
		}
		if !errors.Is(err, ErrRowConflict) {
			return 0, err
		}
		if err := pause(ctx, attempt); err != nil {
			return 0, err
		}
	}
	return 0, fmt.Errorf("rewrap subject keys: %w", ErrRowConflict)
}

// rewrapPage returns the page as it should be, nil if it is so already.
func (k *Keyring) rewrapPage(app string, p *page, keys *ciphers) (int, *page, error) {
	var rows []subjectRow
	for _, s := range p.Subjects {
		if len(s.Key) == 0 {
			continue
		}
		generation, err := wrappedGeneration(s.Key)
		if err != nil {
			return 0, nil, err
		}
		if generation == keys.current {
			continue
		}
		key, err := k.rewrapKey(keys, app, kindSubjectKey, s.Tag[:], s.Key)
		if err != nil {
			return 0, nil, err
		}
		rows = append(rows, subjectRow{Tag: s.Tag, Key: key, Erased: s.Erased})
	}
	if len(rows) == 0 && p.Generation == keys.current {
		return 0, nil, nil
	}
	next := p.with(rows...)
	next.Generation = keys.current
	return len(rows), next, nil
}

// Verification is what VerifyApp found.
type Verification struct {
	App      string
	Wraps    []WrapCheck
	Epochs   int // keys of epochs that open
	Subjects int // keys of subjects that open
	Erased   int // subjects that were erased
	Pages    int
}

// WrapCheck is whether one wrap of an app key unwraps to that key.
type WrapCheck struct {
	Generation uint32
	Wrap       Wrap
	Err        error
}

// VerifyApp unwraps the app's key by each of its wraps, and opens every key that
// it wraps. It returns what it found also with an error, which is the first of
// those that make data unreadable; a wrap that does not work beside one that
// does is told in the result only.
func (k *Keyring) VerifyApp(ctx context.Context, app string) (Verification, error) {
	v := Verification{App: app}
	if err := checkApp(app); err != nil {
		return v, err
	}
	row, _, err := k.loadRow(ctx, app)
	if err != nil {
		return v, err
	}
	keys := &ciphers{app: map[uint32]cipher.AEAD{}, current: row.generation()}
	for _, r := range row.Keys {
		var failed error
		for _, w := range r.Wraps {
			raw, err := k.unwrapOne(ctx, app, r, w)
			v.Wraps = append(v.Wraps, WrapCheck{Generation: r.Generation, Wrap: w, Err: err})
			if err != nil {
				failed = err
				continue
			}
			if keys.app[r.Generation] == nil {
				aead, err := newAEAD(raw)
				if err != nil {
					return v, err
				}
				defer wipe(aead)
				keys.app[r.Generation] = aead
			}
			clear(raw)
		}
		if keys.app[r.Generation] == nil {
			return v, fmt.Errorf("verify app %s: %w", app, failed)
		}
	}
	check := func(kind string, id, blob []byte) error {
		raw, err := keys.open(k.cfg.Region, app, kind, id, blob)
		clear(raw)
		if err != nil {
			return fmt.Errorf("verify app %s: %w", app, corruptIfStale(err))
		}
		return nil
	}
	if err := errors.Join(check(kindTagKey, nil, row.TagKey), check(kindBlobKey, nil, row.BlobKey)); err != nil {
		return v, err
	}
	for _, e := range row.Epochs {
		if len(e.Key) == 0 {
			continue
		}
		if err := check(kindEpochKey, epochID(e.ID), e.Key); err != nil {
			return v, err
		}
		v.Epochs++
	}
	return v, k.verifyPages(ctx, app, "", &v, check)
}

func (k *Keyring) verifyPages(ctx context.Context, app, path string, v *Verification, check func(string, []byte, []byte) error) error {
	p, err := k.loadPage(ctx, app, path)
	if err != nil {
		return err
	}
	if p.revision != 0 {
		v.Pages++
	}
	if p.Split {
		for _, digit := range hexDigits {
			if err := k.verifyPages(ctx, app, path+string(digit), v, check); err != nil {
				return err
			}
		}
	}
	for _, s := range p.Subjects {
		if len(s.Key) == 0 {
			v.Erased++
			continue
		}
		if err := check(kindSubjectKey, s.Tag[:], s.Key); err != nil {
			return err
		}
		v.Subjects++
	}
	return nil
}
