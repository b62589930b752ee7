package callbacks_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/callbacks"
	"github.com/cofferdb/coffer/projections/pebble"
	"github.com/cofferdb/coffer/projections/storetest"
)

var (
	app      = journal.AppID{3, 1}      //nolint:gochecknoglobals // of the tests
	endpoint = journal.EndpointID{5, 9} //nolint:gochecknoglobals // of the tests
)

const stream = "coffer_eu_cb_0"

// fold is a view and the records it was given.
type fold struct {
	t     *testing.T
	view  *callbacks.View
	store *storetest.Memory
	next  uint64
}

func newFold(t *testing.T) *fold {
	t.Helper()
	f := &fold{t: t, store: &storetest.Memory{}}
	var err error
	if f.view, err = callbacks.New(callbacks.Config{Store: f.store}); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *fold) apply(batch ...journal.Attempts) {
	f.t.Helper()
	var sealed []journal.Sealed
	for i := range batch {
		f.next++
		batch[i].Endpoint = endpoint
		sealed = append(sealed, journal.Sealed{App: app, Sequence: f.next, Record: batch[i].Append(nil)})
	}
	err := f.store.Update(func(txn projections.Txn) error { return f.view.Apply(context.Background(), txn, stream, sealed) })
	if err != nil {
		f.t.Fatal(err)
	}
}

func (f *fold) progress() callbacks.Progress {
	f.t.Helper()
	p, err := f.view.Progress(context.Background(), app, endpoint)
	if err != nil {
		f.t.Fatal(err)
	}
	return p
}

// dump is everything that is stored.
func (f *fold) dump() []string {
	f.t.Helper()
	var out []string
	err := f.store.View(func(r projections.Reader) error {
		c := r.Iterate([]byte{1}, nil, false)
		defer c.Close()
		for c.Next() {
			out = append(out, fmt.Sprintf("%x=%x", c.Key(), c.Value()))
		}
		return c.Close()
	})
	if err != nil {
		f.t.Fatal(err)
	}
	return out
}

func outcome(number uint64, state journal.DeliveryState, due int64) journal.Attempt {
	a := journal.Attempt{Number: number, Position: journal.Position(10 * number), State: state, Attempts: 1, Arrived: 1_000_000}
	if state == journal.DeliveryWaiting {
		a.Due = due
	}
	return a
}

// TestFencing ignores what a process recorded whose lease had been taken.
func TestFencing(t *testing.T) {
	t.Parallel()
	f := newFold(t)
	f.apply(journal.Attempts{Kind: journal.AttemptsOutcomes, Token: 1, Number: 1, Through: 10, Entries: []journal.Attempt{outcome(1, journal.DeliveryDone, 0)}})
	f.apply(journal.Attempts{Kind: journal.AttemptsTaken, Token: 2})
	before := f.dump()
	f.apply(journal.Attempts{Kind: journal.AttemptsOutcomes, Token: 1, Number: 9, Through: 90, Entries: []journal.Attempt{outcome(2, journal.DeliveryDone, 0)}})
	if after := f.dump(); !slices.Equal(before, after) {
		t.Errorf("a record of the one before changed the view: %v", after)
	}
	f.apply(journal.Attempts{Kind: journal.AttemptsOutcomes, Token: 2, Number: 2, Through: 20, Entries: []journal.Attempt{outcome(2, journal.DeliveryDone, 0)}})
	if p := f.progress(); p.Done != 2 || p.Number != 2 || p.Token != 2 {
		t.Errorf("%+v", p)
	}
}

// TestDoneIsFinal keeps a delivered event delivered, whatever comes later.
func TestDoneIsFinal(t *testing.T) {
	t.Parallel()
	f := newFold(t)
	for _, state := range []journal.DeliveryState{journal.DeliveryWaiting, journal.DeliveryDone, journal.DeliveryWaiting, journal.DeliveryParked} {
		f.apply(journal.Attempts{Kind: journal.AttemptsOutcomes, Entries: []journal.Attempt{outcome(1, state, 7)}})
	}
	if p := f.progress(); p.Done != 1 || p.Waiting+p.Parked+p.Held != 0 {
		t.Errorf("%+v", p)
	}
}

