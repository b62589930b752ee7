package journal_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/journaltest"
)

// TestThreeServers appends through atomic batches to streams of three replicas,
// while first a follower and then the leader of the stream goes and comes back.
func TestThreeServers(t *testing.T) {
	c := journaltest.StartCluster(t)
	j, err := journal.Open(t.Context(), journal.Config{
		Region: region(), Conn: c.Connect(), KMS: provider(t, t.TempDir()), Replicas: 3, CommitTimeout: 30 * time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	// Before anything goes: a server may leave a stream without messages and
	// without a leader for minutes after its restart.
	if drifts, err := j.Check(t.Context()); err != nil || len(drifts) != 0 {
		t.Errorf("drifts: %+v, %v", drifts, err)
	}
	app := newApp(t, j)
	var acked atomic.Int64
	var stop atomic.Bool
	var wg sync.WaitGroup
	for worker := range 64 {
		wg.Go(func() {
			for i := 0; !stop.Load(); i++ {
				id := fmt.Sprintf("w%d-%d", worker, i)
				if _, err := appendOne(t.Context(), j, app, message(id, "alice", 300)); err != nil {
					t.Errorf("%s: %v", id, err)
					return
				}
				acked.Add(1)
			}
		})
	}
	progress := func() {
		t.Helper()
		before := acked.Load()
		for deadline := time.Now().Add(time.Minute); acked.Load() < before+300; time.Sleep(time.Millisecond) {
			if t.Failed() || time.Now().After(deadline) {
				t.Fatalf("only %d appends in a minute", acked.Load()-before)
			}
		}
	}
	progress()
	leader := c.StreamLeader(enterprise())
	follower := (leader + 1) % 3
	c.Stop(follower)
	progress()
	c.Restart(follower)
	progress()
	leader = c.StreamLeader(enterprise())
	c.Stop(leader)
	progress()
	c.Restart(leader)
	progress()
	stop.Store(true)
	wg.Wait()

	seen, read := map[string]int{}, 0
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	done := errors.New("done")
	err = j.Read(ctx, enterprise(), 0, "", func(batch []journal.Sealed) error {
		for _, s := range batch {
			plain, err := j.OpenRecord(ctx, nil, s.App, s.Record)
			if err != nil {
				return err
			}
			seen[idOf(string(plain))]++
			read++
		}
		if len(seen) == int(acked.Load()) {
			return done
		}
		return nil
	})
	if !errors.Is(err, done) {
		t.Errorf("read %d of %d acknowledged: %v", len(seen), acked.Load(), err)
	}
	t.Logf("acknowledged %d, read %d, doubled %d", acked.Load(), read, read-len(seen))
}

// TestPartition cuts the leader of the stream off from the other two servers
// while both sides are written to. The side of one refuses, the side of two goes
// on under a new leader, and what was acknowledged on either side is there when
// the network has healed.
func TestPartition(t *testing.T) {
	c := journaltest.StartCluster(t)
	keys := provider(t, t.TempDir())
	open := func(on ...int) *journal.Journal {
		t.Helper()
		j, err := journal.Open(t.Context(), journal.Config{
			Region: region(), Conn: c.Connect(on...), KMS: keys, Replicas: 3, CommitTimeout: 2 * time.Second,
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = j.Close() })
		return j
	}
	first := open()
	app := newApp(t, first)
	leader := c.StreamLeader(enterprise())
	minority, majority := newSide(t, "minority", open(leader), app), newSide(t, "majority", open((leader+1)%3, (leader+2)%3), app)
	minority.progress()
	majority.progress()

	c.Isolate(leader)
	majority.progress()
	minority.refuses()
	stored := minority.acknowledged()
	majority.progress()
	minority.refuses()
	if now := minority.acknowledged(); now != stored {
		t.Errorf("the isolated leader has acknowledged %d events", now-stored)
	}
	c.Heal()
	minority.progress()
	majority.progress()
	want := append(minority.end(), majority.end()...)

	seen := make(map[string]int)
	missing := len(want)
	done := errors.New("done")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	wanted := make(map[string]bool, len(want))
	for _, id := range want {
		wanted[id] = true
	}
	err := first.Read(ctx, enterprise(), 0, "", func(batch []journal.Sealed) error {
		for _, s := range batch {
			plain, err := first.OpenRecord(ctx, nil, s.App, s.Record)
			if err != nil {
				return err
			}
			id := idOf(string(plain))
			if seen[id]++; seen[id] == 1 && wanted[id] {
				missing--
			}
		}
		if missing == 0 {
			return done
		}
		return nil
	})
	if !errors.Is(err, done) {
		t.Errorf("%d of %d acknowledged events are not there: %v", missing, len(want), err)
	}
	t.Logf("acknowledged %d, of them %d by the isolated server's writers before and after", len(want), minority.acknowledged())
}

// A side is eight writers that go on when they are refused, with the same event.
type side struct {
	t       *testing.T
	name    string
	stop    atomic.Bool
	refused atomic.Int64
	wg      sync.WaitGroup

	mu    sync.Mutex
	acked []string // guarded by mu
}

func newSide(t *testing.T, name string, j *journal.Journal, app journal.AppID) *side {
	t.Helper()
	s := &side{t: t, name: name}
	for worker := range 8 {
		s.wg.Go(func() {
			for i := 0; !s.stop.Load(); {
				id := fmt.Sprintf("%s%d-%d", name, worker, i)
				_, err := appendOne(t.Context(), j, app, message(id, "alice", 300))
				switch {
				case err == nil:
					s.mu.Lock()
					s.acked = append(s.acked, id)
					s.mu.Unlock()
					i++
				case errors.Is(err, journal.ErrUnavailable):
					s.refused.Add(1)
				default:
					t.Errorf("%s: %v", id, err)
					return
				}
			}
		})
	}
	t.Cleanup(func() { s.end() })
	return s
}

func (s *side) acknowledged() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.acked)
}

func (s *side) progress() {
	s.t.Helper()
	before := s.acknowledged()
	s.await("append", func() bool { return s.acknowledged() >= before+100 })
}

// refuses waits until each writer has been refused: what it had asked for before
// has been answered.
func (s *side) refuses() {
	s.t.Helper()
	before := s.refused.Load()
	s.await("refuse", func() bool { return s.refused.Load() >= before+16 })
}

func (s *side) await(what string, done func() bool) {
	s.t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !done(); time.Sleep(time.Millisecond) {
		if s.t.Failed() || time.Now().After(deadline) {
			s.t.Fatalf("the %s does not %s", s.name, what)
		}
	}
}

func (s *side) end() []string {
	s.stop.Store(true)
	s.wg.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.acked
}
