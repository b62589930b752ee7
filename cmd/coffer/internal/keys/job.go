package keys

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/kms"
)

// Kind is what a job does.
type Kind string

// The kinds of jobs.
const (
	Rewrap  Kind = "rewrap"  // app keys under the latest version of their KEK
	Migrate Kind = "migrate" // app keys under another KEK
	Replace Kind = "replace" // new app keys, and what they wrap under them
	Verify  Kind = "verify"  // every wrap unwraps, every wrapped key opens
)

// State is how a job stands.
type State string

// The states of a job.
const (
	Running State = "running" // someone holds its lease, or may take it
	Done    State = "done"
	Failed  State = "failed"  // it came to the end, and some apps failed
	Stopped State = "stopped" // something stopped it on the way; starting it again goes on
)

// The phases of a migration; every other kind has the one phase "apps". Each is
// a pass over all apps and leaves a keyring that works.
const (
	phaseApps   = "apps"
	phaseAdd    = "add"    // the second wrap, verified
	phasePrefer = "prefer" // it is tried first
	phaseDrop   = "drop"   // the first one goes
)

func (k Kind) phases() []string {
	if k == Migrate {
		return []string{phaseAdd, phasePrefer, phaseDrop}
	}
	return []string{phaseApps}
}

// Spec says what a job is to do.
type Spec struct {
	Kind Kind `json:"kind"`
	// App limits the job to one app; empty means all of the region.
	App string `json:"app,omitempty"`
	// To is the setting of the KEK to migrate to, as in the configuration.
	To     string `json:"to,omitempty"`
	DryRun bool   `json:"dry_run,omitempty"`
	Actor  string `json:"actor"`
}

func (s Spec) check() error {
	switch s.Kind {
	case Rewrap, Replace, Verify:
		if s.To != "" {
			return fmt.Errorf("%w: only a migration has a destination", ErrSpec)
		}
	case Migrate:
		if s.To == "" {
			return fmt.Errorf("%w: a migration needs a destination", ErrSpec)
		}
	default:
		return fmt.Errorf("%w: no kind of job %q", ErrSpec, s.Kind)
	}
	if s.Actor == "" {
		return fmt.Errorf("%w: nobody asks for it", ErrSpec)
	}
	return nil
}

// same reports whether a second start with other asks for the same work.
func (s Spec) same(other Spec) bool {
	other.Actor = s.Actor
	return s == other
}

// Failure is one app that a job could not do.
type Failure struct {
	App   string `json:"app"`
	Error string `json:"error"` // the class; no text of the provider
}

// maxFailures is how many failures a job names; the others are counted.
const maxFailures = 20

// Job is a long operation on keys, as its row has it.
type Job struct {
	ID string `json:"id"`
	Spec

	State  State         `json:"state"`
	From   *kms.Identity `json:"from,omitempty"` // of a migration of the region: the primary until then
	Target *kms.Identity `json:"target,omitempty"`

	Phase  string `json:"phase"`
	Cursor string `json:"cursor"` // the last app that is done in this phase
	Total  int    `json:"total"`  // apps, when the phase began

	Done     int       `json:"done"`
	Skipped  int       `json:"skipped"` // nothing was to be done
	Failed   int       `json:"failed"`
	Failures []Failure `json:"failures,omitempty"`
	Error    string    `json:"error,omitempty"`

	// Pending are the apps that the worker has begun with and not counted yet:
	// whoever takes over counts those as done that need nothing any more.
	Pending []Pending `json:"pending,omitempty"`

	Owner    string    `json:"owner"`
	Lease    time.Time `json:"lease"`
	Started  time.Time `json:"started"`
	Updated  time.Time `json:"updated"`
	Finished time.Time `json:"finished,omitzero"`
}

// Pending is an app that a worker has begun with.
type Pending struct {
	App        string `json:"app"`
	Generation uint32 `json:"generation"` // of its key, then
}

// Ended reports whether nobody works on the job any more.
func (j Job) Ended() bool { return j.State != Running }

const (
	jobPrefix  = "job."
	currentRow = "job.current" // the id of the one job that may run
)

type current struct {
	ID string `json:"id"`
}

// jobRow is a job with the revision that a change of it must follow.
type jobRow struct {
	Job

	revision uint64
}

func loadJSON(ctx context.Context, rows kms.Rows, name string, into any) (uint64, error) {
	row, err := rows.Load(ctx, name)
	if err != nil {
		return 0, err
	}
	if err := json.Unmarshal(row.Value, into); err != nil {
		return 0, fmt.Errorf("row %s: %w", name, ErrCorrupt)
	}
	return row.Revision, nil
}

// storeJSON creates a row at revision 0, and replaces it at any other.
func storeJSON(ctx context.Context, rows kms.Rows, name string, value any, revision uint64) (uint64, error) {
	encoded, err := json.Marshal(value)
	if err != nil {
		return 0, fmt.Errorf("row %s: %w", name, err)
	}
	if revision == 0 {
		return rows.Create(ctx, name, encoded)
	}
	return rows.Update(ctx, name, encoded, revision)
}

func (a *Admin) loadJob(ctx context.Context, id string) (jobRow, error) {
	var j jobRow
	var err error
	if strings.Trim(id, "0123456789abcdef") != "" || len(id) != 2*idBytes {
		return j, fmt.Errorf("%w: %q is no job's id", ErrNoJob, id)
	}
	j.revision, err = loadJSON(ctx, a.rows, jobPrefix+id, &j.Job)
	if errors.Is(err, kms.ErrRowNotFound) {
		return j, fmt.Errorf("%w: %s", ErrNoJob, id)
	}
	return j, err
}

