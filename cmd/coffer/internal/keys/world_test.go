package keys

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/journal/journaltest"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/kmstest"
	"github.com/cofferdb/coffer/kms/local"
)

const (
	region = "eu"
	actor  = "operator:test"
)

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// world is a region on disk with two KEKs, each behind faults.
type world struct {
	t        testing.TB
	js       jetstream.JetStream
	nc       *nats.Conn
	sync     journal.Syncer
	journal  *journal.Journal
	a, b     *kmstest.Faults
	ida, idb kms.Identity
	shift    atomic.Int64 // of the clock, in nanoseconds
	opened   map[string]kms.Provider
	mu       sync.Mutex
}

// kept is a provider that others close in vain.
type kept struct{ kms.Provider }

func (kept) Close() error { return nil }

// keptKEK can also rotate and retire.
type keptKEK struct {
	kept
	kms.Rotator
	kms.Retirer
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, opened: map[string]kms.Provider{}}
	srv, nc := journaltest.Start(t, embedded.Options{})
	w.nc = nc
	if s := srv.Syncer(); s != nil {
		w.sync = s
	}
	var err error
	w.js, err = jetstream.New(nc)
	must(t, err)
	dir := t.TempDir()
	w.a, w.ida = w.kek(filepath.Join(dir, "a"), "local:a")
	w.b, w.idb = w.kek(filepath.Join(dir, "b"), "local:b")
	w.journal, err = journal.Open(t.Context(), journal.Config{
		Region: journal.DefaultRegions()[2], Conn: nc, Sync: w.sync, KMS: w.opened["local:a"],
	})
	must(t, err)
	t.Cleanup(func() { must(t, w.journal.Close()) })
	return w
}

func (w *world) kek(path, setting string) (*kmstest.Faults, kms.Identity) {
	w.t.Helper()
	p, err := local.Open(w.t.Context(), local.Options{Path: path, Create: true, Region: region})
	must(w.t, err)
	w.t.Cleanup(func() { must(w.t, p.Close()) })
	d, err := p.Describe(w.t.Context())
	must(w.t, err)
	faults := kmstest.NewFaults(p)
	w.opened[setting] = keptKEK{kept{faults}, p, p}
	return faults, d.Identity()
}

func (w *world) open(_ context.Context, setting string) (kms.Provider, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	p, ok := w.opened[setting]
	if !ok {
		return nil, errors.New("no such setting")
	}
	return p, nil
}

func (w *world) now() time.Time { return time.Now().Add(time.Duration(w.shift.Load())) }

func (w *world) rows() kms.Rows {
	return journal.NewRows(w.js, journal.KeyringBucket(region), w.sync)
}

// admin is one of a process of its own, with its own keyring over rows.
func (w *world) admin(rows kms.Rows) *Admin {
	w.t.Helper()
	keyring, err := kms.NewKeyring(kms.Config{Region: region, Provider: w.opened["local:a"], Rows: w.rows()})
	must(w.t, err)
	w.t.Cleanup(func() { must(w.t, keyring.Close()) })
	return w.adminOver(keyring, rows)
}

func (w *world) adminOver(keyring *kms.Keyring, rows kms.Rows) *Admin {
	w.t.Helper()
	a, err := New(w.t.Context(), Options{
		Keyring: keyring, Rows: rows, Audit: w.journal, Primary: w.opened["local:a"], Setting: "local:a", Open: w.open,
		Now: w.now, Log: slog.New(slog.NewTextHandler(w.t.Output(), nil)),
	})
	must(w.t, err)
	a.pause, a.chunks = time.Millisecond, 3
	w.t.Cleanup(func() { must(w.t, a.Close()) })
	return a
}

// run lets an Admin work until the test, or what is returned, ends it.
func (w *world) run(a *Admin) (stop func()) {
	ctx, cancel := context.WithCancel(w.t.Context())
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	return sync.OnceFunc(func() {
		cancel()
		must(w.t, <-ended)
	})
}

// apps makes apps, named so that they are in order.
func (w *world) apps(a *Admin, n int) []string {
	w.t.Helper()
	var names []string
	for i := range n {
		names = append(names, fmt.Sprintf("app%03d", i))
		must(w.t, a.keyring.CreateApp(w.t.Context(), names[i]))
	}
	return names
}

