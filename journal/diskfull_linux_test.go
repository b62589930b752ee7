package journal_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/journal/journaltest"
)

// fill leaves about leave bytes free on the file system of dir, and returns what
// to remove.
func fill(t *testing.T, dir string, leave int64) string {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "filler")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, int64(st.Bavail)*st.Bsize-leave); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestDiskFull fills the disk under the server: appends fail with ErrFull, at
// once, readiness says so, nothing that was acknowledged is lost, and appends
// go on by themselves when there is room again.
func TestDiskFull(t *testing.T) {
	d := newLoopDisk(t, 256)
	w := &world{dir: d.dir, kms: provider(t, d.dir)}
	w.srv, w.nc = journaltest.Start(t, embedded.Options{StoreDir: filepath.Join(d.dir, "nats"), MaxStore: 1 << 40, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	var err error
	cfg := w.config()
	cfg.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	if w.Journal, err = journal.Open(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	app := newApp(t, w.Journal)
	filler := fill(t, d.dir, 6<<20)
	var acked []string
	n := 0
	for {
		batch := make([]journal.Event, 100)
		for i := range batch {
			n++
			batch[i] = message(fmt.Sprintf("f%d", n), "alice", 2000)
		}
		results, err := w.Append(t.Context(), app, batch...)
		if err != nil {
			t.Fatal(err)
		}
		var failed error
		for _, r := range results {
			if r.Err == nil {
				acked = append(acked, r.ID)
			} else {
				failed = r.Err
			}
		}
		if failed == nil {
			continue
		}
		if !errors.Is(failed, journal.ErrFull) {
			t.Fatalf("a full disk: %v, want ErrFull; the server's health: %v", failed, w.srv.Check(t.Context()))
		}
		t.Logf("full after %d events: %v", len(acked), failed)
		break
	}
	if err := w.srv.Check(t.Context()); !errors.Is(err, embedded.ErrFrozen) || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("readiness on a full disk: %v", err)
	}
	start := time.Now()
	if _, err := appendOne(t.Context(), w.Journal, app, message("more", "alice", 2000)); !errors.Is(err, journal.ErrFull) {
		t.Errorf("the next append: %v", err)
	}
	t.Logf("the next append failed after %s", time.Since(start).Round(time.Millisecond))
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		_, err := appendOne(ctx, w.Journal, app, message("after", "alice", 2000))
		cancel()
		if err == nil {
			acked = append(acked, "after")
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("with room again: %v", err)
		}
	}
	t.Logf("appends go on %s after there was room", time.Since(start).Round(time.Millisecond))
	if err := w.srv.Check(t.Context()); err != nil {
		t.Errorf("readiness with room again: %v", err)
	}
	w.end(t)
	there := count(t, d.dir)
	if lost, doubled := lostAndDoubled(acked, there); lost != 0 || doubled != 0 {
		t.Errorf("acknowledged %d, lost %d, doubled %d", len(acked), lost, doubled)
	}
}

// TestStoreLimit reaches the server's own limit, before the disk is full: the
// streams are not frozen, and reading goes on.
func TestStoreLimit(t *testing.T) {
	dir := t.TempDir()
	w := &world{dir: dir, kms: provider(t, dir)}
	w.srv, w.nc = journaltest.Start(t, embedded.Options{StoreDir: filepath.Join(dir, "nats"), MaxStore: 4 << 20})
	var err error
	if w.Journal, err = journal.Open(t.Context(), w.config()); err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	app := newApp(t, w.Journal)
	acked := 0
	for {
		_, err := appendOne(t.Context(), w.Journal, app, message(fmt.Sprintf("f%d", acked), "alice", 5000))
		if errors.Is(err, journal.ErrFull) {
			t.Logf("full after %d events: %v", acked, err)
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		acked++
	}
	if err := w.srv.Check(t.Context()); err != nil {
		t.Errorf("readiness: %v", err)
	}
	last, err := w.Last(t.Context(), enterprise())
	if err != nil {
		t.Fatal(err)
	}
	if got := len(readAll(t, w.Journal, enterprise(), last)); got != acked {
		t.Errorf("%d events, acknowledged %d", got, acked)
	}
}
