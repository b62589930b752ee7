package journal_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/journaltest"
	"github.com/cofferdb/coffer/kms"
)

// fakeIndex is a view that has applied what it was told of.
type fakeIndex struct {
	mu      sync.Mutex
	events  map[kms.Tag]journal.Sealed
	applied uint64
	err     error
}

func (f *fakeIndex) Lookup(_ context.Context, _ journal.AppID, tag kms.Tag) ([]byte, journal.Position, bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s, ok := f.events[tag]
	return s.Record, s.Position, ok, f.err
}

func (f *fakeIndex) Applied(string) uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.applied
}

// follow applies the stream until the test ends.
func (f *fakeIndex) follow(t *testing.T, j *journal.Journal) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		err := j.Read(ctx, enterprise(), 0, "", func(batch []journal.Sealed) error {
			f.mu.Lock()
			defer f.mu.Unlock()
			for _, s := range batch {
				h, err := journal.ParseHeader(s.Record)
				if err != nil {
					return err
				}
				s.Record = bytes.Clone(s.Record)
				if _, ok := f.events[h.Event]; !ok {
					f.events[h.Event] = s
				}
				f.applied = s.Sequence
			}
			return nil
		})
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
}

func newFakeIndex() *fakeIndex { return &fakeIndex{events: map[kms.Tag]journal.Sealed{}} }

func TestIdempotency(t *testing.T) {
	for _, indexed := range []bool{false, true} {
		t.Run("indexed="+strconv.FormatBool(indexed), func(t *testing.T) {
			index := newFakeIndex()
			w := begin(t, t.TempDir(), false, func(c *journal.Config) {
				if indexed {
					c.Index = index
				}
			})
			app := newApp(t, w.Journal)
			e := message("m1", "alice", 50)
			first, err := appendOne(t.Context(), w.Journal, app, e)
			if err != nil {
				t.Fatal(err)
			}
			if indexed {
				index.follow(t, w.Journal)
				for index.Applied("") < first.Position.Sequence() {
					time.Sleep(time.Millisecond)
				}
				// The next commit forgets what the index knows.
				if _, err := appendOne(t.Context(), w.Journal, app, message("m2", "alice", 50)); err != nil {
					t.Fatal(err)
				}
			}
			again := func(what string, e journal.Event, want error) {
				t.Helper()
				r, err := appendOne(t.Context(), w.Journal, app, e)
				switch {
				case !errors.Is(err, want):
					t.Errorf("%s: %v, want %v", what, err, want)
				case want == nil && (!r.Duplicate || r.Position != first.Position || !r.Time.Equal(first.Time)):
					t.Errorf("%s: %+v, first %+v", what, r, first)
				}
			}
			again("without a time", e, nil)
			timed := e
			timed.Time = first.Time
			again("with the stored time", timed, nil)
			timed.Time = first.Time.Add(-time.Second)
			again("with another time", timed, journal.ErrConflict)
			other := message("m1", "alice", 51)
			again("with another body", other, journal.ErrConflict)
			other = e
			other.Sender = "mallory"
			again("from another sender", other, journal.ErrConflict)

			// In one call, and many at once.
			results, err := w.Append(t.Context(), app, message("twin", "bob", 10), message("twin", "bob", 10), message("twin", "bob", 11))
			if err != nil {
				t.Fatal(err)
			}
			if results[0].Err != nil || results[0].Duplicate || !results[1].Duplicate || results[1].Position != results[0].Position ||
				!errors.Is(results[2].Err, journal.ErrConflict) {
				t.Errorf("twins in one call: %+v", results)
			}
			var wg sync.WaitGroup
			var fresh atomic.Int32
			for range 32 {
				wg.Go(func() {
					r, err := appendOne(t.Context(), w.Journal, app, message("crowd", "bob", 10))
					if err != nil {
						t.Error(err)
					}
					if !r.Duplicate {
						fresh.Add(1)
					}
				})
			}
			wg.Wait()
			if fresh.Load() != 1 {
				t.Errorf("%d of 32 at once were first", fresh.Load())
			}
			// Another app's event with the same id is another event.
			r, err := appendOne(t.Context(), w.Journal, newApp(t, w.Journal), e)
			if err != nil || r.Duplicate {
				t.Errorf("another app: %+v, %v", r, err)
			}
		})
	}
}

