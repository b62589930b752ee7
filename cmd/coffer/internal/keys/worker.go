package keys

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cofferdb/coffer/kms"
)

const (
	rewrapChunk = 2000 // several batches of a provider's: their ends are not waited for
	chunk       = 64   // apps between two checkpoints of the other kinds
	parallel    = 8    // apps at once within a chunk
	outages     = 6    // tries of a chunk while the provider does not answer
	beats       = 3    // renewals of a lease in its time
	maxSweeps   = 16   // looks for apps that were made while a pass was under way
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
// bring in, and asks those again that did not answer.
func (a *Admin) Run(ctx context.Context) error {
	look := time.NewTicker(a.lease / beats)
	defer look.Stop()
	var changes <-chan string
	for {
		if changes == nil {
			var err error
			if changes, err = a.rows.Watch(ctx, providersRow); err != nil && ctx.Err() == nil {
				a.log.Error("key providers are not followed", "error", err)
			}
			a.unsettle() // what has changed before
		}
		a.settleAndTell(ctx)
		if err := a.workOnCurrent(ctx); err != nil && ctx.Err() == nil {
			a.log.Error("key job stopped", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-a.wakeup:
		case <-look.C:
		case _, open := <-changes:
			if !open {
				changes = nil
			}
			a.unsettle()
		}
	}
}

// settleAndTell logs what does not answer when that changes.
func (a *Admin) settleAndTell(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, a.lease)
	defer cancel()
	err := a.Settle(ctx)
	var text strings.Builder
	for setting, why := range a.unanswered() {
		text.WriteString(setting + ": " + why.Error() + "; ")
	}
	if err != nil {
		text.WriteString(err.Error())
	}
	a.mu.Lock()
	changed := a.state.told != text.String()
	a.state.told = text.String()
	a.mu.Unlock()
	switch {
	case !changed || errors.Is(ctx.Err(), context.Canceled):
	case text.String() == "":
		a.log.Info("all key providers have answered")
	default:
		a.log.Warn("a key provider cannot be used", "error", text.String())
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
	if err := a.Settle(ctx); err != nil {
		return nil //nolint:nilerr // told by Run, which tries again
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

	job   jobRow
	kept  []kms.Identity // single apps' own KEKs, which a migration of the region leaves
	begin []Pending      // to be noted in the job before it is done
}

// checkpoint writes the job as it stands and renews the lease, by
// compare-and-set: whoever loses stops. A row that has another revision and is
// otherwise as it was has been moved by an erasure.
func (w *worker) checkpoint(ctx context.Context) error {
	before := w.job
	now := w.now().UTC()
	w.job.Owner, w.job.Lease, w.job.Updated = w.owner, now.Add(w.lease), now
	for {
		revision, err := storeJSON(ctx, w.rows, jobPrefix+w.job.ID, w.job.Job, w.job.revision)
		if err == nil {
			w.job.revision = revision
			return nil
		}
		if !errors.Is(err, kms.ErrRowConflict) {
			return fmt.Errorf("checkpoint: %w", err)
		}
		have, err := w.loadJob(ctx, w.job.ID)
		if err != nil {
			return fmt.Errorf("checkpoint: %w", err)
		}
		if have.Owner != before.Owner || !have.Updated.Equal(before.Updated) || have.State != before.State || have.revision == w.job.revision {
			return errFenced
		}
		w.job.revision = have.revision
	}
}

// ended writes how the job ended. A process that is shutting down gives it back:
// the next one goes on.
func (w *worker) ended(ctx context.Context, err error) error {
	if errors.Is(err, errFenced) {
		w.log.Warn("key job taken over", "job", w.job.ID)
		return nil
	}
	if ctx.Err() != nil {
		w.release(ctx)
		return nil //nolint:nilerr // the process shuts down; the next one goes on
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

// release gives the lease back, so that nobody has to wait for its end.
func (w *worker) release(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	w.job.Owner, w.job.Lease = "", time.Time{}
	if _, err := storeJSON(ctx, w.rows, jobPrefix+w.job.ID, w.job.Job, w.job.revision); err != nil {
		w.log.Debug("the lease of a key job was not given back", "job", w.job.ID, "error", err)
	}
}

// work goes through the phases that are left.
func (w *worker) work(ctx context.Context) (err error) {
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
		if w.kept, err = w.own(ctx); err != nil {
			return err
		}
	}
	phases := w.job.Kind.phases()
	for _, phase := range phases[slices.Index(phases, w.job.Phase):] {
		if phase != w.job.Phase {
			w.job.Phase, w.job.Cursor, w.job.Pending = phase, "", nil
			w.job.Done, w.job.Skipped, w.job.Failed, w.job.Failures = 0, 0, 0, nil
		}
		if err := w.pass(ctx); err != nil {
			return fmt.Errorf("phase %s: %w", phase, err)
		}
		if w.job.Kind == Rewrap && !w.job.DryRun {
			if err := w.erase(ctx); err != nil {
				return err
			}
		}
		if w.job.Failed > 0 || w.job.DryRun {
			return nil // a later phase needs that this one holds for all
		}
	}
	return nil
}

// pass goes over the apps behind the cursor, in the order of their names, and
// then over those that were made meanwhile.
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
	for part := range slices.Chunk(apps[i:], w.chunk()) {
		if err := w.part(ctx, part); err != nil {
			return err
		}
		w.job.Cursor = part[len(part)-1]
		if err := w.checkpoint(ctx); err != nil {
			return err
		}
	}
	if err := w.sweep(ctx); err != nil {
		return err
	}
	w.job.Total = w.job.Done + w.job.Skipped + w.job.Failed
	return nil
}

// sweep does the apps that need it although the pass is over: they were made
// behind the cursor, by a process that did not know of the job yet. What a pass
// failed with is not tried again.
func (w *worker) sweep(ctx context.Context) error {
	if w.job.DryRun || w.job.App != "" || w.job.Failed > 0 || (w.job.Kind != Rewrap && w.job.Kind != Migrate) {
		return nil
	}
	for range maxSweeps {
		apps, err := w.apps(ctx)
		if err != nil {
			return err
		}
		versions, err := w.versions(ctx)
		if err != nil {
			return err
		}
		var left []string
		for i, n := range w.look(ctx, apps, versions) {
			if n.err == nil && n.needed || w.pending(apps[i]) >= 0 {
				left = append(left, apps[i])
			}
		}
		if len(left) == 0 || w.job.Failed > 0 {
			return nil
		}
		for part := range slices.Chunk(left, w.chunk()) {
			if err := w.part(ctx, part); err != nil {
				return err
			}
			if err := w.checkpoint(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// erase has the bytes of what was rewrapped removed from the disk: until then an
// old version of the KEK opens them.
func (w *worker) erase(ctx context.Context) error {
	pause := w.pause
	for attempt := 1; ; attempt++ {
		err := w.keep(ctx, w.keyring.EraseReplaced)
		if err == nil || !passing(err) || attempt == outages {
			return err
		}
		if err := w.wait(ctx, pause); err != nil {
			return err
		}
		pause *= 3
	}
}

func (w *worker) chunk() int {
	if w.chunks > 0 {
		return w.chunks
	}
	if w.job.Kind == Rewrap {
		return rewrapChunk
	}
	return chunk
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
