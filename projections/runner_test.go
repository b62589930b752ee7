package projections_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func appN(n byte) journal.AppID { return journal.AppID{0: 3, 15: n} }

// source is a journal in memory. App n writes to stream s<n>.
type source struct {
	mu      sync.Mutex // guards what follows
	streams []journal.StreamInfo
	records map[string][]journal.Sealed
	grown   chan struct{} // closed when a record comes
	fail    func(stream string) error
	reads   int
}

func newSource(streams ...string) *source {
	s := &source{records: make(map[string][]journal.Sealed), grown: make(chan struct{})}
	for _, name := range streams {
		s.streams = append(s.streams, journal.StreamInfo{Name: name, Incarnation: "first"})
	}
	return s
}

func (s *source) append(stream string, app journal.AppID, texts ...string) journal.Position {
	s.mu.Lock()
	defer s.mu.Unlock()
	var seq uint64
	if list := s.records[stream]; len(list) > 0 {
		seq = list[len(list)-1].Sequence
	}
	for _, text := range texts {
		seq++
		s.records[stream] = append(s.records[stream], journal.Sealed{
			App: app, Position: journal.Position(seq), Sequence: seq, Record: []byte(text),
		})
	}
	close(s.grown)
	s.grown = make(chan struct{})
	return journal.Position(seq)
}

func (s *source) set(fn func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fn()
}

func (s *source) Streams() []journal.StreamInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.streams)
}

