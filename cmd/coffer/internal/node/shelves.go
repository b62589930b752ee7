package node

import (
	"context"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/cmd/coffer/internal/accounts"
	"github.com/cofferdb/coffer/cmd/coffer/internal/deletion"
	"github.com/cofferdb/coffer/cmd/coffer/internal/profiles"
	"github.com/cofferdb/coffer/cmd/coffer/internal/shelf"
	"github.com/cofferdb/coffer/journal"
)

// openDeletions opens the profiles, and what deletes apps with them.
func (r *region) openDeletions(js jetstream.JetStream, syncer journal.Syncer) {
	r.shelf = journal.NewRows(js, journal.ProfileBucket(r.config.ID), syncer)
	r.profiles = profiles.New(profiles.Config{
		Rows: r.shelf, Keyring: r.journal.Keyring(), Retention: r.journal.Retention(), Log: r.log, Now: r.options.now,
	})
	r.deletions = deletion.New(deletion.Options{
		Journal: r.journal, Accounts: r.accounts, Rows: r.rows, Views: r.runner, Log: r.log, Now: r.options.now,
		Steps: []deletion.Step{
			{Name: "profiles", Do: r.profiles.DeleteApp, Count: r.profiles.CountApp},
			{Name: "monitoring", Do: r.journal.DeleteMonitoring, Count: r.journal.CountMonitoring},
			{Name: "attachments", Do: r.attached.DeleteApp, Count: r.attached.CountApp},
		},
	})
}

// shelfTicks is how many times in the refresh of a record's clock the sweeps run:
// each hour by default. A look that finds nothing costs two requests.
const shelfTicks = 24

// sweepShelves ends what nobody has used for its lifetime, and warns before.
func (r *region) sweepShelves(ctx context.Context) {
	tick := time.NewTicker(max(r.journal.Retention().Refresh/shelfTicks, fastest))
	defer tick.Stop()
	for {
		for _, sweep := range []shelf.Sweep{r.accountSweep(), r.profileSweep()} {
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
	began := time.Now()
	done, err := sweep.Run(ctx, r.options.now())
	if err != nil && ctx.Err() == nil {
		r.log.Error("unused records stay", "kind", sweep.Name, "err", err)
	}
	if err == nil {
		r.swept.done(sweep.Name, began)
	}
	r.metrics.Unused(sweep.Name, done.Warned, done.Ended)
	if done != (shelf.Result{}) {
		r.log.Info("unused records have ended or were warned of", "kind", sweep.Name, "ended", done.Ended, "warned", done.Warned, "untold", done.Untold)
	}
}

// processActor names this process in the audit log.
const processActor = "process:coffer"

func (r *region) accountSweep() shelf.Sweep {
	sweep := r.accounts.Sweep(r.rows, func(ctx context.Context, w accounts.Warning) error {
		return r.journal.Audit(ctx, journal.AuditEntry{
			Actor: processActor, Action: "account.expiring", Target: "account:" + w.ID, Outcome: "ok",
			Detail: map[string]string{"ends": w.Ends.UTC().Format(time.RFC3339)},
		})
	}, r.tellAccounts())
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

func (r *region) profileSweep() shelf.Sweep {
	return r.profiles.Sweep(r.shelf, r.rows, func(ctx context.Context, w profiles.Warning) error {
		return r.journal.Audit(ctx, journal.AuditEntry{
			Actor: processActor, Action: "profile.expiring", Target: "app:" + w.App.String(), Outcome: "ok",
			Detail: map[string]string{"subject": w.Subject.String(), "ends": w.Ends.UTC().Format(time.RFC3339)},
		})
	}, r.tellProfile)
}
