package presend

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/deliver"
	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

var (
	// ErrRefused means that the app's endpoint does not want the message stored.
	// Do not send it again; the [*Refusal] has its reason.
	ErrRefused = errors.New("the message was refused by the app's own rules")
	// ErrUnanswered means that the endpoint did not answer, and that the app wants
	// nothing stored then. Send it again later, with the same id.
	ErrUnanswered = errors.New("whether the message may be stored could not be asked")
)

// A Refusal is a message that was refused.
type Refusal struct{ Reason string }

// Error has the reason that the endpoint gave.
func (r *Refusal) Error() string {
	if r.Reason == "" {
		return ErrRefused.Error()
	}
	return ErrRefused.Error() + ": " + r.Reason
}

// Unwrap returns [ErrRefused].
func (*Refusal) Unwrap() error { return ErrRefused }

// Outcome is what became of a question.
type Outcome string

// The outcomes. Those after Rewritten are followed by the fallback.
const (
	Allowed   Outcome = "allowed"
	Denied    Outcome = "denied"
	Rewritten Outcome = "rewritten"
	Late      Outcome = "timeout"
	Failed    Outcome = "failed"  // no connection, or a status that is not 2xx
	Unclear   Outcome = "unclear" // an answer that cannot be understood or is not allowed
	Skipped   Outcome = "skipped" // not asked: the breaker is open
	Busy      Outcome = "busy"    // not asked: too many questions at once
	Absent    Outcome = "absent"  // not asked: the endpoint is not enabled
)

const (
	endpointAge = 2 * time.Second // how old what is known of an endpoint may be
	reloadEvery = 30 * time.Second
	retryEvery  = time.Second
)

// Config is what an [Asker] needs.
type Config struct {
	Rows      kms.Rows
	Endpoints *endpoints.Store
	Journal   *journal.Journal
	// Post asks an endpoint, within ctx.
	Post func(ctx context.Context, e *endpoints.Endpoint, event *journal.Event) (deliver.Answer, error)
	// Failing is told that an app's endpoint does not answer and is left alone for
	// a while.
	Failing func(app journal.AppID, e *endpoints.Endpoint)
	// Count is told of each outcome; nil means nobody is.
	Count func(outcome string)
	// MaxTimeout is the longest time a setting may have; 0 means the constant.
	MaxTimeout time.Duration
	Log        *slog.Logger
}

// Asker asks the endpoints of a region's apps. [Asker.Run] has to run.
type Asker struct {
	Config

	ready  chan struct{} // closed when the settings are known
	once   sync.Once
	memory memory

	mu   sync.Mutex // guards apps
	apps map[journal.AppID]*asked
}

// asked is an app that asks.
type asked struct {
	setting Setting
	slots   chan struct{}
	counts  *counts

	breaker breaker

	mu       sync.Mutex // guards what follows
	endpoint *endpoints.Endpoint
	read     time.Time // when endpoint was
}

type counts struct{ byOutcome sync.Map } // Outcome to *atomic.Uint64

func (c *counts) add(o Outcome) {
	n, _ := c.byOutcome.LoadOrStore(o, new(atomic.Uint64))
	n.(*atomic.Uint64).Add(1) //nolint:errcheck,forcetypeassert // nothing else is stored
}

// New returns an asker.
func New(c Config) *Asker {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.MaxTimeout <= 0 {
		c.MaxTimeout = MaxTimeout
	}
	return &Asker{Config: c, ready: make(chan struct{}), apps: make(map[journal.AppID]*asked)}
}

