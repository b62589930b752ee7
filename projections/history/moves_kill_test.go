package history

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/kms"
)

const (
	moveDirEnv  = "COFFER_TEST_MOVE_DIR"
	movePlanEnv = "COFFER_TEST_MOVE_PLAN"
	moveKillEnv = "COFFER_TEST_MOVE_KILL"

	killLease = 100 * time.Millisecond
)

// killPoints are where a process that moves an app kills itself: when a step is
// durable, and, with a plus, in the middle of the one behind it.
func killPoints() []string {
	return []string{"planned", "switched", "switched+", "copied", "copied+", "verified", "closed", "destroyed"}
}

func atKillPoint(point string, m journal.Move) bool {
	step, middle := strings.CutSuffix(point, "+")
	return string(m.Step) == step && (!middle || m.Step == journal.MoveSwitched && m.Copied > 0 || m.Step == journal.MoveCopied && m.Verified > 0)
}

// moveChild appends and moves its app to a plan until it is killed, or the move is
// done. What it sends and what is acknowledged goes to standard output.
func moveChild(t *testing.T, dir, plan, kill string) {
	store := openStore(t, filepath.Join(dir, "views"))
	t.Cleanup(func() { _ = store.Close() })
	var out sync.Mutex
	say := func(format string, args ...any) {
		out.Lock()
		defer out.Unlock()
		_, _ = fmt.Fprintf(os.Stdout, "\n"+format+"\n", args...) // the parent may have gone
	}
	r := newMoveRig(t, dir, store, embedded.Options{}, journal.MoverConfig{
		Lease: killLease,
		Progress: func(_ journal.AppID, m journal.Move) {
			if atKillPoint(kill, m) {
				say("killed %s", kill)
				_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
				select {}
			}
		},
	})
	ctx := t.Context()
	var app journal.AppID
	for a, err := range r.Apps(ctx) {
		if err != nil {
			t.Fatal(err)
		}
		app = a.ID
	}
	send := func(events ...journal.Event) {
		for _, e := range events {
			say("try %s %d", e.ID, e.Time.UnixMilli())
		}
		results, err := r.Append(ctx, app, events...)
		if err != nil {
			say("failed %v", err)
			return
		}
		for _, res := range results {
			if res.Err == nil {
				say("ack %s %s", res.ID, res.Position)
			}
		}
	}
	if app.IsZero() {
		made, err := r.CreateApp(ctx, journal.AppSpec{Name: "moves", Plan: "enterprise"})
		if err != nil {
			t.Fatal(err)
		}
		app = made.ID
		now := time.Now().Truncate(time.Millisecond)
		var events []journal.Event
		for i := range 900 {
			age := []time.Duration{time.Minute, 2 * day, 80 * day, 170 * day}[i%4]
			events = append(events, movedMessage(fmt.Sprint("old", i), now.Add(-age)))
		}
		send(events...)
	}
	say("ready %s", app)
	var writers sync.WaitGroup
	writing, stop := context.WithCancel(ctx)
	for w := range 2 {
		writers.Go(func() {
			for i := 0; writing.Err() == nil; i++ {
				send(movedMessage(fmt.Sprintf("w%d-%d-%d", os.Getpid(), w, i), time.Now()))
			}
		})
	}
	if kill == "random" && rand.IntN(2) == 0 {
		writers.Go(func() {
			if err := r.runner.Rebuild(writing, "history"); err != nil && writing.Err() == nil {
				t.Error(err)
			}
		})
	}
	if m, err := r.mover.Move(ctx, app); err != nil || m.Step == journal.MoveDone && m.To != plan {
		if _, err := r.mover.ChangePlan(ctx, app, plan, "operator:test"); err != nil {
			t.Fatal(err)
		}
	}
	r.await(t, app)
	stop()
	writers.Wait()
	say("done")
}

// TestPlanChangeKilled kills a process that changes an app's plan, down and up,
// when each step is durable, in the middle of copying and of comparing, and at
// random moments, some of them while the view is rebuilt; the app is written to all
// the time. Afterwards every acknowledged event that the plans keep is there once,
// at its position, nothing else is, and the keys of earlier plans are gone.
func TestPlanChangeKilled(t *testing.T) {
	if dir := os.Getenv(moveDirEnv); dir != "" {
		moveChild(t, dir, os.Getenv(movePlanEnv), os.Getenv(moveKillEnv))
		return
	}
	dir := t.TempDir()
	k := killed{acked: map[string]journal.Position{}, clocks: map[string]time.Time{}}
	exact := map[string]int{}
	for _, plan := range []string{"free", "pro"} {
		points := append(killPoints(), "random", "random")
		if plan == "free" {
			points = append([]string{"random"}, points...)
		}
		for _, point := range points {
			exact[k.run(t, dir, plan, point)]++
		}
		k.run(t, dir, plan, "never")
		if !k.done {
			t.Fatalf("the change to %s did not come to its end", plan)
		}
	}
	for _, point := range killPoints() {
		if exact[point] == 0 {
			t.Errorf("no process was killed at %s: %v", point, exact)
		}
	}
	k.check(t, dir)
}

// killed is what the processes have said.
type killed struct {
	app    journal.AppID
	acked  map[string]journal.Position
	clocks map[string]time.Time // of what was sent
	done   bool
}

