package deliver

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections/history"
)

var (
	// ErrNoReplay means that the app has no replay with the id.
	ErrNoReplay = errors.New("replay not found")
	// ErrReplays means that the endpoint has as many replays under way as it may.
	// Wait for one to end, or cancel it.
	ErrReplays = errors.New("too many replays")
)

const (
	replayPrefix  = "replay."
	replayVersion = 1
	maxReplays    = 4 // under way, of an endpoint

	// DefaultReplayRate is the rate of a replay, in events a second.
	DefaultReplayRate = 100
	// MaxReplayRate is the highest one.
	MaxReplayRate = 10_000

	replayTries  = 5 // of an event, until it counts as failed
	replayNote   = time.Second
	replayEvents = 256 // between two notes of progress, at most
)

// A ReplaySpec says what is sent again.
type ReplaySpec struct {
	// After and Before bound positions, both exclusive; Before 0 is the end at
	// the start of the replay.
	After, Before journal.Position
	// From and Until bound the events' own times; zero is no bound.
	From, Until time.Time
	// Rate is events a second; 0 means DefaultReplayRate.
	Rate int
}

// replayRow is a replay as it is stored, in JSON.
type replayRow struct {
	Version  int              `json:"version"`
	Endpoint string           `json:"endpoint"`
	State    string           `json:"state"`
	After    journal.Position `json:"after"`
	Before   journal.Position `json:"before"`
	From     time.Time        `json:"from,omitzero"`
	Until    time.Time        `json:"until,omitzero"`
	Rate     int              `json:"rate"`
	Created  time.Time        `json:"created"`
	Finished time.Time        `json:"finished,omitzero"`
}

// The states of a replay.
const (
	ReplayRunning   = "running"
	ReplayDone      = "done"
	ReplayCancelled = "cancelled"
)

// A Replay is a range of events that is sent to an endpoint again.
type Replay struct {
	ID       [16]byte
	App      journal.AppID
	Endpoint journal.EndpointID
	State    string
	Spec     ReplaySpec
	Created  time.Time
	Finished time.Time
	// At is how far it has come, Sent and Failed count events.
	At     journal.Position
	Sent   uint64
	Failed uint16

	revision uint64
}

// IDText returns the id as callers see it.
func (r *Replay) IDText() string { return hex.EncodeToString(r.ID[:]) }

// running replays of this process, by id.
type replays struct {
	mu     sync.Mutex // guards cancel
	cancel map[[16]byte]context.CancelFunc
}

func replayName(app journal.AppID, id [16]byte) string {
	return replayPrefix + app.String() + "." + hex.EncodeToString(id[:])
}

// StartReplay begins to send events to an endpoint again. It returns when the
// replay is durable.
func (e *Engine) StartReplay(ctx context.Context, ep *endpoints.Endpoint, spec ReplaySpec) (Replay, error) {
	others, err := e.listReplays(ctx, replayPrefix+ep.App.String()+".")
	if err != nil {
		return Replay{}, err
	}
	n := 0
	for i := range others {
		if others[i].Endpoint == ep.ID && others[i].State == ReplayRunning {
			n++
		}
	}
	if n >= maxReplays {
		return Replay{}, ErrReplays
	}
	if spec.Rate == 0 {
		spec.Rate = DefaultReplayRate
	}
	if spec.Before == 0 {
		last, err := e.lastPosition(ctx, ep.App)
		if err != nil {
			return Replay{}, err
		}
		spec.Before = last + 1
	}
	r := Replay{
		ID: endpoints.NewID(), App: ep.App, Endpoint: ep.ID, State: ReplayRunning, Spec: spec, Created: e.now().UTC().Truncate(time.Millisecond), At: spec.After,
	}
	value, err := json.Marshal(r.row())
	if err != nil {
		return r, fmt.Errorf("encoding a replay: %w", err)
	}
	if r.revision, err = e.Rows.Create(ctx, replayName(r.App, r.ID), value); err != nil {
		return r, fmt.Errorf("storing a replay: %w", err)
	}
	e.wakeReplays()
	_ = e.nudge(ctx, endpoints.Ref{App: ep.App, ID: ep.ID}) // or it is found with the next look
	return r, nil
}

