package bench

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"runtime"
	"time"

	"github.com/cofferdb/coffer/kms"
)

// seal measures sealing with a key that is in memory beside the bare cipher.
func (k *keysRig) seal(ctx context.Context, o Options) (Case, error) {
	const seals = 200_000
	apps, err := k.create(ctx, "seal", 1)
	if err != nil {
		return Case{}, err
	}
	from := time.Now().UTC().Truncate(day)
	epoch := kms.Epoch{Class: "free/0", From: from, Until: from.Add(day), Expires: from.Add(4 * day)}
	var (
		subject   = kms.Tag{1}
		plaintext = make([]byte, o.Size)
		aad       = make([]byte, 120) // as long as the journal's
		dst       = make([]byte, 0, o.Size+kms.Overhead)
	)
	if _, err := k.keyring.Sealer(ctx, apps[0], epoch, subject); err != nil {
		return Case{}, err
	}
	var allocated []float64
	ours := &side{name: "seal", round: func(ctx context.Context) (sample, error) {
		before := mallocs()
		begin := time.Now()
		for range seals {
			key, err := k.keyring.Sealer(ctx, apps[0], epoch, subject)
			if err != nil {
				return sample{}, err
			}
			dst = key.Seal(dst[:0], aad, plaintext)
		}
		s := sample{count: seals, elapsed: time.Since(begin)}
		// What runs in the background allocates too, a little.
		allocated = append(allocated, float64((mallocs()-before)/seals))
		return s, nil
	}}
	block, err := aes.NewCipher(make([]byte, kms.KeySize))
	if err != nil {
		return Case{}, fmt.Errorf("make the bare cipher: %w", err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return Case{}, fmt.Errorf("make the bare cipher: %w", err)
	}
	bare := make([]byte, kms.HeaderSize+len(aad))
	raw := &side{name: "bare cipher", round: func(context.Context) (sample, error) {
		begin := time.Now()
		for range seals {
			dst = aead.Seal(dst[:0], nil, plaintext, bare)
		}
		return sample{count: seals, elapsed: time.Since(begin)}, nil
	}}
	if err := warmUp(ctx, o, ours, raw); err != nil {
		return Case{}, err
	}
	allocated = nil
	if err := alternate(ctx, o, 1, ours, raw); err != nil {
		return Case{}, err
	}
	c := compare("seal with a cached key", "seals/s", ours, raw)
	c.Beside = []Beside{
		{Name: "allocations beyond the output", Unit: "allocations per seal", Value: median(allocated), Rounds: allocated},
		{Name: "time of a seal", Unit: "ns", Value: rounded(1e9 / ours.median())},
		{Name: "time of the bare cipher", Unit: "ns", Value: rounded(1e9 / raw.median())},
	}
	return c, nil
}

func mallocs() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.Mallocs
}

// rewrap measures rows put under the latest version of the key encryption key.
func (k *keysRig) rewrap(ctx context.Context, o Options) (Case, error) {
	o.Log.InfoContext(ctx, "making rows", "rows", o.Rows)
	apps, err := k.create(ctx, "rewrap", o.Rows)
	if err != nil {
		return Case{}, err
	}
	old := make([]kms.RewrapItem, len(apps))
	for i, app := range apps {
		keys, err := k.keyring.AppKeys(ctx, app)
		if err != nil {
			return Case{}, err
		}
		old[i] = kms.RewrapItem{Context: k.binding(app), Wrap: keys[0].Wraps[0]}
	}
	ours := &side{name: "rewrap", round: func(ctx context.Context) (sample, error) {
		if err := k.rotate(ctx); err != nil {
			return sample{}, err
		}
		return chunks(len(apps), func(from, to int) error { return k.rewrapOurs(ctx, apps[from:to]) })
	}}
	raw := &side{name: "raw calls", round: func(ctx context.Context) (sample, error) {
		return chunks(len(apps), func(from, to int) error { return k.rewrapRaw(ctx, old[from:to]) })
	}}
	if err := alternate(ctx, o, 1, ours, raw); err != nil {
		return Case{}, err
	}
	return compare(fmt.Sprintf("rewrap of %d rows", len(apps)), "rows/s", ours, raw), nil
}

func (k *keysRig) binding(app string) kms.Context {
	return kms.Context{Region: k.journal.Region().ID, App: app, Purpose: kms.PurposeApp}
}

// rotate makes a new version, where the provider can: without one there would be
// nothing to rewrap. A provider without versions rewraps always.
func (k *keysRig) rotate(ctx context.Context) error {
	now, err := k.provider.Describe(ctx)
	if err != nil || now.Version == "" {
		return err
	}
	r, ok := k.provider.(kms.Rotator)
	if !ok {
		return fmt.Errorf("%w: the provider cannot rotate its key", ErrUnknown)
	}
	_, err = r.Rotate(ctx)
	return err
}

// chunks runs f over n rows, some at a time.
func chunks(n int, f func(from, to int) error) (sample, error) {
	begin := time.Now()
	for from := 0; from < n; from += rewrapChunk {
		if err := f(from, min(from+rewrapChunk, n)); err != nil {
			return sample{}, err
		}
	}
	return sample{count: n, elapsed: time.Since(begin)}, nil
}

func (k *keysRig) rewrapOurs(ctx context.Context, apps []string) error {
	results, err := k.keyring.RewrapApps(ctx, k.id, apps)
	if err != nil {
		return err
	}
	for _, r := range results {
		if r.Err != nil {
			return r.Err
		}
		if r.Skipped {
			return fmt.Errorf("the row of app %s was not rewrapped", r.App)
		}
	}
	return nil
}

func (k *keysRig) rewrapRaw(ctx context.Context, items []kms.RewrapItem) error {
	if _, err := k.provider.Describe(ctx); err != nil {
		return err
	}
	results, err := k.provider.Rewrap(ctx, items)
	if err != nil {
		return err
	}
	return inParallel(ctx, len(results), rewrapCalls, func(ctx context.Context, i int) error {
		if results[i].Err != nil {
			return results[i].Err
		}
		raw, err := k.provider.Unwrap(ctx, items[i].Context, results[i].Wrap)
		clear(raw)
		return err
	})
}
