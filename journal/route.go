package journal

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/nats-io/nats.go/jetstream"
)

// An app's route is the stream that it writes to. A plan change puts the next one
// into the app's row; it can be used behind two markers, the seal of the old
// stream and the opening of the new one, which whoever comes first writes. See
// docs/adr/0009-plan-changes.md.

// openMark is the payload of an opening.
type openMark struct {
	From   string `json:"from"`
	Sealed uint64 `json:"sealed"`
	Floor  int64  `json:"floor"`
}

// An Opening is what the record of [RoleOpen] says.
type Opening struct {
	// From is the stream that the app wrote to before, and Sealed the sequence of
	// the seal there.
	From   string
	Sealed uint64
	// Floor hides what had expired when the plan was changed: older records whose
	// retention clock lies before it.
	Floor time.Time
}

// Opening parses the payload of an opening.
func (s Sealed) Opening() (Opening, error) {
	var m openMark
	if err := json.Unmarshal(s.Record, &m, json.RejectUnknownMembers(true)); s.Role != RoleOpen || err != nil || m.From == "" || m.Sealed == 0 {
		return Opening{}, fmt.Errorf("opening at sequence %d: %w", s.Sequence, ErrCorrupt)
	}
	return Opening{From: m.From, Sealed: m.Sealed, Floor: time.UnixMilli(m.Floor).UTC()}, nil
}

// parseCopy reads the header of a copy: position, arrival, plan and source.
func (s *Sealed) parseCopy(v string) error {
	position, rest, _ := strings.Cut(v, " ")
	millis, rest, _ := strings.Cut(rest, " ")
	plan, source, _ := strings.Cut(rest, " ")
	p, perr := ParsePosition(position)
	ms, merr := strconv.ParseInt(millis, 10, 64)
	seq, serr := strconv.ParseUint(source, 10, 64)
	if perr != nil || merr != nil || serr != nil || !isName(plan, 16) || p.Generation() > s.Generation || p.Generation() == s.Generation && !isStub(s.Record) {
		return fmt.Errorf("%w: the header of a copy does not parse", ErrCorrupt)
	}
	s.Role, s.Position, s.Stored, s.From, s.Source = RoleCopy, p, time.UnixMilli(ms).UTC(), plan, seq
	return nil
}

// copyValue is what parseCopy reads.
func copyValue(s *Sealed) string {
	return s.Position.String() + " " + strconv.FormatInt(s.Stored.UnixMilli(), 10) + " " + s.Plan + " " + strconv.FormatUint(s.Sequence, 10)
}