func (s *source) Read(ctx context.Context, stream string, after uint64, _ string, fn func([]journal.Sealed) error) error {
	s.set(func() { s.reads++ })
	for {
		s.mu.Lock()
		var batch []journal.Sealed
		for _, r := range s.records[stream] {
			if r.Sequence > after && len(batch) < 100 {
				batch = append(batch, r)
			}
		}
		grown, fail := s.grown, s.fail
		s.mu.Unlock()
		if fail != nil {
			if err := fail(stream); err != nil {
				return err
			}
		}
		if len(batch) == 0 {
			select {
			case <-grown:
				continue
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if err := fn(batch); err != nil {
			return err
		}
		after = batch[len(batch)-1].Sequence
	}
}

func (s *source) Last(_ context.Context, stream string) (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if list := s.records[stream]; len(list) > 0 {
		return list[len(list)-1].Sequence, nil
	}
	return 0, nil
}

func (s *source) Locate(_ context.Context, app journal.AppID, pos journal.Position) (string, uint64, error) {
	return fmt.Sprint("s", app[15]), pos.Sequence(), nil
}

// words is a projection that keeps each record's text. The text "bad" cannot be
// applied, "panic" panics, "slow" waits.
type words struct {
	name   string
	table  byte
	format uint32
	resume chan struct{}

	mu       sync.Mutex // guards what follows
	gate     error
	gates    []string
	advanced map[string]uint64
	heal     bool // "bad" is applied all the same
	applied  int
}

func newWords(name string, table byte) *words {
	return &words{name: name, table: table, format: 1, resume: make(chan struct{}), advanced: make(map[string]uint64)}
}

var errBad = errors.New("a bad word")

func (w *words) Name() string   { return w.name }
func (w *words) Format() uint32 { return w.format }
func (w *words) Tables() []byte { return []byte{w.table} }

func (w *words) Apply(ctx context.Context, txn projections.Txn, stream string, batch []journal.Sealed) error {
	for _, s := range batch {
		w.mu.Lock()
		heal := w.heal
		w.applied++
		w.mu.Unlock()
		switch string(s.Record) {
		case "bad":
			if !heal {
				return errBad
			}
		case "panic":
			panic("of the test")
		case "slow":
			select {
			case <-w.resume:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		key := append([]byte{w.table}, stream...)
		txn.Set(binary.BigEndian.AppendUint64(key, s.Sequence), s.Record)
	}
	return nil
}

func (w *words) Gate(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.gate = err
	w.gates = append(w.gates, fmt.Sprint(err))
}

func (w *words) closed() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.gate
}

func (w *words) Advanced(stream string, seq uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.advanced[stream] = seq
}

func (w *words) text(t *testing.T, s projections.Store) string {
	t.Helper()
	var list []string
	if err := s.View(func(r projections.Reader) error {
		c := r.Iterate([]byte{w.table}, []byte{w.table + 1}, false)
		defer c.Close()
		for c.Next() {
			list = append(list, string(c.Value()))
		}
		return c.Close()
	}); err != nil {
		t.Fatal(err)
	}
	return strings.Join(list, " ")
}

// begin runs a runner until the returned function is called; that returns Run's
// error.
func begin(t *testing.T, s projections.Source, store projections.Store, list ...projections.Projection) (*projections.Runner, func() error) {
	t.Helper()
	return beginWith(t, projections.RunnerConfig{Journal: s, Store: store, Projections: list, Batch: 10})
}

func beginWith(t *testing.T, cfg projections.RunnerConfig) (*projections.Runner, func() error) {
	t.Helper()
	r, err := projections.NewRunner(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()
	return r, func() error {
		cancel()
		return <-ended
	}
}

func wait(t *testing.T, r *projections.Runner, app journal.AppID, pos journal.Position, names ...string) {
	t.Helper()
	if err := r.Wait(t.Context(), app, pos, names...); err != nil {
		t.Fatalf("Wait: %v", err)
	}
}

func end(t *testing.T, stop func() error) {
	t.Helper()
	if err := stop(); err != nil {
		t.Errorf("Run: %v", err)
	}
}

func TestRunnerFollowsAndResumes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, store, w := newSource("s1", "s2"), &storetest.Memory{}, newWords("words", 'w')
		r, stop := begin(t, src, store, w)
		wait(t, r, appN(1), src.append("s1", appN(1), "a", "b"))
		wait(t, r, appN(2), src.append("s2", appN(2), "x"))
		if got := w.text(t, store); got != "a b x" {
			t.Errorf("the view has %q", got)
		}
		if err := r.Ready(); err != nil {
			t.Errorf("Ready: %v", err)
		}
		for _, s := range r.Status(t.Context()) {
			if s.State != projections.Following || s.Lag != 0 || s.Err != nil || s.Checkpoint.Incarnation != "first" {
				t.Errorf("status %+v", s)
			}
		}
		end(t, stop)

		// What came while nothing ran is read from the checkpoint, once.
		w2 := newWords("words", 'w')
		pos := src.append("s1", appN(1), "c")
		r, stop = begin(t, src, store, w2)
		wait(t, r, appN(1), pos)
		if got := w2.text(t, store); got != "a b c x" || w2.applied != 1 {
			t.Errorf("the view has %q after %d records", got, w2.applied)
		}
		synctest.Wait()
		if w2.advanced["s1"] != 3 || w2.advanced["s2"] != 1 {
			t.Errorf("advanced to %v", w2.advanced)
		}
		end(t, stop)
	})
}

// Who reads while a process starts must not be shown what the store had before
// a crash, whichever goroutine comes first.
func TestRunnerGatesBeforeRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, store, w := newSource("s1", "s2"), &storetest.Memory{}, newWords("words", 'w')
		r, err := projections.NewRunner(projections.RunnerConfig{Journal: src, Store: store, Projections: []projections.Projection{w}})
		if err != nil {
			t.Fatal(err)
		}
		if !errors.Is(w.closed(), projections.ErrRebuilding) {
			t.Errorf("before Run the gate is %v, want ErrRebuilding", w.closed())
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- r.Run(ctx) }()
		synctest.Wait()
		if err := w.closed(); err != nil {
			t.Errorf("caught up, the gate is %v", err)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestRunnerGatesUntilCaughtUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, store := newSource("s1"), &storetest.Memory{}
		src.append("s1", appN(1), "a", "slow", "b")
		w := newWords("words", 'w')
		r, stop := begin(t, src, store, w)
		synctest.Wait()
		if !errors.Is(w.closed(), projections.ErrRebuilding) || !errors.Is(r.Ready(), projections.ErrRebuilding) {
			t.Errorf("a new view of an old journal: gate %v, ready %v; want ErrRebuilding", w.closed(), r.Ready())
		}
		end(t, stop)

		// The fill was interrupted; it is still one after a restart.
		w = newWords("words", 'w')
		r, stop = begin(t, src, store, w)
		synctest.Wait()
		if s := r.Status(t.Context())[0]; s.State != projections.Rebuilding {
			t.Errorf("after a restart the state is %s", s.State)
		}
		close(w.resume)
		wait(t, r, appN(1), 3)
		synctest.Wait()
		if w.closed() != nil || r.Ready() != nil {
			t.Errorf("after the end: gate %v, ready %v", w.closed(), r.Ready())
		}
		end(t, stop)
	})
}

