package projections

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"time"

	"github.com/cofferdb/coffer/journal"
)

// follow reads the tail's stream until ctx ends or the tail stops. It returns
// an error only if the store has failed.
func (r *Runner) follow(ctx context.Context, t *tail) error {
	log := r.log.With("projection", t.projection.Name(), "stream", t.stream.Name)
	for failures := 0; ; {
		before := t.at().Sequence
		err := r.read(ctx, t)
		switch {
		case ctx.Err() != nil:
			return nil //nolint:nilerr // it was told to end
		case err == nil:
			err = errors.New("the journal's reader ended by itself")
		case isStoreError(err):
			t.fail(Stopped, err)
			log.Error("view store failed", "error", err)
			return err
		case isFinal(err):
			t.fail(Stopped, err)
			log.Error("projection stopped", "sequence", t.at().Sequence, "error", err)
			return nil
		}
		if t.at().Sequence > before {
			failures = 0
		}
		t.fail(Retrying, err)
		log.Warn("reading the journal failed", "sequence", t.at().Sequence, "error", err)
		select {
		case <-time.After(retryDelay(failures)):
		case <-ctx.Done():
			return nil
		}
		failures++
	}
}

func isStoreError(err error) bool {
	return errors.Is(err, ErrCorrupt) || errors.Is(err, ErrUnavailable)
}

// isFinal reports whether trying again cannot help.
func isFinal(err error) bool {
	var record *RecordError
	return errors.As(err, &record) || errors.Is(err, journal.ErrGap) ||
		errors.Is(err, journal.ErrIncarnation) || errors.Is(err, journal.ErrCorrupt)
}

func (r *Runner) read(ctx context.Context, t *tail) error {
	name := t.stream.Name
	cp := t.at()
	if cp.Incarnation != "" && cp.Incarnation != t.stream.Incarnation {
		return fmt.Errorf("stream %s has the incarnation %q, the view was made from %q: %w",
			name, t.stream.Incarnation, cp.Incarnation, journal.ErrIncarnation)
	}
	last, err := r.source.Last(ctx, name)
	if err != nil {
		return fmt.Errorf("end of stream %s: %w", name, err)
	}
	if last != 0 && last < cp.Sequence {
		return fmt.Errorf("stream %s ends at %d, the view has been made up to %d: %w",
			name, last, cp.Sequence, journal.ErrGap)
	}
	if cp.Sequence == 0 && last > 0 && t.incomplete() == 0 {
		// A new view of a journal that is not new: an interrupted first fill
		// must be known as such after a crash.
		if err := r.announce(t, last); err != nil {
			return err
		}
	}
	t.begin(last)
	if t.incomplete() > 0 {
		var stop context.CancelFunc
		ctx, stop = context.WithCancel(ctx)
		defer stop()
		go r.watchEnd(ctx, t)
	}
	return r.source.Read(ctx, name, cp.Sequence, t.stream.Incarnation, func(batch []journal.Sealed) error {
		return r.applyAll(ctx, t, batch)
	})
}

// announce stores that the view is incomplete until the sequence is applied.
func (r *Runner) announce(t *tail, target uint64) error {
	err := r.store.Update(func(txn Txn) error {
		txn.Set(runnerKey(keyRebuild, t.projection.Name(), t.stream.Name), binary.BigEndian.AppendUint64(nil, target))
		return nil
	})
	if err == nil {
		t.mu.Lock()
		t.target = target
		t.mu.Unlock()
	}
	return err
}

// watchEnd opens the view when the records that it waits for have left the
// journal by age before they were read: nothing would ever reach the target.
func (r *Runner) watchEnd(ctx context.Context, t *tail) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for t.incomplete() > 0 {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		last, err := r.source.Last(ctx, t.stream.Name)
		if err != nil {
			continue // the reader sees it too, and reports it
		}
		if cp := t.at(); t.incomplete() > 0 && (last <= cp.Sequence || r.emptyTo(ctx, t.stream.Name, t.incomplete())) {
			if err := r.store.Update(func(txn Txn) error {
				txn.Delete(runnerKey(keyRebuild, t.projection.Name(), t.stream.Name))
				return nil
			}); err != nil {
				continue // the next commit of the reader fails too, and reports it
			}
			t.complete()
			return
		}
	}
}

// applyAll applies a batch in transactions of the configured size.
func (r *Runner) applyAll(ctx context.Context, t *tail, batch []journal.Sealed) error {
	for len(batch) > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(len(batch), r.batch)
		if i := slices.IndexFunc(batch[:n], func(s journal.Sealed) bool { return s.Role == journal.RoleOpen }); i > 0 {
			n = i
		} else if i == 0 {
			if err := r.passSeal(ctx, t, batch[0]); err != nil {
				return err
			}
			n = 1
		}
		if err := r.apply(ctx, t, batch[:n]); err != nil {
			return err
		}
		batch = batch[n:]
	}
	return nil
}

func (r *Runner) apply(ctx context.Context, t *tail, batch []journal.Sealed) error {
	after := t.at().Sequence
	for i := range batch {
		if batch[i].Sequence <= after {
			return fmt.Errorf("stream %s: sequence %d came after %d: %w",
				t.stream.Name, batch[i].Sequence, after, journal.ErrGap)
		}
		after = batch[i].Sequence
	}
	err := r.commit(ctx, t, batch)
	if err == nil || len(batch) == 1 || isStoreError(err) || ctx.Err() != nil {
		return err
	}
	// One record of the batch cannot be applied. One by one, those in front of
	// it are, and it is named.
	for i := range batch {
		if err := r.commit(ctx, t, batch[i:i+1]); err != nil {
			return err
		}
	}
	return nil
}

// commit applies the batch and moves the checkpoint, in one transaction.
func (r *Runner) commit(ctx context.Context, t *tail, batch []journal.Sealed) error {
	p := t.projection
	last := batch[len(batch)-1].Sequence
	cp := Checkpoint{Incarnation: t.stream.Incarnation, Sequence: last}
	target := t.rebuildTarget()
	apply, fresh := t.sift(batch)
	err := r.store.Update(func(txn Txn) error {
		if len(apply) > 0 {
			if err := guard(ctx, p, txn, t.stream.Name, apply); err != nil {
				return err
			}
		}
		for i := range fresh {
			txn.Set(sealKey(p, t.stream.Name, fresh[i].App, fresh[i].Generation), binary.BigEndian.AppendUint64(nil, fresh[i].Sequence))
		}
		txn.Set(runnerKey(keyCheckpoint, p.Name(), t.stream.Name), cp.append(nil))
		if target > 0 && last >= target {
			txn.Delete(runnerKey(keyRebuild, p.Name(), t.stream.Name))
		}
		return nil
	})
	if err != nil {
		t.forget(fresh)
		if len(batch) > 1 || isStoreError(err) || ctx.Err() != nil {
			return err
		}
		return recordError(p, t.stream.Name, batch[0], err)
	}
	t.advance(cp)
	r.changes.notify(batch)
	return nil
}

// guard calls Apply and turns a panic into an error.
func guard(ctx context.Context, p Projection, txn Txn, stream string, batch []journal.Sealed) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &PanicError{Value: fmt.Sprint(v), Stack: string(debug.Stack())}
		}
	}()
	return p.Apply(ctx, txn, stream, batch)
}

func recordError(p Projection, stream string, s journal.Sealed, err error) error {
	if named, ok := errors.AsType[*RecordError](err); ok {
		err = named.Err
	}
	return &RecordError{
		Projection: p.Name(), Stream: stream, Sequence: s.Sequence,
		App: s.App, Position: s.Position, Err: err,
	}
}
