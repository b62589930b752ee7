package node

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/server"
	"github.com/cofferdb/coffer/kms"
)

const (
	readyFresh   = time.Second     // an answer is given again for so long
	readyTimeout = 2 * time.Second // of all checks together
	// A provider that has answered well is not asked again for so long, unless
	// the keyring has met a failure: AWS KMS bills each description.
	keysFresh = 15 * time.Second
)

// ready says what is wrong with the region. Load balancers ask often, so an
// answer is kept for a second, and one caller at a time finds it out.
func (r *region) ready(ctx context.Context) []server.Unready {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.checked.IsZero() && time.Since(r.checked) < readyFresh {
		return r.reasons
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), readyTimeout)
	defer cancel()
	r.reasons = r.check(ctx)
	r.checked = time.Now()
	return r.reasons
}

func (r *region) check(ctx context.Context) []server.Unready {
	var reasons []server.Unready
	var told []string
	say := func(part string, err error) {
		if err == nil {
			return
		}
		// Anyone may ask, so the names of keys and files are for the log.
		detail := err.Error()
		if class := kms.Class(err); class != nil {
			detail = class.Error()
		}
		reasons = append(reasons, server.Unready{Part: part, Detail: detail})
		told = append(told, part+": "+err.Error())
	}
	say("nats", r.checkNATS(ctx))
	if r.failure != nil {
		say("view", r.failure)
	} else {
		say("view", r.runner.Ready())
	}
	say("kms", r.checkKeys(ctx))
	if now := strings.Join(told, "; "); now != r.told {
		r.told = now
		if now == "" {
			r.log.Info("ready again")
		} else {
			r.log.Warn("not ready", "reasons", now)
		}
	}
	return reasons
}

var errDisconnected = errors.New("not connected to the NATS server")

func (r *region) checkNATS(ctx context.Context) error {
	if r.nats != nil {
		if err := r.nats.Check(ctx); err != nil {
			return err
		}
	}
	if !r.conn.IsConnected() {
		return errDisconnected
	}
	return nil
}

var errKeyState = errors.New("the key is not enabled")

// checkKeys asks the provider; keys that are cached may still serve for a
// while, and the region says so by staying up.
func (r *region) checkKeys(ctx context.Context) error {
	if err := r.describeKey(ctx); err != nil {
		return err
	}
	return r.probe.check(ctx, r.provider, r.config.ID, probeEvery(r.config.Keys))
}

func (r *region) describeKey(ctx context.Context) error {
	if time.Since(r.keysAnswered) < keysFresh && r.journal.Keyring().Status().Degraded == 0 {
		return nil
	}
	r.keysAnswered = time.Time{}
	description, err := r.provider.Describe(ctx)
	if err != nil {
		return err
	}
	if description.State != kms.StateEnabled {
		return errKeyState
	}
	r.keysAnswered = time.Now()
	return nil
}

// awaitReady returns when the region can be used.
func (r *region) awaitReady(ctx context.Context) error {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		err := r.runner.Ready()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return err
		}
	}
}