// TestSplits folds the same records in batches of every kind: the view is the
// same. Its counts are those of its deliveries.
func TestSplits(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(3, 4)) //nolint:gosec // a test
	states := []journal.DeliveryState{journal.DeliveryDone, journal.DeliveryWaiting, journal.DeliveryParked, journal.DeliveryHeld}
	var records []journal.Attempts
	for range 300 {
		a := journal.Attempts{Kind: journal.AttemptsOutcomes, Millis: int64(random.IntN(1000))}
		for range random.IntN(5) {
			a.Entries = append(a.Entries, outcome(1+random.Uint64N(600), states[random.IntN(4)], int64(random.IntN(50))))
		}
		records = append(records, a)
	}
	one := newFold(t)
	one.apply(records...)
	many := newFold(t)
	for rest := records; len(rest) > 0; {
		n := min(1+random.IntN(7), len(rest))
		many.apply(rest[:n]...)
		rest = rest[n:]
	}
	if !slices.Equal(one.dump(), many.dump()) {
		t.Error("the batches changed the view")
	}
	p := one.progress()
	for state, want := range map[journal.DeliveryState]uint64{
		journal.DeliveryDone: p.Done, journal.DeliveryWaiting: p.Waiting, journal.DeliveryParked: p.Parked, journal.DeliveryHeld: p.Held,
	} {
		n := uint64(0)
		if err := one.view.Deliveries(t.Context(), app, endpoint, callbacks.Query{State: state}, func(callbacks.Delivery) error { n++; return nil }); err != nil || n != want {
			t.Errorf("%d deliveries are %s, %d are counted, %v", n, state, want, err)
		}
	}
	due, last := uint64(0), int64(0)
	if err := one.view.Due(t.Context(), app, endpoint, 0, func(d callbacks.Delivery) error {
		if d.Due < last {
			t.Errorf("%d after %d", d.Due, last)
		}
		due, last = due+1, d.Due
		return nil
	}); err != nil || due != p.Waiting {
		t.Errorf("%d are due, %d wait, %v", due, p.Waiting, err)
	}
}

// TestExpireLeavesNothing removes deliveries when their time is over, and no
// earlier; one that was sent again stays.
func TestExpireLeavesNothing(t *testing.T) {
	t.Parallel()
	f := newFold(t)
	arrived := time.UnixMilli(1_000_000)
	var a journal.Attempts
	for n := range uint64(600) {
		if len(a.Entries) == journal.MaxAttempts {
			f.apply(a)
			a = journal.Attempts{}
		}
		a.Kind = journal.AttemptsOutcomes
		a.Entries = append(a.Entries, outcome(n+1, []journal.DeliveryState{journal.DeliveryDone, journal.DeliveryParked}[n%2], 0))
	}
	f.apply(a)
	again := outcome(600, journal.DeliveryWaiting, 5)
	again.Arrived += (24 * time.Hour).Milliseconds()
	f.apply(journal.Attempts{Kind: journal.AttemptsOutcomes, Entries: []journal.Attempt{again}})
	for at, want := range map[time.Duration]int{71 * time.Hour: 0} {
		if n, err := f.view.Expire(t.Context(), arrived.Add(at)); n != want || err != nil {
			t.Fatalf("%d expired after %s, %v", n, at, err)
		}
	}
	if n, err := f.view.Expire(t.Context(), arrived.Add(75*time.Hour)); n != 599 || err != nil {
		t.Fatalf("%d expired, %v", n, err)
	}
	if p := f.progress(); p.Done+p.Parked != 0 || p.Waiting != 1 {
		t.Errorf("%+v", p)
	}
	if n, err := f.view.Expire(t.Context(), arrived.Add(100*time.Hour)); n != 1 || err != nil {
		t.Fatalf("%d expired at the end, %v", n, err)
	}
	if rest := f.dump(); len(rest) != 1 { // how far the endpoint has come
		t.Errorf("%d keys are left: %v", len(rest), rest)
	}
}

// TestShortRetention: where time is scaled, deliveries go as they do otherwise, and
// a view of another retention is another view.
func TestShortRetention(t *testing.T) {
	t.Parallel()
	formats := make(map[uint32]bool)
	for _, retention := range []time.Duration{3 * time.Second, time.Hour, 2 * 24 * time.Hour, 3 * 24 * time.Hour} {
		f := newFold(t)
		var err error
		if f.view, err = callbacks.New(callbacks.Config{Store: f.store, Retention: retention}); err != nil {
			t.Fatal(err)
		}
		formats[f.view.Format()] = true
		arrived := time.UnixMilli(1_800_000_000_000)
		done := outcome(1, journal.DeliveryDone, 0)
		done.Arrived = arrived.UnixMilli()
		f.apply(journal.Attempts{Kind: journal.AttemptsOutcomes, Entries: []journal.Attempt{done}})
		if n, err := f.view.Expire(t.Context(), arrived.Add(retention-time.Millisecond)); n != 0 || err != nil {
			t.Errorf("kept %s: %d expired before the end, %v", retention, n, err)
		}
		end := arrived.Add(retention + max(retention/36, 2*time.Second))
		if d, err := f.view.Depth(t.Context(), end.Add(time.Hour)); err != nil || d.Overdue < time.Hour || d.Waiting != 0 {
			t.Errorf("kept %s: before the sweep %+v, %v", retention, d, err)
		}
		if n, err := f.view.Expire(t.Context(), end); n != 1 || err != nil {
			t.Errorf("kept %s: %d expired after the end, %v", retention, n, err)
		}
	}
	f := newFold(t)
	f.apply(journal.Attempts{Kind: journal.AttemptsOutcomes, Entries: []journal.Attempt{
		outcome(1, journal.DeliveryWaiting, 2_000_000), outcome(2, journal.DeliveryWaiting, 1_500_000), outcome(3, journal.DeliveryParked, 0),
	}})
	if d, err := f.view.Depth(t.Context(), time.UnixMilli(1_600_000)); err != nil || d.Waiting != 2 || d.Parked != 1 || d.OldestDue.UnixMilli() != 1_500_000 {
		t.Errorf("what there is to deliver: %+v, %v", d, err)
	}
	if d, err := f.view.Depth(t.Context(), time.UnixMilli(1_400_000)); err != nil || !d.OldestDue.IsZero() {
		t.Errorf("before anything is due: %+v, %v", d, err)
	}
	if len(formats) != 4 {
		t.Errorf("the formats are %v", formats)
	}
}

