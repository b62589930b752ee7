package shelf

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

// Rows are the rows of the records, in the order of their last writes;
// journal.Rows are.
type Rows interface {
	InOrder(ctx context.Context, prefix string, after uint64) iter.Seq2[journal.WrittenRow, error]
}

// Sweep ends what has not been used for its lifetime, and warns of what soon
// will have. It can be run by several processes at a time: a record ends once,
// and is warned of at least once.
type Sweep struct {
	// Name names the row "shelf.<name>" of Places, in which the sweep keeps how
	// far it is.
	Name   string
	Places kms.Rows
	Rows   Rows
	Prefix string // of the records' names
	Life   Life

	// Used returns a record's last use; ok is false for a row that has no end,
	// because it has come already.
	Used func(row journal.WrittenRow) (used time.Time, ok bool, err error)
	// End removes a record; kms.ErrRowConflict and kms.ErrRowNotFound mean that
	// it was used or removed in between.
	End func(ctx context.Context, row journal.WrittenRow) error
	// Warn notes its end to come; when it fails, the sweep stops there.
	Warn func(ctx context.Context, row journal.WrittenRow) error
	// Tell tells those whom it concerns, before Warn; nil tells nobody. It must be
	// one that can be repeated. When it fails, which may be the fault of one
	// record's keys, the others are told all the same, and it is called again at
	// each later run until the record is used or ends.
	Tell func(ctx context.Context, row journal.WrittenRow) error
	// Forget removes the marker that a deleted record left, so that records
	// that are gone cost nothing; nil leaves it.
	Forget func(ctx context.Context, name string, revision uint64) error
}

// place is how far a sweep is: the revisions up to which every row has ended,
// or was warned of.
type place struct {
	Ended  uint64 `json:"ended,string"`
	Warned uint64 `json:"warned,string"`
	// Untold are revisions up to Warned of rows that nobody could be told of yet.
	Untold []uint64 `json:"untold,omitempty"`
}

func (p place) equal(other place) bool {
	return p.Ended == other.Ended && p.Warned == other.Warned && slices.Equal(p.Untold, other.Untold)
}

const (
	// maxUntold bounds [place.Untold]: with more, the sweep waits where it is.
	maxUntold = 1000
	// patience is how much of a run may be spent on telling in vain.
	patience = time.Minute
)

// Result counts what a sweep did; Untold is how many of those that were warned of
// nobody could be told of yet.
type Result struct{ Ended, Warned, Untold int }

// Run sweeps once. Its cost is that of what it ends and warns of. A record that
// cannot be read is an error, and does not keep the others.
func (s Sweep) Run(ctx context.Context, now time.Time) (Result, error) {
	var done Result
	at, revision, err := s.load(ctx)
	if err != nil {
		return done, fmt.Errorf("sweep of %s: %w", s.Name, err)
	}
	before := at
	before.Untold = slices.Clone(at.Untold)
	done.Ended, err = s.pass(ctx, &at.Ended, pass{
		do: s.End, forget: s.Forget, now: now, come: func(used time.Time) bool { return s.Life.Ended(used, now) },
	})
	at.Warned = max(at.Warned, at.Ended)
	t := &teller{Sweep: s, left: patience}
	err = errors.Join(err, t.again(ctx, &at, now))
	var warning error
	done.Warned, warning = s.pass(ctx, &at.Warned, pass{
		do:  func(ctx context.Context, row journal.WrittenRow) error { return t.warn(ctx, &at, row) },
		now: now, come: func(used time.Time) bool { return s.Life.Warned(used, now) },
	})
	err = errors.Join(err, warning)
	done.Untold = len(at.Untold)
	if !at.equal(before) {
		// Also after an error: what was done is not done again.
		err = errors.Join(err, s.store(context.WithoutCancel(ctx), at, revision))
	}
	if err != nil {
		return done, fmt.Errorf("sweep of %s: %w", s.Name, err)
	}
	return done, nil
}

// teller tells of rows, and bounds the time that it takes when nobody can be told.
type teller struct {
	Sweep

	left time.Duration // for calls that fail
}

func (t *teller) tell(ctx context.Context, row journal.WrittenRow) error {
	began := time.Now()
	err := t.Tell(ctx, row)
	if err != nil {
		t.left -= time.Since(began)
	}
	return err
}

