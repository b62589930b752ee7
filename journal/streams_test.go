package journal_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
)

func jsOf(tb testing.TB, w *world) jetstream.JetStream {
	tb.Helper()
	js, err := jetstream.New(w.nc)
	if err != nil {
		tb.Fatal(err)
	}
	return js
}

// TestFourRegionsStartFast is about coffer serve --dev: four regions, each with
// a server and ten streams. No duration is asserted; the log tells.
func TestFourRegionsStartFast(t *testing.T) {
	dir := t.TempDir()
	for _, what := range []string{"first start", "restart"} {
		start := time.Now()
		var wg sync.WaitGroup
		worlds := make([]*world, 4)
		for i, r := range journal.DefaultRegions() {
			wg.Go(func() {
				w := &world{dir: filepath.Join(dir, r.ID)}
				if err := os.MkdirAll(w.dir, 0o700); err != nil {
					t.Error(err)
					return
				}
				var err error
				if w.srv, err = embedded.Start(t.Context(), embedded.Options{StoreDir: filepath.Join(w.dir, "nats")}); err != nil {
					t.Error(err)
					return
				}
				if w.nc, err = w.srv.Connect(); err != nil {
					t.Error(err)
					return
				}
				w.kms = provider(t, t.TempDir())
				cfg := w.config()
				cfg.Region = r
				if w.Journal, err = journal.Open(t.Context(), cfg); err != nil {
					t.Error(err)
					return
				}
				worlds[i] = w
			})
		}
		wg.Wait()
		t.Logf("%s: four regions open after %s", what, time.Since(start).Round(time.Millisecond))
		for _, w := range worlds {
			if w != nil {
				w.end(t)
			}
		}
	}
}

