//go:build unix

package recalls

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/journal/journaltest"
	"github.com/cofferdb/coffer/projections/history"
)

const (
	recallDirEnv   = "COFFER_TEST_RECALL_DIR"
	recallRoundEnv = "COFFER_TEST_RECALL_ROUND"
	recallStepEnv  = "COFFER_TEST_RECALL_STEP"

	acknowledged = "the recall is acknowledged" // what the process says
)

// recallChild recalls the message of a round and erases it, and kills itself on the
// way.
func recallChild(t *testing.T, dir, round string) {
	step, err := strconv.Atoi(os.Getenv(recallStepEnv))
	must(t, err)
	var k journaltest.Killer
	w := openWorld(t, dir, func(s *embedded.Syncer) journal.Syncer { k.Syncer = s; return &k })
	k.Arm(step)
	w.append(recall("r"+round, "m"+round))
	fmt.Println(acknowledged)
	w.sweep(New(Options{Journal: w.journal, History: w.view, step: func(string) error { k.Step(); return nil }}))
	k.Disarm()
}

// TestEraseKilled kills the process that recalls and erases a message with -9 before
// and after each of its steps towards the disk. Whoever serves the region next
// finishes: no file has the sealed bytes of the message or its edit, the recall is
// seen, and nothing else is lost. By itself it takes every fifth step; with
// COFFER_TEST_LONG=1 each.
func TestEraseKilled(t *testing.T) {
	if dir := os.Getenv(recallDirEnv); dir != "" {
		recallChild(t, dir, os.Getenv(recallRoundEnv))
		return
	}
	dir, stride := t.TempDir(), 5
	if os.Getenv("COFFER_TEST_LONG") != "" {
		stride = 1
	}
	var last journal.Position
	kept := map[string][]byte{}
	rounds, killed := 0, 0
	for step, over := 1, false; !over && !t.Failed(); step += stride {
		rounds++
		round := strconv.Itoa(rounds)
		doomed := map[string][]byte{}
		t.Run("before "+round, func(t *testing.T) {
			w := openWorld(t, dir, func(s *embedded.Syncer) journal.Syncer { return s })
			_, err := w.journal.Registry().SetOnRecall(t.Context(), w.app, journal.RecallErases)
			must(t, err)
			at := w.append(message("m"+round, "secret"), message("k"+round, "kept"), edit("x"+round, "m"+round, "changed"))
			doomed["m"+round], doomed["x"+round], kept["k"+round] = w.sealed(at[0]), w.sealed(at[2]), w.sealed(at[1])
			for name, content := range doomed {
				w.there(name, content)
			}
		})
		if t.Failed() {
			return
		}
		child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestEraseKilled$", "-test.count=1", "-test.timeout=5m") //nolint:gosec // itself
		child.Env = append(os.Environ(), recallDirEnv+"="+dir, recallRoundEnv+"="+round, recallStepEnv+"="+strconv.Itoa(step))
		out, err := child.CombinedOutput()
		status, _ := child.ProcessState.Sys().(syscall.WaitStatus)
		switch {
		case status.Signaled() && status.Signal() == syscall.SIGKILL:
			killed++
		case err != nil:
			t.Fatalf("step %d: %v\n%s", step, err, out)
		default:
			over = true // it came to its end before the step
		}
		t.Run("after "+round, func(t *testing.T) {
			w := openWorld(t, dir, func(s *embedded.Syncer) journal.Syncer { return s })
			if !bytes.Contains(out, []byte(acknowledged)) {
				w.append(recall("r"+round, "m"+round)) // whoever had no answer does it again
			}
			last = w.append(message("e"+round, "end"))[0]
			w.sweep(New(Options{Journal: w.journal, History: w.view}))
			for name, content := range doomed {
				w.erased(fmt.Sprintf("%s, killed at step %d", name, step), content)
			}
			for name, content := range kept {
				if !w.holds("nats", content) {
					t.Errorf("killed at step %d: the journal has lost %s", step, name)
				}
			}
			w.shows(rounds)
			if over {
				w.equalsRebuilt("rebuilt", last)
			}
		})
	}
	if killed < 3 {
		t.Errorf("only %d processes were killed", killed)
	}
	t.Logf("killed %d times", killed)
}

// shows holds the conversation against what the rounds have left: of each a message
// that is recalled and two that can be opened.
func (w *world) shows(rounds int) {
	w.Helper()
	page, err := w.view.Messages(w.Context(), w.app, w.conversation(), history.PageQuery{Limit: 3 * rounds})
	must(w.T, err)
	recalled, open := 0, 0
	for _, m := range page.Messages {
		if m.Recalled {
			recalled++
			continue
		}
		if _, err := w.journal.OpenRecord(w.Context(), nil, w.app, m.Record); err != nil {
			w.Errorf("position %s: %v", m.Position, err)
		}
		open++
	}
	if recalled != rounds || open != 2*rounds {
		w.Errorf("after %d rounds %d messages are recalled and %d can be read", rounds, recalled, open)
	}
}
