package projections

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/cofferdb/coffer/journal"
)

// RunnerConfig is what a runner needs.
type RunnerConfig struct {
	// Journal is where the records come from; required.
	Journal Source
	// Store is where the views are; required. Another runner may use it for
	// other projections with other tables.
	Store Store
	// Projections are the views to keep; at least one.
	Projections []Projection
	// CloseStopped keeps readers out of a projection that has stopped on a stream,
	// with [ErrStopped], for one that something is done by: what it does not have
	// would be done again. Without it, what it has can still be read.
	CloseStopped bool
	// Log receives starts, stops and errors; nil discards them.
	Log *slog.Logger
	// Batch is the number of records committed at once, at most; 0 means 512.
	Batch int
}

// A Runner keeps views up to date. Each stream is read by one goroutine per
// projection, so that a projection that has stopped, or is being rebuilt, does
// not hold up another.
type Runner struct {
	source Source
	store  Store
	log    *slog.Logger
	batch  int
	tails  []*tail // fixed by Run

	// rebuilding lets one rebuild through at a time.
	rebuilding sync.Mutex

	// mu guards what follows.
	mu      sync.Mutex
	running *run // nil unless Run is under way
	started bool

	changes changes
}

type run struct {
	ctx    context.Context // ends when Run is to end
	cancel context.CancelCauseFunc
	tails  sync.WaitGroup
}

// NewRunner checks the configuration. Nothing is read before [Runner.Run], and
// until it has caught up the views cannot be read either.
func NewRunner(cfg RunnerConfig) (*Runner, error) {
	if cfg.Journal == nil || cfg.Store == nil || len(cfg.Projections) == 0 {
		return nil, errors.New("projections: a runner needs a journal, a store and a projection")
	}
	r := &Runner{source: cfg.Journal, store: cfg.Store, log: cfg.Log, batch: cfg.Batch}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	if r.batch <= 0 {
		r.batch = 512
	}
	tables := map[byte]string{runnerTable: "the runner"}
	names := make(map[string]bool)
	for _, p := range cfg.Projections {
		if !validName(p.Name()) || names[p.Name()] {
			return nil, fmt.Errorf("projections: the name %q is not lower-case letters, digits and hyphens, or is taken", p.Name())
		}
		names[p.Name()] = true
		for _, t := range p.Tables() {
			if owner, taken := tables[t]; taken {
				return nil, fmt.Errorf("projections: %s and %s both have the table %#02x", owner, p.Name(), t)
			}
			tables[t] = p.Name()
		}
		g := &gate{closeStopped: cfg.CloseStopped}
		g.projection, _ = p.(Gated)
		for _, s := range cfg.Journal.Streams() {
			t := &tail{projection: p, stream: s, gate: g, state: Starting}
			// Closed until the tail knows where the journal ends: who reads while
			// Run begins must not be shown what was there before a crash.
			g.close(t, ErrRebuilding)
			r.tails = append(r.tails, t)
		}
	}
	return r, nil
}

func validName(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return s != ""
}

// Run keeps the views up to date until ctx ends, and then returns nil. It
// returns an error earlier only if the store has failed: [ErrCorrupt] or
// [ErrUnavailable]. A projection that stops on a stream does not end Run, see
// [Runner.Status].
//
// A view that was written in another format, or that is new while the journal
// is not, is filled first and cannot be read in the meantime
// ([ErrRebuilding]). Neither can a view that is behind the journal at the
// start: after a crash it may have lost its last seconds, and a reader must not
// be shown less than it has seen.
func (r *Runner) Run(ctx context.Context) error {
	runCtx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	rn := &run{ctx: runCtx, cancel: cancel}
	r.mu.Lock()
	if r.started {
		r.mu.Unlock()
		return errors.New("projections: the runner was started before")
	}
	r.started = true
	r.mu.Unlock()

	if err := r.load(); err != nil {
		return fmt.Errorf("projections: load checkpoints: %w", err)
	}
	r.mu.Lock()
	r.running = rn
	for _, t := range r.tails {
		r.start(rn, t) //nolint:contextcheck // its life is not the caller's
	}
	r.mu.Unlock()

	<-runCtx.Done()
	r.mu.Lock()
	r.running = nil
	r.mu.Unlock()
	rn.tails.Wait()
	if cause := context.Cause(runCtx); ctx.Err() == nil && cause != nil {
		return cause
	}
	return nil
}

// start runs the tail until its context or the run's ends. r.mu is held.
func (r *Runner) start(rn *run, t *tail) {
	ctx, stop := context.WithCancel(rn.ctx)
	done := make(chan struct{})
	t.mu.Lock()
	t.stop, t.done = stop, done
	t.mu.Unlock()
	rn.tails.Go(func() {
		defer close(done)
		defer stop()
		if err := r.follow(ctx, t); err != nil {
			rn.cancel(err)
		}
	})
}

// load reads each tail's checkpoint, and drops what has another format.
func (r *Runner) load() error {
	dropped := make(map[string]bool)
	for _, t := range r.tails {
		p := t.projection
		if !dropped[p.Name()] {
			dropped[p.Name()] = true
			if err := r.loadFormat(p); err != nil {
				return err
			}
		}
		var cp Checkpoint
		var target uint64
		err := r.store.View(func(rd Reader) error {
			v, ok, err := rd.Get(nil, runnerKey(keyCheckpoint, p.Name(), t.stream.Name))
			if err != nil {
				return err
			}
			if ok {
				if cp, err = parseCheckpoint(v); err != nil {
					return err
				}
			}
			if target, _, err = loadUint64(rd, runnerKey(keyRebuild, p.Name(), t.stream.Name)); err != nil {
				return err
			}
			t.seals, err = loadSeals(rd, p, t.stream.Name)
			return err
		})
		if err != nil {
			return fmt.Errorf("%s on %s: %w", p.Name(), t.stream.Name, err)
		}
		t.reset(cp, target)
	}
	return nil
}

