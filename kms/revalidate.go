package kms

import (
	"context"
	"errors"
	"log/slog"
	"time"
)

const (
	firstRetry = 15 * time.Second // after a revalidation that found the provider away
	lastRetry  = 5 * time.Minute
)

// schedule sets the time of the next revalidation.
func (a *appKeys) schedule(after time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.keys == nil {
		return
	}
	if a.timer != nil {
		a.timer.Stop()
	}
	a.timer = time.AfterFunc(after, func() { a.ring.background(a.revalidate) })
}

// revalidate asks the provider whether the app's keys may still be used. An app
// that nobody has used is dropped instead, which costs no call.
func (a *appKeys) revalidate(ctx context.Context) {
	k := a.ring
	a.mu.RLock()
	degraded, hardAt := a.err != nil, a.hardAt
	a.mu.RUnlock()
	if degraded && !time.Now().Before(hardAt) {
		k.cfg.Log.ErrorContext(ctx, "app keys dropped at the hard limit", slog.String("app", a.name))
		k.evict(a)
		return
	}
	if !a.used.Swap(false) && !degraded {
		k.evict(a)
		return
	}
	started := time.Now()
	row, revision, err := a.confirm(ctx)
	switch {
	case err == nil:
		a.mu.Lock()
		recovered := a.err != nil
		a.hardAt = started.Add(k.cfg.Hard)
		a.attempts, a.since, a.failedAt, a.err = 0, time.Time{}, time.Time{}, nil
		a.mu.Unlock()
		if err := a.install(row, revision); err != nil {
			k.evict(a)
			return
		}
		if recovered {
			k.cfg.Log.InfoContext(ctx, "app keys revalidated again", slog.String("app", a.name))
		}
		a.schedule(k.softLife()) //nolint:contextcheck // the next one has a context of its own
	case errors.Is(err, errStale):
		k.evict(a)
	case bridged(err) && !errors.Is(err, ErrAppUnknown) && !errors.Is(err, ErrAppDestroyed) && !errors.Is(err, ErrKeyringCorrupt):
		a.degrade(ctx, err)
	default:
		k.cfg.Log.ErrorContext(ctx, "app keys dropped", slog.String("app", a.name), slog.Any("error", err))
		k.refuse(a.name, err)
		k.evict(a)
	}
}

// confirm reads the row and unwraps the app key again.
func (a *appKeys) confirm(ctx context.Context) (*appRow, uint64, error) {
	row, revision, err := a.ring.loadRow(ctx, a.name)
	if err != nil {
		return nil, 0, err
	}
	for _, r := range row.Keys {
		raw, err := a.ring.unwrapAny(ctx, a.name, r)
		if err != nil {
			return nil, 0, err
		}
		clear(raw) // unwrapAny has compared it with the row
	}
	return row, revision, nil
}

// degrade keeps the app in use, and asks again later: at the hard limit for the
// last time.
func (a *appKeys) degrade(ctx context.Context, err error) {
	now := time.Now()
	a.mu.Lock()
	if a.err == nil {
		a.since = now
	}
	a.err, a.failedAt = err, now
	wait := min(firstRetry<<min(a.attempts, 10), lastRetry)
	a.attempts++
	left := a.hardAt.Sub(now)
	a.mu.Unlock()
	a.ring.cfg.Log.WarnContext(ctx, "app keys not revalidated, still in use",
		slog.String("app", a.name), slog.Any("error", err), slog.Duration("left", left))
	a.schedule(max(0, min(jitter(wait, 0.5), left))) //nolint:contextcheck // as above
}