func (r *Replay) row() replayRow {
	return replayRow{
		Version: replayVersion, Endpoint: endpoints.FormatID(r.Endpoint), State: r.State, After: r.Spec.After, Before: r.Spec.Before,
		From: r.Spec.From, Until: r.Spec.Until, Rate: r.Spec.Rate, Created: r.Created, Finished: r.Finished,
	}
}

func (e *Engine) lastPosition(ctx context.Context, app journal.AppID) (journal.Position, error) {
	var last journal.Position
	_, err := e.Events.Replay(ctx, app, history.Query{Reverse: true, Limit: 1}, func(i history.Item) error {
		last = i.Position
		return nil
	})
	return last, err
}

// Replay returns a replay of an app.
func (e *Engine) Replay(ctx context.Context, app journal.AppID, id string) (Replay, error) {
	parsed, err := endpoints.ParseID(id)
	if err != nil {
		return Replay{}, ErrNoReplay
	}
	return e.loadReplay(ctx, app, parsed)
}

func (e *Engine) loadReplay(ctx context.Context, app journal.AppID, id [16]byte) (Replay, error) {
	stored, err := e.Rows.Load(ctx, replayName(app, id))
	if errors.Is(err, kms.ErrRowNotFound) {
		return Replay{}, ErrNoReplay
	}
	if err != nil {
		return Replay{}, fmt.Errorf("reading a replay: %w", err)
	}
	var row replayRow
	if err := json.Unmarshal(stored.Value, &row, json.RejectUnknownMembers(true)); err != nil || row.Version != replayVersion {
		return Replay{}, fmt.Errorf("replay %s: %w", hex.EncodeToString(id[:]), kms.ErrKeyringCorrupt)
	}
	r := Replay{
		ID: id, App: app, State: row.State, Created: row.Created, Finished: row.Finished, At: row.After, revision: stored.Revision,
		Spec: ReplaySpec{After: row.After, Before: row.Before, From: row.From, Until: row.Until, Rate: row.Rate},
	}
	if r.Endpoint, err = endpoints.ParseID(row.Endpoint); err != nil {
		return Replay{}, fmt.Errorf("replay %s: %w", hex.EncodeToString(id[:]), kms.ErrKeyringCorrupt)
	}
	p, ok, err := e.View.Replay(ctx, app, r.Endpoint, id)
	if err != nil {
		return r, err
	}
	if ok {
		r.At, r.Sent, r.Failed = max(p.At, r.At), p.Sent, p.Failed
	}
	return r, nil
}

func (e *Engine) listReplays(ctx context.Context, prefix string) ([]Replay, error) {
	var list []Replay
	for name, err := range e.Rows.List(ctx, prefix) {
		if err != nil {
			return nil, fmt.Errorf("listing replays: %w", err)
		}
		first, second, _ := strings.Cut(strings.TrimPrefix(name, replayPrefix), ".")
		app, err := journal.ParseAppID(first)
		if err != nil {
			continue
		}
		id, err := endpoints.ParseID(second)
		if err != nil {
			continue
		}
		r, err := e.loadReplay(ctx, app, id)
		if errors.Is(err, ErrNoReplay) {
			continue
		}
		if err != nil {
			return nil, err
		}
		list = append(list, r)
	}
	return list, nil
}

// CancelReplay ends a replay; what it has sent is not taken back.
func (e *Engine) CancelReplay(ctx context.Context, app journal.AppID, id string) (Replay, error) {
	for {
		r, err := e.Replay(ctx, app, id)
		if err != nil || r.State != ReplayRunning {
			return r, err
		}
		err = e.endReplay(ctx, &r, ReplayCancelled)
		if errors.Is(err, kms.ErrRowConflict) {
			continue
		}
		e.replays.mu.Lock()
		if cancel := e.replays.cancel[r.ID]; cancel != nil {
			cancel()
		}
		e.replays.mu.Unlock()
		return r, err
	}
}