// run runs a process until it ends and returns where it killed itself.
func (k *killed) run(t *testing.T, dir, plan, point string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestPlanChangeKilled$", "-test.timeout=2m")
	cmd.Env = append(os.Environ(), moveDirEnv+"="+dir, movePlanEnv+"="+plan, moveKillEnv+"="+point)
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	k.done = false
	where := ""
	in := bufio.NewReader(pipe)
	for {
		line, err := in.ReadString('\n')
		if errors.Is(err, io.EOF) {
			break // a line that was cut says nothing
		}
		if err != nil {
			t.Fatal(err)
		}
		f := strings.Fields(line)
		switch {
		case len(f) == 3 && f[0] == "try":
			ms, _ := strconv.ParseInt(f[2], 10, 64)
			k.clocks[f[1]] = time.UnixMilli(ms)
		case len(f) == 3 && f[0] == "ack":
			position, err := journal.ParsePosition(f[2])
			if err != nil {
				t.Fatal(err)
			}
			k.acked[f[1]] = position
		case len(f) == 2 && f[0] == "ready":
			if k.app, err = journal.ParseAppID(f[1]); err != nil {
				t.Fatal(err)
			}
			if point == "random" {
				time.AfterFunc(time.Duration(rand.IntN(60))*time.Millisecond, func() { _ = cmd.Process.Kill() }) // it may have ended
			}
		case len(f) == 2 && f[0] == "killed":
			where = f[1]
		case len(f) == 1 && f[0] == "done":
			k.done = true
		case len(f) > 0 && f[0] == "failed", strings.Contains(line, "moves") && strings.Contains(line, "_test.go"):
			t.Logf("%s: %s", point, strings.TrimSpace(line))
		}
	}
	_ = cmd.Wait() // it was killed
	return where
}

// check opens what is left, and holds it against what was acknowledged.
func (k *killed) check(t *testing.T, dir string) {
	store := openStore(t, filepath.Join(dir, "views"))
	t.Cleanup(func() { _ = store.Close() })
	r := newMoveRig(t, dir, store, embedded.Options{}, journal.MoverConfig{Lease: killLease})
	ctx := t.Context()
	oldest := time.Now().Add(-3 * day)
	replay := func() {
		t.Helper()
		seen := map[string]journal.Position{}
		var last journal.Position
		if _, err := r.view.Replay(ctx, k.app, Query{Oldest: time.Now().Add(-90 * day)}, func(i Item) error {
			if i.Position <= last {
				return fmt.Errorf("position %s after %s", i.Position, last)
			}
			last = i.Position
			plain, err := r.OpenRecord(ctx, nil, k.app, i.Record)
			if err != nil {
				return fmt.Errorf("position %s: %w", i.Position, err)
			}
			e, err := journal.ParseReplayed(journal.SplicePosition(nil, plain, i.Position))
			if err != nil {
				return err
			}
			if i.Type == journal.AppPlanChanged {
				return nil
			}
			if _, twice := seen[e.ID]; twice {
				return fmt.Errorf("event %s is there twice", e.ID)
			}
			clock, sent := k.clocks[e.ID]
			if !sent || clock.Before(oldest) {
				return fmt.Errorf("event %s at %s should not be there", e.ID, i.Position)
			}
			seen[e.ID] = i.Position
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		kept := 0
		for id, position := range k.acked {
			if k.clocks[id].Before(oldest) {
				continue
			}
			kept++
			if seen[id] != position {
				t.Errorf("event %s was acknowledged at %s and is at %s", id, position, seen[id])
			}
		}
		t.Logf("%d acknowledged, %d of them kept; %d there", len(k.acked), kept, len(seen))
	}
	// The view has to come up first.
	if err := r.runner.Wait(ctx, k.app, slices.Max(slices.Collect(maps.Values(k.acked)))); err != nil {
		t.Fatal(err)
	}
	for r.view.open() != nil {
		time.Sleep(time.Millisecond)
	}
	replay()
	if err := r.runner.Rebuild(ctx, "history"); err != nil {
		t.Fatal(err)
	}
	replay()
	app, err := r.App(ctx, k.app)
	if err != nil || app.Plan != "pro" || app.Generation != 2 {
		t.Errorf("the app is %+v, %v", app, err)
	}
	k.checkKeys(t, r, app)
}

// checkKeys has nothing left under the keys of earlier plans.
func (k *killed) checkKeys(t *testing.T, r *moveRig, app journal.App) {
	t.Helper()
	ctx := t.Context()
	for _, stream := range r.Streams() {
		last, err := r.Last(ctx, stream.Name)
		if err != nil {
			t.Fatal(err)
		}
		if last == 0 {
			continue
		}
		reading, stop := context.WithCancel(ctx)
		open, shut := 0, 0
		err = r.Read(reading, stream.Name, 0, "", func(batch []journal.Sealed) error {
			for _, s := range batch {
				if s.Role == journal.RoleEvent || s.Role == journal.RoleCopy {
					_, err := r.OpenRecord(ctx, nil, s.App, s.Record)
					switch {
					case err == nil && s.Generation < app.Generation:
						return fmt.Errorf("sequence %d, of generation %d, opens", s.Sequence, s.Generation)
					case err == nil:
						open++
					case isDestroyed(err):
						shut++
					default:
						return err
					}
				}
				if s.Sequence >= last {
					stop()
				}
			}
			return nil
		})
		if reading.Err() == nil {
			t.Errorf("stream %s: %v", stream.Name, err)
		}
		stop()
		t.Logf("%s: %d records open, %d do not", stream.Name, open, shut)
	}
}

func isDestroyed(err error) bool {
	return err != nil && strings.Contains(err.Error(), kms.ErrEpochDestroyed.Error())
}
