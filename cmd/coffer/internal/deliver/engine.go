package deliver

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections/callbacks"
	"github.com/cofferdb/coffer/projections/history"
)

const (
	// reload is how often all endpoints are read, in case a change was missed.
	reload = time.Minute
	// again is how long to wait before an endpoint that could not be read, or
	// whose worker has failed, is tried again.
	again = time.Second
	// drain is how long a worker that ends waits for the requests under way.
	drain = 5 * time.Second
	// maxRequests bounds the requests of a process.
	maxRequests = 4096
)

// Config is what an [Engine] needs. Everything but Leases, Disabled, Log and Now
// is required.
type Config struct {
	Journal   *journal.Journal
	Events    *history.View
	View      *callbacks.View
	Endpoints *endpoints.Store
	// Rows are those of the registry.
	Rows kms.Rows
	// Changed returns a channel that is closed when the history view has
	// something new of the app: [projections.Runner.Changed].
	Changed func(journal.AppID) <-chan struct{}

	Transport Transport
	Signer    Signer
	Encoder   Encoder

	// Leases say which endpoints are this process's; nil when no other process
	// can reach the region's streams.
	Leases Leases
	// Disabled is told of endpoints that were disabled because they answered
	// 410 or had failed for too long, as their Untold says: again, by whichever
	// process holds the endpoint, until it has returned nil and that is stored.
	Disabled func(ctx context.Context, e endpoints.Endpoint) error
	Log      *slog.Logger
	Now      func() time.Time
}

// Leases divide the endpoints among processes.
type Leases interface {
	// Holds reports whether the endpoint is this process's, under which token,
	// and returns a channel that is closed when that may have changed.
	Holds(id journal.EndpointID) (token uint64, ok bool, changed <-chan struct{})
}

// Engine delivers. [Engine.Run] does the work.
type Engine struct {
	Config

	log      *slog.Logger
	now      func() time.Time
	streams  *journal.Callbacks
	schedule schedule
	requests chan struct{} // of capacity maxRequests: those under way
	side     sync.WaitGroup
	replays  replays
	wake     chan struct{} // of capacity 1: look for replays

	mu      sync.Mutex // guards what follows
	running map[endpoints.Ref]*running
}

// running is an endpoint that is looked after.
type running struct {
	ref    endpoints.Ref
	poke   chan struct{} // of capacity 1: read the endpoint again
	forced atomic.Bool   // start anew although the settings are the same
	// paused says why nothing is sent although there is something, "" if it is.
	paused string
}

// New returns an engine. It starts nothing.
func New(cfg Config) *Engine {
	e := &Engine{
		Config: cfg, log: cfg.Log, now: cfg.Now, streams: cfg.Journal.Callbacks(),
		requests: make(chan struct{}, maxRequests), running: make(map[endpoints.Ref]*running),
		replays: replays{cancel: make(map[[16]byte]context.CancelFunc)}, wake: make(chan struct{}, 1),
	}
	e.schedule = newSchedule(e.streams.Retention())
	if e.log == nil {
		e.log = slog.New(slog.DiscardHandler)
	}
	if e.now == nil {
		e.now = time.Now
	}
	return e
}

// Run delivers until ctx ends. It returns when every worker has ended.
func (e *Engine) Run(ctx context.Context) {
	var work sync.WaitGroup
	defer e.side.Wait()
	defer work.Wait()
	var changes <-chan endpoints.Ref
	look := time.NewTicker(reload)
	defer look.Stop()
	for {
		if changes == nil {
			var err error
			if changes, err = e.Endpoints.Watch(ctx); err != nil && ctx.Err() == nil {
				e.log.Warn("endpoints are not followed", "error", err)
			}
			e.startAll(ctx, &work)
			e.runReplays(ctx, &work)
		}
		var retry <-chan time.Time
		if changes == nil {
			retry = time.After(again)
		}
		select {
		case <-ctx.Done():
			return
		case <-retry:
		case <-look.C:
			e.startAll(ctx, &work)
			e.runReplays(ctx, &work)
		case <-e.wake:
			e.runReplays(ctx, &work)
		case ref, open := <-changes:
			if !open {
				changes = nil
				continue
			}
			e.start(ctx, &work, ref)
		}
	}
}

func (e *Engine) startAll(ctx context.Context, work *sync.WaitGroup) {
	refs, err := e.Endpoints.All(ctx)
	if err != nil {
		if ctx.Err() == nil {
			e.log.Warn("endpoints cannot be read", "error", err)
		}
		return
	}
	for _, ref := range refs {
		e.start(ctx, work, ref)
	}
}

// start looks after an endpoint, or has its goroutine read it again.
func (e *Engine) start(ctx context.Context, work *sync.WaitGroup, ref endpoints.Ref) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if r := e.running[ref]; r != nil {
		select {
		case r.poke <- struct{}{}:
		default:
		}
		return
	}
	r := &running{ref: ref, poke: make(chan struct{}, 1)}
	e.running[ref] = r
	work.Go(func() { e.look(ctx, ref, r) })
}

