package journal

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/kms"
)

// A MoveStep is how far a plan change has come: what has been done last.
type MoveStep string

// The steps, in their order.
const (
	MovePlanned   MoveStep = "planned"   // it is in the registry
	MoveSwitched  MoveStep = "switched"  // new events go to the new stream
	MoveCopied    MoveStep = "copied"    // what is kept is in the new stream
	MoveVerified  MoveStep = "verified"  // each copy was opened and compared
	MoveClosed    MoveStep = "closed"    // the views have the copies
	MoveDestroyed MoveStep = "destroyed" // the keys of the old streams are gone
	MoveDone      MoveStep = "done"
)

// A Move is a plan change of an app, as its row has it.
type Move struct {
	// Generation is the route generation that it makes; it names the move among
	// those of its app.
	Generation uint16   `json:"generation"`
	From       string   `json:"from"`
	To         string   `json:"to"`
	Step       MoveStep `json:"step"`
	Actor      string   `json:"actor"`

	// Cursor is the sequence in the old stream up to which is copied, End that of
	// the last copy in the new one.
	Cursor uint64 `json:"cursor,omitzero"`
	End    uint64 `json:"end,omitzero"`

	// Total is about how many events there are to go through. Copied and Skipped
	// count those that were; what is skipped is too old for the new plan, expired,
	// or of an erased user. After a crash some are counted twice. Verified counts
	// the copies that were compared, in the last step once each.
	Total    uint64 `json:"total"`
	Copied   uint64 `json:"copied"`
	Skipped  uint64 `json:"skipped"`
	Verified uint64 `json:"verified"`
	// Keys is the number of epoch keys that were destroyed.
	Keys int `json:"keys"`

	Error    string    `json:"error,omitzero"` // why it does not go on; it is tried again
	Owner    string    `json:"owner,omitzero"`
	Lease    time.Time `json:"lease,omitzero"`
	Started  time.Time `json:"started"`
	Updated  time.Time `json:"updated"`
	Finished time.Time `json:"finished,omitzero"`
}

// moveRow is the prefix of the registry's rows with the apps' last plan changes.
const moveRow = "job.move."

const defaultMoveLease = 30 * time.Second

// A MoveViews waits until this process's views have come to a position of an
// app; a projections.Runner does.
type MoveViews interface {
	Wait(ctx context.Context, app AppID, position Position, names ...string) error
}

// MoverConfig says what a [Mover] works with. Journal is required.
type MoverConfig struct {
	Journal *Journal
	// Views keep the keys of the old streams from being destroyed before the
	// copies are in them. Nil means that there are none.
	Views MoveViews
	// Lease is how long a worker may be silent before another one goes on with
	// its move; 30 seconds.
	Lease time.Duration
	// Progress is called when a move has come further and that is durable, at
	// least once for each step; nil is nobody.
	Progress func(app AppID, move Move)
	// Log receives what an operator should know; nil discards it.
	Log *slog.Logger
}

// A Mover changes the plans of a region's apps: see docs/adr/0009-plan-changes.md.
// Several may run, in this process and in others.
type Mover struct {
	j      *Journal
	cfg    MoverConfig
	log    *slog.Logger
	owner  string
	wakeup chan struct{}
}