// openRoute returns the app's route when it can be appended to.
func (j *Journal) openRoute(ctx context.Context, id AppID) (*route, error) {
	for range maxReroutes {
		r, err := j.route(ctx, id)
		if err != nil || r.open {
			return r, err
		}
		if _, err := j.openStream(ctx, id); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%w: app %s changes its plan again and again", ErrUnavailable, id)
}

// reroute returns the route after one that was sealed: from the app's row, as soon
// as it has it.
func (j *Journal) reroute(ctx context.Context, id AppID, old *route) (*route, error) {
	for {
		j.registry.evict(id)
		r, err := j.openRoute(ctx, id)
		if err != nil {
			return nil, err
		}
		if r.gen > old.gen {
			return r, nil
		}
		// The seal is written after the row, so this one was read before.
		if !pause(ctx, retryPause/4) {
			return nil, fmt.Errorf("app %s changes its plan: %w", id, ctx.Err())
		}
	}
}

// settle waits until the index knows everything in front of the seal: before that
// an event could be stored a second time, on the new route.
func (r *route) settle(ctx context.Context) error {
	if r.settled.Load() {
		return nil
	}
	for index := r.before.j.cfg.Index; index.Applied(r.before.info.Name) < r.sealed; {
		// What has left the stream by age will never be applied.
		if first, err := r.before.j.First(ctx, r.before.info.Name); err == nil && first > r.sealed {
			break
		}
		if !pause(ctx, retryPause/4) {
			return fmt.Errorf("%w: the history view has not caught up with stream %s: %w", ErrUnavailable, r.before.info.Name, ctx.Err())
		}
		if r.before.j.closed.Load() {
			return fmt.Errorf("%w: the journal is closed", ErrUnavailable)
		}
	}
	r.settled.Store(true)
	return nil
}

// moved reports whether the app's row has a later route.
func (r *Registry) moved(ctx context.Context, id AppID, generation uint16) bool {
	app, _, err := r.load(ctx, id)
	return err == nil && app.Generation > generation
}

// openStream writes what is missing of the two markers, and their sequences into
// the app's row. Any process may do it at any time.
func (j *Journal) openStream(ctx context.Context, id AppID) (App, error) {
	app, _, err := j.registry.load(ctx, id)
	if err != nil || !app.moving() {
		j.registry.evict(id) // what is in memory says otherwise
		return app, err
	}
	sealed, err := j.mark(ctx, app, app.Previous, markSeal, []byte("{}"))
	if err != nil {
		return app, fmt.Errorf("seal the route of app %s: %w", id, err)
	}
	plan, ok := j.plans[app.Previous.Plan]
	if !ok {
		return app, fmt.Errorf("app %s: plan %q: %w", id, app.Previous.Plan, ErrUnknownPlan)
	}
	payload, err := json.Marshal(openMark{
		From: StreamName(j.region.ID, app.Previous.Plan, app.Previous.Shard), Sealed: sealed, Floor: plan.Oldest(app.Moved).UnixMilli(),
	})
	if err != nil {
		return app, fmt.Errorf("open the route of app %s: %w", id, err)
	}
	opened, err := j.mark(ctx, app, app.current(), markOpen, payload)
	if err != nil {
		return app, fmt.Errorf("open the route of app %s: %w", id, err)
	}
	return j.registry.update(ctx, id, func(now *App) error {
		if now.Generation == app.Generation {
			now.Previous.Sealed, now.Opened = sealed, opened
		}
		return nil
	})
}

func (a App) current() Route { return Route{Plan: a.Plan, Shard: a.Shard, Generation: a.Generation} }

// mark returns the sequence of a marker on a route, which it writes unless it is
// there.
func (j *Journal) mark(ctx context.Context, app App, on Route, kind byte, payload []byte) (uint64, error) {
	name := StreamName(j.region.ID, on.Plan, on.Shard)
	s := j.streams[name]
	if s == nil {
		return 0, fmt.Errorf("%w: shard %d of plan %s", ErrUnknownPlan, on.Shard, on.Plan)
	}
	subject := Subject{Plan: on.Plan, Shard: on.Shard, App: app.ID, Marker: kind, Generation: on.Generation}.String()
	for {
		seq, err := j.lastOf(ctx, name, subject)
		if err != nil {
			return 0, err
		}
		if seq > 0 {
			if kind == markSeal {
				s.noteSealed(app.ID, on.Generation)
			}
			if s.gated {
				err = s.durable.wait(ctx, seq) // another goroutine may just have written it
			}
			return seq, err
		}
		entries := []entry{{subject: subject, record: payload, gen: on.Generation, fence: subject}}
		enqueue := s.enqueue
		if kind == markSeal {
			enqueue = s.enqueueSeal
		}
		if err := j.put(ctx, app.ID, entries, enqueue); err != nil {
			return 0, err
		}
		switch err := entries[0].err; {
		case err == nil:
			return entries[0].seq, nil
		case !errors.Is(err, errSealed):
			return 0, err
		}
		// Another one was faster, here or in another process: it is there.
		if !pause(ctx, retryPause/4) {
			return 0, fmt.Errorf("%w: %w", ErrUnavailable, ctx.Err())
		}
	}
}

// noteSealed remembers a seal that is in the stream.
func (s *stream) noteSealed(app AppID, generation uint16) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sealed == nil {
		s.sealed = make(map[AppID]uint16)
	}
	s.sealed[app] = max(s.sealed[app], generation)
}

// put hands entries of an app over and waits until all are settled. When ctx ends
// first the entries are the committer's.
func (j *Journal) put(ctx context.Context, app AppID, entries []entry, enqueue func(context.Context, *appending) error) error {
	call := &appending{j: j, app: app, entries: entries, done: make(chan struct{}, 1)}
	for i := range entries {
		entries[i].call = call
	}
	if err := enqueue(ctx, call); err != nil {
		return err
	}
	return call.await()
}

// lastOf returns the sequence of a subject's last message, 0 for none.
func (j *Journal) lastOf(ctx context.Context, stream, subject string) (seq uint64, err error) {
	err = retry(ctx, func(ctx context.Context) error {
		handle, err := j.js.Stream(ctx, stream)
		if err != nil {
			return streamError(err)
		}
		msg, err := handle.GetLastMsgForSubject(ctx, subject)
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound):
			return nil
		case err != nil:
			return streamError(err)
		}
		seq = msg.Sequence
		return nil
	})
	return seq, err
}

// First returns the sequence of the oldest message that a stream still has; when
// it has none, the one after its last.
func (j *Journal) First(ctx context.Context, name string) (uint64, error) {
	if j.streams[name] == nil {
		return 0, fmt.Errorf("%w: stream %s is none of region %s", ErrInvalid, name, j.region.ID)
	}
	info, err := j.js.Stream(ctx, name)
	if err != nil {
		return 0, fmt.Errorf("first sequence of stream %s: %w", name, streamError(err))
	}
	return info.CachedInfo().State.FirstSeq, nil
}

// Oldest returns the earliest retention clock that is served of an app.
func (j *Journal) Oldest(app App, now time.Time) time.Time {
	plan, ok := j.plans[app.Plan]
	if !ok {
		return now // a plan that has left the table: serving nothing is the safe answer
	}
	oldest := plan.Oldest(now)
	if before, ok := j.plans[app.Previous.Plan]; ok && app.moving() {
		// The views do not know yet what had expired before a longer plan.
		return later(oldest, before.Oldest(app.Moved))
	}
	return oldest
}
