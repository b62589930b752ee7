package deliver

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections/history"
)

// A ledger knows which numbers have been given, which outcomes are not on disk
// yet, and how far the endpoint has come without a hole.
type ledger struct {
	// given are the numbers from the first one without an outcome on, in order.
	given []given

	entries []journal.Attempt // outcomes to be written
	details []detail
	writing bool
	number  uint64           // up to here everything has an outcome
	through journal.Position // the same
	noted   journal.Position // the through of the last record
	// sequence is that of the last record of this process.
	sequence uint64
	// idle is when a record without outcomes was last written.
	idle time.Time
}

type given struct {
	number   uint64
	position journal.Position
	settled  bool // its outcome is in entries, or on disk
}

// give notes a number that was given.
func (l *ledger) give(number uint64, position journal.Position, settled bool) {
	l.given = append(l.given, given{number, position, settled})
}

// find returns what is known of a number, nil when its outcome is on disk.
func (l *ledger) find(number uint64) *given {
	if len(l.given) == 0 || number < l.given[0].number {
		return nil
	}
	i, ok := slices.BinarySearchFunc(l.given, number, func(g given, n uint64) int { return cmp.Compare(g.number, n) })
	if !ok {
		return nil
	}
	return &l.given[i]
}

// has reports whether a number has an outcome.
func (l *ledger) has(number uint64) bool {
	g := l.find(number)
	return g == nil || g.settled
}

// outstanding is the number of events that have a number and no outcome on disk.
func (l *ledger) outstanding() int { return len(l.given) + len(l.entries) }

// settled reports whether everything is on disk.
func (l *ledger) settled() bool { return len(l.entries) == 0 && !l.writing }

// A storedRecord is what became of a record.
type storedRecord struct {
	sequence uint64
	err      error
}

// settle notes an outcome, to be written with the next record.
func (w *worker) settle(d *delivery, state journal.DeliveryState, a Answer, took time.Duration) {
	entry := journal.Attempt{
		Number: d.number, Position: d.position, Conversation: d.conversation, State: state, Cause: a.Cause,
		Status: uint16(max(min(a.Status, 999), 0)), Attempts: uint16(min(d.attempts, 1<<16-1)),
		Millis: uint32(min(took.Milliseconds(), 1<<32-1)), Arrived: d.arrived,
	}
	if state == journal.DeliveryWaiting {
		entry.Due = d.due.UnixMilli()
	}
	if entry.Cause == journal.CauseNone && a.Status != 0 && !a.Delivered() {
		entry.Cause = journal.CauseStatus
	}
	w.ledger.entries = append(w.ledger.entries, entry)
	if detail, ok := detailOf(d.number, a); ok && state != journal.DeliveryDone {
		w.ledger.details = append(w.ledger.details, detail)
	}
	if g := w.ledger.find(d.number); g != nil {
		g.settled = true
	}
}

// maxDetails bounds the details of one record: they are sealed together.
const maxDetails = 32

// record writes the outcomes that have come since the last record, one record at
// a time. When there are none it notes from time to time how far the endpoint's
// events have been read, so that a rebuilt view need not read them again.
func (w *worker) record(ctx context.Context) {
	l := &w.ledger
	if l.writing {
		return
	}
	n := min(len(l.entries), journal.MaxAttempts)
	if n == 0 {
		l.advance(w.number, w.scanned) // every outcome is on disk
		if !w.noteProgress() {
			return
		}
	}
	a := &journal.Attempts{Kind: journal.AttemptsOutcomes, Endpoint: w.ep.ID, Token: w.token, Entries: l.entries[:n:n]}
	details := l.details[:min(len(l.details), maxDetails)]
	if n < len(l.entries) {
		// Further outcomes come with the next record; so must what it says of them.
		details = nil
		a.Number, a.Through = l.number, l.through
	} else {
		l.advance(w.number, w.scanned)
		a.Number, a.Through = l.number, l.through
		l.details = nil
	}
	l.entries, l.noted = l.entries[n:], l.through
	l.writing = true
	go func() { w.stored <- w.store(ctx, a, details) }()
}

