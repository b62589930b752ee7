package recalls

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/journaltest"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections/history"
)

// contents are the sealed contents that were ever in the streams, by the events' tags.
type contents struct {
	mu  sync.Mutex // guards of
	of  map[kms.Tag][][]byte
	end func()
}

// collect follows the streams of plans from their first records on.
func (w *world) collect(plans ...string) *contents {
	w.Helper()
	c := &contents{of: map[kms.Tag][][]byte{}}
	var stops []func()
	for _, plan := range plans {
		consumer, err := w.js.OrderedConsumer(w.Context(), journal.StreamName("eu", plan, 0), jetstream.OrderedConsumerConfig{})
		must(w.T, err)
		following, err := consumer.Consume(func(msg jetstream.Msg) {
			h, err := journal.ParseHeader(msg.Data())
			if err != nil || len(msg.Data()) <= journal.HeaderSize+kms.Overhead {
				return // a marker, or a stub
			}
			c.mu.Lock()
			defer c.mu.Unlock()
			c.of[h.Event] = append(c.of[h.Event], msg.Data()[journal.HeaderSize+56:])
		})
		must(w.T, err)
		stops = append(stops, func() { following.Stop(); <-following.Closed() })
	}
	c.end = func() {
		for _, stop := range stops {
			stop()
		}
	}
	return c
}

// TestEraseDuringPlanChanges: messages are recalled at each step of a plan change, up
// and down, and while it goes on what can be erased is tried to be again and again.
// At the end no file has the bytes of the message, its edit or any copy of them; the
// recall is seen and the neighbours can be read.
func TestEraseDuringPlanChanges(t *testing.T) {
	w := newWorld(t)
	_, err := w.journal.Registry().SetOnRecall(t.Context(), w.app, journal.RecallErases)
	must(t, err)
	collected := w.collect("pro", "enterprise")
	r := New(Options{Journal: w.journal, History: w.view})
	originals, waited := map[string][]byte{}, 0
	const rounds = 6
	for i := range rounds {
		plan := []string{"enterprise", "pro"}[i%2]
		m, k, x, id := fmt.Sprint("m", i), fmt.Sprint("k", i), fmt.Sprint("x", i), fmt.Sprint("r", i)
		at := w.append(message(m, "secret"), message(k, "kept"), edit(x, m, "changed"))
		originals[m], originals[x] = w.sealed(at[0]), w.sealed(at[2])
		w.there(m, originals[m])
		begin, ended := make(chan struct{}), make(chan error, 1)
		go func() {
			<-begin
			results, err := w.journal.Append(t.Context(), w.app, recall(id, m))
			if err == nil {
				err = results[0].Err
			}
			for left := 1; err == nil && left > 0; {
				if left, err = r.Sweep(t.Context()); left > 0 {
					waited++
				}
			}
			ended <- err
		}()
		steps := 0
		var once sync.Once
		w.move(plan, func(journal.Move) {
			if steps++; steps > i {
				once.Do(func() { close(begin) })
			}
		})
		once.Do(func() { close(begin) })
		select {
		case err := <-ended:
			must(t, err)
		case <-time.After(time.Minute):
			t.Fatalf("round %d: the recall is not over after the plan change", i)
		}
	}
	if waited == 0 {
		t.Error("no sweep met a plan change, so this test shows nothing")
	}
	last := w.append(message("end", "of all"))[0]
	collected.end()
	for name, content := range originals {
		w.erased(name, content)
		for n, copied := range collected.of[w.tag(name)] {
			w.erased(fmt.Sprintf("%s, copy %d", name, n), copied)
		}
	}
	page, err := w.view.Messages(t.Context(), w.app, w.conversation(), history.PageQuery{Limit: 50})
	must(t, err)
	recalled, open := 0, 0
	for _, m := range page.Messages {
		if m.Recalled {
			recalled++
		} else if _, err := w.journal.OpenRecord(t.Context(), nil, w.app, m.Record); err != nil {
			t.Errorf("position %s: %v", m.Position, err)
		} else {
			open++
		}
	}
	if recalled != rounds || open != rounds+1 {
		t.Errorf("%d messages are recalled and %d can be read, want %d and %d", recalled, open, rounds, rounds+1)
	}
	w.equalsRebuilt("rebuilt", last)
	t.Logf("%d sweeps had to wait", waited)
}