// look runs an endpoint's worker, anew after each change, until the endpoint is
// deleted.
func (e *Engine) look(ctx context.Context, ref endpoints.Ref, r *running) {
	var last uint64 // the sequence of the last record of this process
	for ctx.Err() == nil {
		ep, err := e.Endpoints.Endpoint(ctx, ref.App, ref.ID)
		switch {
		case errors.Is(err, endpoints.ErrNotFound):
			e.Transport.Forget(ref.ID)
			if e.forget(ref, r) {
				return
			}
			continue
		case err != nil:
			e.pause(r, err)
			e.sleep(ctx, r.poke, again)
			continue
		case ep.Untold != nil && e.Disabled != nil:
			if err := e.tell(ctx, &ep, r); err != nil && ctx.Err() == nil {
				e.pause(r, err)
				e.sleep(ctx, r.poke, again)
			}
			continue
		case ep.State != endpoints.Enabled, ep.AskedOnly:
			e.pause(r, nil)
			e.sleep(ctx, r.poke, 0)
			continue
		}
		if last, err = e.work(ctx, &ep, r, last); err != nil && ctx.Err() == nil {
			e.pause(r, err)
			e.sleep(ctx, r.poke, again)
		}
	}
}

// tell has Disabled told of an endpoint that was disabled, if it is this process's,
// and stores that it was.
func (e *Engine) tell(ctx context.Context, ep *endpoints.Endpoint, r *running) error {
	if e.Leases != nil {
		if _, ok, changed := e.Leases.Holds(ep.ID); !ok {
			e.pause(r, nil)
			select {
			case <-ctx.Done():
			case <-changed:
			case <-r.poke:
			}
			return nil
		}
	}
	if err := e.Disabled(ctx, *ep); err != nil {
		return fmt.Errorf("endpoint %s: its app is not told: %w", ep.IDText(), err)
	}
	told := *ep.Untold
	_, err := e.Endpoints.Change(ctx, ep.App, ep.ID, func(now *endpoints.Endpoint) error {
		if now.Untold == nil || !now.Untold.Since.Equal(told.Since) {
			return endpoints.ErrChanged
		}
		now.Untold = nil
		return nil
	})
	if errors.Is(err, endpoints.ErrChanged) || errors.Is(err, endpoints.ErrNotFound) {
		return nil
	}
	return err
}

// forget takes a deleted endpoint off, unless it has changed again.
func (e *Engine) forget(ref endpoints.Ref, r *running) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	select {
	case <-r.poke:
		return false
	default:
	}
	delete(e.running, ref)
	return true
}

// sleep waits for a poke, or at most d when it is not 0.
func (e *Engine) sleep(ctx context.Context, poke <-chan struct{}, d time.Duration) {
	var timer <-chan time.Time
	if d > 0 {
		timer = time.After(d)
	}
	select {
	case <-ctx.Done():
	case <-poke:
	case <-timer:
	}
}

// pause notes why an endpoint gets nothing at present.
func (e *Engine) pause(r *running, err error) {
	text := ""
	if err != nil {
		text = pauseText(err)
	}
	e.mu.Lock()
	changed := r.paused != text
	r.paused = text
	e.mu.Unlock()
	if changed && err != nil {
		e.log.Warn("deliveries are paused", "app", r.ref.App.String(), "endpoint", endpoints.FormatID(r.ref.ID), "error", err)
	}
}

// Paused says why an endpoint gets nothing although it is enabled: "keys" or
// "store"; "" when it does.
func (e *Engine) Paused(ref endpoints.Ref) string {
	e.mu.Lock()
	defer e.mu.Unlock()
	if r := e.running[ref]; r != nil {
		return r.paused
	}
	return ""
}

// Poke has an endpoint's worker start anew from what the view has.
func (e *Engine) Poke(ref endpoints.Ref) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if r := e.running[ref]; r != nil {
		r.forced.Store(true)
		select {
		case r.poke <- struct{}{}:
		default:
		}
	}
}

// mine reports whether an endpoint is this process's.
func (e *Engine) mine(id journal.EndpointID) bool {
	if e.Leases == nil {
		return true
	}
	_, ok, _ := e.Leases.Holds(id)
	return ok
}

// nudge has the process that an endpoint belongs to start its worker anew from what
// the view has, and look for its replays. Another one is told by the endpoint's row,
// which is stored again as it is.
func (e *Engine) nudge(ctx context.Context, ref endpoints.Ref) error {
	if e.mine(ref.ID) {
		e.Poke(ref)
		return nil
	}
	_, err := e.Endpoints.Change(ctx, ref.App, ref.ID, func(*endpoints.Endpoint) error { return nil })
	return err
}

// messageID is the webhook-id of events for an endpoint.
func (e *Engine) messageID(ctx context.Context, ep *endpoints.Endpoint, positions ...journal.Position) (string, error) {
	input := make([]byte, 0, len(ep.ID)+8*len(positions))
	input = append(input, ep.ID[:]...)
	for _, p := range positions {
		input = appendPosition(input, p)
	}
	mac, err := e.Journal.MAC(ctx, ep.App, "webhook-id", input)
	if err != nil {
		return "", fmt.Errorf("id of a message: %w", err)
	}
	return "msg_" + hex.EncodeToString(mac[:16]), nil
}

func appendPosition(dst []byte, p journal.Position) []byte {
	for shift := 56; shift >= 0; shift -= 8 {
		dst = append(dst, byte(p>>shift))
	}
	return dst
}
