package exports

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections/history"
)

const (
	beats    = 3 // renewals of a lease in its time
	maxTries = 10
	maxPause = 10 * time.Minute
)

var (
	errFenced = errors.New("another worker has taken the export, or it was deleted") //nolint:gochecknoglobals // a sentinel
	errPart   = errors.New("the file is full")                                       //nolint:gochecknoglobals // a sentinel
)

// Run makes exports until ctx ends: those that are asked for here, and those whose
// worker has fallen silent. It removes them when their time is over.
func (e *Exports) Run(ctx context.Context) {
	look := time.NewTicker(e.o.Lease / beats)
	defer look.Stop()
	for {
		again, err := e.pass(ctx)
		if err != nil && ctx.Err() == nil {
			e.o.Log.Error("exports cannot be looked at", "error", err)
		}
		if again && ctx.Err() == nil {
			continue
		}
		select {
		case <-ctx.Done():
			return
		case <-e.wakeup:
		case <-look.C:
		}
	}
}

// pass gives every job that needs a worker its turn. again tells that one of them
// is not at its end.
func (e *Exports) pass(ctx context.Context) (again bool, err error) {
	began, failed := time.Now(), false
	var names []string
	for name, err := range e.rows.List(ctx, jobPrefix) {
		if err != nil {
			return false, err
		}
		names = append(names, name)
	}
	for _, name := range names {
		if ctx.Err() != nil {
			return false, nil //nolint:nilerr // the process shuts down
		}
		more, err := e.visit(ctx, strings.TrimPrefix(name, jobPrefix))
		again = again || more
		if err != nil && ctx.Err() == nil {
			e.o.Log.Error("an export did not get on", "row", name, "error", err)
			failed = true
		}
	}
	if !failed && e.o.Passed != nil {
		e.o.Passed(began)
	}
	return again, nil
}

func (e *Exports) visit(ctx context.Context, name string) (again bool, err error) {
	text, id, _ := strings.Cut(name, "-")
	app, err := journal.ParseAppID(text)
	if err != nil {
		return false, fmt.Errorf("%w: the row's name", ErrCorrupt)
	}
	r, err := e.load(ctx, app, id)
	switch {
	case errors.Is(err, ErrNotFound):
		return false, nil
	case errors.Is(err, kms.ErrAppDestroyed), errors.Is(err, kms.ErrAppUnknown):
		return false, e.remove(ctx, app, id) // its events are gone too
	case err != nil:
		return false, err
	}
	now := e.o.Now()
	if r.over(now) {
		return false, e.remove(ctx, app, id)
	}
	if r.State != Running || (now.Before(r.Lease) && r.Owner != e.owner) {
		return false, nil
	}
	w := &worker{Exports: e, job: r, until: now.Add(e.o.Turn)}
	if err := w.checkpoint(ctx); err != nil { // takes the lease
		return false, w.ended(ctx, err)
	}
	err = w.work(ctx)
	return err == nil && w.job.State == Running, w.ended(ctx, err)
}

// worker has its turn with one job. It is used by one goroutine.
type worker struct {
	*Exports

	job   row
	app   journal.App
	query history.Query
	until time.Time // the end of the turn
	beat  time.Time // the last checkpoint
}

// checkpoint writes the job as it stands and renews the lease, by
// compare-and-set: whoever loses stops.
func (w *worker) checkpoint(ctx context.Context) error {
	now := w.o.Now().UTC()
	w.job.Owner, w.job.Lease, w.job.Updated, w.beat = w.owner, now.Add(w.o.Lease), now, now
	return w.write(ctx)
}

func (w *worker) write(ctx context.Context) error {
	r, err := w.store(ctx, w.job)
	if errors.Is(err, kms.ErrRowConflict) || errors.Is(err, kms.ErrRowNotFound) {
		return errFenced
	}
	if err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	w.job = r
	return nil
}

// work makes files until the turn or the job is over.
func (w *worker) work(ctx context.Context) error {
	var err error
	if w.app, err = w.o.Journal.App(ctx, w.job.App); err != nil {
		return err
	}
	if w.app.Disabled {
		return journal.ErrDisabled
	}
	if w.job.Through > 0 {
		wait, cancel := context.WithTimeout(ctx, w.o.Lease/beats)
		err = w.o.Runner.Wait(wait, w.job.App, w.job.Through)
		cancel()
		if err != nil {
			return err
		}
	}
	if w.query, err = w.Exports.query(ctx, w.app, w.job.Job, w.job.After, w.job.Through); err != nil {
		return err
	}
	for !w.over() {
		if w.job.Files >= maxFiles {
			return fmt.Errorf("%w: more than %d files", ErrSpec, maxFiles)
		}
		if w.job.Format == Agora {
			err = w.hour(ctx)
		} else {
			err = w.part(ctx)
		}
		if err != nil {
			return err
		}
		if !w.over() && w.o.Now().After(w.until) {
			w.job.Owner, w.job.Lease, w.job.Tries, w.job.Error = "", time.Time{}, 0, ""
			return w.write(ctx)
		}
		if w.o.Now().Sub(w.beat) > w.o.Lease/beats {
			if err := w.checkpoint(ctx); err != nil {
				return err
			}
		}
	}
	w.job.State, w.job.Finished, w.job.Error, w.job.Tries = Done, w.o.Now().UTC(), "", 0
	w.job.Owner, w.job.Lease = "", time.Time{}
	if err := w.record(ctx, w.job.Job, "export.finished", "ok"); err != nil {
		w.job.State = Running
		return err
	}
	return w.write(ctx)
}