func TestIndexIsAskedOrNothingIsStored(t *testing.T) {
	index := newFakeIndex()
	index.err = errors.New("being rebuilt")
	w := begin(t, t.TempDir(), false, func(c *journal.Config) { c.Index = index })
	app := newApp(t, w.Journal)
	if _, err := appendOne(t.Context(), w.Journal, app, message("m1", "alice", 5)); !errors.Is(err, journal.ErrUnavailable) {
		t.Errorf("without an index: %v", err)
	}
	if last, _ := w.Last(t.Context(), enterprise()); last != 0 {
		t.Errorf("the stream ends at %d", last)
	}
	index.mu.Lock()
	index.err = nil
	index.mu.Unlock()
	if _, err := appendOne(t.Context(), w.Journal, app, message("m1", "alice", 5)); err != nil {
		t.Errorf("with it: %v", err)
	}
}

func TestAppendsWaitForTheView(t *testing.T) {
	dir := t.TempDir()
	w := begin(t, dir, false, nil)
	app := newApp(t, w.Journal)
	first, err := appendOne(t.Context(), w.Journal, app, message("m1", "alice", 5))
	if err != nil {
		t.Fatal(err)
	}
	w.end(t)
	index := newFakeIndex()
	w = begin(t, dir, false, func(c *journal.Config) { c.Index = index })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := w.Append(ctx, app, message("m1", "alice", 5)); !errors.Is(err, journal.ErrUnavailable) {
		t.Errorf("before the view has caught up: %v", err)
	}
	index.follow(t, w.Journal)
	r, err := appendOne(t.Context(), w.Journal, app, message("m1", "alice", 5))
	if err != nil || !r.Duplicate || r.Position != first.Position {
		t.Errorf("after a restart: %+v, %v; first %+v", r, err, first)
	}
}

func TestBadInputStoresNothing(t *testing.T) {
	w := begin(t, t.TempDir(), false, nil)
	app := newApp(t, w.Journal)
	old, ahead := message("a", "alice", 5), message("b", "alice", 5)
	old.Time, ahead.Time = time.Now().Add(-181*24*time.Hour), time.Now().Add(time.Hour)
	typed := message("c", "alice", 5)
	typed.Type = 99
	results, err := w.Append(t.Context(), app, old, ahead, typed,
		message("d*", "alice", 5), message("e", ".alice", 5), message("f", "alice", 70<<10), message("good", "alice", 5))
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []error{
		journal.ErrExpired, journal.ErrTimeRange, journal.ErrInvalid, journal.ErrInvalid, journal.ErrInvalid, journal.ErrTooLarge, nil,
	} {
		if !errors.Is(results[i].Err, want) || want == nil && results[i].Err != nil {
			t.Errorf("event %d: %v, want %v", i, results[i].Err, want)
		}
	}
	if last, _ := w.Last(t.Context(), enterprise()); last != 1 || results[6].Position.Sequence() != 1 {
		t.Errorf("the stream ends at %d", last)
	}
	foreign := app
	foreign[0] = 1
	for what, c := range map[string]struct {
		app  journal.AppID
		want error
	}{
		"another region": {foreign, journal.ErrWrongRegion},
		"unknown":        {journal.NewAppID(app.Region()), journal.ErrUnknownApp},
	} {
		if _, err := w.Append(t.Context(), c.app, message("x", "alice", 5)); !errors.Is(err, c.want) {
			t.Errorf("app of %s: %v", what, err)
		}
	}
	if _, err := w.Registry().SetDisabled(t.Context(), app, true); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Append(t.Context(), app, message("x", "alice", 5)); !errors.Is(err, journal.ErrDisabled) {
		t.Errorf("a disabled app: %v", err)
	}
}

// TestCancelStopsTheWait cancels appends at random moments: each is stored
// once or not at all, and sending it again settles which.
func TestCancelStopsTheWait(t *testing.T) {
	w := begin(t, t.TempDir(), false, nil)
	app := newApp(t, w.Journal)
	var wg sync.WaitGroup
	for worker := range 16 {
		wg.Go(func() {
			for i := range 30 {
				id := fmt.Sprintf("c%d-%d", worker, i)
				ctx, cancel := context.WithCancel(t.Context())
				timer := time.AfterFunc(time.Duration(i*40)*time.Microsecond, cancel)
				_, err := appendOne(ctx, w.Journal, app, message(id, "alice", 100))
				if err != nil && (!errors.Is(err, context.Canceled) || ctx.Err() == nil) {
					t.Errorf("%s: %v", id, err)
				}
				timer.Stop()
				cancel()
				if _, err := appendOne(t.Context(), w.Journal, app, message(id, "alice", 100)); err != nil {
					t.Errorf("%s again: %v", id, err)
				}
			}
		})
	}
	wg.Wait()
	last, err := w.Last(t.Context(), enterprise())
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	for _, event := range readAll(t, w.Journal, enterprise(), last) {
		seen[idOf(event)]++
	}
	for id, n := range seen {
		if n != 1 {
			t.Errorf("event %s is there %d times", id, n)
		}
	}
	if len(seen) != 16*30 {
		t.Errorf("%d events, want %d", len(seen), 16*30)
	}
}

