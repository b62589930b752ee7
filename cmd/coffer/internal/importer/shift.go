package importer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/client"
)

const (
	// firstProbes is how many of the first events are looked for in the store.
	firstProbes = 32
	// spreadProbes is how many more are looked for, evenly spread: the first ones
	// may have expired since an earlier run.
	spreadProbes = 64
	probesAtOnce = 8
)

// ErrNothing means that the files hold no message that could be imported, so
// there is no newest one to shift to now. The rejects file says why.
var ErrNothing = errors.New("the files hold no message that can be imported")

// shift is by how much the times are shifted.
type shift struct {
	by    time.Duration
	found bool // among what is stored
}

// probe is an event to look for.
type probe struct {
	id    string
	time  time.Time // as the file has it
	event journal.Event
}

// findShift reads the files once to find the newest message, and asks the server
// whether messages of these files are stored: if so, an earlier run has chosen
// the shift, and any other would make the same messages anew, as conflicts.
//
// When none is stored, one of the messages that a later run will look for first
// is appended before any other, alone: whenever this run is killed, either
// nothing is stored or the shift can be found.
func (r *run) findShift(ctx context.Context) (shift, error) {
	if slices.Contains(r.o.Files, "-") {
		return shift{}, errors.New("rebasing the time reads the input twice, which standard input cannot; save it to a file first")
	}
	var by time.Duration
	var after time.Time // what is older is not kept
	for {
		sample, err := r.scan(ctx, after)
		if err != nil {
			return shift{}, err
		}
		if sample.newest.id == "" || len(sample.first) == 0 {
			return shift{}, ErrNothing
		}
		if found, by, err := r.ask(ctx, sample.probes()); found || err != nil {
			return shift{by: by, found: found}, err
		}
		if after.IsZero() {
			by = time.Now().Truncate(time.Millisecond).Sub(sample.newest.time)
		}
		err = r.anchor(ctx, sample.first, by)
		kept := (*notKept)(nil)
		if !errors.As(err, &kept) {
			return shift{by: by}, err
		}
		if !after.IsZero() {
			return shift{by: by}, nil // the import itself counts them
		}
		// The first ones are too old even so. Those that are not are looked for.
		after = sample.newest.time.Add(-kept.retention)
	}
}

// notKept says that events are older than the plan keeps.
type notKept struct{ retention time.Duration }

func (*notKept) Error() string { return "older than the plan keeps" }

// anchor appends the first of the events that the server takes.
func (r *run) anchor(ctx context.Context, first []probe, by time.Duration) error {
	var kept *notKept
	for _, p := range first {
		e := p.event
		e.Time = e.Time.Add(by)
		results, err := r.to.Append(ctx, e)
		if refusedWhole(err) {
			continue
		}
		if err != nil {
			return err
		}
		err = results[0].Err
		if err == nil {
			r.anchored = e.ID
			return nil
		}
		if p := (*client.Problem)(nil); errors.As(err, &p) && errors.Is(err, client.ErrExpired) && !p.OldestAvailable.IsZero() {
			kept = &notKept{time.Since(p.OldestAvailable)}
		}
	}
	if kept != nil {
		return kept
	}
	return nil // the import itself tells why each was refused
}

// sample is what one reading of the files has found.
type sample struct {
	newest        probe
	first, spread []probe
}

// probes returns what to look for. The newest comes early: it is the most likely
// to be kept still.
func (s sample) probes() []probe {
	return slices.Concat(s.first, []probe{s.newest}, s.spread)
}

func (r *run) scan(ctx context.Context, after time.Time) (sample, error) {
	// Bad lines are reported in the second pass only.
	quiet := &run{o: r.o, rejects: &rejects{}, total: r.total, scanning: true}
	var s sample
	stride, n := 1, 0
	err := quiet.readFiles(func(l line, err error) error {
		if err != nil {
			return nil //nolint:nilerr // the second pass meets it again and reports it
		}
		if err := context.Cause(ctx); err != nil {
			return err
		}
		p := probe{id: l.event.ID, time: l.event.Time, event: l.event}
		if s.newest.id == "" || p.time.After(s.newest.time) {
			s.newest = p
		}
		switch {
		case p.time.Before(after):
			return nil
		case len(s.first) < firstProbes:
			s.first = append(s.first, p)
		case n%stride == 0:
			s.spread = append(s.spread, p)
			if len(s.spread) == 2*spreadProbes {
				for i := range spreadProbes {
					s.spread[i] = s.spread[2*i]
				}
				s.spread = s.spread[:spreadProbes]
				stride *= 2
			}
		}
		if n++; n%10000 == 0 && r.o.Progress != nil {
			r.o.Progress(Progress{Scanning: true, Bytes: l.offset, Total: r.total, Summary: Summary{Read: n}})
		}
		return nil
	})
	return s, err
}

// scanned checks everything but the event's age, which the shift will change.
// One from the future is no newest message: it is a clock that was wrong.
func scanned(e journal.Event, now time.Time) (journal.Event, error) {
	t := e.Time
	if t.Before(now) {
		e.Time = now
	}
	if err := e.Normalize(now, journal.Limits{}); err != nil {
		return journal.Event{}, err
	}
	e.Time = t
	return e, nil
}

// ask looks for the probes in the store and returns how far the first that is
// found was shifted.
func (r *run) ask(ctx context.Context, probes []probe) (found bool, by time.Duration, err error) {
	for chunk := range slices.Chunk(probes, probesAtOnce) {
		stored := make([]time.Time, len(chunk))
		g, ctx := errgroup.WithContext(ctx)
		for i, p := range chunk {
			g.Go(func() error {
				e, err := r.to.Event(ctx, p.id)
				switch {
				case err == nil:
					stored[i] = e.Time
					return nil
				case errors.Is(err, client.ErrNotFound), errors.Is(err, client.ErrExpired):
					return nil
				}
				return err
			})
		}
		if err := g.Wait(); err != nil {
			return false, 0, fmt.Errorf("looking for messages of an earlier run: %w", err)
		}
		for i, t := range stored {
			if !t.IsZero() {
				return true, t.Sub(chunk[i].time), nil
			}
		}
	}
	return false, 0, nil
}