func TestRunnerStopsAtBadRecord(t *testing.T) {
	for _, word := range []string{"bad", "panic"} {
		t.Run(word, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				src, store := newSource("s1", "s2"), &storetest.Memory{}
				w, other := newWords("words", 'w'), newWords("other", 'o')
				other.heal = true
				r, stop := begin(t, src, store, w, other)
				synctest.Wait()
				pos := src.append("s1", appN(1), "a", "b", word, "c")
				err := r.Wait(t.Context(), appN(1), pos, "words")
				var record *projections.RecordError
				if !errors.Is(err, projections.ErrStopped) || !errors.As(err, &record) {
					t.Fatalf("Wait = %v, want ErrStopped with a RecordError", err)
				}
				if record.Stream != "s1" || record.Sequence != 3 || record.Position != 3 || record.Projection != "words" || record.App != appN(1) {
					t.Errorf("the error names %+v", record)
				}
				var panicked *projections.PanicError
				if word == "panic" && !errors.As(err, &panicked) {
					t.Errorf("%v has no PanicError", err)
				}
				if got := w.text(t, store); got != "a b" {
					t.Errorf("the view has %q, want what was in front", got)
				}
				wait(t, r, appN(2), src.append("s2", appN(2), "x"))
				if word == "bad" {
					wait(t, r, appN(1), pos, "other")
				}
				synctest.Wait()
				if err := r.Ready(); !errors.Is(err, projections.ErrStopped) {
					t.Errorf("Ready = %v, want ErrStopped", err)
				}
				i := slices.IndexFunc(r.Status(t.Context()), func(s projections.Status) bool { return s.State == projections.Stopped })
				if s := r.Status(t.Context())[i]; s.Checkpoint.Sequence != 2 || s.Lag != 2 {
					t.Errorf("status %+v", s)
				}

				// A rebuild with a projection that knows better goes past it.
				if word == "bad" {
					w.mu.Lock()
					w.heal = true
					w.mu.Unlock()
					if err := r.Rebuild(t.Context(), "words"); err != nil {
						t.Errorf("Rebuild: %v", err)
					}
					if got := w.text(t, store); got != "a b bad c x" {
						t.Errorf("the rebuilt view has %q", got)
					}
				}
				end(t, stop)
			})
		})
	}
}

// TestStoppedIsClosed keeps readers out of a view that has stopped, if that is
// asked for: at once, after a start, and until it has been rebuilt.
func TestStoppedIsClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, store, w := newSource("s1", "s2"), &storetest.Memory{}, newWords("words", 'w')
		cfg := projections.RunnerConfig{Journal: src, Store: store, Projections: []projections.Projection{w}, CloseStopped: true}
		r, stop := beginWith(t, cfg)
		wait(t, r, appN(1), src.append("s1", appN(1), "a"))
		synctest.Wait()
		if err := w.closed(); err != nil {
			t.Errorf("before: %v", err)
		}
		src.append("s1", appN(1), "bad")
		synctest.Wait()
		wait(t, r, appN(2), src.append("s2", appN(2), "x")) // does not open it
		if err := w.closed(); !errors.Is(err, projections.ErrStopped) || !errors.Is(err, errBad) {
			t.Errorf("stopped: %v", err)
		}
		end(t, stop)
		r, stop = beginWith(t, cfg)
		synctest.Wait()
		if err := w.closed(); !errors.Is(err, projections.ErrStopped) {
			t.Errorf("after a start: %v", err)
		}
		w.mu.Lock()
		w.heal = true
		w.mu.Unlock()
		if err := r.Rebuild(t.Context(), "words"); err != nil {
			t.Errorf("Rebuild: %v", err)
		}
		if err := w.closed(); err != nil {
			t.Errorf("rebuilt: %v", err)
		}
		end(t, stop)
	})
}

func TestJournalIsAnother(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*source)
		want   error
	}{
		{"re-created", func(s *source) { s.streams[0].Incarnation = "second" }, journal.ErrIncarnation},
		{"truncated", func(s *source) { s.records["s1"] = s.records["s1"][:1] }, journal.ErrGap},
		{"gap", func(s *source) { s.fail = func(string) error { return fmt.Errorf("of the test: %w", journal.ErrGap) } }, journal.ErrGap},
		{"order", func(s *source) { s.append("s1", appN(1), "c"); s.records["s1"][1].Sequence = 9 }, journal.ErrGap},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				src, store, w := newSource("s1"), &storetest.Memory{}, newWords("words", 'w')
				r, stop := begin(t, src, store, w)
				wait(t, r, appN(1), src.append("s1", appN(1), "a", "b"))
				end(t, stop)
				test.change(src)
				r, stop = begin(t, src, store, w)
				synctest.Wait()
				if test.name == "order" {
					// 9 follows 2, then 3 follows 9.
					src.set(func() { src.records["s1"][1], src.records["s1"][2] = src.records["s1"][2], src.records["s1"][1] })
				}
				src.append("s1", appN(1), "z")
				synctest.Wait()
				if s := r.Status(t.Context())[0]; test.name != "order" && (s.State != projections.Stopped || !errors.Is(s.Err, test.want)) {
					t.Errorf("status %+v, want stopped with %v", s, test.want)
				}
				if test.name != "order" && w.closed() != nil {
					t.Errorf("what the view has cannot be read: %v", w.closed())
				}
				end(t, stop)
			})
		})
	}
}

func TestRunnerRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, store, w := newSource("s1"), &storetest.Memory{}, newWords("words", 'w')
		var failures atomic.Int64
		failures.Store(5)
		src.fail = func(string) error {
			if failures.Add(-1) >= 0 {
				return errors.New("away")
			}
			return nil
		}
		r, stop := begin(t, src, store, w)
		synctest.Wait()
		if s := r.Status(t.Context())[0]; s.State != projections.Retrying || s.Err == nil {
			t.Errorf("status %+v, want retrying", s)
		}
		wait(t, r, appN(1), src.append("s1", appN(1), "a"))
		if s := r.Status(t.Context())[0]; s.State != projections.Following || s.Err != nil {
			t.Errorf("status %+v, want following", s)
		}
		end(t, stop)
	})
}

func TestStoreFailureEndsRun(t *testing.T) {
	for _, want := range []error{projections.ErrCorrupt, projections.ErrUnavailable} {
		synctest.Test(t, func(t *testing.T) {
			src, w := newSource("s1"), newWords("words", 'w')
			var broken atomic.Bool
			store := &storetest.Memory{Fail: func(call string) error {
				if call == "update" && broken.Load() {
					return fmt.Errorf("of the test: %w", want)
				}
				return nil
			}}
			r, stop := begin(t, src, store, w)
			synctest.Wait()
			broken.Store(true)
			src.append("s1", appN(1), "a")
			synctest.Wait()
			if err := r.Wait(t.Context(), appN(1), 1); !errors.Is(err, projections.ErrStopped) || !errors.Is(err, want) {
				t.Errorf("Wait = %v, want ErrStopped and %v", err, want)
			}
			if err := stop(); !errors.Is(err, want) {
				t.Errorf("Run = %v, want %v", err, want)
			}
		})
	}
}

func TestChanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, store, w := newSource("s1", "s2"), &storetest.Memory{}, newWords("words", 'w')
		r, stop := begin(t, src, store, w)
		one, two := r.Changed(appN(1)), r.Changed(appN(2))
		if r.Changed(appN(1)) != one {
			t.Error("two waiters of an app have two channels")
		}
		wait(t, r, appN(1), src.append("s1", appN(1), "a"))
		synctest.Wait()
		select {
		case <-one:
		default:
			t.Error("the app's channel is open after a change")
		}
		select {
		case <-two:
			t.Error("another app's channel is closed")
		default:
		}
		if r.Changed(appN(1)) == one {
			t.Error("the channel was not replaced")
		}
		end(t, stop)
	})
}

func TestWaitGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, store, w := newSource("s1"), &storetest.Memory{}, newWords("words", 'w')
		r, stop := begin(t, src, store, w)
		for range 100 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			if err := r.Wait(ctx, appN(1), 1); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Wait = %v", err)
			}
			cancel()
		}
		if err := r.Wait(t.Context(), appN(7), 1); !errors.Is(err, projections.ErrUnknown) {
			t.Errorf("Wait on a stream that is not there: %v", err)
		}
		var group sync.WaitGroup
		for i := range 1000 {
			group.Go(func() { wait(t, r, appN(1), journal.Position(i%50+1)) })
		}
		synctest.Wait()
		for range 50 {
			src.append("s1", appN(1), "a")
		}
		group.Wait()
		end(t, stop)
	})
}

func TestWaitBeforeRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, store, w := newSource("s1"), &storetest.Memory{}, newWords("words", 'w')
		r, stop := begin(t, src, store, w)
		pos := src.append("s1", appN(1), "a")
		wait(t, r, appN(1), pos)
		end(t, stop)
		r, err := projections.NewRunner(projections.RunnerConfig{Journal: src, Store: store, Projections: []projections.Projection{w}})
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- r.Wait(t.Context(), appN(1), pos) }()
		synctest.Wait() // it waits: the runner does not know what the store has
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- r.Run(ctx) }()
		if err := <-done; err != nil {
			t.Errorf("Wait: %v", err)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestNewRunnerRefuses(t *testing.T) {
	src, store := newSource("s1"), &storetest.Memory{}
	for name, cfg := range map[string]projections.RunnerConfig{
		"nothing":       {},
		"no projection": {Journal: src, Store: store},
		"same table":    {Journal: src, Store: store, Projections: []projections.Projection{newWords("a", 'w'), newWords("b", 'w')}},
		"same name":     {Journal: src, Store: store, Projections: []projections.Projection{newWords("a", 'w'), newWords("a", 'x')}},
		"runner's":      {Journal: src, Store: store, Projections: []projections.Projection{newWords("a", 0)}},
		"bad name":      {Journal: src, Store: store, Projections: []projections.Projection{newWords("A/b", 'w')}},
	} {
		if _, err := projections.NewRunner(cfg); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
