package keys

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/cofferdb/coffer/kms"
)

const (
	rewrapChunk = 500 // a batch of Vault's, and no more than any provider takes
	chunk       = 64  // apps between two checkpoints of the other kinds
	parallel    = 8   // apps at once within a chunk
	outages     = 6   // tries of a chunk while the provider does not answer
)

// errFenced means that another worker has taken the job.
var errFenced = errors.New("another worker has taken the job")

func (a *Admin) wake() {
	select {
	case a.wakeup <- struct{}{}:
	default:
	}
}

// Run works on jobs until ctx ends: on those that are started here, and on those
// whose worker has fallen silent. It also follows the KEKs that other processes
// bring in.
func (a *Admin) Run(ctx context.Context) error {
	changes, err := a.rows.Watch(ctx, providersRow)
	if err != nil {
		return fmt.Errorf("key administration: %w", err)
	}
	look := time.NewTicker(a.lease)
	defer look.Stop()
	for {
		if err := a.workOnCurrent(ctx); err != nil && ctx.Err() == nil {
			a.log.Error("key_job_stopped", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-a.wakeup:
		case <-look.C:
		case _, open := <-changes:
			if !open {
				changes = nil // the ticker goes on looking
				continue
			}
			if err := a.readProviders(ctx); err != nil && ctx.Err() == nil {
				a.log.Error("key_providers_not_followed", "error", err)
			}
		}
	}
}

// workOnCurrent takes the current job, if it needs a worker, to its end.
func (a *Admin) workOnCurrent(ctx context.Context) error {
	var cur current
	if _, err := loadJSON(ctx, a.rows, currentRow, &cur); err != nil {
		if errors.Is(err, kms.ErrRowNotFound) {
			return nil
		}
		return err
	}
	row, err := a.loadJob(ctx, cur.ID)
	if errors.Is(err, ErrNoJob) {
		return nil
	}
	if err != nil {
		return err
	}
	if row.Ended() || (row.Owner != "" && row.Owner != a.owner && a.now().Before(row.Lease)) {
		return nil
	}
	w := &worker{Admin: a, job: row}
	if err := w.checkpoint(ctx); err != nil { // takes the lease
		return w.ended(ctx, err)
	}
	return w.ended(ctx, w.work(ctx))
}

// worker does one job. It is used by one goroutine.
type worker struct {
	*Admin

	job jobRow
}

// checkpoint writes the job as it stands and renews the lease, by
// compare-and-set: whoever loses stops.
func (w *worker) checkpoint(ctx context.Context) error {
	now := w.now().UTC()
	w.job.Owner, w.job.Lease, w.job.Updated = w.owner, now.Add(w.lease), now
	revision, err := storeJSON(ctx, w.rows, jobPrefix+w.job.ID, w.job.Job, w.job.revision)
	if errors.Is(err, kms.ErrRowConflict) {
		return errFenced
	}
	if err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	w.job.revision = revision
	return nil
}

// ended writes how the job ended. A process that is shutting down leaves it as it
// is: the next one goes on.
func (w *worker) ended(ctx context.Context, err error) error {
	if errors.Is(err, errFenced) {
		w.log.Warn("key_job_taken_over", "job", w.job.ID)
		return nil
	}
	if ctx.Err() != nil {
		return nil
	}
	action, outcome := "keys.job_finished", "ok"
	switch {
	case err != nil:
		w.job.State, w.job.Error = Stopped, classOf(err)
		action, outcome = "keys.job_failed", w.job.Error
	case w.job.Failed > 0:
		w.job.State, w.job.Error = Failed, fmt.Sprintf("%d apps failed", w.job.Failed)
		action, outcome = "keys.job_failed", "incomplete"
	default:
		w.job.State = Done
	}
	// The record first: a job that says done without one would be a gap in the
	// log. A worker that takes over in between records the end twice.
	if aerr := w.record(ctx, w.job.Actor, action, w.job.Job, outcome); aerr != nil {
		return errors.Join(err, aerr)
	}
	w.job.Finished = w.now().UTC()
	if cerr := w.checkpoint(ctx); cerr != nil && !errors.Is(cerr, errFenced) {
		return errors.Join(err, cerr)
	}
	return err
}

// work goes through the phases that are left.
func (w *worker) work(ctx context.Context) error {
	if w.job.Kind == Migrate {
		// After a restart of the process the setting is opened again.
		if _, err := w.openSetting(ctx, w.job.To); err != nil {
			return err
		}
		if !w.job.DryRun {
			// New apps go under the new KEK from now on, so that the passes
			// leave nobody behind.
			if err := w.adopt(ctx, w.job.To, *w.job.Target, w.job.App == ""); err != nil {
				return err
			}
		}
	}
	phases := w.job.Kind.phases()
	for _, phase := range phases[slices.Index(phases, w.job.Phase):] {
		if phase != w.job.Phase {
			w.job.Phase, w.job.Cursor = phase, ""
			w.job.Done, w.job.Skipped, w.job.Failed, w.job.Failures = 0, 0, 0, nil
		}
		if err := w.pass(ctx); err != nil {
			return fmt.Errorf("phase %s: %w", phase, err)
		}
		if w.job.Failed > 0 || w.job.DryRun {
			return nil // a later phase needs that this one holds for all
		}
	}
	return nil
}

// pass goes over the apps behind the cursor, in the order of their names.
func (w *worker) pass(ctx context.Context) error {
	apps, err := w.apps(ctx)
	if err != nil {
		return err
	}
	w.job.Total = len(apps)
	i, found := slices.BinarySearch(apps, w.job.Cursor)
	if found {
		i++
	}
	size := chunk
	if w.job.Kind == Rewrap {
		size = rewrapChunk
	}
	for part := range slices.Chunk(apps[i:], size) {
		if err := w.part(ctx, part); err != nil {
			return err
		}
		w.job.Cursor = part[len(part)-1]
		if err := w.checkpoint(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (w *worker) apps(ctx context.Context) ([]string, error) {
	if w.job.App != "" {
		return []string{w.job.App}, nil
	}
	var apps []string
	for app, err := range w.keyring.Apps(ctx) {
		if err != nil {
			return nil, err
		}
		apps = append(apps, app)
	}
	slices.Sort(apps)
	return apps, nil
}

// outcome of one app.
type outcome struct {
	app     string
	skipped bool
	err     error
}

// part does some apps. A provider that does not answer is waited for, with
// longer pauses; one that refuses everything stops the job.
func (w *worker) part(ctx context.Context, apps []string) error {
	pause := 100 * time.Millisecond
	for attempt := 1; ; attempt++ {
		results, err := w.try(ctx, apps)
		if err == nil {
			err = wholesale(results)
		}
		if err == nil {
			w.count(results)
			return nil
		}
		if !kms.Retryable(err) || attempt == outages {
			return err
		}
		// The lease is kept while waiting.
		if err := w.checkpoint(ctx); err != nil {
			return err
		}
		select {
		case <-time.After(pause):
			pause *= 3
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// wholesale finds what is not about an app but about the provider: it does not
// answer, or answers everyone alike with a refusal.
func wholesale(results []outcome) error {
	failed := 0
	for _, r := range results {
		if r.err == nil {
			continue
		}
		failed++
		if kms.Retryable(r.err) {
			return r.err
		}
	}
	if class := kms.Class(results[0].err); len(results) > 1 && failed == len(results) && class != nil {
		for _, r := range results {
			if kms.Class(r.err) != class {
				return nil
			}
		}
		return results[0].err
	}
	return nil
}

func (w *worker) count(results []outcome) {
	for _, r := range results {
		switch {
		case errors.Is(r.err, kms.ErrAppDestroyed), errors.Is(r.err, kms.ErrAppUnknown):
			w.job.Skipped++ // it has no keys any more
		case r.err != nil:
			w.job.Failed++
			if len(w.job.Failures) < maxFailures {
				w.job.Failures = append(w.job.Failures, Failure{App: r.app, Error: classOf(r.err)})
			}
			w.log.Warn("key_job_app_failed", "job", w.job.ID, "app", r.app, "error", r.err)
		case r.skipped:
			w.job.Skipped++
		default:
			w.job.Done++
		}
	}
}

func (w *worker) try(ctx context.Context, apps []string) ([]outcome, error) {
	if w.job.DryRun {
		return w.each(apps, func(app string) (bool, error) { return w.wouldSkip(ctx, app) }), nil
	}
	if w.job.Kind == Rewrap {
		return w.rewrap(ctx, apps)
	}
	return w.each(apps, func(app string) (skipped bool, err error) { return w.one(ctx, app) }), nil
}

// one does one app of any kind but rewrap. It may be repeated.
func (w *worker) one(ctx context.Context, app string) (skipped bool, err error) {
	switch w.job.Kind {
	case Replace:
		_, err = w.keyring.ReplaceAppKey(ctx, app)
		return false, err
	case Verify:
		return false, w.verify(ctx, app)
	case Migrate:
		switch w.job.Phase {
		case phaseAdd:
			added, err := w.keyring.AddWrap(ctx, app, *w.job.Target)
			return !added, err
		case phasePrefer:
			return false, w.keyring.PreferWrap(ctx, app, *w.job.Target)
		case phaseDrop:
			return w.dropOthers(ctx, app)
		}
	case Rewrap:
	}
	return false, fmt.Errorf("%w: job %s in phase %q", ErrCorrupt, w.job.ID, w.job.Phase)
}

// dropOthers leaves an app with the wrap under the target alone. What a tenant
// brought itself goes too when the job was asked for its app.
func (w *worker) dropOthers(ctx context.Context, app string) (skipped bool, err error) {
	keys, err := w.keyring.AppKeys(ctx, app)
	if err != nil {
		return false, err
	}
	skipped = true
	for _, id := range identitiesOf(keys) {
		if id == *w.job.Target || (w.job.App == "" && w.job.From != nil && id != *w.job.From) {
			continue
		}
		dropped, err := w.keyring.DropWrap(ctx, app, id)
		if err != nil {
			return false, err
		}
		skipped = skipped && !dropped
	}
	return skipped, nil
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
		results[i] = outcome{app: app, skipped: true}
	}
	for _, id := range w.identities() {
		done, err := w.keyring.RewrapApps(ctx, id, apps)
		if err != nil {
			return nil, err
		}
		for i, r := range done {
			results[i].err = errors.Join(results[i].err, r.Err)
			results[i].skipped = results[i].skipped && r.Skipped
		}
	}
	for i, r := range results {
		if errors.Is(r.err, kms.ErrRowConflict) { // another writer was faster: once more, alone
			again, err := w.rewrap(ctx, apps[i:i+1])
			if err != nil {
				return nil, err
			}
			results[i] = again[0]
		}
	}
	return results, nil
}

// wouldSkip is a dry run: it reads the row and calls the provider for its
// description only.
func (w *worker) wouldSkip(ctx context.Context, app string) (bool, error) {
	keys, err := w.keyring.AppKeys(ctx, app)
	if err != nil {
		return false, err
	}
	switch w.job.Kind {
	case Migrate:
		ids := identitiesOf(keys)
		return len(ids) == 1 && ids[0] == *w.job.Target, nil
	case Rewrap:
		for _, key := range keys {
			for _, wrap := range key.Wraps {
				p, ok := w.provider(wrap.Identity())
				if !ok {
					return false, &kms.Error{Op: "rewrap", Provider: wrap.Provider, Key: wrap.Key, Class: kms.ErrNotFound, Detail: "no such provider is configured"}
				}
				now, err := p.Describe(ctx)
				if err != nil {
					return false, err
				}
				if now.Version != wrap.Version {
					return false, nil
				}
			}
		}
		return true, nil
	case Replace, Verify:
	}
	return false, nil
}

func identitiesOf(keys []kms.AppKey) []kms.Identity {
	var ids []kms.Identity
	for _, key := range keys {
		for _, wrap := range key.Wraps {
			if !slices.Contains(ids, wrap.Identity()) {
				ids = append(ids, wrap.Identity())
			}
		}
	}
	return ids
}

// each runs do for apps, some at a time, and keeps their order.
func (w *worker) each(apps []string, do func(app string) (skipped bool, err error)) []outcome {
	results := make([]outcome, len(apps))
	slots := make(chan struct{}, parallel)
	var wg sync.WaitGroup
	for i, app := range apps {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			skipped, err := do(app)
			results[i] = outcome{app: app, skipped: skipped, err: err}
		})
	}
	wg.Wait()
	return results
}
