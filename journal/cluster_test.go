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