// advance moves number and through over everything that has an outcome.
func (l *ledger) advance(number uint64, scanned journal.Position) {
	n := 0
	for n < len(l.given) && l.given[n].settled {
		l.number, l.through = l.given[n].number, l.given[n].position
		n++
	}
	l.given = l.given[n:]
	if len(l.given) == 0 {
		l.number, l.through = number, max(l.through, scanned)
	}
}

// noteProgress reports whether a record without outcomes is due.
func (w *worker) noteProgress() bool {
	l := &w.ledger
	if w.ending || l.through <= l.noted {
		return false
	}
	now := time.Now()
	if l.idle.IsZero() {
		l.idle = now
	}
	if now.Sub(l.idle) < w.schedule.scale(time.Minute) {
		return false
	}
	l.idle = now
	return true
}

// store appends a record until it is on disk or the worker's life ends: without
// it what was sent would be sent again.
func (w *worker) store(ctx context.Context, a *journal.Attempts, details []detail) storedRecord {
	var sealed []byte
	if len(details) > 0 {
		var err error
		if sealed, err = json.Marshal(details); err != nil {
			sealed = nil // the outcome counts, not what was said
		}
	}
	for wait := outage; ; wait = min(2*wait, outageMost) {
		sequence, err := w.streams.Append(ctx, w.ep.App, a, sealed)
		if err == nil && wait > outage {
			w.pause(w.r, nil)
		}
		if err == nil || ctx.Err() != nil {
			return storedRecord{sequence, err}
		}
		if errors.Is(err, journal.ErrTooLarge) {
			sealed = nil
		}
		w.pause(w.r, err)
		select {
		case <-ctx.Done():
			return storedRecord{err: err}
		case <-time.After(jitter(wait)):
		}
	}
}

// noted takes note of a record on disk.
func (w *worker) noted(s storedRecord) {
	w.ledger.writing = false
	if s.err == nil {
		w.ledger.sequence = max(w.ledger.sequence, s.sequence)
	}
	if len(w.ledger.entries) == 0 {
		w.ledger.advance(w.number, w.scanned) // what was sent before makes room
	}
}

// load reads where the endpoint is. The view must have this process's last
// record, and the one that takes the endpoint over.
func (w *worker) load(ctx context.Context, last uint64) error {
	stream, _, err := w.streams.Locate(ctx, w.ep.App, 0)
	if err != nil {
		return err
	}
	if w.Leases != nil {
		taken := &journal.Attempts{Kind: journal.AttemptsTaken, Endpoint: w.ep.ID, Token: w.token}
		if last, err = w.streams.Append(ctx, w.ep.App, taken, nil); err != nil {
			return err
		}
	}
	if err := w.View.Wait(ctx, stream, last); err != nil {
		return err
	}
	return w.loadView(ctx)
}

// fill reads new events. It reports whether there may be more of them: what was
// read may all have been for others, or have been sent.
func (w *worker) fill(ctx context.Context) (more bool, err error) {
	app, err := w.Journal.App(ctx, w.ep.App)
	if err != nil {
		return false, err
	}
	n := 0
	q := history.Query{After: w.scanned, Limit: fetch, Oldest: w.Journal.Oldest(app, w.now())}
	selects(w.ep, &q)
	next, err := w.Events.Replay(ctx, w.ep.App, q, func(i history.Item) error {
		n++
		return w.take(i)
	})
	if trimmed, ok := trimmedBy(err); ok && trimmed > w.scanned {
		w.scanned = trimmed
		return true, nil
	}
	if err != nil {
		return false, err
	}
	w.scanned = max(w.scanned, next)
	return n == fetch, nil
}

// take gives an event its number and queues it, unless it was before.
func (w *worker) take(i history.Item) error {
	w.scanned = i.Position
	if !matches(w.ep, &i) {
		return nil
	}
	if number, ok := w.known[i.Position]; ok {
		delete(w.known, i.Position)
		w.number = max(w.number, number)
		w.ledger.give(number, i.Position, true)
		return nil
	}
	w.number++
	d := &delivery{number: w.number, position: i.Position, arrived: i.Stored.UnixMilli(), item: keep(i)}
	if w.ep.Ordered {
		copy(d.conversation[:], i.Record[28:44])
	}
	w.ledger.give(d.number, d.position, false)
	w.fresh = append(w.fresh, d)
	return nil
}