// heldSync syncs when it may.
type heldSync struct {
	journal.Syncer
	held atomic.Bool
	may  chan struct{}
}

func (s *heldSync) Sync(stream string) error {
	if s.held.Load() {
		<-s.may
	}
	return s.Syncer.Sync(stream)
}

// TestCancelWhileSyncing cancels appends whose commit does not end, and others
// that wait for the next commit: their callers hear of it, and the events are
// stored nevertheless, once.
func TestCancelWhileSyncing(t *testing.T) {
	gate := &heldSync{may: make(chan struct{})}
	w := begin(t, t.TempDir(), false, func(c *journal.Config) {
		if gate.Syncer = c.Sync; c.Sync != nil {
			c.Sync = gate
		}
	})
	if gate.Syncer == nil {
		journaltest.Skip(t, "needs a file system for temporary files that the journal syncs itself, as ext4 and btrfs")
	}
	app := newApp(t, w.Journal)
	if _, err := appendOne(t.Context(), w.Journal, app, message("first", "alice", 10)); err != nil {
		t.Fatal(err)
	}
	gate.held.Store(true)
	for i := range 8 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		results, err := w.Append(ctx, app, message(fmt.Sprintf("a%d", i), "alice", 10), message(fmt.Sprintf("b%d", i), "alice", 10))
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range results {
			if !errors.Is(r.Err, context.DeadlineExceeded) || !errors.Is(r.Err, journal.ErrUnavailable) {
				t.Errorf("event %s: %+v", r.ID, r)
			}
		}
	}
	gate.held.Store(false)
	close(gate.may)
	for i := range 8 {
		for _, id := range []string{fmt.Sprintf("a%d", i), fmt.Sprintf("b%d", i)} {
			if _, err := appendOne(t.Context(), w.Journal, app, message(id, "alice", 10)); err != nil {
				t.Errorf("event %s again: %v", id, err)
			}
		}
	}
	if last, err := w.Last(t.Context(), enterprise()); err != nil || last != 17 {
		t.Errorf("the stream ends at %d (%v), want 17", last, err)
	}
}

// TestServerRestarts restarts the NATS server while writers append and a reader
// follows: appends are retried within the caller's deadline, nothing is doubled.
func TestServerRestarts(t *testing.T) {
	for name, always := range map[string]bool{"own sync": false, "sync always": true} {
		t.Run(name, func(t *testing.T) {
			w := begin(t, t.TempDir(), always, nil)
			app := newApp(t, w.Journal)
			var mu sync.Mutex
			seen, read := map[string]int{}, 0
			ctx, cancel := context.WithCancel(t.Context())
			var readers, wg sync.WaitGroup
			readers.Go(func() {
				err := w.Read(ctx, enterprise(), 0, "", func(batch []journal.Sealed) error {
					mu.Lock()
					defer mu.Unlock()
					for _, s := range batch {
						plain, err := w.OpenRecord(ctx, nil, s.App, s.Record)
						if err != nil {
							return err
						}
						seen[idOf(string(plain))]++
						read++
					}
					return nil
				})
				if !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
			})
			var stop atomic.Bool
			var acked atomic.Int64
			for worker := range 16 {
				wg.Go(func() {
					for i := 0; !stop.Load(); i++ {
						id := fmt.Sprintf("w%d-%d", worker, i)
						if _, err := appendOne(ctx, w.Journal, app, message(id, "alice", 200)); err != nil {
							t.Errorf("%s: %v", id, err)
							return
						}
						acked.Add(1)
					}
				})
			}
			for range 4 {
				before := acked.Load()
				for acked.Load() < before+200 && !t.Failed() {
					time.Sleep(time.Millisecond)
				}
				if err := w.srv.Restart(ctx); err != nil {
					t.Fatal(err)
				}
			}
			stop.Store(true)
			wg.Wait()
			for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
				mu.Lock()
				n := len(seen)
				mu.Unlock()
				if n >= int(acked.Load()) {
					break
				}
			}
			cancel()
			readers.Wait()
			if len(seen) != int(acked.Load()) || read != len(seen) {
				t.Errorf("acknowledged %d, read %d, of them different %d", acked.Load(), read, len(seen))
			}
		})
	}
}

