package projections

import (
	"context"
	"fmt"
)

// A Status says how a projection stands on one stream.
type Status struct {
	Projection string
	Stream     string
	State      State
	// Checkpoint is how far the view has come.
	Checkpoint Checkpoint
	// Last is the last sequence of the stream, 0 if it is empty or LastErr is
	// set.
	Last uint64
	// Lag is the number of sequences that the view is behind.
	Lag uint64
	// Err is why the projection has stopped, or is trying again.
	Err error
	// LastErr is why the end of the stream is not known.
	LastErr error
}

// Status reports on each projection and stream. It asks the journal where its
// streams end.
func (r *Runner) Status(ctx context.Context) []Status {
	list := make([]Status, 0, len(r.tails))
	ends := make(map[string]Status)
	for _, t := range r.tails {
		end, ok := ends[t.stream.Name]
		if !ok {
			end.Last, end.LastErr = r.source.Last(ctx, t.stream.Name)
			ends[t.stream.Name] = end
		}
		s := t.status()
		s.Last, s.LastErr = end.Last, end.LastErr
		if s.Last > s.Checkpoint.Sequence {
			s.Lag = s.Last - s.Checkpoint.Sequence
		}
		list = append(list, s)
	}
	return list
}

func (t *tail) status() Status {
	t.mu.Lock()
	defer t.mu.Unlock()
	return Status{
		Projection: t.projection.Name(), Stream: t.stream.Name,
		State: t.state, Checkpoint: t.checkpoint, Err: t.err,
	}
}

// Ready returns nil if every view can be read and follows the journal.
// Otherwise it says what does not, with [ErrRebuilding] or [ErrStopped].
func (r *Runner) Ready() error {
	for _, t := range r.tails {
		switch s := t.status(); s.State {
		case Stopped:
			return fmt.Errorf("projection %s on %s at %d: %w: %w", s.Projection, s.Stream, s.Checkpoint.Sequence, ErrStopped, s.Err)
		case Following, Retrying:
			if t.incomplete() == 0 {
				continue
			}
			fallthrough
		case Starting, Rebuilding, CatchingUp:
			return fmt.Errorf("projection %s on %s at %d: %w", s.Projection, s.Stream, s.Checkpoint.Sequence, ErrRebuilding)
		}
	}
	return nil
}
