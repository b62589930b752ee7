package exports

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/history"
)

// The sentinels below are what callers branch on.
var (
	// ErrSpec means that an export does not make sense as it was asked for.
	// Correct it.
	ErrSpec = errors.New("no such export can be made")
	// ErrNotFound means that the app has no export, or no file of one, with this
	// name. Exports go when their time is over.
	ErrNotFound = errors.New("no such export")
	// ErrUnfinished means that the export is still being made, or has failed. Look
	// at its state, and ask again when it is done.
	ErrUnfinished = errors.New("the export is not done")
	// ErrTooMany means that the app has as many exports as it may. Delete one.
	ErrTooMany = errors.New("the app has too many exports")
	// ErrExists means that the idempotency key was used for another export. Take
	// another key.
	ErrExists = errors.New("an export with this key and other filters exists")
	// ErrCorrupt means that a row of an export does not parse. Delete the export.
	ErrCorrupt = errors.New("the row of an export does not parse")
)

// Options configure [Exports]. Region, Journal, History, Wait and Rows are
// required.
type Options struct {
	Region  journal.Region
	Journal *journal.Journal
	History *history.View
	// Runner keeps the view; a job waits for it to have its range.
	Runner *projections.Runner
	Rows   kms.Rows // of the registry's bucket

	// Keep is how long an export stays after it was asked for; what the retention
	// table says when 0.
	Keep time.Duration
	// Lease is how long a worker may be silent before another takes over; 30 s.
	Lease time.Duration
	// Turn is how long the worker stays with one job while others wait; 5 s.
	Turn time.Duration
	// PartEvents and PartBytes are where a file of lines ends: 100,000 events,
	// 64 MiB.
	PartEvents, PartBytes int
	Log                   *slog.Logger
	Now                   func() time.Time

	// Passed is told when a look at every job began that went well, so that what
	// is over has gone; nil for nobody.
	Passed func(began time.Time)
}

const (
	defaultLease = 30 * time.Second
	defaultTurn  = 5 * time.Second
	partEvents   = 100_000
	partBytes    = 64 << 20

	// MaxPerApp is how many exports an app may have at a time.
	MaxPerApp = 32
	maxFiles  = 16_384
	maxTypes  = 64

	idBytes = 8
)

// Exports makes the exports of one region. It is safe for concurrent use, also by
// several processes.
type Exports struct {
	o      Options
	rows   kms.Rows
	owner  string
	wakeup chan struct{}
}