// TestRefusedEventFailsAlone makes the server refuse one event of a commit.
func TestRefusedEventFailsAlone(t *testing.T) {
	for name, always := range map[string]bool{"own sync": false, "sync always": true} {
		t.Run(name, func(t *testing.T) {
			w := begin(t, t.TempDir(), always, nil)
			app := newApp(t, w.Journal)
			js, err := jetstream.New(w.nc)
			if err != nil {
				t.Fatal(err)
			}
			st, err := js.Stream(t.Context(), enterprise())
			if err != nil {
				t.Fatal(err)
			}
			c := st.CachedInfo().Config
			c.MaxMsgSize = 2000
			if _, err := js.UpdateStream(t.Context(), c); err != nil {
				t.Fatal(err)
			}
			for _, n := range []int{3, 64} {
				events := make([]journal.Event, n)
				for i := range events {
					events[i] = message(fmt.Sprintf("r%d-%d", n, i), "alice", 10)
				}
				events[n/2] = message(fmt.Sprintf("big%d", n), "alice", 4000)
				results, err := w.Append(t.Context(), app, events...)
				if err != nil {
					t.Fatal(err)
				}
				for i, r := range results {
					if i == n/2 != errors.Is(r.Err, journal.ErrTooLarge) || i != n/2 && r.Err != nil {
						t.Errorf("event %d of %d: %v", i, n, r.Err)
					}
				}
			}
			last, _ := w.Last(t.Context(), enterprise())
			if got := len(readAll(t, w.Journal, enterprise(), last)); got != 2+63 {
				t.Errorf("%d events stored, want 65", got)
			}
			drifts, err := w.Check(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if len(drifts) != 1 || drifts[0].Field != "max_msg_size" || drifts[0].Stream != enterprise() {
				t.Errorf("drifts: %+v", drifts)
			}
		})
	}
}

// TestNothingInClear searches every file and every line of the log for what an
// event says.
func TestNothingInClear(t *testing.T) {
	dir := t.TempDir()
	var log syncBuffer
	w := begin(t, dir, false, func(c *journal.Config) {
		c.Log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	})
	app := newApp(t, w.Journal)
	e := message("CANARY-event-id", "CANARY-sender", 0)
	e.Conversation = "CANARY-conversation"
	e.Data = []byte(`{"bodies":[{"type":"txt","msg":"CANARY-text"}],"ext":{"CANARY-key":"x"}}`)
	if _, err := appendOne(t.Context(), w.Journal, app, e); err != nil {
		t.Fatal(err)
	}
	e.Data = []byte(`{"bodies":[{"type":"txt","msg":"CANARY-other"}]}`)
	if _, err := appendOne(t.Context(), w.Journal, app, e); err == nil || strings.Contains(err.Error(), "CANARY") {
		t.Errorf("the error of a conflict: %v", err)
	}
	last, _ := w.Last(t.Context(), enterprise())
	events := readAll(t, w.Journal, enterprise(), last)
	if len(events) != 1 || !strings.Contains(events[0], "CANARY-text") {
		t.Fatalf("events: %q", events)
	}
	w.end(t)
	if search(t, dir, []byte("CANARY")) {
		t.Error("clear text on disk")
	}
	if strings.Contains(log.String(), "CANARY") {
		t.Error("clear text in the log")
	}
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func TestOpenRecordAllocates(t *testing.T) {
	w := begin(t, t.TempDir(), false, nil)
	app := newApp(t, w.Journal)
	if _, err := appendOne(t.Context(), w.Journal, app, message("m", "alice", 500)); err != nil {
		t.Fatal(err)
	}
	var record []byte
	done := errors.New("done")
	err := w.Read(t.Context(), enterprise(), 0, "", func(batch []journal.Sealed) error {
		record = bytes.Clone(batch[0].Record)
		return done
	})
	if !errors.Is(err, done) {
		t.Fatal(err)
	}
	dst := make([]byte, 0, 4096)
	ctx := t.Context()
	if n := testing.AllocsPerRun(1000, func() {
		if _, err := w.OpenRecord(ctx, dst, app, record); err != nil {
			t.Fatal(err)
		}
	}); n != 0 && !underRace {
		t.Errorf("%v allocations to open a record", n)
	}
	for i := range record {
		record[i] ^= 1
		if _, err := w.OpenRecord(ctx, dst, app, record); err == nil {
			t.Fatalf("a flipped bit in byte %d was not noticed", i)
		}
		record[i] ^= 1
	}
	other := newApp(t, w.Journal)
	if _, err := w.OpenRecord(ctx, dst, other, record); err == nil {
		t.Error("another app opened the record")
	}
}
