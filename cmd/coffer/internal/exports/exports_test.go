package exports

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/journal/journaltest"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/local"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/history"
	"github.com/cofferdb/coffer/projections/pebble"
)

// world is a region on disk with one app.
type world struct {
	t     *testing.T
	o     Options
	app   journal.App
	last  journal.Position
	shift atomic.Int64 // of the clock
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newWorld has an app with so many events, one of them by ann.
func newWorld(t *testing.T, events int) *world {
	t.Helper()
	ctx := t.Context()
	dir := t.TempDir()
	w := &world{t: t}
	srv, conn := journaltest.Start(t, embedded.Options{StoreDir: filepath.Join(dir, "nats")})
	provider, err := local.Open(ctx, local.Options{Path: filepath.Join(dir, "key.json"), Create: true})
	must(t, err)
	t.Cleanup(func() { must(t, provider.Close()) })
	store, err := pebble.Open(pebble.Options{Dir: filepath.Join(dir, "views")})
	must(t, err)
	t.Cleanup(func() { must(t, store.Close()) })
	view, err := history.New(history.Config{Store: store})
	must(t, err)
	var syncer journal.Syncer
	if s := srv.Syncer(); s != nil {
		syncer = s
	}
	j, err := journal.Open(ctx, journal.Config{Region: journal.DefaultRegions()[2], Conn: conn, Sync: syncer, KMS: provider, Index: view})
	must(t, err)
	t.Cleanup(func() { must(t, j.Close()) })
	runner, err := projections.NewRunner(projections.RunnerConfig{Journal: j, Store: store, Projections: []projections.Projection{view}})
	must(t, err)
	running, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- runner.Run(running) }()
	t.Cleanup(func() { stop(); must(t, <-ended) })
	js, err := jetstream.New(conn)
	must(t, err)
	w.o = Options{
		Region: journal.DefaultRegions()[2], Journal: j, History: view, Runner: runner, Rows: journal.NewRows(js, journal.RegistryBucket("eu"), syncer),
		PartEvents: 7, Turn: time.Nanosecond, Now: func() time.Time { return time.Now().Add(time.Duration(w.shift.Load())) },
	}
	w.app, err = j.CreateApp(ctx, journal.AppSpec{Name: "test", Plan: "enterprise"})
	must(t, err)
	var batch []journal.Event
	for i := range events {
		sender := "ben"
		if i == 4 {
			sender = "ann"
		}
		batch = append(batch, journal.Event{
			ID: fmt.Sprint("e", i), Type: journal.MessageSent, Sender: sender, Recipient: "cid",
			Data: jsontext.Value(fmt.Sprintf(`{"bodies":[{"type":"txt","msg":"text %d"}]}`, i)),
		})
	}
	if events > 0 {
		results, err := j.Append(ctx, w.app.ID, batch...)
		must(t, err)
		for _, r := range results {
			must(t, r.Err)
			w.last = max(w.last, r.Position)
		}
		must(t, runner.Wait(ctx, w.app.ID, w.last))
	}
	return w
}

func (w *world) pass(e *Exports) {
	w.t.Helper()
	_, err := e.pass(w.t.Context())
	must(w.t, err)
}

func (w *world) job(e *Exports, id string) Job {
	w.t.Helper()
	j, err := e.Job(w.t.Context(), w.app.ID, id)
	must(w.t, err)
	return j
}

func (w *world) start(e *Exports, spec Spec) Job {
	w.t.Helper()
	j, _, err := e.Start(w.t.Context(), w.app, spec, "")
	must(w.t, err)
	return j
}

// content is every file of an export, each compared with its entry.
func (w *world) content(e *Exports, j Job) string {
	w.t.Helper()
	files, err := e.Files(w.t.Context(), j)
	must(w.t, err)
	var all bytes.Buffer
	for _, f := range files {
		before := all.Len()
		must(w.t, e.WriteFile(w.t.Context(), &all, w.app, j, f))
		if got := int64(all.Len() - before); got != f.Bytes {
			w.t.Errorf("%s has %d bytes, its entry says %d", f.Name, got, f.Bytes)
		}
	}
	after, err := e.Files(w.t.Context(), j)
	must(w.t, err)
	for i := range after {
		if !after[i].Changed.IsZero() {
			w.t.Errorf("%s was corrected", after[i].Name)
		}
	}
	return all.String()
}

