package deletion

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/accounts"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

// Options is what deletions work on. All are required but Steps, Lease, Log and
// Now.
type Options struct {
	Journal  *journal.Journal
	Accounts *accounts.Store
	Rows     kms.Rows // of the registry
	Views    Views
	// Steps remove what others keep of an app, after its keys are gone and before
	// its messages are.
	Steps []Step
	// Lease is how long a process that falls silent keeps its work; 10 seconds.
	Lease time.Duration
	Log   *slog.Logger
	Now   func() time.Time
}

// Views are the views of a region; projections.Runner is.
type Views interface {
	Forget(ctx context.Context, app journal.AppID) error
}

// A Step removes a kind of data of an app. Do can be repeated, and is after an
// error; it returns how much it removed. Count tells how much there is.
type Step struct {
	Name  string
	Do    func(ctx context.Context, app journal.AppID) (int, error)
	Count func(ctx context.Context, app journal.AppID) (int, error)
}

const defaultLease = 10 * time.Second

// Deletions are the deletions of one region.
type Deletions struct {
	journal  *journal.Journal
	accounts *accounts.Store
	rows     kms.Rows
	steps    []Step
	lease    time.Duration
	log      *slog.Logger
	now      func() time.Time
	owner    string
	wakeup   chan struct{}

	// at is called before and after each step of a job, and by tests only set.
	at func(moment string)
}

// New returns the deletions of a region. It starts nothing: see [Deletions.Run].
func New(o Options) *Deletions {
	var owner [8]byte
	rand.Read(owner[:]) // never fails; it ends the process instead
	d := &Deletions{
		journal: o.Journal, accounts: o.Accounts, rows: o.Rows, lease: o.Lease, log: o.Log, now: o.Now,
		owner: hex.EncodeToString(owner[:]), wakeup: make(chan struct{}, 1), at: func(string) {},
	}
	if d.lease <= 0 {
		d.lease = defaultLease
	}
	if d.log == nil {
		d.log = slog.New(slog.DiscardHandler)
	}
	if d.now == nil {
		d.now = time.Now
	}
	d.steps = d.appSteps(o.Views, o.Steps)
	return d
}

// StartApp begins to delete an app. When it returns the deletion is durable and
// the app answers nobody. An app that is being deleted already is no error.
func (d *Deletions) StartApp(ctx context.Context, app journal.AppID, actor string) (Job, error) {
	_, err := d.journal.Registry().Deleted(ctx, app)
	if err != nil && !errors.Is(err, journal.ErrAppExists) {
		return Job{}, err
	}
	return d.start(ctx, App, app.String(), actor, func() error {
		_, err := d.journal.Registry().BeginDelete(ctx, app)
		return err
	})
}

// StartAccount begins to delete an account and its apps, as StartApp does.
func (d *Deletions) StartAccount(ctx context.Context, id, actor string) (Job, error) {
	if err := d.accounts.Known(ctx, id); err != nil {
		return Job{}, err
	}
	return d.start(ctx, Account, id, actor, func() error { return d.accounts.BeginDelete(ctx, id) })
}

// start records a deletion, then marks its target: one that is killed in between
// is done by whoever finds the row.
func (d *Deletions) start(ctx context.Context, kind Kind, target, actor string, mark func() error) (Job, error) {
	job := jobRow{Job: Job{
		ID: idOf(kind, target), Kind: kind, Target: target, Actor: actor, State: Running, Step: stepMark, Started: d.now().UTC(),
	}}
	entry := journal.AuditEntry{Actor: actor, Action: string(kind) + ".deletion_started", Target: string(kind) + ":" + target, Outcome: "ok"}
	if err := d.journal.Audit(ctx, entry); err != nil {
		return Job{}, err
	}
	err := d.store(ctx, &job)
	if errors.Is(err, kms.ErrRowConflict) {
		job, err = d.load(ctx, job.ID)
	}
	if err != nil {
		return Job{}, err
	}
	if err := mark(); err != nil {
		return Job{}, err
	}
	select {
	case d.wakeup <- struct{}{}:
	default:
	}
	return job.Job, nil
}

// Count tells how much of an app each step would remove; it changes nothing.
func (d *Deletions) Count(ctx context.Context, app journal.AppID) (map[string]int, error) {
	counts := map[string]int{}
	for _, step := range d.steps {
		if step.Count == nil {
			continue
		}
		n, err := step.Count(ctx, app)
		if err != nil {
			return nil, fmt.Errorf("count %s of app %s: %w", step.Name, app, err)
		}
		counts[step.Name] = n
	}
	return counts, nil
}