// TestExpireInParts removes a block's deliveries as their hours end, whether they
// go as a range or one by one, and leaves the one in between that was sent again.
func TestExpireInParts(t *testing.T) {
	t.Parallel()
	f := newFold(t)
	const numbers, early, late = 1000, 300, 7
	arrived := time.UnixMilli(1_000_000)
	hour := func(n uint64) int64 { // three spans: most, then a few, then the rest
		switch {
		case n <= early:
			return 0
		case n <= early+late:
			return 2
		}
		return 4
	}
	for n := uint64(1); n <= numbers; {
		a := journal.Attempts{Kind: journal.AttemptsOutcomes}
		for ; n <= numbers && len(a.Entries) < journal.MaxAttempts; n++ {
			o := outcome(n, journal.DeliveryDone, 0)
			if n == 150 {
				o = outcome(n, journal.DeliveryParked, 0)
			}
			o.Arrived += hour(n) * time.Hour.Milliseconds()
			a.Entries = append(a.Entries, o)
		}
		f.apply(a)
	}
	again := outcome(150, journal.DeliveryDone, 0)
	again.Arrived += 4 * time.Hour.Milliseconds()
	f.apply(journal.Attempts{Kind: journal.AttemptsOutcomes, Entries: []journal.Attempt{again}})
	left := uint64(numbers)
	for _, step := range []struct {
		after time.Duration
		want  int
	}{{70, 0}, {74, early - 1}, {74, 0}, {76, late}, {78, numbers - early - late + 1}, {90, 0}} {
		n, err := f.view.Expire(t.Context(), arrived.Add(step.after*time.Hour))
		if n != step.want || err != nil {
			t.Fatalf("%d expired after %d hours, want %d; %v", n, step.after, step.want, err)
		}
		left -= uint64(n)
		listed := uint64(0)
		if err := f.view.Deliveries(t.Context(), app, endpoint, callbacks.Query{}, func(callbacks.Delivery) error { listed++; return nil }); err != nil {
			t.Fatal(err)
		}
		if p := f.progress(); p.Done != left || listed != left {
			t.Errorf("after %d hours %d are counted and %d listed, %d should", step.after, p.Done, listed, left)
		}
	}
	if rest := f.dump(); len(rest) != 1 { // how far the endpoint has come
		t.Errorf("%d keys are left: %v", len(rest), rest)
	}
}

// TestExpireCostsWhatExpires removes 1,000 deliveries beside 10,000 that stay and beside
// 100,000, for the same keys read and bytes written.
func TestExpireCostsWhatExpires(t *testing.T) {
	t.Parallel()
	var read, written [2]int
	least, most := uint64(10_000), uint64(100_000)
	if testing.Short() {
		least, most = 1000, 5000
	}
	for i, live := range []uint64{least, most} {
		disk, err := pebble.Open(pebble.Options{Dir: t.TempDir() + "/views"})
		if err != nil {
			t.Fatal(err)
		}
		defer disk.Close() //nolint:errcheck // of the test
		store := &storetest.Tally{Store: disk}
		view, err := callbacks.New(callbacks.Config{Store: store})
		if err != nil {
			t.Fatal(err)
		}
		const ended = 1000
		arrived := time.UnixMilli(1_000_000)
		var batch []journal.Sealed
		for n := uint64(1); n <= ended+live; {
			a := journal.Attempts{Kind: journal.AttemptsOutcomes, Endpoint: endpoint}
			for ; n <= ended+live && len(a.Entries) < journal.MaxAttempts; n++ {
				o := outcome(n, []journal.DeliveryState{journal.DeliveryDone, journal.DeliveryParked, journal.DeliveryWaiting}[n%3], 7)
				if n > ended {
					o.Arrived += (24 * time.Hour).Milliseconds()
				}
				a.Entries = append(a.Entries, o)
			}
			batch = append(batch, journal.Sealed{App: app, Sequence: n, Record: a.Append(nil)})
		}
		if err := store.Update(func(txn projections.Txn) error { return view.Apply(t.Context(), txn, stream, batch) }); err != nil {
			t.Fatal(err)
		}
		store.Read, store.Written = 0, 0
		if n, err := view.Expire(t.Context(), arrived.Add(75*time.Hour)); n != ended || err != nil {
			t.Fatalf("%d expired, %v", n, err)
		}
		read[i], written[i] = store.Read, store.Written
	}
	if read[0] != read[1] || written[0] != written[1] {
		t.Errorf("removing 1,000 deliveries: %d keys read beside %d, %d beside %d; %d and %d bytes written", read[0], least, read[1], most, written[0], written[1])
	}
	t.Logf("1,000 deliveries: %d keys read, %d bytes written", read[1], written[1])
}
