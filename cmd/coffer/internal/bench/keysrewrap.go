package bench

import (
	"context"
	"fmt"
	"time"

	"github.com/cofferdb/coffer/kms"
)

const (
	rewrapChunk = 2000 // apps of one call of the keyring, as a job has them
	rawBatch    = 250  // keys of one call of the provider, as the keyring has them
	rawBatches  = 2    // of those under way at a time
	rewrapCalls = 16   // unwraps of each at a time: together as many as the keyring has
)

// rewrap measures rows put under the latest version of the key encryption key.
func (k *keysRig) rewrap(ctx context.Context, o Options) (Case, error) {
	o.Log.InfoContext(ctx, "making rows", "rows", o.Rows)
	apps, err := k.create(ctx, "rewrap", o.Rows)
	if err != nil {
		return Case{}, err
	}
	keys, errs := k.keyring.AppsKeys(ctx, apps)
	old := make([]kms.RewrapItem, len(apps))
	for i, app := range apps {
		if errs[i] != nil {
			return Case{}, errs[i]
		}
		old[i] = kms.RewrapItem{Context: k.binding(app), Wrap: keys[i][0].Wraps[0]}
	}
	var erasing, whole []float64
	ours := &side{name: "rewrap", round: func(ctx context.Context) (sample, error) {
		if err := k.rotate(ctx); err != nil {
			return sample{}, err
		}
		begin := time.Now()
		for from := 0; from < len(apps); from += rewrapChunk {
			if err := k.rewrapOurs(ctx, apps[from:min(from+rewrapChunk, len(apps))]); err != nil {
				return sample{}, err
			}
		}
		s := sample{count: len(apps), elapsed: time.Since(begin)}
		if err := k.keyring.EraseReplaced(ctx); err != nil {
			return sample{}, err
		}
		all := time.Since(begin)
		erasing = append(erasing, rounded((all - s.elapsed).Seconds()))
		whole = append(whole, rounded(float64(len(apps))/all.Seconds()))
		return s, nil
	}}
	raw := &side{name: "raw calls", round: func(ctx context.Context) (sample, error) {
		begin := time.Now()
		batches := (len(old) + rawBatch - 1) / rawBatch
		err := inParallel(ctx, batches, rawBatches, func(ctx context.Context, i int) error {
			return k.rewrapRaw(ctx, old[i*rawBatch:min((i+1)*rawBatch, len(old))])
		})
		return sample{count: len(old), elapsed: time.Since(begin)}, err
	}}
	if err := alternate(ctx, o, 1, ours, raw); err != nil {
		return Case{}, err
	}
	c := compare(fmt.Sprintf("rewrap of %d rows", len(apps)), "rows/s", ours, raw)
	c.Beside = []Beside{
		{Name: "with the erasure of what was replaced", Unit: "rows/s", Value: rounded(median(whole)), Ratio: ratio(median(whole), c.Raw), Rounds: whole},
		{Name: "that erasure", Unit: "s", Value: rounded(median(erasing)), Rounds: erasing},
	}
	return c, nil
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