func (w *world) start(a *Admin, spec Spec) Job {
	w.t.Helper()
	spec.Actor = actor
	j, err := a.Start(w.t.Context(), spec)
	must(w.t, err)
	return j
}

// end waits for the end of a job.
func (w *world) end(a *Admin, id string) Job {
	w.t.Helper()
	for {
		j, err := a.Job(w.t.Context(), id)
		must(w.t, err)
		if j.Ended() && !j.Finished.IsZero() {
			return j
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func (w *world) do(a *Admin, spec Spec) Job {
	w.t.Helper()
	return w.end(a, w.start(a, spec).ID)
}

// want checks how a job ended.
func (w *world) want(j Job, state State, done, skipped, failed int) {
	w.t.Helper()
	if j.State != state || j.Done != done || j.Skipped != skipped || j.Failed != failed || len(j.Pending) != 0 || j.Total != done+skipped+failed {
		w.t.Fatalf("job %+v\nwant %s with %d done, %d skipped, %d failed", j, state, done, skipped, failed)
	}
}

// wraps lists what wraps each app: PROVIDER:KEY#VERSION, separated by spaces.
func (w *world) wraps(a *Admin) map[string]string {
	w.t.Helper()
	found := map[string]string{}
	must(w.t, a.Inventory(w.t.Context(), func(app AppInventory) error {
		var names []string
		for _, key := range app.Keys {
			for _, ref := range key.Wraps {
				names = append(names, wrapName(ref))
			}
		}
		found[app.App] = strings.Join(names, " ")
		return nil
	}))
	return found
}

// all checks that every app has just the one wrap.
func (w *world) all(a *Admin, id kms.Identity, version string) {
	w.t.Helper()
	for app, wraps := range w.wraps(a) {
		if want := id.String() + "#" + version; wraps != want {
			w.t.Errorf("app %s is under %s, want %s", app, wraps, want)
		}
	}
}

// audited verifies the audit log and returns "ACTION OUTCOME" of each record.
func (w *world) audited() []string {
	w.t.Helper()
	head, err := w.journal.AuditHead(w.t.Context())
	must(w.t, err)
	chain := journal.NewAuditChain(head)
	var records []string
	must(w.t, w.journal.AuditLog(w.t.Context(), 0, func(payload []byte) error {
		r, err := chain.Add(payload)
		records = append(records, r.Action+" "+r.Outcome)
		if r.Actor != actor {
			w.t.Errorf("record %d is of %s", r.N, r.Actor)
		}
		return err
	}))
	must(w.t, chain.Close())
	return records
}

// recordedOnce checks that the log has each of the records that often.
func (w *world) recorded(want map[string]int) {
	w.t.Helper()
	counts := map[string]int{}
	for _, r := range w.audited() {
		counts[r]++
	}
	for r, n := range want {
		if counts[r] != n {
			w.t.Errorf("%d records %q, want %d; all: %v", counts[r], r, n, counts)
		}
	}
}

// cutRows are rows of a process that dies: at the n-th write of a job's row,
// before or after it, and then does nothing any more.
type cutRows struct {
	kms.Rows

	mu     sync.Mutex // guards what follows
	left   int
	before bool
	dead   bool
	die    func()
}

var errDead = errors.New("the process is dead")

func (c *cutRows) Update(ctx context.Context, name string, value []byte, revision uint64) (uint64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead {
		return 0, errDead
	}
	if strings.HasPrefix(name, jobPrefix) && name != currentRow {
		if c.left--; c.left == 0 {
			c.dead = true
			defer c.die()
			if c.before {
				return 0, errDead
			}
		}
	}
	return c.Rows.Update(ctx, name, value, revision)
}

func (c *cutRows) survived() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.dead
}

// keysOf returns an app's row, to compare.
func keysOf(t testing.TB, rows kms.Rows) map[string]string {
	t.Helper()
	found := map[string]string{}
	for name, err := range rows.List(t.Context(), "app.") {
		must(t, err)
		row, err := rows.Load(t.Context(), name)
		must(t, err)
		found[name] = string(row.Value)
	}
	return found
}

func pretty(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

func has(list []string, want string) bool { return slices.Contains(list, want) }