// Job returns a job.
func (a *Admin) Job(ctx context.Context, id string) (Job, error) {
	j, err := a.loadJob(ctx, id)
	return j.Job, err
}

// Jobs returns the jobs of the region, the latest first.
func (a *Admin) Jobs(ctx context.Context) ([]Job, error) {
	jobs := []Job{}
	for name, err := range a.rows.List(ctx, jobPrefix) {
		if err != nil {
			return nil, fmt.Errorf("list jobs: %w", err)
		}
		if name == currentRow {
			continue
		}
		j, err := a.loadJob(ctx, strings.TrimPrefix(name, jobPrefix))
		if errors.Is(err, ErrNoJob) {
			continue
		}
		if err != nil {
			return nil, err
		}
		jobs = append(jobs, j.Job)
	}
	slices.SortFunc(jobs, func(x, y Job) int { return y.Started.Compare(x.Started) })
	return jobs, nil
}

// Start begins a job, or goes on with the one that was started before for the
// same work and has not come to its end. It returns at once: [Admin.Run] does
// the work. Another job under way is ErrBusy.
func (a *Admin) Start(ctx context.Context, spec Spec) (Job, error) {
	if err := spec.check(); err != nil {
		return Job{}, err
	}
	if err := a.Settle(ctx); err != nil {
		return Job{}, err
	}
	var target *kms.Identity
	if spec.Kind == Migrate {
		id, err := a.openSetting(ctx, spec.To)
		switch {
		case kms.Retryable(err) || ctx.Err() != nil:
			return Job{}, fmt.Errorf("migrate: %w", err)
		case err != nil:
			return Job{}, fmt.Errorf("%w: the destination cannot be used: %w", ErrSpec, err)
		}
		target = &id
	}
	for {
		job, err := a.tryStart(ctx, spec, target)
		if errors.Is(err, kms.ErrRowConflict) {
			continue // another start or the worker was first: look again
		}
		if err != nil {
			return Job{}, err
		}
		a.wake()
		return job, nil
	}
}

func (a *Admin) tryStart(ctx context.Context, spec Spec, target *kms.Identity) (Job, error) {
	var cur current
	curRevision, err := loadJSON(ctx, a.rows, currentRow, &cur)
	if err != nil && !errors.Is(err, kms.ErrRowNotFound) {
		return Job{}, err
	}
	if cur.ID != "" {
		old, err := a.loadJob(ctx, cur.ID)
		switch {
		case errors.Is(err, ErrNoJob): // it was to be made when the process ended
		case err != nil:
			return Job{}, err
		case old.same(spec) && old.State == Running:
			return old.Job, nil
		case old.same(spec) && old.State == Stopped:
			if err := a.record(ctx, spec.Actor, "keys.job_resumed", old.Job, "ok"); err != nil {
				return Job{}, err
			}
			old.State, old.Error, old.Owner, old.Lease = Running, "", "", time.Time{}
			return a.storeJob(ctx, old)
		case !old.Ended():
			return Job{}, fmt.Errorf("%w: %s %s", ErrBusy, old.Kind, old.ID)
		}
	}
	now := a.now().UTC()
	job := jobRow{Job: Job{
		ID: newID(), Spec: spec, State: Stopped, Error: notBegun, Target: target, Phase: spec.Kind.phases()[0], Started: now, Updated: now,
	}}
	if spec.Kind == Migrate && spec.App == "" {
		from := a.Primary()
		job.From = &from
	}
	return a.begin(ctx, job, curRevision)
}

// notBegun is the error of a job whose process ended before it was recorded.
const notBegun = "not_begun"

// begin makes a job the current one, records it, and lets it run, in this order:
// of starts at the same time one is recorded, and a crash on the way leaves a job
// that has stopped, with which the same start goes on.
func (a *Admin) begin(ctx context.Context, job jobRow, curRevision uint64) (Job, error) {
	var err error
	if job.revision, err = storeJSON(ctx, a.rows, jobPrefix+job.ID, job.Job, 0); err != nil {
		return Job{}, err
	}
	if _, err := storeJSON(ctx, a.rows, currentRow, current{ID: job.ID}, curRevision); err != nil {
		return Job{}, errors.Join(err, a.rows.Delete(ctx, jobPrefix+job.ID, job.revision))
	}
	if err := a.record(ctx, job.Actor, "keys.job_started", job.Job, "ok"); err != nil {
		return Job{}, err
	}
	job.State, job.Error = Running, ""
	if job.revision, err = storeJSON(ctx, a.rows, jobPrefix+job.ID, job.Job, job.revision); err != nil {
		return Job{}, err // a conflict: another start has gone on with it
	}
	var cur current
	if _, err := loadJSON(ctx, a.rows, currentRow, &cur); err != nil {
		return Job{}, err
	}
	if cur.ID != job.ID { // another start has taken the place of one that stood still
		job.State, job.Error = Stopped, notBegun
		_, err := a.storeJob(ctx, job)
		return Job{}, errors.Join(err, kms.ErrRowConflict)
	}
	return job.Job, nil
}

func (a *Admin) storeJob(ctx context.Context, j jobRow) (Job, error) {
	j.Updated = a.now().UTC()
	_, err := storeJSON(ctx, a.rows, jobPrefix+j.ID, j.Job, j.revision)
	return j.Job, err
}
