package keys

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

// outcome of one app.
type outcome struct {
	app     string
	skipped bool
	err     error
}

// part does some apps and counts them. What does not answer is waited for, with
// longer pauses; a provider that refuses everything stops the job. The counts
// change when the whole part is through: of one that was interrupted, the job's
// row names the apps that were begun with.
func (w *worker) part(ctx context.Context, apps []string) error {
	var all []outcome
	pause := w.pause
	for attempt := 1; ; attempt++ {
		settled, again, err := w.try(ctx, apps)
		all = append(all, settled...)
		if err == nil && len(again) == 0 {
			w.count(all)
			return nil
		}
		if err == nil {
			err = again[0].err
		}
		if !passing(err) || attempt == outages {
			return err
		}
		if len(again) > 0 {
			apps = nil
			for _, r := range again {
				apps = append(apps, r.app)
			}
		}
		if err := w.wait(ctx, pause); err != nil {
			return err
		}
		pause *= 3
	}
}

// wait keeps the lease for a while.
func (w *worker) wait(ctx context.Context, d time.Duration) error {
	return w.keep(ctx, func(ctx context.Context) error {
		select {
		case <-time.After(d):
		case <-ctx.Done():
		}
		return nil
	})
}

// passing reports whether an error may go away by itself.
func passing(err error) bool {
	return kms.Retryable(err) || errors.Is(err, kms.ErrRowConflict) || errors.Is(err, journal.ErrUnavailable)
}

// keep renews the lease while do runs, and ends it when the lease was lost.
func (w *worker) keep(ctx context.Context, do func(ctx context.Context) error) error {
	working, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	ended := make(chan error, 1)
	go func() { ended <- do(working) }()
	beat := time.NewTicker(w.lease / beats)
	defer beat.Stop()
	for {
		select {
		case err := <-ended:
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return err
		case <-beat.C:
			err := w.checkpoint(ctx)
			if err == nil {
				continue
			}
			cancel(err)
			<-ended //nolint:errcheck // the first error is the one to tell
			return err
		}
	}
}

