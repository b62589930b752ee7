package journal_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/journaltest"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/kmstest"
)

// search reports whether a file under dir holds the bytes.
func search(tb testing.TB, dir string, needle []byte) bool {
	tb.Helper()
	found := false
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || err == nil && !d.Type().IsRegular() {
			return nil
		}
		if err != nil {
			return err
		}
		content, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if bytes.Contains(content, needle) {
			tb.Logf("found in %s", path)
			found = true
		}
		return err
	})
	if err != nil {
		tb.Fatal(err)
	}
	return found
}

// rowsOn returns the registry's rows of a region that was opened in w.
func rowsOn(tb testing.TB, w *world) kms.Rows {
	tb.Helper()
	js, err := jetstream.New(w.nc)
	if err != nil {
		tb.Fatal(err)
	}
	return journal.NewRows(js, journal.KeyringBucket(region().ID), w.config().Sync)
}

func TestRows(t *testing.T) {
	for name, always := range map[string]bool{"own sync": false, "sync always": true} {
		t.Run(name, func(t *testing.T) {
			worlds := map[kms.Rows]*world{}
			kmstest.RunRows(t, kmstest.RowsHarness{
				New: func(tb testing.TB) kms.Rows {
					w := begin(tb, tb.TempDir(), always, nil)
					r := rowsOn(tb, w)
					worlds[r] = w
					return r
				},
				Again: func(tb testing.TB, r kms.Rows) kms.Rows { return rowsOn(tb, worlds[r]) },
				Search: func(tb testing.TB, r kms.Rows, needle []byte) bool {
					return search(tb, worlds[r].dir, needle)
				},
			})
		})
	}
}

func TestRowsOnThreeServers(t *testing.T) {
	nc := journaltest.StartCluster(t).Connect()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	kmstest.RunRows(t, kmstest.RowsHarness{
		New: func(tb testing.TB) kms.Rows {
			for name := range js.StreamNames(tb.Context()).Name() {
				if err := js.DeleteStream(tb.Context(), name); err != nil {
					tb.Fatal(err)
				}
			}
			cfg := journal.Config{Region: region(), Conn: nc, KMS: provider(tb, tb.TempDir()), Replicas: 3}
			j, err := journal.Open(tb.Context(), cfg)
			if err != nil {
				tb.Fatal(err)
			}
			tb.Cleanup(func() { _ = j.Close() })
			return journal.NewRows(js, journal.KeyringBucket(region().ID), nil)
		},
		Again: func(_ testing.TB, r kms.Rows) kms.Rows { return r },
		Cannot: map[string]string{
			"Search": "the Raft log of each server keeps replaced bytes until it is compacted",
		},
	})
}

// TestRaftLogsForget replaces a row on three servers and waits until no file of
// any of them holds the old bytes: what docs/operations/nats.md says about how
// long that takes. Nothing is written meanwhile, as in a keyring that rests.
func TestRaftLogsForget(t *testing.T) {
	if os.Getenv("COFFER_TEST_LONG") == "" {
		t.Skip("skipped: it waits for minutes; set COFFER_TEST_LONG=1")
	}
	cluster := journaltest.StartCluster(t)
	nc := cluster.Connect()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	j, err := journal.Open(t.Context(), journal.Config{Region: region(), Conn: nc, KMS: provider(t, t.TempDir()), Replicas: 3})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = j.Close() }()
	rows := journal.NewRows(js, journal.KeyringBucket(region().ID), nil)
	old := []byte("CANARY-of-the-first-revision")
	revision, err := rows.Create(t.Context(), "app.x", old)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := rows.Update(t.Context(), "app.x", []byte("second"), revision); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	holders := slices.DeleteFunc(cluster.StoreDirs(), func(dir string) bool { return !search(t, dir, old) })
	if len(holders) == 0 {
		t.Fatal("no server holds the bytes right after they were replaced, so the test shows nothing")
	}
	for len(holders) > 0 {
		if time.Since(start) > 10*time.Minute {
			t.Fatalf("%d servers still hold the bytes after ten minutes", len(holders))
		}
		time.Sleep(time.Second)
		before := len(holders)
		holders = slices.DeleteFunc(holders, func(dir string) bool { return !search(quiet{t}, dir, old) })
		if len(holders) < before {
			t.Logf("%d servers hold them after %s", len(holders), time.Since(start).Round(time.Second))
		}
	}
}

// quiet logs nothing.
type quiet struct{ testing.TB }

func (quiet) Logf(string, ...any) {}

// TestSweepFinishesErasures makes the state that a crash between writing a row
// and erasing the one before leaves, and starts again.
func TestSweepFinishesErasures(t *testing.T) {
	dir := t.TempDir()
	w := begin(t, dir, false, nil)
	rows := rowsOn(t, w)
	first := []byte("CANARY-of-the-first-revision")
	if _, err := rows.Create(t.Context(), "app.x", first); err != nil {
		t.Fatal(err)
	}
	js, err := jetstream.New(w.nc)
	if err != nil {
		t.Fatal(err)
	}
	// The sweep of this journal's own start may come as late as now.
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := js.Publish(t.Context(), "$KV."+journal.KeyringBucket(region().ID)+".app.x", []byte("second")); err != nil {
		t.Fatal(err)
	}
	w.end(t)
	if !search(t, dir, first) {
		t.Fatal("the first revision is gone already, so the test shows nothing")
	}
	w = begin(t, dir, false, nil)
	row, err := rowsOn(t, w).Load(t.Context(), "app.x")
	if err != nil || string(row.Value) != "second" {
		t.Fatalf("row %q, %v", row.Value, err)
	}
	w.end(t) // waits for the sweep
	if search(t, dir, first) {
		t.Error("the first revision is still on disk")
	}
}