func (e *Engine) endReplay(ctx context.Context, r *Replay, state string) error {
	r.State, r.Finished = state, e.now().UTC().Truncate(time.Millisecond)
	value, err := json.Marshal(r.row())
	if err != nil {
		return fmt.Errorf("encoding a replay: %w", err)
	}
	if r.revision, err = e.Rows.Update(ctx, replayName(r.App, r.ID), value, r.revision); err != nil {
		return fmt.Errorf("storing a replay: %w", err)
	}
	return nil
}

// runReplays takes up the replays that are under way and not run here, and
// removes those that ended long ago.
func (e *Engine) runReplays(ctx context.Context, work *sync.WaitGroup) {
	list, err := e.listReplays(ctx, replayPrefix)
	if err != nil {
		if ctx.Err() == nil {
			e.log.Warn("replays cannot be read", "error", err)
		}
		return
	}
	for i := range list {
		r := &list[i]
		if r.State != ReplayRunning {
			if e.now().Sub(r.Finished) > e.schedule.retention {
				_ = e.Rows.Delete(ctx, replayName(r.App, r.ID), r.revision) // or the next time
			}
			continue
		}
		if !e.mine(r.Endpoint) {
			continue
		}
		e.replays.mu.Lock()
		if e.replays.cancel[r.ID] == nil {
			run, cancel := context.WithCancel(ctx)
			e.replays.cancel[r.ID] = cancel
			work.Go(func() {
				defer func() {
					cancel()
					e.replays.mu.Lock()
					defer e.replays.mu.Unlock()
					delete(e.replays.cancel, r.ID)
				}()
				e.runReplay(run, r)
			})
		}
		e.replays.mu.Unlock()
	}
}

// wakeReplays has Run look for replays.
func (e *Engine) wakeReplays() {
	select {
	case e.wake <- struct{}{}:
	default:
	}
}

// runReplay sends what is left of a replay, unless the endpoint becomes another
// process's.
func (e *Engine) runReplay(ctx context.Context, r *Replay) {
	s := &replaying{Engine: e, r: r, noted: e.now()}
	for ctx.Err() == nil && e.mine(r.Endpoint) {
		ep, err := e.Endpoints.Endpoint(ctx, r.App, r.Endpoint)
		if errors.Is(err, endpoints.ErrNotFound) || err == nil && ep.State != endpoints.Enabled {
			s.end(ctx, ReplayCancelled, journal.DeliveryParked)
			return
		}
		done := false
		if err == nil {
			done, err = s.round(ctx, &ep)
		}
		switch {
		case ctx.Err() != nil:
		case errors.Is(err, errCancelled):
			return
		case err != nil:
			e.sleep(ctx, nil, again)
		case done:
			s.end(ctx, ReplayDone, journal.DeliveryDone)
			return
		}
	}
	// Whoever goes on begins where this was noted.
	note, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if s.cancelled(note) == nil {
		_ = s.note(note, journal.DeliveryWaiting)
	}
}

// replaying is a replay under way.
type replaying struct {
	*Engine

	r     *Replay
	rate  int // that pace is of
	pace  pace
	since int // events since the last note
	noted time.Time
}