func (w *worker) over() bool {
	if w.job.Format == Agora {
		return w.job.HoursDone >= w.job.Hours
	}
	return w.job.Cursor >= w.job.Through
}

// part makes the next file of lines.
func (w *worker) part(ctx context.Context) error {
	q := w.query
	q.After = w.job.Cursor
	c := newContent()
	through := w.job.Through
	err := w.scan(ctx, w.app, NDJSON, q, func(o one) error {
		c.add(o)
		if c.Events >= w.o.PartEvents || c.Bytes >= int64(w.o.PartBytes) {
			through = o.position
			return errPart
		}
		return w.keepAlive(ctx)
	})
	if err != nil && !errors.Is(err, errPart) {
		return err
	}
	f := c.file(fmt.Sprintf("events-%06d.ndjson", w.job.Files+1), w.job.Cursor, through)
	w.job.Cursor = through
	return w.add(ctx, f)
}

// hour makes the file of the next hour.
func (w *worker) hour(ctx context.Context) error {
	hour := w.job.Hour.Add(time.Duration(w.job.HoursDone) * time.Hour)
	c := newContent()
	err := w.scan(ctx, w.app, Agora, inHour(w.query, hour), func(o one) error {
		c.add(o)
		return w.keepAlive(ctx)
	})
	if err != nil {
		return err
	}
	w.job.HoursDone++
	return w.add(ctx, c.file(hourName(hour), max(c.low, 1)-1, c.high))
}

// keepAlive renews the lease while one file takes long.
func (w *worker) keepAlive(ctx context.Context) error {
	if w.o.Now().Sub(w.beat) <= w.o.Lease/beats {
		return nil
	}
	return w.checkpoint(ctx)
}

// add lists a file that has something in it. The entry is written before the job
// counts it; a row that a worker before this one has written further is cut.
func (w *worker) add(ctx context.Context, f File) error {
	w.job.Counts.add(f.Counts)
	if f.Events == 0 {
		return nil
	}
	n := w.job.Files / filesPerRow
	for {
		list, err := w.loadEntries(ctx, w.job.Job, n)
		if err != nil {
			return err
		}
		if len(list.Files) < w.job.Files%filesPerRow {
			return fmt.Errorf("%w: files are missing", ErrCorrupt)
		}
		list.Files = append(list.Files[:w.job.Files%filesPerRow], f)
		err = w.storeEntries(ctx, w.job.Job, n, list)
		if errors.Is(err, kms.ErrRowConflict) {
			continue
		}
		if err != nil {
			return err
		}
		break
	}
	w.job.Files, w.job.Tries, w.job.Error = w.job.Files+1, 0, ""
	if w.job.Oldest.IsZero() || f.First.Before(w.job.Oldest) {
		w.job.Oldest = f.First
	}
	if f.Last.After(w.job.Newest) {
		w.job.Newest = f.Last
	}
	return w.checkpoint(ctx)
}

// ended writes why a turn ended early. What may pass is tried again, with a
// longer pause each time.
func (w *worker) ended(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errFenced):
		return nil
	case ctx.Err() != nil:
		w.release(ctx)
		return nil //nolint:nilerr // the process ends; another goes on
	}
	now := w.o.Now().UTC()
	w.job.Tries++
	w.job.Error, w.job.Updated = classOf(err), now
	if final(err) || w.job.Tries >= maxTries {
		w.job.State, w.job.Finished, w.job.Owner, w.job.Lease = Failed, now, "", time.Time{}
		if aerr := w.record(ctx, w.job.Job, "export.finished", w.job.Error); aerr != nil {
			return errors.Join(err, aerr)
		}
	} else {
		// Nobody has it until then.
		w.job.Owner, w.job.Lease = "nobody", now.Add(min(maxPause, w.o.Lease<<(w.job.Tries-1)/beats))
	}
	if werr := w.write(ctx); werr != nil && !errors.Is(werr, errFenced) {
		return errors.Join(err, werr)
	}
	return err
}

// release gives the lease back, so that nobody has to wait for its end. The row is
// read again: the checkpoint that was interrupted may be there or not.
func (w *worker) release(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	r, err := w.load(ctx, w.job.App, w.job.ID)
	if err == nil && r.State == Running && r.Owner == w.owner {
		r.Owner, r.Lease = "", time.Time{}
		_, err = w.store(ctx, r)
	}
	if err != nil {
		w.o.Log.Debug("the lease of an export was not given back", "export", w.job.ID, "error", err)
	}
}

// final reports whether trying again cannot help.
func final(err error) bool {
	for _, class := range []error{
		ErrSpec, ErrCorrupt, journal.ErrDisabled, journal.ErrUnknownApp, journal.ErrCorrupt, kms.ErrAppDestroyed, kms.ErrAuthentication,
		kms.ErrEnvelope, kms.ErrKeyMismatch,
	} {
		if errors.Is(err, class) {
			return true
		}
	}
	return false
}

// classOf names an error without the texts that are wrapped in it.
func classOf(err error) string {
	for class, name := range map[error]string{
		ErrSpec: "too_large", ErrCorrupt: "corrupt_row", journal.ErrDisabled: "app_disabled", journal.ErrUnknownApp: "no_app",
		journal.ErrCorrupt: "corrupt_event", journal.ErrUnavailable: "unavailable",
		context.DeadlineExceeded: "view_behind",
	} {
		if errors.Is(err, class) {
			return name
		}
	}
	if class := kms.Class(err); class != nil {
		return strings.ReplaceAll(strings.TrimPrefix(class.Error(), "kms: "), " ", "_")
	}
	return "failed"
}
