package node

import (
	"context"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/shelf"
	"github.com/cofferdb/coffer/journal"
)

// shelfTicks is how many times in the refresh of a record's clock the sweeps run:
// each hour by default. A look that finds nothing costs two requests.
const shelfTicks = 24

// sweepShelves ends what nobody has used for its lifetime, and warns before.
func (r *region) sweepShelves(ctx context.Context) {
	tick := time.NewTicker(max(r.journal.Retention().Refresh/shelfTicks, time.Millisecond))
	defer tick.Stop()
	for {
		for _, sweep := range []shelf.Sweep{r.accountSweep()} {
			r.sweepShelf(ctx, sweep)
		}
		if n, err := r.accounts.DestroyEpochs(ctx); err != nil && ctx.Err() == nil {
			r.log.Error("keys of ended registration data stay", "err", err)
		} else if n > 0 {
			r.log.Info("keys of ended registration data were destroyed", "epochs", n)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (r *region) sweepShelf(ctx context.Context, sweep shelf.Sweep) {
	done, err := sweep.Run(ctx, r.options.now())
	if err != nil && ctx.Err() == nil {
		r.log.Error("unused records stay", "kind", sweep.Name, "err", err)
	}
	if done != (shelf.Result{}) {
		r.log.Info("unused records have ended or were warned of", "kind", sweep.Name, "ended", done.Ended, "warned", done.Warned)
	}
}

// processActor names this process in the audit log.
const processActor = "process:coffer"

func (r *region) accountSweep() shelf.Sweep {
	sweep := r.accounts.Sweep(r.rows, func(ctx context.Context, id string, ends time.Time) error {
		return r.journal.Audit(ctx, journal.AuditEntry{
			Actor: processActor, Action: "account.expiring", Target: "account:" + id, Outcome: "ok",
			Detail: map[string]string{"ends": ends.UTC().Format(time.RFC3339)},
		})
	})
	end := sweep.End
	sweep.End = func(ctx context.Context, row journal.WrittenRow) error {
		if err := end(ctx, row); err != nil {
			return err
		}
		return r.journal.Audit(ctx, journal.AuditEntry{
			Actor: processActor, Action: "account.expired", Target: "account:" + row.Name[len(sweep.Prefix):], Outcome: "ok",
		})
	}
	return sweep
}