func TestRegisteredStreams(t *testing.T) {
	dir := t.TempDir()
	w := begin(t, dir, false, nil)
	app := newApp(t, w.Journal)
	if _, err := appendOne(t.Context(), w.Journal, app, message("m", "alice", 5)); err != nil {
		t.Fatal(err)
	}
	cfg := w.config()
	reopen := func(what string, want error, name string) {
		t.Helper()
		j, err := journal.Open(t.Context(), cfg)
		if err == nil {
			_ = j.Close()
		}
		if !errors.Is(err, want) || want != nil && !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v, want %v with %q", what, err, want, name)
		}
	}
	if drifts, err := w.Check(t.Context()); err != nil || len(drifts) != 0 {
		t.Errorf("drifts of a new region: %+v, %v", drifts, err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	reopen("as it was", nil, "")
	// A plan that is new gets its streams.
	cfg.Plans = append(journal.DefaultPlans(), journal.Plan{ID: "trial", Retention: 24 * time.Hour, Epoch: time.Hour, Shards: 2})
	reopen("with another plan", nil, "")

	js := jsOf(t, w)
	st, err := js.Stream(t.Context(), enterprise())
	if err != nil {
		t.Fatal(err)
	}
	c := st.CachedInfo().Config
	c.MaxAge = time.Hour
	if _, err := js.UpdateStream(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	j, err := journal.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	drifts, err := j.Check(t.Context())
	if err != nil || len(drifts) != 1 || drifts[0] != (journal.Drift{Stream: enterprise(), Field: "max_age", Want: "4320h0m0s", Have: "1h0m0s"}) {
		t.Errorf("drifts: %+v, %v", drifts, err)
	}
	// It vanishes while the journal is open: appends fail, and nothing makes it
	// again.
	if err := js.DeleteStream(t.Context(), enterprise()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if _, err := appendOne(ctx, j, app, message("n", "alice", 5)); err == nil {
		t.Error("an append to a stream that is gone succeeded")
	}
	if err := j.Read(t.Context(), enterprise(), 0, "", func([]journal.Sealed) error { return nil }); !errors.Is(err, journal.ErrIncarnation) {
		t.Errorf("reading it: %v", err)
	}
	if _, err := js.Stream(t.Context(), enterprise()); !errors.Is(err, jetstream.ErrStreamNotFound) {
		t.Errorf("the stream was made again: %v", err)
	}
	if drifts, err := j.Check(t.Context()); err != nil || len(drifts) != 1 || drifts[0].Field != "missing" {
		t.Errorf("drifts: %+v, %v", drifts, err)
	}
	if err := j.Close(); err != nil {
		t.Error(err)
	}
	reopen("without a stream", journal.ErrIncarnation, enterprise())
	c.Metadata = map[string]string{journal.IncarnationKey: "another"}
	if _, err := js.CreateStream(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	reopen("with another stream of its name", journal.ErrIncarnation, enterprise())
	if err := js.DeleteStream(t.Context(), "KV_"+journal.RegistryBucket(region().ID)); err != nil {
		t.Fatal(err)
	}
	reopen("without the registry", journal.ErrIncarnation, "registry")
}

// TestGaps makes each kind of gap and reads over it, or not.
func TestGaps(t *testing.T) {
	dir := t.TempDir()
	w := begin(t, dir, false, nil)
	app := newApp(t, w.Journal)
	for i := range 30 {
		if _, err := appendOne(t.Context(), w.Journal, app, message(fmt.Sprintf("m%d", i+1), "alice", 5)); err != nil {
			t.Fatal(err)
		}
	}
	st, err := jsOf(t, w).Stream(t.Context(), enterprise())
	if err != nil {
		t.Fatal(err)
	}
	incarnation := w.Streams()[3].Incarnation
	if w.Streams()[3].Name != enterprise() {
		t.Fatal(w.Streams())
	}
	read := func(after, upTo uint64, incarnation string) (got []uint64, err error) {
		done := errors.New("done")
		err = w.Read(t.Context(), enterprise(), after, incarnation, func(batch []journal.Sealed) error {
			for _, s := range batch {
				got = append(got, s.Sequence)
				if s.Sequence >= upTo {
					return done
				}
			}
			return nil
		})
		if errors.Is(err, done) {
			err = nil
		}
		return got, err
	}
	if got, err := read(0, 30, incarnation); err != nil || len(got) != 30 {
		t.Fatalf("%d, %v", len(got), err)
	}
	if got, err := read(10, 30, ""); err != nil || len(got) != 20 || got[0] != 11 {
		t.Fatalf("%v, %v", got, err)
	}
	if _, err := read(0, 30, "another"); !errors.Is(err, journal.ErrIncarnation) {
		t.Errorf("a checkpoint of another incarnation: %v", err)
	}
	if _, err := read(31, 32, incarnation); !errors.Is(err, journal.ErrGap) {
		t.Errorf("a checkpoint beyond the end: %v", err)
	}
	if err := w.DeleteRecords(t.Context(), enterprise(), 12, 13, 20); err != nil {
		t.Fatal(err)
	}
	if err := w.DeleteRecords(t.Context(), enterprise(), 13, 14); err != nil {
		t.Errorf("again: %v", err)
	}
	if got, err := read(0, 30, ""); err != nil || len(got) != 26 {
		t.Errorf("over deleted records: %v, %v", got, err)
	}
	// Sequence 25 goes without a note.
	if err := st.DeleteMsg(t.Context(), 25); err != nil {
		t.Fatal(err)
	}
	got, err := read(0, 30, "")
	if !errors.Is(err, journal.ErrGap) || !strings.Contains(err.Error(), "25") || len(got) != 20 {
		t.Errorf("over a lost record: %d read, %v", len(got), err)
	}
	// The head goes, in a stream that is younger than its retention.
	if err := st.Purge(t.Context(), jetstream.WithPurgeSequence(8)); err != nil {
		t.Fatal(err)
	}
	if _, err := read(0, 30, ""); !errors.Is(err, journal.ErrGap) {
		t.Errorf("a head that cannot have expired: %v", err)
	}
	if got, err := read(7, 11, ""); err != nil || got[0] != 8 {
		t.Errorf("behind it: %v, %v", got, err)
	}
}

// TestExpiredHead lets a stream's head expire, which is no gap.
func TestExpiredHead(t *testing.T) {
	w := begin(t, t.TempDir(), false, nil)
	app := newApp(t, w.Journal)
	for i := range 10 {
		if _, err := appendOne(t.Context(), w.Journal, app, message(fmt.Sprintf("m%d", i+1), "alice", 5)); err != nil {
			t.Fatal(err)
		}
	}
	js := jsOf(t, w)
	st, err := js.Stream(t.Context(), enterprise())
	if err != nil {
		t.Fatal(err)
	}
	c := st.CachedInfo().Config
	c.MaxAge = 200 * time.Millisecond
	c.Duplicates = 100 * time.Millisecond
	if _, err := js.UpdateStream(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	for {
		info, err := st.Info(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if info.State.Msgs == 0 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	r, err := appendOne(t.Context(), w.Journal, app, message("later", "alice", 5))
	if err != nil || r.Position.Sequence() != 11 {
		t.Fatalf("%+v, %v", r, err)
	}
	c.MaxAge = time.Hour // so that it stays while it is read
	if err := w.Read(t.Context(), enterprise(), 3, "", func(batch []journal.Sealed) error {
		if batch[0].Sequence != 11 {
			t.Errorf("read %d", batch[0].Sequence)
		}
		return context.Canceled
	}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
