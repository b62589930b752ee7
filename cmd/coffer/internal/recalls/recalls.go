// Package recalls erases what was recalled in apps that want that: the sealed
// bytes of a recalled message, and of its edits, in the journal and in the views.
//
// What is to be done is in the registry before the recall is acknowledged, so it
// is done also after a crash, by whoever serves the region next. Every step may be
// repeated. See docs/adr/0020-message-erasure.md.
package recalls

import (
	"context"
	"errors"
	"log/slog"
	"strconv"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections/history"
)

const (
	firstPause   = 20 * time.Millisecond // while the view has not come to a recall
	longestPause = 30 * time.Second      // then also for what other processes left
	oneTimeout   = time.Minute           // for one recall

	// abandoned is how long after its note a recall must have come.
	abandoned = time.Hour
)

// Options is what erasing takes. Journal and History are required.
type Options struct {
	Journal *journal.Journal
	History *history.View
	Log     *slog.Logger
	Now     func() time.Time

	step func(name string) error // of tests: called after each step
}

// Recalls erases what was recalled. Its methods may be called concurrently.
type Recalls struct{ o Options }

// New returns the recalls of a region.
func New(o Options) *Recalls {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.step == nil {
		o.step = func(string) error { return nil }
	}
	return &Recalls{o: o}
}

// Run erases until ctx ends.
func (r *Recalls) Run(ctx context.Context) {
	pause := firstPause
	for ctx.Err() == nil {
		left, err := r.Sweep(ctx)
		if err != nil && ctx.Err() == nil {
			r.o.Log.Warn("recalled messages are not erased yet; it is tried again", "error", err)
		}
		if left == 0 && err == nil {
			pause = longestPause
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
		case <-timer.C:
			pause = min(2*pause, longestPause)
		case <-r.o.Journal.Recalled():
			pause = firstPause
		}
		timer.Stop()
	}
}

// Sweep does what can be done now, and returns how many recalls are left.
func (r *Recalls) Sweep(ctx context.Context) (left int, err error) {
	list, err := r.o.Journal.Recalls(ctx)
	if err != nil {
		return 0, err
	}
	var failed error
	for _, recall := range list {
		done, err := r.one(ctx, recall)
		if errors.Is(err, journal.ErrMoving) {
			err = nil // until the plan change is over
		}
		if err != nil {
			failed = err
		}
		if !done {
			left++
		}
	}
	return left, failed
}

// over reports whether nothing will be recalled any more: the message has expired,
// or what was to recall it was refused.
func (r *Recalls) over(ctx context.Context, recall journal.Recall, known bool) (bool, error) {
	now := r.o.Now()
	if now.After(recall.Until) {
		return true, nil
	}
	if !known || now.Before(recall.Requested.Add(abandoned)) {
		return false, nil
	}
	stream, _, err := r.o.Journal.Locate(ctx, recall.App, 0)
	if errors.Is(err, journal.ErrUnknownApp) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	last, err := r.o.Journal.Last(ctx, stream)
	return err == nil && r.o.History.Applied(stream) >= last, err
}

// one erases what was recalled, unless it is not known to be yet.
func (r *Recalls) one(ctx context.Context, recall journal.Recall) (done bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, oneTimeout)
	defer cancel()
	positions, known, err := r.o.History.Recalled(ctx, recall.App, recall.Event)
	if err != nil {
		return false, err
	}
	if len(positions) == 0 {
		if over, err := r.over(ctx, recall, known); !over || err != nil {
			return false, err
		}
		return true, r.o.Journal.EndRecall(ctx, recall)
	}
	n, err := r.o.Journal.EraseRecords(ctx, recall.App, positions...)
	if errors.Is(err, journal.ErrUnknownApp) {
		return true, r.o.Journal.EndRecall(ctx, recall) // it was deleted, with its keys
	}
	if err == nil {
		err = r.o.step("journal")
	}
	if err != nil {
		return false, err
	}
	if err := r.o.History.EraseRecalled(ctx, recall.App, recall.Event); err != nil {
		return false, err
	}
	if err := r.o.step("views"); err != nil {
		return false, err
	}
	err = r.o.Journal.Audit(ctx, journal.AuditEntry{
		Actor: "process:coffer", Action: "message.erased", Target: "app:" + recall.App.String(), Outcome: "ok",
		Detail: map[string]string{"event": recall.Event.String(), "records": strconv.Itoa(n)},
	})
	if err == nil {
		err = r.o.step("audit")
	}
	if err != nil {
		return false, err
	}
	return true, r.o.Journal.EndRecall(ctx, recall)
}
