package node

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/deliver"
	"github.com/cofferdb/coffer/cmd/coffer/internal/egress"
	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/cmd/coffer/internal/presend"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/callbacks"
)

// deliveries is what a region delivers callbacks with.
type deliveries struct {
	view    *callbacks.View
	runner  *projections.Runner
	engine  *deliver.Engine
	presend *presend.Asker
	// transport is closed last: it is used by requests too.
	transport *deliver.HTTP
	leases    *deliver.LeaseTable // nil when no other process can reach the streams
}

// openCallbacks makes the callback view, its runner, and the engine. The callback
// streams are another source than the messages', so they have a runner of their
// own, over the same store.
func (r *region) openCallbacks() error {
	d := &deliveries{}
	var err error
	d.view, err = callbacks.New(callbacks.Config{Store: r.store, Retention: r.journal.Callbacks().Retention()})
	if err != nil {
		return err
	}
	d.runner, err = projections.NewRunner(projections.RunnerConfig{
		Journal: r.journal.Callbacks(), Store: r.store, Projections: []projections.Projection{d.view}, Log: r.log,
		CloseStopped: true, // what it lacks would be sent again
	})
	if err != nil {
		return err
	}
	transport, err := callbackTransport(r.options.config.Callbacks)
	if err != nil {
		return err
	}
	d.transport = transport
	var leases deliver.Leases
	if r.nats == nil {
		d.leases = deliver.NewLeases(deliver.LeaseOptions{Rows: r.rows, Log: r.log})
		leases = d.leases
	}
	d.engine = deliver.New(deliver.Config{
		Leases:  leases,
		Journal: r.journal, Events: r.view, View: d.view, Endpoints: endpoints.New(r.rows, r.journal, r.options.now), Rows: r.rows, Changed: r.runner.Changed,
		Transport: meteredTransport{transport, r.meter}, Signer: deliver.Standard{}, Encoder: deliver.Events{},
		Disabled: r.endpointDisabled, Log: r.log, Now: r.options.now,
	})
	d.presend = presend.New(presend.Config{
		Rows: r.rows, Endpoints: d.engine.Endpoints, Journal: r.journal, Post: d.engine.Ask, Failing: r.presendFailing, Log: r.log,
		Count:      r.metrics.Counter("coffer_presend_questions_total", "What has become of the questions before messages are stored.", "outcome"),
		MaxTimeout: time.Duration(r.options.config.Callbacks.PresendTimeout),
	})
	r.callbacks = d
	return nil
}

// runEngine delivers until ctx ends, and gives the leases back after that.
func (d *deliveries) runEngine(ctx context.Context) {
	if d.leases != nil {
		leases, end := context.WithCancel(context.WithoutCancel(ctx))
		var work sync.WaitGroup
		defer work.Wait()
		defer end()
		work.Go(func() { d.leases.Run(leases) })
	}
	d.engine.Run(ctx)
}

func callbackTransport(c config.Callbacks) (*deliver.HTTP, error) {
	networks, err := c.Networks()
	if err != nil {
		return nil, err
	}
	proxy, err := c.Proxy()
	if err != nil {
		return nil, err
	}
	roots, err := c.Roots()
	if err != nil {
		return nil, err
	}
	return deliver.NewHTTP(deliver.TransportOptions{
		Dialer: &egress.Dialer{Policy: egress.NewPolicy(networks, c.Ports...), Proxy: proxy},
		Roots:  roots, Timeout: time.Duration(c.Timeout),
	}), nil
}

// deliver keeps the callback view and delivers until ctx ends.
func (r *region) deliver(ctx context.Context) {
	var work sync.WaitGroup
	defer work.Wait()
	work.Go(func() {
		if err := r.callbacks.runner.Run(ctx); err != nil {
			r.log.Error("the callback view has stopped", "err", err)
			r.mu.Lock()
			defer r.mu.Unlock()
			r.failure = err
		}
	})
	work.Go(func() { r.callbacks.runEngine(ctx) })
	work.Go(func() { r.callbacks.presend.Run(ctx) })
	expire := time.NewTicker(r.options.every(expireEvery))
	defer expire.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-expire.C:
			if _, err := r.callbacks.view.Expire(ctx, r.options.now()); err != nil && ctx.Err() == nil {
				r.log.Error("expired deliveries stay in the view", "err", err)
			}
		}
	}
}

// presendFailing records that an app's messages are no longer asked about, because
// nobody answers.
func (r *region) presendFailing(app journal.AppID, e *endpoints.Endpoint) {
	r.log.Warn("messages are not asked about: the endpoint does not answer", "app", app.String(), "endpoint", e.IDText())
	r.journal.AuditLater(journal.AuditEntry{
		Actor: "process:presend", Action: "presend.failing", Target: "endpoint:" + e.IDText(), Outcome: "ok",
		Detail: map[string]string{"app": app.String()},
	})
}

// endpointDisabled tells the app and the audit log what the engine did by itself. The
// event's id is of that change; the audit record may be written again when this
// process ends before the engine has noted it.
func (r *region) endpointDisabled(ctx context.Context, e endpoints.Endpoint) error {
	data, err := json.Marshal(struct {
		Endpoint string           `json:"endpoint"`
		Reason   endpoints.Reason `json:"reason"`
	}{e.IDText(), e.Untold.Reason})
	if err != nil {
		return fmt.Errorf("event of a disabled endpoint: %w", err)
	}
	err = r.tell(ctx, e.App, journal.Event{
		ID:   fmt.Sprintf("coffer:endpoint-disabled:%s:%d", e.IDText(), e.Untold.Since.UnixMilli()),
		Type: journal.EndpointDisabled, Data: data,
	})
	if err != nil {
		return r.untold(journal.EndpointDisabled, err, "app", e.App.String(), "endpoint", e.IDText())
	}
	return r.journal.Audit(ctx, journal.AuditEntry{
		Actor: "process:callbacks", Action: "endpoint.disabled", Target: "endpoint:" + e.IDText(), Outcome: "ok",
		Detail: map[string]string{"app": e.App.String(), "reason": string(e.Untold.Reason)},
	})
}