// warn tells of a row and notes it.
func (t *teller) warn(ctx context.Context, at *place, row journal.WrittenRow) error {
	if t.Tell != nil {
		if err := t.tell(ctx, row); err != nil {
			if ctx.Err() != nil || raced(err) || len(at.Untold) >= maxUntold || t.left < 0 {
				return err
			}
			at.Untold = append(at.Untold, row.Revision)
		}
	}
	return t.Warn(ctx, row)
}

// again tells of the rows that nobody could be told of. One that has changed since,
// or ended, is no longer to be told of. Those that fail come last the next time.
func (t *teller) again(ctx context.Context, at *place, now time.Time) error {
	var failed []uint64
	for i, revision := range at.Untold {
		if t.left < 0 {
			at.Untold = append(slices.Clone(at.Untold[i:]), failed...)
			return nil
		}
		row, ok, err := t.at(ctx, revision)
		if err != nil {
			at.Untold = append(slices.Clone(at.Untold[i:]), failed...)
			return err
		}
		if !ok {
			continue
		}
		if used, ok, err := t.used(row); err != nil || !ok || t.Life.Ended(used, now) {
			continue // an error is told of where the ends are looked for
		}
		if err := t.tell(ctx, row); err != nil && !raced(err) {
			failed = append(failed, revision)
		}
	}
	at.Untold = failed
	return nil
}

// at returns the row with a revision, if it is still the present one.
func (s Sweep) at(ctx context.Context, revision uint64) (journal.WrittenRow, bool, error) {
	for row, err := range s.Rows.InOrder(ctx, s.Prefix, revision-1) {
		return row, row.Revision == revision, err
	}
	return journal.WrittenRow{}, false, nil
}

type pass struct {
	now    time.Time
	come   func(used time.Time) bool
	do     func(context.Context, journal.WrittenRow) error
	forget func(ctx context.Context, name string, revision uint64) error
}

// pass does something about every row behind a place whose time has come, and
// moves the place. The first row whose time has not come ends it.
func (s Sweep) pass(ctx context.Context, at *uint64, p pass) (int, error) {
	count := 0
	var unreadable error
	for row, err := range s.Rows.InOrder(ctx, s.Prefix, *at) {
		if err != nil {
			return count, errors.Join(unreadable, err)
		}
		switch used, ok, err := s.used(row); {
		case err != nil:
			unreadable = errors.Join(unreadable, fmt.Errorf("row %s: %w", row.Name, err))
		case ok && !p.come(used):
			return count, unreadable
		case ok:
			if err = p.do(ctx, row); err == nil {
				count++
			} else if !raced(err) {
				return count, errors.Join(unreadable, err)
			}
		case row.Deleted && p.forget != nil:
			if p.now.Sub(row.Written) < s.Life.Refresh {
				return count, unreadable // whoever watches may not have seen it yet
			}
			if err := p.forget(ctx, row.Name, row.Revision); err != nil && !raced(err) {
				return count, errors.Join(unreadable, err)
			}
		}
		*at = row.Revision
	}
	return count, unreadable
}

func (s Sweep) used(row journal.WrittenRow) (time.Time, bool, error) {
	if row.Deleted {
		return time.Time{}, false, nil
	}
	return s.Used(row)
}

// Unchanged returns kms.ErrRowConflict for a row that is no longer at the revision
// that a sweep came upon.
func Unchanged(have, swept uint64) error {
	if have != swept {
		return kms.ErrRowConflict
	}
	return nil
}

// raced reports whether a row was written or removed by another in between.
func raced(err error) bool {
	return errors.Is(err, kms.ErrRowConflict) || errors.Is(err, kms.ErrRowNotFound)
}

func (s Sweep) load(ctx context.Context) (place, uint64, error) {
	var at place
	row, err := s.Places.Load(ctx, s.row())
	if errors.Is(err, kms.ErrRowNotFound) {
		return at, 0, nil
	}
	if err != nil {
		return at, 0, err
	}
	if err := json.Unmarshal(row.Value, &at); err != nil {
		return at, 0, fmt.Errorf("row %s: %w", s.row(), journal.ErrCorrupt)
	}
	return at, row.Revision, nil
}

// store keeps a place. When another process was faster, its place counts: what
// lies between is looked at again.
func (s Sweep) store(ctx context.Context, at place, revision uint64) error {
	value, err := json.Marshal(at)
	if err != nil {
		return err
	}
	if revision == 0 {
		_, err = s.Places.Create(ctx, s.row(), value)
	} else {
		_, err = s.Places.Update(ctx, s.row(), value, revision)
	}
	if errors.Is(err, kms.ErrRowConflict) {
		return nil
	}
	return err
}

func (s Sweep) row() string { return "shelf." + s.Name }