func (r *Runner) loadFormat(p Projection) error {
	key := runnerKey(keyFormat, p.Name(), "")
	return r.store.Update(func(txn Txn) error {
		format, ok, err := loadUint64(txn, key)
		if err != nil {
			return err
		}
		if ok && format == uint64(p.Format()) {
			return nil
		}
		if ok {
			r.log.Warn("view has another format and is rebuilt",
				"projection", p.Name(), "stored", format, "wanted", p.Format())
		}
		drop(txn, p)
		txn.Set(key, binary.BigEndian.AppendUint64(nil, uint64(p.Format())))
		return nil
	})
}

// drop removes what the projection and its tails have in the store.
func drop(txn Txn, p Projection) {
	for _, table := range p.Tables() {
		to := []byte{table + 1}
		if table == 0xff {
			to = nil
		}
		txn.DeleteRange([]byte{table}, to)
	}
	txn.DeleteRange(runnerRange(keyCheckpoint, p.Name()))
	txn.DeleteRange(runnerRange(keyRebuild, p.Name()))
	txn.DeleteRange(runnerRange(keySeal, p.Name()))
}

// Rebuild drops the projection's view and fills it again from the journal. It
// returns when the view has caught up with where the journal ended at the call;
// until then readers get [ErrRebuilding]. If ctx ends first, or the process
// dies, the rebuild goes on, or is taken up at the next start. Without [Runner.Run] under way
// the view is only dropped.
func (r *Runner) Rebuild(ctx context.Context, name string) error {
	r.rebuilding.Lock()
	defer r.rebuilding.Unlock()
	var tails []*tail
	for _, t := range r.tails {
		if t.projection.Name() == name {
			tails = append(tails, t)
		}
	}
	if len(tails) == 0 {
		return fmt.Errorf("projections: rebuild %q: %w", name, ErrUnknown)
	}
	targets := make([]uint64, len(tails))
	for i, t := range tails {
		var err error
		if targets[i], err = r.source.Last(ctx, t.stream.Name); err != nil {
			return fmt.Errorf("projections: rebuild %s: end of %s: %w", name, t.stream.Name, err)
		}
	}
	r.log.Info("view is rebuilt", "projection", name)
	if err := r.restart(tails, targets); err != nil { //nolint:contextcheck // its life is not the caller's
		return fmt.Errorf("projections: rebuild %s: %w", name, err)
	}
	r.mu.Lock()
	running := r.running != nil
	r.mu.Unlock()
	if !running {
		return nil
	}
	for i, t := range tails {
		if err := t.wait(ctx, targets[i]); err != nil {
			return fmt.Errorf("projections: rebuild %s: %w", name, err)
		}
	}
	return nil
}

// restart stops the tails of one projection, drops its view and starts them
// again. r.mu is held throughout, so that Run cannot end in the middle.
func (r *Runner) restart(tails []*tail, targets []uint64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, t := range tails {
		t.halt()
		t.gate.close(t, ErrRebuilding) // before anything is dropped
	}
	p := tails[0].projection
	err := r.store.Update(func(txn Txn) error {
		drop(txn, p)
		txn.Set(runnerKey(keyFormat, p.Name(), ""), binary.BigEndian.AppendUint64(nil, uint64(p.Format())))
		for i, t := range tails {
			if targets[i] > 0 {
				txn.Set(runnerKey(keyRebuild, p.Name(), t.stream.Name), binary.BigEndian.AppendUint64(nil, targets[i]))
			}
		}
		return nil
	})
	if err != nil {
		if r.running != nil {
			r.running.cancel(err)
		}
		return err
	}
	for i, t := range tails {
		t.reset(Checkpoint{}, targets[i])
		t.seals = nil
		if r.running != nil {
			r.start(r.running, t)
		}
	}
	return nil
}

// Wait returns when the views have every event of the app up to the position:
// a reader that calls it sees what was appended at the position. It waits for
// the projections with the given names, or for all of them. It fails with
// [ErrStopped] if one has stopped before that, and with ctx's error.
func (r *Runner) Wait(ctx context.Context, app journal.AppID, position journal.Position, names ...string) error {
	stream, sequence, err := r.source.Locate(ctx, app, position)
	if err != nil {
		return fmt.Errorf("projections: wait for position %s: %w", position, err)
	}
	found := false
	for _, t := range r.tails {
		if t.stream.Name != stream || len(names) > 0 && !slices.Contains(names, t.projection.Name()) {
			continue
		}
		found = true
		if err := t.wait(ctx, sequence); err != nil {
			return fmt.Errorf("projections: wait for position %s: %w", position, err)
		}
	}
	if !found {
		return fmt.Errorf("projections: wait for position %s: stream %s: %w", position, stream, ErrUnknown)
	}
	return nil
}

// Changed returns a channel that is closed when a view has something new of the
// app. Take the channel, read the view, then wait: what was committed between
// the two closes the channel too. All waiters of an app share one channel, and
// an app without waiters costs nothing.
func (r *Runner) Changed(app journal.AppID) <-chan struct{} { return r.changes.of(app) }

// retryDelay is how long to wait before reading a stream again after the n-th
// failure in a row: 50 ms, doubled up to 5 s.
func retryDelay(n int) time.Duration {
	return min(50*time.Millisecond<<min(n, 10), 5*time.Second)
}
