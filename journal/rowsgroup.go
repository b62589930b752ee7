package journal

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/cofferdb/coffer/kms"
)

const (
	groupWriters = 64
	// maxDeferred is how many revisions of a row are left to Sweep. The bucket
	// keeps eight: one that is pushed out of it could not be overwritten any more.
	maxDeferred = 3
	// sweepAfter is how long after the last of several groups the sweep comes: it
	// takes the disk that they need.
	sweepAfter = 10 * time.Second
)

var _ kms.RowsGroup = (*Rows)(nil)

// UpdateGroup replaces rows and makes them durable together. The bytes of those
// before are overwritten by Sweep, and by the next Update of the row.
func (r *Rows) UpdateGroup(ctx context.Context, updates []kms.RowUpdate) []error {
	errs := make([]error, len(updates))
	var wg sync.WaitGroup
	next := make(chan int)
	for range min(groupWriters, len(updates)) {
		wg.Go(func() {
			for i := range next {
				errs[i] = r.updateLater(ctx, updates[i])
			}
		})
	}
	for i := range updates {
		next <- i
	}
	close(next)
	wg.Wait()
	var failed error
	if r.sync != nil {
		if err := r.sync.Sync(r.stream); err != nil {
			failed = fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
	}
	for i, u := range updates {
		if errs[i] == nil {
			errs[i] = failed
		}
		if errs[i] != nil {
			errs[i] = fmt.Errorf("update row %s: %w", u.Name, errs[i])
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.soon == nil {
		r.soon = time.AfterFunc(sweepAfter, r.unfinished)
	} else {
		r.soon.Reset(sweepAfter)
	}
	return errs
}

// updateLater writes a row that is synced later, and overwrites the one before
// only when too many are left already.
func (r *Rows) updateLater(ctx context.Context, u kms.RowUpdate) error {
	if err := checkRowName(u.Name); err != nil {
		return err
	}
	if u.Revision == 0 {
		return kms.ErrRowConflict
	}
	r.mu.Lock()
	full := r.deferred[u.Name] >= maxDeferred
	r.mu.Unlock()
	if full {
		_, err := r.Update(ctx, u.Name, u.Value, u.Revision)
		return err
	}
	if _, err := r.write(ctx, u.Name, u.Value, u.Revision, ""); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.deferred[u.Name]++
	return nil
}

// settled notes that nothing of a row is left to overwrite.
func (r *Rows) settled(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.deferred, name)
}

// unfinished lets the next Sweep come soon.
func (r *Rows) unfinished() {
	select {
	case r.left <- struct{}{}:
	default:
	}
}