// Run follows the settings until ctx ends.
func (a *Asker) Run(ctx context.Context) {
	for ctx.Err() == nil {
		err := a.follow(ctx)
		if err != nil && ctx.Err() == nil {
			a.Log.Warn("whom apps ask is not followed", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(retryEvery):
		}
	}
}

func (a *Asker) follow(ctx context.Context) error {
	watch, stop := context.WithCancel(ctx)
	defer stop()
	names, err := a.Rows.Watch(watch, rowPrefix)
	if err != nil {
		return err
	}
	if err := a.loadAll(ctx); err != nil {
		return err
	}
	a.once.Do(func() { close(a.ready) })
	again := time.NewTicker(reloadEvery)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-again.C:
			if err := a.loadAll(ctx); err != nil {
				return err
			}
		case name, ok := <-names:
			if !ok {
				return errors.New("changes may have been missed")
			}
			app, err := journal.ParseAppID(strings.TrimPrefix(name, rowPrefix))
			if err != nil {
				continue
			}
			if err := a.load(ctx, app); err != nil {
				return err
			}
		}
	}
}

func (a *Asker) loadAll(ctx context.Context) error {
	for name, err := range a.Rows.List(ctx, rowPrefix) {
		if err != nil {
			return fmt.Errorf("listing whom apps ask: %w", err)
		}
		app, err := journal.ParseAppID(strings.TrimPrefix(name, rowPrefix))
		if err != nil {
			return fmt.Errorf("row %s: %w", name, kms.ErrKeyringCorrupt)
		}
		if err := a.load(ctx, app); err != nil {
			return err
		}
	}
	return nil
}

// load takes an app's setting over as it is stored now.
func (a *Asker) load(ctx context.Context, app journal.AppID) error {
	s, err := a.stored(ctx, app)
	if err != nil && !errors.Is(err, ErrNotSet) {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		delete(a.apps, app)
		return nil
	}
	old := a.apps[app]
	if old != nil && same(old.setting, s) {
		return nil
	}
	fresh := &asked{setting: s, slots: make(chan struct{}, endpoints.MaxConcurrency), counts: &counts{}}
	if old != nil {
		fresh.counts = old.counts
	}
	a.apps[app] = fresh
	return nil
}

func same(a, b Setting) bool { return fmt.Sprint(a) == fmt.Sprint(b) }

// Counts returns what has become of an app's questions in this process.
func (a *Asker) Counts(app journal.AppID) map[Outcome]uint64 {
	out := make(map[Outcome]uint64)
	a.mu.Lock()
	s := a.apps[app]
	a.mu.Unlock()
	if s != nil {
		s.counts.byOutcome.Range(func(k, v any) bool {
			out[k.(Outcome)] = v.(*atomic.Uint64).Load() //nolint:errcheck,forcetypeassert // nothing else is stored
			return true
		})
	}
	return out
}

// Apps returns the same for every app that asks.
func (a *Asker) Apps() map[journal.AppID]map[Outcome]uint64 {
	a.mu.Lock()
	apps := make([]journal.AppID, 0, len(a.apps))
	for app := range a.apps {
		apps = append(apps, app)
	}
	a.mu.Unlock()
	out := make(map[journal.AppID]map[Outcome]uint64, len(apps))
	for _, app := range apps {
		out[app] = a.Counts(app)
	}
	return out
}

// of returns an app that asks about events of a type; nil when it does not.
func (a *Asker) of(ctx context.Context, app journal.AppID) (*asked, error) {
	select {
	case <-a.ready:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.apps[app], nil
}

// current is the endpoint of an app, read again when it is a while ago. nil means
// that it cannot be asked.
func (s *asked) current(ctx context.Context, store *endpoints.Store, app journal.AppID) *endpoints.Endpoint {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.read) < endpointAge {
		return s.endpoint
	}
	e, err := store.Endpoint(ctx, app, s.setting.Endpoint)
	switch {
	case errors.Is(err, endpoints.ErrNotFound):
		s.endpoint = nil
	case err != nil:
		return s.endpoint // as it was: the store is away
	case e.State != endpoints.Enabled:
		s.endpoint = nil
	default:
		s.endpoint = &e
	}
	s.read = time.Now()
	return s.endpoint
}