// round sends some events, as many at a time as the endpoint takes.
func (s *replaying) round(ctx context.Context, ep *endpoints.Endpoint) (done bool, err error) {
	width := concurrency(ep)
	if ep.Ordered {
		width = 1
	}
	rate := s.r.Spec.Rate
	if ep.Rate > 0 {
		rate = min(rate, ep.Rate) // beside what is live
	}
	if rate != s.rate {
		s.rate, s.pace = rate, newPace(rate)
	}
	app, err := s.Journal.App(ctx, ep.App)
	if err != nil {
		return false, err
	}
	var items []*history.Item
	q := history.Query{
		After: s.r.At, Before: s.r.Spec.Before, From: s.r.Spec.From, Until: s.r.Spec.Until, Limit: width,
		Oldest: s.Journal.Oldest(app, s.now()),
	}
	selects(ep, &q)
	next, err := s.Events.Replay(ctx, ep.App, q, func(i history.Item) error {
		if matches(ep, &i) {
			items = append(items, keep(i))
		}
		return nil
	})
	if oldest, ok := trimmedBy(err); ok {
		s.r.At = max(s.r.At+1, oldest)
		return false, nil
	}
	if err != nil {
		return false, err
	}
	var work sync.WaitGroup
	failed := make([]bool, len(items))
	for i, item := range items {
		for wait := s.pace.wait(s.now()); wait > 0; wait = s.pace.wait(s.now()) {
			s.sleep(ctx, nil, wait)
			if ctx.Err() != nil {
				break
			}
		}
		s.pace.take(s.now(), 1)
		work.Go(func() { failed[i] = !s.sendAgain(ctx, ep, item) })
	}
	work.Wait()
	if ctx.Err() != nil {
		return false, ctx.Err() // the events of this round are sent again
	}
	for _, f := range failed {
		if f {
			s.r.Failed = min(s.r.Failed, 1<<16-2) + 1
		} else {
			s.r.Sent++
		}
	}
	s.since += len(items)
	done = next == s.r.At || next >= s.r.Spec.Before-1
	s.r.At = max(s.r.At, min(next, s.r.Spec.Before-1))
	if s.since >= replayEvents || s.now().Sub(s.noted) >= replayNote {
		if err := s.note(ctx, journal.DeliveryWaiting); err != nil {
			return false, err
		}
		return done, s.cancelled(ctx)
	}
	return done, nil
}

// errCancelled means that a replay was cancelled by another process.
var errCancelled = errors.New("the replay was cancelled")

// cancelled returns errCancelled, noted, when the replay no longer runs.
func (s *replaying) cancelled(ctx context.Context) error {
	now, err := s.loadReplay(ctx, s.r.App, s.r.ID)
	switch {
	case errors.Is(err, ErrNoReplay):
		return errCancelled
	case err != nil:
		return err
	case now.State == ReplayRunning:
		return nil
	}
	if err := s.note(ctx, journal.DeliveryParked); err != nil {
		return err
	}
	return errCancelled
}

// sendAgain sends one event, several times if need be, and reports whether it
// was taken.
func (s *replaying) sendAgain(ctx context.Context, ep *endpoints.Endpoint, item *history.Item) bool {
	wait, away := s.schedule.scale(time.Second), outage
	for tries := 0; tries < replayTries && ctx.Err() == nil; {
		d := &delivery{position: item.Position, arrived: item.Stored.UnixMilli(), item: item}
		r := s.attempt(ctx, ep, []*delivery{d})
		if r.held != nil { // keys or store are away
			s.sleep(ctx, nil, jitter(away))
			away = min(2*away, outageMost)
			continue
		}
		if r.answer.Delivered() {
			return true
		}
		if tries++; tries < replayTries {
			s.sleep(ctx, nil, max(jitter(wait), min(r.answer.RetryAfter, time.Minute)))
			wait *= 2
		}
	}
	return false
}

// note records how far the replay has come.
func (s *replaying) note(ctx context.Context, state journal.DeliveryState) error {
	s.since, s.noted = 0, s.now()
	p, err := s.View.Progress(ctx, s.r.App, s.r.Endpoint)
	if err != nil {
		return err
	}
	a := &journal.Attempts{
		Kind: journal.AttemptsReplay, Endpoint: s.r.Endpoint, Token: p.Token, Replay: s.r.ID,
		Entries: []journal.Attempt{{Number: s.r.Sent, Position: s.r.At, State: state, Attempts: s.r.Failed}},
	}
	_, err = s.streams.Append(ctx, s.r.App, a, nil)
	return err
}

// end records the end of a replay, until that is durable or ctx ends.
func (s *replaying) end(ctx context.Context, state string, as journal.DeliveryState) {
	for ctx.Err() == nil {
		err := s.note(ctx, as)
		if err == nil {
			err = s.endReplay(ctx, s.r, state)
		}
		if err == nil || errors.Is(err, kms.ErrRowConflict) || errors.Is(err, kms.ErrRowNotFound) {
			return // a conflict: it was cancelled
		}
		s.sleep(ctx, nil, again)
	}
}