// TestEraseWhileMoving: what may be copied at the moment is not erased, and is when
// the plan change is over.
func TestEraseWhileMoving(t *testing.T) {
	w := newWorld(t)
	at := w.append(message("m1", "secret"))
	for plan, step := range map[string]journal.MoveStep{"enterprise": journal.MoveSwitched, "basic": journal.MoveCopied} {
		met := false
		w.move(plan, func(m journal.Move) {
			if m.Step == step && !met {
				met = true
				if n, err := w.journal.EraseRecords(t.Context(), w.app, at...); !errors.Is(err, journal.ErrMoving) || n != 0 {
					t.Errorf("%s: %d erased, %v", step, n, err)
				}
			}
		})
		if !met {
			t.Errorf("step %s did not come", step)
		}
	}
}

// TestEraseOnThreeServers: where streams have three replicas, the bytes leave the
// streams of all servers. The Raft logs let go with their next snapshot, minutes later;
// with COFFER_TEST_LONG=1 that is waited for.
func TestEraseOnThreeServers(t *testing.T) {
	c := journaltest.StartCluster(t)
	w := worldOf(t, t.TempDir(), c.StoreDirs(), journal.Config{Conn: c.Connect(), Replicas: 3, CommitTimeout: 30 * time.Second})
	_, err := w.journal.Registry().SetOnRecall(t.Context(), w.app, journal.RecallErases)
	must(t, err)
	at := w.append(message("m1", "secret"), message("kept", "two"), edit("x1", "m1", "changed"))
	doomed, kept := map[string][]byte{"m1": w.sealed(at[0]), "x1": w.sealed(at[2])}, w.sealed(at[1])
	everywhere := func(content []byte) bool {
		for _, dir := range w.nats {
			if len(w.files(dir, content)) == 0 {
				return false
			}
		}
		return true
	}
	await := func(what string, done func() bool) {
		t.Helper()
		for deadline := time.Now().Add(8 * time.Minute); !done(); time.Sleep(20 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("never: %s", what)
			}
		}
	}
	for name, content := range doomed {
		await("all replicas have "+name, func() bool { return everywhere(content) })
	}
	w.append(recall("r1", "m1"))
	w.sweep(New(Options{Journal: w.journal, History: w.view}))
	left := func() (inStreams, inLogs []string) {
		for _, content := range doomed {
			for _, dir := range w.nats {
				for _, path := range w.files(dir, content) {
					if isRaft(path) {
						inLogs = append(inLogs, path)
					} else {
						inStreams = append(inStreams, path)
					}
				}
			}
		}
		return inStreams, inLogs
	}
	await("the replicas let go", func() bool { s, _ := left(); return len(s) == 0 })
	for name, content := range doomed {
		if w.holds("views", content) {
			t.Errorf("the views have %s", name)
		}
	}
	if os.Getenv("COFFER_TEST_LONG") != "" {
		began := time.Now()
		await("the Raft logs let go", func() bool { _, logs := left(); return len(logs) == 0 })
		t.Logf("the Raft logs let go after %s", time.Since(began).Round(time.Second))
	}
	leader := c.StreamLeader(journal.StreamName("eu", "pro", 0))
	c.Stop(leader)
	c.Restart(leader)
	w.append(message("after", "more"))
	if streams, _ := left(); len(streams) > 0 {
		t.Errorf("after a restart of the leader the bytes are back in %v", streams)
	}
	if !everywhere(kept) {
		t.Error("a replica has lost what was not recalled")
	}
	page, err := w.view.Messages(t.Context(), w.app, w.conversation(), history.PageQuery{Limit: 10})
	must(t, err)
	if len(page.Messages) != 3 || !page.Messages[2].Recalled || page.Messages[1].Recalled {
		t.Errorf("the conversation has %+v", page.Messages)
	}
}

// isRaft reports whether a file belongs to the log of a Raft group of NATS.
func isRaft(path string) bool { return strings.Contains(path, "_js_") }