// New returns the exports of a region. [Exports.Run] does the work.
func New(o Options) *Exports {
	if o.Keep <= 0 {
		o.Keep = o.Journal.Retention().Exports
	}
	if o.Lease <= 0 {
		o.Lease = defaultLease
	}
	if o.Turn <= 0 {
		o.Turn = defaultTurn
	}
	if o.PartEvents <= 0 {
		o.PartEvents = partEvents
	}
	if o.PartBytes <= 0 {
		o.PartBytes = partBytes
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return &Exports{o: o, rows: o.Rows, owner: newID(), wakeup: make(chan struct{}, 1)}
}

func newID() string {
	var id [idBytes]byte
	rand.Read(id[:]) // never fails; it ends the process instead
	return hex.EncodeToString(id[:])
}

// Start asks for an export of what the app has now. With a key, a second call
// with the same key returns the export of the first, and false.
func (e *Exports) Start(ctx context.Context, app journal.App, spec Spec, key string) (Job, bool, error) {
	if err := spec.check(); err != nil {
		return Job{}, false, err
	}
	id := newID()
	if key != "" {
		sum, err := e.o.Journal.MAC(ctx, app.ID, "export key", []byte(key))
		if err != nil {
			return Job{}, false, err
		}
		id = hex.EncodeToString(sum[:idBytes])
		switch old, err := e.load(ctx, app.ID, id); {
		case errors.Is(err, ErrNotFound):
		case err == nil && old.over(e.o.Now()):
			if err := e.remove(ctx, app.ID, id); err != nil {
				return Job{}, false, err
			}
		case err != nil:
			return Job{}, false, err
		case !old.Spec.same(spec):
			return Job{}, false, ErrExists
		default:
			return old.Job, false, nil
		}
	}
	have, err := e.List(ctx, app.ID)
	if err != nil {
		return Job{}, false, err
	}
	if len(have) >= MaxPerApp {
		return Job{}, false, fmt.Errorf("%w: %d", ErrTooMany, len(have))
	}
	now := e.o.Now().UTC()
	job := Job{ID: id, App: app.ID, Spec: spec, State: Running, Created: now, Updated: now, Expires: now.Add(e.o.Keep)}
	if err := e.bound(ctx, app, &job); err != nil {
		return Job{}, false, err
	}
	// The record first: an export of which the log does not know must not be.
	if err := e.record(ctx, job, "export.started", "ok"); err != nil {
		return Job{}, false, err
	}
	if _, err := e.store(ctx, row{Job: job}); err != nil {
		if errors.Is(err, kms.ErrRowConflict) && key != "" { // the same call, twice at once
			old, err := e.load(ctx, app.ID, id)
			return old.Job, false, err
		}
		return Job{}, false, err
	}
	e.wake()
	return job, true, nil
}

// bound fixes the range: from the first event that is kept to the last one there
// is, and for hourly files the hours.
func (e *Exports) bound(ctx context.Context, app journal.App, job *Job) error {
	oldest := e.oldest(app)
	one := func(reverse bool) (journal.Position, error) {
		var at journal.Position
		_, err := e.o.History.Replay(ctx, app.ID, history.Query{Reverse: reverse, Limit: 1, Oldest: oldest}, func(i history.Item) error {
			at = i.Position
			return nil
		})
		return at, err
	}
	var err error
	if job.First, err = one(false); err != nil {
		return err
	}
	if job.Through, err = one(true); err != nil {
		return err
	}
	job.Cursor = job.After
	if job.Spec.Format != Agora {
		return nil
	}
	from, until := oldest, job.Created.Add(time.Hour) // an event may be ahead of the clock a little
	if job.Spec.From.After(from) {
		from = job.Spec.From
	}
	if !job.Spec.Until.IsZero() && job.Spec.Until.Before(until) {
		until = job.Spec.Until
	}
	job.Hour = from.Truncate(time.Hour).UTC()
	job.Hours = max(0, int(until.Sub(job.Hour)+time.Hour-1)/int(time.Hour))
	if job.Hours > maxFiles {
		return fmt.Errorf("%w: more than %d hours; narrow the time", ErrSpec, maxFiles)
	}
	return nil
}

// oldest is the earliest retention clock that the app's plan still serves.
func (e *Exports) oldest(app journal.App) time.Time {
	now := e.o.Now()
	if plan, ok := e.o.Journal.Plan(app.Plan); ok {
		return plan.Oldest(now)
	}
	return now // a plan that has left the table: serving nothing is the safe answer
}

// Job returns an export of an app.
func (e *Exports) Job(ctx context.Context, app journal.AppID, id string) (Job, error) {
	r, err := e.load(ctx, app, id)
	if err == nil && r.over(e.o.Now()) {
		return Job{}, ErrNotFound
	}
	return r.Job, err
}

// List returns the exports of an app, the latest first.
func (e *Exports) List(ctx context.Context, app journal.AppID) ([]Job, error) {
	jobs := []Job{}
	prefix := jobPrefix + app.String() + "-"
	for name, err := range e.rows.List(ctx, prefix) {
		if err != nil {
			return nil, fmt.Errorf("list exports: %w", err)
		}
		r, err := e.load(ctx, app, strings.TrimPrefix(name, prefix))
		if errors.Is(err, ErrNotFound) {
			continue // it has just gone
		}
		if err != nil {
			return nil, err
		}
		if r.over(e.o.Now()) {
			continue // it is swept soon
		}
		jobs = append(jobs, r.Job)
	}
	slices.SortFunc(jobs, func(x, y Job) int {
		return min(1, max(-1, 2*y.Created.Compare(x.Created)+strings.Compare(x.ID, y.ID)))
	})
	return jobs, nil
}

// Delete ends an export, whatever its state, and removes its rows.
func (e *Exports) Delete(ctx context.Context, app journal.AppID, id string) error {
	r, err := e.load(ctx, app, id)
	if err != nil && !errors.Is(err, ErrCorrupt) {
		return err
	}
	r.ID, r.App = id, app
	if err := e.record(ctx, r.Job, "export.deleted", "ok"); err != nil {
		return err
	}
	return e.remove(ctx, app, id)
}

// remove deletes the rows of an export: the entries of files first, so that none
// is left without a job.
func (e *Exports) remove(ctx context.Context, app journal.AppID, id string) error {
	name := app.String() + "-" + id
	var names []string
	for file, err := range e.rows.List(ctx, filesPrefix+name+".") {
		if err != nil {
			return fmt.Errorf("delete an export: %w", err)
		}
		names = append(names, file)
	}
	for _, n := range append(names, jobPrefix+name) {
		if err := e.drop(ctx, n); err != nil {
			return fmt.Errorf("delete an export: %w", err)
		}
	}
	return nil
}

// drop deletes a row whatever its revision.
func (e *Exports) drop(ctx context.Context, name string) error {
	for {
		r, err := e.rows.Load(ctx, name)
		if err == nil {
			err = e.rows.Delete(ctx, name, r.Revision)
		}
		switch {
		case errors.Is(err, kms.ErrRowConflict): // the worker's checkpoint came in between
			continue
		case errors.Is(err, kms.ErrRowNotFound):
			return nil
		}
		return err
	}
}

// record writes an audit entry about an export. It names no user or conversation.
func (e *Exports) record(ctx context.Context, j Job, action, outcome string) error {
	detail := map[string]string{"app": j.App.String()}
	if j.Spec.Format != "" {
		detail["format"] = string(j.Spec.Format)
	}
	if j.Through > 0 {
		detail["through"] = j.Through.String()
	}
	return e.o.Journal.Audit(ctx, journal.AuditEntry{
		Actor: "app:" + j.App.String(), Action: action, Target: "export:" + j.ID, Outcome: outcome, Detail: detail,
	})
}

func (e *Exports) wake() {
	select {
	case e.wakeup <- struct{}{}:
	default:
	}
}