// TestTakeover: a worker that has fallen silent between any two of its steps is
// followed by another, and the export is what it would have been.
func TestTakeover(t *testing.T) {
	w := newWorld(t, 30)
	a, b := New(w.o), New(w.o)
	whole := w.start(a, Spec{Format: NDJSON})
	for range 5 {
		w.pass(a)
	}
	done := w.job(a, whole.ID)
	if done.State != Done || done.Files != 5 || done.Events != 30 || done.Progress() != 1 {
		t.Fatalf("after five turns of one file each: %+v", done)
	}
	want := w.content(a, done)
	if n := strings.Count(want, "\n"); n != 30 {
		t.Fatalf("%d lines", n)
	}

	job := w.start(a, Spec{Format: NDJSON})
	w.pass(a)
	w.pass(a)
	r, err := a.load(t.Context(), w.app.ID, job.ID)
	must(t, err)
	if r.Files != 2 || r.Owner != "" {
		t.Fatalf("after two turns: %+v", r.Job)
	}
	// It has listed one more file than its row says, and holds the lease.
	list, err := a.loadEntries(t.Context(), r.Job, 0)
	must(t, err)
	list.Files = append(list.Files, File{Name: "events-000003.ndjson", SHA256: strings.Repeat("0", 64)})
	must(t, a.storeEntries(t.Context(), r.Job, 0, list))
	r.Owner, r.Lease = a.owner, w.o.Now().Add(defaultLease)
	_, err = a.store(t.Context(), r)
	must(t, err)

	w.pass(b)
	if j := w.job(b, job.ID); j.Files != 2 || j.Owner != a.owner {
		t.Fatalf("it was taken while the lease ran: %+v", j)
	}
	w.shift.Store(int64(2 * defaultLease))
	for range 3 {
		w.pass(b)
	}
	done = w.job(b, job.ID)
	if done.State != Done || done.Files != 5 {
		t.Fatalf("after the takeover: %+v", done)
	}
	if got := w.content(b, done); got != want {
		t.Errorf("the export is\n%s\nwant\n%s", got, want)
	}
}

// TestFenced: a worker whose row was changed by another writes no more.
func TestFenced(t *testing.T) {
	w := newWorld(t, 10)
	a, b := New(w.o), New(w.o)
	job := w.start(a, Spec{Format: NDJSON})
	r, err := a.load(t.Context(), w.app.ID, job.ID)
	must(t, err)
	slow := &worker{Exports: a, job: r}
	must(t, slow.checkpoint(t.Context()))
	w.shift.Store(int64(2 * defaultLease))
	w.pass(b)
	if err := slow.checkpoint(t.Context()); !errors.Is(err, errFenced) {
		t.Errorf("checkpoint: %v", err)
	}
	must(t, b.Delete(t.Context(), w.app.ID, job.ID))
	if err := slow.checkpoint(t.Context()); !errors.Is(err, errFenced) {
		t.Errorf("after it was deleted: %v", err)
	}
	if _, err := a.Job(t.Context(), w.app.ID, job.ID); !errors.Is(err, ErrNotFound) {
		t.Errorf("the job: %v", err)
	}
	for name, err := range w.o.Rows.List(t.Context(), filesPrefix) {
		t.Errorf("row %s is left, %v", name, err)
	}
}

// TestEnds: what becomes of exports of an app that is disabled, or destroyed, and
// of those whose time is over.
func TestEnds(t *testing.T) {
	w := newWorld(t, 10)
	ctx := t.Context()
	e := New(w.o)
	job := w.start(e, Spec{Format: NDJSON, User: "ann"})
	_, err := w.o.Journal.Registry().SetDisabled(ctx, w.app.ID, true)
	must(t, err)
	w.pass(e)
	if j := w.job(e, job.ID); j.State != Failed || j.Error != "app_disabled" {
		t.Errorf("of a disabled app: %+v", j)
	}
	if _, err := e.Manifest(ctx, w.job(e, job.ID)); !errors.Is(err, ErrUnfinished) {
		t.Errorf("its manifest: %v", err)
	}
	_, err = w.o.Journal.Registry().SetDisabled(ctx, w.app.ID, false)
	must(t, err)

	// No row holds the id of a user in the clear.
	loaded, err := w.o.Rows.Load(ctx, jobPrefix+w.app.ID.String()+"-"+job.ID)
	must(t, err)
	if bytes.Contains(loaded.Value, []byte("ann")) {
		t.Errorf("the row is %s", loaded.Value)
	}
	next := w.start(e, Spec{Format: NDJSON, User: "ann"})
	w.pass(e)
	if j := w.job(e, next.ID); j.State != Done || j.Events != 1 || j.User != "ann" {
		t.Errorf("%+v", j)
	}
	must(t, w.o.Rows.(*journal.Rows).Sweep(ctx))

	w.shift.Store(int64(w.o.Journal.Retention().Exports + time.Hour))
	w.pass(e)
	if jobs, err := e.List(ctx, w.app.ID); err != nil || len(jobs) != 0 {
		t.Errorf("%d exports outlive their time, %v", len(jobs), err)
	}
	w.shift.Store(0)
	job = w.start(e, Spec{Format: NDJSON, User: "ann"})
	must(t, w.o.Journal.Keyring().DestroyApp(ctx, w.app.ID.String()))
	w.pass(e)
	if _, err := w.o.Rows.Load(ctx, jobPrefix+w.app.ID.String()+"-"+job.ID); !errors.Is(err, kms.ErrRowNotFound) {
		t.Errorf("of a destroyed app: %v", err)
	}
}

// TestNothingToExport: an app without events has exports without files.
func TestNothingToExport(t *testing.T) {
	w := newWorld(t, 0)
	w.o.Turn = 0
	e := New(w.o)
	for _, format := range []Format{NDJSON, Agora} {
		job := w.start(e, Spec{Format: format})
		w.pass(e)
		for again := true; again; {
			var err error
			again, err = e.pass(t.Context())
			must(t, err)
		}
		m, err := e.Manifest(t.Context(), w.job(e, job.ID))
		must(t, err)
		if len(m.Files) != 0 || m.Events != 0 || m.Through != 0 {
			t.Errorf("%s: %+v", format, m)
		}
	}
}
