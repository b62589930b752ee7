package node

import (
	"context"
	"time"
)

const (
	// expireEvery is how often what has expired leaves the view; readers are
	// not shown it in the meantime.
	expireEvery = 5 * time.Minute
	// destroyEvery is how often the keys of expired epochs are destroyed.
	destroyEvery = time.Hour
	// fastest is how often anything of this is done at most, however short a day.
	fastest = 250 * time.Millisecond
)

// clean enforces retention where nobody reads: in the view, and in the keyring,
// so that copies elsewhere can no longer be opened either.
func (r *region) clean(ctx context.Context) {
	expire, destroy := time.NewTicker(r.options.every(expireEvery)), time.NewTicker(r.options.every(destroyEvery))
	defer expire.Stop()
	defer destroy.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-expire.C:
			r.expire(ctx)
		case <-r.moved:
			r.expire(ctx)
		case <-destroy.C:
			r.destroyEpochs(ctx, r.options.now())
		}
	}
}

func (r *region) expire(ctx context.Context) {
	if n, err := r.view.Expire(ctx, r.options.now()); err != nil && ctx.Err() == nil {
		r.log.Error("expired events stay in the view", "err", err)
	} else if n > 0 {
		r.log.Info("expired events have left the view", "events", n)
	}
	if _, err := r.roaming.Expire(ctx, r.options.now()); err != nil && ctx.Err() == nil {
		r.log.Error("expired events stay in the roaming view", "err", err)
	}
}

func (r *region) destroyEpochs(ctx context.Context, now time.Time) {
	destroyed, failed, began := 0, false, time.Now()
	for app, err := range r.journal.Apps(ctx) {
		n := 0
		if err == nil {
			n, err = r.journal.Keyring().DestroyEpochs(ctx, app.ID.String(), now)
		}
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			failed = true
			r.log.Error("keys of expired epochs stay", "app", app.ID.String(), "err", err)
		}
		destroyed += n
	}
	if !failed {
		r.swept.done("keys", began)
	}
	if destroyed > 0 {
		r.log.Info("keys of expired epochs were destroyed", "epochs", destroyed)
	}
}