// Run works on deletions until ctx ends: on those that are started here, and on
// those whose process has fallen silent.
func (d *Deletions) Run(ctx context.Context) {
	look := time.NewTicker(d.lease / 2)
	defer look.Stop()
	for {
		if err := d.round(ctx); err != nil && ctx.Err() == nil {
			d.log.Error("deletions wait", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-d.wakeup:
		case <-look.C:
		}
	}
}

// round works on every deletion that nobody else does.
func (d *Deletions) round(ctx context.Context) error {
	jobs, err := d.Jobs(ctx)
	if err != nil {
		return err
	}
	var all error
	for _, job := range jobs {
		if job.State == Done || job.Owner != "" && job.Owner != d.owner && d.now().Before(job.Lease) {
			continue
		}
		row, err := d.load(ctx, job.ID)
		if err == nil && row.State != Done {
			err = d.work(ctx, &row)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil && !errors.Is(err, kms.ErrRowConflict) {
			all = errors.Join(all, fmt.Errorf("deletion %s: %w", job.ID, err))
		}
	}
	return all
}

// work does what is left of a deletion. Its lease is renewed at each step and,
// while one takes long, in between.
func (d *Deletions) work(ctx context.Context, job *jobRow) error {
	job.Owner = d.owner
	if err := d.checkpoint(ctx, job); err != nil {
		return err
	}
	steps := d.accountSteps(job.Target)
	if job.Kind == App {
		app, err := journal.ParseAppID(job.Target)
		if err != nil {
			return fmt.Errorf("%w: its target", journal.ErrCorrupt)
		}
		steps = d.bound(app)
	}
	begun := false
	for i, step := range steps {
		if begun = begun || step.name == job.Step; !begun {
			continue
		}
		d.at("before " + step.name)
		n, err := d.hold(ctx, job, step.do)
		if err != nil {
			return d.keep(ctx, job, err)
		}
		d.at("after " + step.name)
		job.Removed += n
		job.Error = ""
		if i+1 < len(steps) {
			job.Step = steps[i+1].name
		}
		if err := d.checkpoint(ctx, job); err != nil {
			return err
		}
	}
	if !begun {
		return fmt.Errorf("%w: no step %q", journal.ErrCorrupt, job.Step)
	}
	// The record first: a deletion that says done without one would be a gap in
	// the log.
	entry := journal.AuditEntry{
		Actor: job.Actor, Action: string(job.Kind) + ".deleted", Target: string(job.Kind) + ":" + job.Target, Outcome: "ok",
		Detail: map[string]string{"removed": strconv.Itoa(job.Removed)},
	}
	if err := d.journal.Audit(ctx, entry); err != nil {
		return err
	}
	job.State, job.Owner, job.Lease, job.Finished = Done, "", time.Time{}, d.now().UTC()
	if err := d.store(ctx, job); err != nil {
		return err
	}
	d.log.Info("deleted", "kind", string(job.Kind), "target", job.Target, "removed", job.Removed)
	return nil
}

func (d *Deletions) checkpoint(ctx context.Context, job *jobRow) error {
	job.Lease = d.now().UTC().Add(d.lease)
	return d.store(ctx, job)
}

// keep notes what keeps a deletion, and gives it back.
func (d *Deletions) keep(ctx context.Context, job *jobRow, err error) error {
	job.Error, job.Owner, job.Lease = "failed", "", time.Time{}
	if class := kms.Class(err); class != nil {
		job.Error = class.Error()
	} else if errors.Is(err, journal.ErrUnavailable) {
		job.Error = journal.ErrUnavailable.Error()
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	return errors.Join(err, d.store(ctx, job))
}

// hold does a step while it renews the lease. When another process has taken the
// deletion the step is given up.
func (d *Deletions) hold(ctx context.Context, job *jobRow, do func(context.Context) (int, error)) (int, error) {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	type outcome struct {
		n   int
		err error
	}
	done := make(chan outcome, 1)
	var working sync.WaitGroup
	defer working.Wait()
	working.Go(func() {
		n, err := do(ctx)
		done <- outcome{n, err}
	})
	renew := time.NewTicker(d.lease / 3)
	defer renew.Stop()
	for {
		select {
		case o := <-done:
			return o.n, o.err
		case <-renew.C:
			if err := d.checkpoint(ctx, job); err != nil {
				stop(err)
				return 0, err
			}
		}
	}
}
