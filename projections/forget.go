package projections

import (
	"context"
	"errors"
	"fmt"

	"github.com/cofferdb/coffer/journal"
)

// PerApp is a [Projection] that has tables whose keys begin with an app: all
// that it has of an app, but for what leads nowhere without them and expires.
type PerApp interface {
	// AppTables returns those of Tables whose keys go on with the app's id.
	AppTables() []byte
}

// Forget removes what the views have of a deleted app. Its events must be gone
// from the journal before: Forget waits until the views have come past what is in
// the journal now, so that nothing that was on its way is applied afterwards. Its
// cost does not grow with what the app had. It can be repeated.
func (r *Runner) Forget(ctx context.Context, app journal.AppID) error {
	for _, t := range r.tails {
		last, err := r.source.Last(ctx, t.stream.Name)
		if err != nil {
			return fmt.Errorf("projections: forget app %s: end of %s: %w", app, t.stream.Name, err)
		}
		// One that has stopped applies nothing, and goes on behind the purge.
		if err := t.wait(ctx, last); err != nil && !errors.Is(err, ErrStopped) {
			return fmt.Errorf("projections: forget app %s: %w", app, err)
		}
	}
	seen := map[string]bool{}
	err := r.store.Update(func(txn Txn) error {
		for _, t := range r.tails {
			of, ok := t.projection.(PerApp)
			if name := t.projection.Name(); ok && !seen[name] {
				seen[name] = true
				for _, table := range of.AppTables() {
					from := append([]byte{table}, app[:]...)
					txn.DeleteRange(from, after(from))
				}
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("projections: forget app %s: %w", app, err)
	}
	return nil
}

// after returns the end of the keys with a prefix. No table is 0xff throughout.
func after(prefix []byte) []byte {
	end := append([]byte(nil), prefix...)
	for i := len(end) - 1; i >= 0; i-- {
		if end[i]++; end[i] != 0 {
			return end[:i+1]
		}
	}
	return nil
}
