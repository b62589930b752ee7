package journal_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/kms/local"
)

// childEnv makes the test binary a writer on the folder that it names, which
// appends from 64 goroutines until it is killed and prints the id of each event
// that was acknowledged. The mode is "own", "always", or "none": own, without
// the syncs, to show that the power-cut test can fail.
const (
	childEnv = "COFFER_TEST_JOURNAL_CHILD"
	modeEnv  = "COFFER_TEST_JOURNAL_MODE"
	roundEnv = "COFFER_TEST_JOURNAL_ROUND"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		if err := childWriter(dir, os.Getenv(modeEnv), os.Getenv(roundEnv)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if dir := os.Getenv(eraserEnv); dir != "" {
		if err := childEraser(dir, os.Getenv(modeEnv), os.Getenv(stepEnv)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// noSync acknowledges without syncing.
type noSync struct{}

func (noSync) Sync(string) error       { return nil }
func (noSync) SyncMeta(string) error   { return nil }
func (noSync) SyncFolder(string) error { return nil }

func childWriter(dir, mode, round string) error {
	ctx := context.Background()
	keys, err := local.Open(ctx, local.Options{Path: filepath.Join(dir, "keys"), Create: true, Region: region().Cloud})
	if err != nil {
		return err
	}
	srv, err := embedded.Start(ctx, embedded.Options{StoreDir: filepath.Join(dir, "nats"), SyncAlways: mode == "always", MaxStore: 8 << 30})
	if err != nil {
		return err
	}
	if reason := srv.Fallback(); mode != "always" && reason != "" {
		return errors.New(reason)
	}
	nc, err := srv.Connect()
	if err != nil {
		return err
	}
	cfg := journal.Config{Region: region(), Conn: nc, KMS: keys, Health: srv.Check}
	switch mode {
	case "own":
		cfg.Sync = srv.Syncer()
	case "none":
		cfg.Sync = noSync{}
	}
	j, err := journal.Open(ctx, cfg)
	if err != nil {
		return err
	}
	app, err := crashApp(ctx, j)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	writers := 64
	if n, err := strconv.Atoi(round); err == nil && n%2 == 1 {
		writers = 1024 // two halves take turns
	}
	for worker := range writers {
		wg.Go(func() {
			for i := 0; ; i++ {
				id := fmt.Sprintf("%s-%d-%d", round, worker, i)
				if _, err := appendOne(ctx, j, app, message(id, "alice", 100+i%900)); err != nil {
					// After the power cut everything fails, and stays failed.
					fmt.Fprintln(os.Stderr, err)
					return
				}
				if _, err := os.Stdout.WriteString(id + "\n"); err != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	return nil
}

// crashApp returns the one app of the crash tests.
func crashApp(ctx context.Context, j *journal.Journal) (journal.AppID, error) {
	id := journal.AppID{region().Number, 15: 1}
	_, err := j.CreateApp(ctx, journal.AppSpec{ID: id, Plan: "enterprise"})
	if errors.Is(err, journal.ErrAppExists) {
		err = nil
	}
	return id, err
}

// writer is a running child.
type writer struct {
	cmd   *exec.Cmd
	acked chan string
	done  chan struct{}
	errs  strings.Builder
}

func startWriter(t *testing.T, dir, mode string, round int) *writer {
	t.Helper()
	w := &writer{cmd: exec.Command(os.Args[0]), acked: make(chan string, 1<<16), done: make(chan struct{})} //nolint:gosec // the test itself
	w.cmd.Env = append(os.Environ(), childEnv+"="+dir, modeEnv+"="+mode, fmt.Sprintf("%s=%d", roundEnv, round))
	w.cmd.Stderr = &w.errs
	out, err := w.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(w.done)
		defer close(w.acked)
		lines := bufio.NewReader(out)
		for {
			line, err := lines.ReadString('\n')
			if err != nil {
				if err != io.EOF && !errors.Is(err, os.ErrClosed) {
					t.Error(err)
				}
				return // a last line without its end was never acknowledged
			}
			w.acked <- strings.TrimSuffix(line, "\n")
		}
	}()
	return w
}

// take receives n acknowledged ids, then calls cut, then receives the rest until
// the child has ended.
func (w *writer) take(t *testing.T, n int, cut func()) []string {
	t.Helper()
	var ids []string
	timeout := time.After(2 * time.Minute)
	for len(ids) < n {
		select {
		case id, ok := <-w.acked:
			if !ok {
				_ = w.cmd.Wait()
				t.Fatalf("the writer ended by itself: %s", w.errs.String())
			}
			ids = append(ids, id)
		case <-timeout:
			_ = w.cmd.Process.Kill()
			t.Fatalf("only %d acknowledged in two minutes", len(ids))
		}
	}
	cut()
	for id := range w.acked {
		ids = append(ids, id)
	}
	_ = w.cmd.Wait() // it was killed
	return ids
}

// count opens the region in dir and counts the events that are there, by id.
func count(t *testing.T, dir string) map[string]int {
	t.Helper()
	w := begin(t, dir, false, nil)
	defer w.end(t)
	last, err := w.Last(t.Context(), enterprise())
	if err != nil {
		t.Fatal(err)
	}
	there := map[string]int{}
	for _, event := range readAll(t, w.Journal, enterprise(), last) {
		there[idOf(event)]++
	}
	return there
}

// lostAndDoubled holds what was acknowledged against what is there.
func lostAndDoubled(acked []string, there map[string]int) (lost, doubled int) {
	for _, id := range acked {
		if there[id] == 0 {
			lost++
		}
	}
	for _, n := range there {
		if n > 1 {
			doubled++
		}
	}
	return lost, doubled
}

// TestKill kills the process with SIGKILL at random moments, while 64 writers
// append, or 1,024: every acknowledged event is there once.
func TestKill(t *testing.T) {
	rounds := 5
	if testing.Short() {
		rounds = 1
	}
	for _, mode := range []string{"own", "always"} {
		t.Run(mode, func(t *testing.T) {
			dir := t.TempDir()
			var acked []string
			for round := range rounds {
				w := startWriter(t, dir, mode, round)
				acked = append(acked, w.take(t, 1+rand.IntN(4000), func() { _ = w.cmd.Process.Kill() })...)
			}
			there := count(t, dir)
			lost, doubled := lostAndDoubled(acked, there)
			t.Logf("%d rounds, acknowledged %d, there %d", rounds, len(acked), len(there))
			if lost != 0 || doubled != 0 {
				t.Errorf("acknowledged and lost %d, doubled %d", lost, doubled)
			}
		})
	}
}
