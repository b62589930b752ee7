package bench

import (
	"context"
	"fmt"
	"time"

	"github.com/cofferdb/coffer/kms"
)

const (
	rewrapTurns = 10   // of each side in a round
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
	turn := rewrapTurn(len(apps))
	turns := (len(apps) + turn - 1) / turn
	// take returns the bounds of a side's next turn, round after round.
	take := func(next *int) (from, to int) {
		from = *next * turn
		*next = (*next + 1) % turns
		return from, min(from+turn, len(apps))
	}
	var erasing, whole []float64
	var ourNext, rawNext int
	var spent time.Duration // by ours in this round
	ours := &side{name: "rewrap", round: func(ctx context.Context) (sample, error) {
		from, to := take(&ourNext)
		if from == 0 {
			spent = 0
			if err := k.rotate(ctx); err != nil {
				return sample{}, err
			}
		}
		begin := time.Now()
		for at := from; at < to; at += rewrapChunk {
			if err := k.rewrapOurs(ctx, apps[at:min(at+rewrapChunk, to)]); err != nil {
				return sample{}, err
			}
		}
		s := sample{count: to - from, elapsed: time.Since(begin)}
		if spent += s.elapsed; to < len(apps) {
			return s, nil
		}
		begin = time.Now()
		if err := k.keyring.EraseReplaced(ctx); err != nil {
			return sample{}, err
		}
		erasure := time.Since(begin)
		erasing = append(erasing, rounded(erasure.Seconds()))
		whole = append(whole, rounded(float64(len(apps))/(spent+erasure).Seconds()))
		return s, nil
	}}
	raw := &side{name: "raw calls", round: func(ctx context.Context) (sample, error) {
		from, to := take(&rawNext)
		items := old[from:to]
		begin := time.Now()
		batches := (len(items) + rawBatch - 1) / rawBatch
		err := inParallel(ctx, batches, rawBatches, func(ctx context.Context, i int) error {
			return k.rewrapRaw(ctx, items[i*rawBatch:min((i+1)*rawBatch, len(items))])
		})
		return sample{count: len(items), elapsed: time.Since(begin)}, err
	}}
	if err := alternate(ctx, o, turns, ours, raw); err != nil {
		return Case{}, err
	}
	c := compare(fmt.Sprintf("rewrap of %d rows", len(apps)), "rows/s", ours, raw)
	c.Paired = paired(ours, raw)
	c.Beside = []Beside{
		{Name: "with the erasure of what was replaced", Unit: "rows/s", Value: rounded(median(whole)), Ratio: ratio(median(whole), c.Raw), Rounds: whole},
		{Name: "that erasure", Unit: "s", Value: rounded(median(erasing)), Rounds: erasing},
	}
	return c, nil
}

// rewrapTurn is how many rows a side rewraps before it is the other one's turn.
func rewrapTurn(rows int) int {
	return max(1, (rows+rewrapTurns*rewrapChunk-1)/(rewrapTurns*rewrapChunk)) * rewrapChunk
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