// try does what the apps need, once. What may go away by itself is to be tried
// again; the error is of all of them.
func (w *worker) try(ctx context.Context, apps []string) (settled, again []outcome, err error) {
	var todo []string
	err = w.keep(ctx, func(ctx context.Context) error {
		versions, err := w.versions(ctx)
		if err != nil {
			return err
		}
		for i, n := range w.look(ctx, apps, versions) {
			begun := w.pending(apps[i]) >= 0
			switch {
			case passing(n.err):
				again = append(again, outcome{app: apps[i], err: n.err})
			case n.err != nil:
				settled = append(settled, outcome{app: apps[i], err: n.err})
			case n.needed:
				todo = append(todo, apps[i])
				if !begun && !w.job.DryRun && w.job.Kind != Verify {
					w.begin = append(w.begin, Pending{App: apps[i], Generation: n.generation})
				}
			default:
				settled = append(settled, outcome{app: apps[i], skipped: !begun})
			}
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	if len(w.begin) > 0 {
		w.job.Pending, w.begin = append(w.job.Pending, w.begin...), nil
		if err := w.checkpoint(ctx); err != nil {
			return nil, nil, err
		}
	}
	if w.job.DryRun {
		for _, app := range todo {
			settled = append(settled, outcome{app: app})
		}
		return settled, again, nil
	}
	var results []outcome
	err = w.keep(ctx, func(ctx context.Context) (err error) {
		if w.job.Kind == Rewrap {
			results, err = w.rewrap(ctx, todo)
			return err
		}
		results = w.each(todo, func(app string) error { return w.one(ctx, app) })
		return nil
	})
	if err == nil {
		err = wholesale(results)
	}
	if err != nil {
		return nil, nil, err
	}
	for _, r := range results {
		if passing(r.err) {
			again = append(again, r)
		} else {
			settled = append(settled, r)
		}
	}
	return settled, again, nil
}

// pending returns the place of an app in what was begun, or a negative number.
func (w *worker) pending(app string) int {
	return slices.IndexFunc(w.job.Pending, func(p Pending) bool { return p.App == app })
}

// wholesale finds a refusal that is not about apps but about the KEK: everyone
// gets it.
func wholesale(results []outcome) error {
	if len(results) == 0 {
		return nil
	}
	class := kms.Class(results[0].err)
	if class == nil || !slices.Contains([]error{
		kms.ErrAccessDenied, kms.ErrUnauthenticated, kms.ErrDisabled, kms.ErrPendingDeletion, kms.ErrQuota,
	}, class) {
		return nil
	}
	for _, r := range results {
		if kms.Class(r.err) != class { //nolint:errorlint // Class returns the sentinels themselves
			return nil
		}
	}
	return results[0].err
}

func (w *worker) count(results []outcome) {
	for _, r := range results {
		switch {
		case errors.Is(r.err, kms.ErrAppDestroyed), w.job.App == "" && errors.Is(r.err, kms.ErrAppUnknown):
			w.job.Skipped++ // it has no keys any more
		case r.err != nil:
			w.job.Failed++
			if len(w.job.Failures) < maxFailures {
				w.job.Failures = append(w.job.Failures, Failure{App: r.app, Error: classOf(r.err)})
			}
			w.log.Warn("key job failed for an app", "job", w.job.ID, "app", r.app, "error", r.err)
		case r.skipped:
			w.job.Skipped++
		default:
			w.job.Done++
		}
		if i := w.pending(r.app); i >= 0 {
			w.job.Pending = slices.Delete(w.job.Pending, i, i+1)
		}
	}
}

// one does one app of any kind but rewrap. It may be repeated, and each phase
// does what an app lacks of those before: it may be younger than they are.
func (w *worker) one(ctx context.Context, app string) error {
	switch w.job.Kind {
	case Replace:
		_, err := w.keyring.ReplaceAppKey(ctx, app)
		return err
	case Verify:
		return w.verify(ctx, app)
	case Migrate:
		if _, err := w.keyring.AddWrap(ctx, app, *w.job.Target); err != nil || w.job.Phase == phaseAdd {
			return err
		}
		if err := w.keyring.PreferWrap(ctx, app, *w.job.Target); err != nil || w.job.Phase == phasePrefer {
			return err
		}
		return w.dropOthers(ctx, app)
	case Rewrap:
	}
	return fmt.Errorf("%w: job %s in phase %q", ErrCorrupt, w.job.ID, w.job.Phase)
}

// dropOthers leaves an app with the wrap under the target alone.
func (w *worker) dropOthers(ctx context.Context, app string) error {
	keys, err := w.keyring.AppKeys(ctx, app)
	if err != nil {
		return err
	}
	for _, id := range w.leaving(keys) {
		if _, err := w.keyring.DropWrap(ctx, app, id); err != nil {
			return err
		}
	}
	return nil
}

func (w *worker) verify(ctx context.Context, app string) error {
	v, err := w.keyring.VerifyApp(ctx, app)
	if err != nil {
		return err
	}
	for _, check := range v.Wraps {
		if check.Err != nil {
			return check.Err // the app is readable by another wrap, but this one is dead
		}
	}
	return nil
}

// rewrap does each app under every KEK that wraps it.
func (w *worker) rewrap(ctx context.Context, apps []string) ([]outcome, error) {
	results := make([]outcome, len(apps))
	for i, app := range apps {
		results[i].app = app
	}
	if len(apps) == 0 {
		return results, nil
	}
	for _, id := range w.identities() {
		done, err := w.keyring.RewrapApps(ctx, id, apps)
		if err != nil {
			return nil, err
		}
		for i, r := range done {
			results[i].err = errors.Join(results[i].err, r.Err)
		}
	}
	return results, nil
}

// each runs do for apps, some at a time, and keeps their order.
func (w *worker) each(apps []string, do func(app string) error) []outcome {
	results := make([]outcome, len(apps))
	inParallel(len(apps), func(i int) { results[i] = outcome{app: apps[i], err: do(apps[i])} })
	return results
}

func inParallel(n int, do func(i int)) {
	slots := make(chan struct{}, parallel)
	var wg sync.WaitGroup
	for i := range n {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			do(i)
		})
	}
	wg.Wait()
}