// NewMover returns a mover; [Mover.Run] does the work.
func NewMover(cfg MoverConfig) (*Mover, error) {
	if cfg.Journal == nil {
		return nil, fmt.Errorf("mover: %w: no journal", ErrInvalid)
	}
	if cfg.Lease <= 0 {
		cfg.Lease = defaultMoveLease
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Mover{j: cfg.Journal, cfg: cfg, log: cfg.Log, owner: randomID(), wakeup: make(chan struct{}, 1)}, nil
}

// ChangePlan begins to move an app to another plan, and returns when the move is
// durable; Run does the rest. [ErrMoving] means that one is under way.
//
// From the switch on the new plan counts for reading: a plan that keeps less hides
// at once what is too old for it. Appends go on; they may wait for some
// milliseconds.
func (m *Mover) ChangePlan(ctx context.Context, id AppID, plan, actor string) (Move, error) {
	for {
		app, _, err := m.check(ctx, id, plan)
		if err != nil {
			return Move{}, fmt.Errorf("change plan: %w", err)
		}
		last, revision, err := m.load(ctx, id)
		switch {
		case errors.Is(err, ErrUnknownMove):
		case err != nil:
			return Move{}, fmt.Errorf("change plan: %w", err)
		case last.Step != MoveDone:
			return last, fmt.Errorf("change plan of app %s: %w: to %s", id, ErrMoving, last.To)
		case last.Generation > app.Generation:
			continue // the app was read before that move
		}
		now := m.j.now().UTC().Truncate(time.Millisecond)
		move := Move{Generation: app.Generation + 1, From: app.Plan, To: plan, Step: MovePlanned, Actor: actor, Started: now, Updated: now}
		if err := m.audit(ctx, id, move, "begun"); err != nil {
			return Move{}, fmt.Errorf("change plan: %w", err)
		}
		if _, err = m.store(ctx, id, move, revision); errors.Is(err, kms.ErrRowConflict) {
			continue
		}
		if err != nil {
			return Move{}, fmt.Errorf("change plan: %w", err)
		}
		m.wake()
		return move, nil
	}
}

// check returns the app and the plan that it is to get.
func (m *Mover) check(ctx context.Context, id AppID, plan string) (App, Plan, error) {
	to, ok := m.j.plans[plan]
	if !ok {
		return App{}, to, fmt.Errorf("plan %q: %w", plan, ErrUnknownPlan)
	}
	if id.Region() != m.j.region.Number {
		return App{}, to, fmt.Errorf("app %s: %w", id, ErrWrongRegion)
	}
	app, _, err := m.j.registry.load(ctx, id)
	switch {
	case err != nil:
		return App{}, to, err
	case app.Plan == plan:
		return app, to, invalid("/plan", "the app has this plan")
	case app.Generation >= MaxGeneration:
		return app, to, invalid("/plan", "the app has changed its plan too often")
	}
	return app, to, nil
}

// Move returns the app's last plan change, or the one under way.
// [ErrUnknownMove] when there was none.
func (m *Mover) Move(ctx context.Context, id AppID) (Move, error) {
	if id.Region() != m.j.region.Number {
		return Move{}, fmt.Errorf("app %s: %w", id, ErrWrongRegion)
	}
	move, _, err := m.load(ctx, id)
	return move, err
}

func (m *Mover) load(ctx context.Context, id AppID) (Move, uint64, error) {
	row, err := m.j.rows.Load(ctx, moveRow+id.String())
	if errors.Is(err, kms.ErrRowNotFound) {
		return Move{}, 0, fmt.Errorf("app %s: %w", id, ErrUnknownMove)
	}
	if err != nil {
		return Move{}, 0, err
	}
	var move Move
	if err := json.Unmarshal(row.Value, &move, json.RejectUnknownMembers(true)); err != nil {
		return Move{}, 0, fmt.Errorf("registry row %s%s: %w", moveRow, id, ErrCorrupt)
	}
	return move, row.Revision, nil
}

func (m *Mover) store(ctx context.Context, id AppID, move Move, revision uint64) (uint64, error) {
	value, err := json.Marshal(move)
	if err != nil {
		return 0, fmt.Errorf("registry row %s%s: %w", moveRow, id, err)
	}
	if revision == 0 {
		return m.j.rows.Create(ctx, moveRow+id.String(), value)
	}
	return m.j.rows.Update(ctx, moveRow+id.String(), value, revision)
}

func (m *Mover) audit(ctx context.Context, id AppID, move Move, outcome string) error {
	return m.j.Audit(ctx, AuditEntry{
		Actor: move.Actor, Action: "app.plan_changed", Target: "app:" + id.String(), Outcome: outcome,
		Detail: map[string]string{"from": move.From, "to": move.To},
	})
}

func (m *Mover) wake() {
	select {
	case m.wakeup <- struct{}{}:
	default:
	}
}

// Run works on the region's moves until ctx ends: on those begun here, and on
// those whose worker has fallen silent.
func (m *Mover) Run(ctx context.Context) error {
	look := time.NewTicker(m.cfg.Lease / 3)
	defer look.Stop()
	for {
		if err := m.workOnAll(ctx); err != nil && ctx.Err() == nil {
			m.log.Warn("plan changes cannot be looked for", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-m.wakeup:
		case <-look.C:
		}
	}
}

func (m *Mover) workOnAll(ctx context.Context) error {
	for name, err := range m.j.rows.List(ctx, moveRow) {
		if err != nil {
			return err
		}
		id, err := ParseAppID(strings.TrimPrefix(name, moveRow))
		if err != nil {
			return fmt.Errorf("registry row %s: %w", name, ErrCorrupt)
		}
		move, revision, err := m.load(ctx, id)
		if err != nil {
			if errors.Is(err, ErrUnknownMove) {
				continue
			}
			return err
		}
		if move.Step == MoveDone || move.Owner != "" && move.Owner != m.owner && m.j.now().Before(move.Lease) {
			continue
		}
		w := &moving{Mover: m, id: id, Move: move, revision: revision}
		if err := w.run(ctx); err != nil && ctx.Err() == nil {
			m.log.Error("a plan change does not go on", "app", id.String(), "to", move.To, "step", string(w.Step), "error", err)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}

// errTaken means that another worker has the move.
var errTaken = errors.New("another worker has the plan change") //nolint:gochecknoglobals // a sentinel

// moving is a worker on one move.
type moving struct {
	*Mover
	Move

	id       AppID
	revision uint64
	beaten   time.Time // when the row was written last
}

// beat writes the move as it stands and renews the lease.
func (w *moving) beat(ctx context.Context) error {
	now := w.j.now().UTC().Truncate(time.Millisecond)
	w.Owner, w.Lease, w.Updated = w.owner, now.Add(w.cfg.Lease), now
	revision, err := w.store(ctx, w.id, w.Move, w.revision)
	if errors.Is(err, kms.ErrRowConflict) {
		return errTaken
	}
	if err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	w.revision, w.beaten = revision, time.Now()
	if w.cfg.Progress != nil {
		w.cfg.Progress(w.id, w.Move)
	}
	return nil
}

// tick is beat, now and then.
func (w *moving) tick(ctx context.Context) error {
	if time.Since(w.beaten) < w.cfg.Lease/10 && time.Since(w.beaten) < time.Second/2 {
		return nil
	}
	return w.beat(ctx)
}

// run takes the move from where it is to its end.
func (w *moving) run(ctx context.Context) error {
	if err := w.beat(ctx); err != nil { // takes the lease
		if errors.Is(err, errTaken) {
			return nil
		}
		return err
	}
	err := w.work(ctx)
	switch {
	case err == nil || errors.Is(err, errTaken):
		return nil
	case ctx.Err() != nil:
		// The process shuts down: nobody has to wait for the lease to end.
		release, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		w.Owner, w.Lease = "", time.Time{}
		_, _ = w.store(release, w.id, w.Move, w.revision) // otherwise the lease runs out
		return nil
	}
	w.Error = moveError(err)
	return errors.Join(err, w.beat(ctx))
}

// moveError names an error without the texts that are wrapped in it.
func moveError(err error) string {
	for _, class := range []error{ErrCorrupt, ErrFull, ErrIncarnation, ErrUnknownPlan, ErrUnavailable, kms.ErrThrottled, kms.ErrUnavailable, kms.ErrAccessDenied, kms.ErrDisabled} {
		if errors.Is(err, class) {
			return class.Error()
		}
	}
	return "failed; the log has the reason"
}

func (w *moving) work(ctx context.Context) error {
	steps := []struct {
		after MoveStep
		do    func(context.Context) error
		done  MoveStep
	}{
		{MovePlanned, w.change, MoveSwitched},
		{MoveSwitched, w.copyAll, MoveCopied},
		{MoveCopied, w.verify, MoveVerified},
		{MoveVerified, w.shut, MoveClosed},
		{MoveClosed, w.destroy, MoveDestroyed},
		{MoveDestroyed, w.tell, MoveDone},
	}
	for _, s := range steps {
		if w.Step != s.after {
			continue
		}
		if err := s.do(ctx); err != nil {
			return err
		}
		w.Step, w.Error = s.done, ""
		if s.done == MoveDone {
			w.Finished = w.j.now().UTC().Truncate(time.Millisecond)
		}
		if err := w.beat(ctx); err != nil {
			return err
		}
		w.log.Info("plan change", "app", w.id.String(), "from", w.From, "to", w.To, "step", string(w.Step),
			"copied", w.Copied, "skipped", w.Skipped, "keys_destroyed", w.Keys)
	}
	return nil
}

// change puts the new route into the app's row and opens it. In a downgrade the
// keys of what is too old as a whole go at once.
func (w *moving) change(ctx context.Context) error {
	_, err := w.j.registry.update(ctx, w.id, func(app *App) error {
		switch {
		case app.Generation == w.Generation:
			return nil // before a crash
		case app.Generation+1 != w.Generation || app.Plan != w.From:
			return fmt.Errorf("the app's route is %d on %s: %w", app.Generation, app.Plan, ErrCorrupt)
		}
		app.Previous = app.current()
		app.Plan, app.Generation, app.Shard = w.To, w.Generation, shardOf(app.ID, w.j.plans[w.To])
		app.Moved, app.Opened, app.Closed = w.j.now().UTC().Truncate(time.Millisecond), 0, 0
		return nil
	})
	if err != nil {
		return err
	}
	app, err := w.j.openStream(ctx, w.id)
	if err != nil {
		return err
	}
	if w.Total, err = w.j.countApp(ctx, w.id, app.Previous); err != nil {
		return err
	}
	// As long as the views have not passed the opening they could show, by a
	// longer plan, what had expired by the old one.
	if err := w.await(ctx, app.Opened); err != nil {
		return err
	}
	n, err := w.j.keyring.DestroyClasses(ctx, w.id.String(), w.isOld, w.j.plans[w.To].Oldest(app.Moved))
	w.Keys += n
	return err
}

// isOld reports whether a class of epochs is of an earlier route.
func (w *moving) isOld(class string) bool {
	generation, ok := classGeneration(class)
	return ok && generation < w.Generation
}

func (w *moving) await(ctx context.Context, sequence uint64) error {
	if w.cfg.Views == nil {
		return nil
	}
	position, err := NewPosition(w.Generation, sequence)
	if err != nil {
		return err
	}
	for {
		wait, cancel := context.WithTimeout(ctx, w.cfg.Lease/3)
		err := w.cfg.Views.Wait(wait, w.id, position)
		cancel()
		if err == nil || ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
			return err
		}
		if err := w.beat(ctx); err != nil {
			return err
		}
	}
}

// shut writes the closing, and waits until the views have passed it.
func (w *moving) shut(ctx context.Context) error {
	app, _, err := w.j.registry.load(ctx, w.id)
	if err != nil {
		return err
	}
	payload, err := json.Marshal(struct {
		Copied uint64 `json:"copied"`
	}{w.Verified})
	if err != nil {
		return fmt.Errorf("closing: %w", err)
	}
	closed, err := w.j.mark(ctx, app, app.current(), markClose, payload)
	if err != nil {
		return err
	}
	if _, err := w.j.registry.update(ctx, w.id, func(app *App) error {
		app.Closed = closed
		return nil
	}); err != nil {
		return err
	}
	return w.await(ctx, closed)
}

// destroy destroys the keys of every earlier route.
func (w *moving) destroy(ctx context.Context) error {
	n, err := w.j.keyring.DestroyClasses(ctx, w.id.String(), w.isOld, time.Time{})
	w.Keys += n
	return err
}

// tell records the end, in the audit log and among the app's events.
func (w *moving) tell(ctx context.Context) error {
	data, err := json.Marshal(struct {
		From string `json:"from"`
		To   string `json:"to"`
	}{w.From, w.To})
	if err != nil {
		return fmt.Errorf("event of the plan change: %w", err)
	}
	results, err := w.j.Append(ctx, w.id, Event{
		ID: fmt.Sprintf("coffer:plan-changed:%d", w.Generation), Type: AppPlanChanged, Time: w.Started, Data: data,
	})
	if err == nil {
		err = results[0].Err
	}
	// A disabled app takes no events, and one that old would be hidden.
	if err != nil && !errors.Is(err, ErrDisabled) && !errors.Is(err, ErrExpired) {
		return err
	}
	return w.audit(ctx, w.id, w.Move, "ok")
}
