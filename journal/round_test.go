package journal

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/journal/journaltest"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/local"
)

// audited is a sync that takes next to no time, and knows up to where each stream
// was synced.
type audited struct {
	*embedded.Syncer
	js     jetstream.JetStream
	synced sync.Map // from the stream's name to the last sequence
}

func (a *audited) Sync(name string) error {
	stream, err := a.js.Stream(context.Background(), name)
	if err == nil {
		a.synced.Store(name, stream.CachedInfo().State.LastSeq)
	}
	return err
}

// covers reports whether the last sync of a stream was of a sequence.
func (a *audited) covers(name string, seq uint64) bool {
	last, ok := a.synced.Load(name)
	return ok && seq <= last.(uint64) //nolint:forcetypeassert // nothing else is stored
}

// TestRefusedInARound: rounds in which the server refuses something, while others
// are full and on their way, store every event once, at the position that its
// caller is told, and not before it was synced.
func TestRefusedInARound(t *testing.T) {
	t.Run("all the time", func(t *testing.T) { refusedInARound(t, 64, 40, 0) })
	t.Run("between halves", func(t *testing.T) { refusedInARound(t, 1024, 12, 4) })
}

// refusedInARound has writers append some events each. Something is refused all
// the time, or once whenever the first writer has appended so many.
func refusedInARound(t *testing.T, count, each, every int) {
	t.Helper()
	ctx := t.Context()
	provider, err := local.Open(ctx, local.Options{Path: filepath.Join(t.TempDir(), "key"), Create: true, Region: "eu"})
	if err != nil {
		t.Fatal(err)
	}
	server, conn := journaltest.Start(t, embedded.Options{})
	syncer := server.Syncer()
	if syncer == nil {
		t.Fatal("the server syncs always, and has no rounds")
	}
	js, err := jetstream.New(conn)
	if err != nil {
		t.Fatal(err)
	}
	audit := &audited{Syncer: syncer, js: js}
	j, err := Open(ctx, Config{Region: DefaultRegions()[2], Conn: conn, Sync: audit, KMS: provider})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = j.Close() })
	app, err := j.CreateApp(ctx, AppSpec{Plan: "free"})
	if err != nil {
		t.Fatal(err)
	}
	name := StreamName("eu", app.Plan, app.Shard)
	s := j.streams[name]
	marker := Subject{Plan: app.Plan, Shard: app.Shard, App: app.ID, Marker: markOpen, Generation: 1}.String()
	mark := func() error {
		entries := []entry{{subject: marker, record: []byte("{}"), gen: 1, fence: marker}}
		if err := j.put(ctx, app.ID, entries, s.enqueue); err != nil {
			return err
		}
		return entries[0].err
	}
	if err := mark(); err != nil {
		t.Fatal(err)
	}
	var told sync.Map // from the event's tag to where it is
	var done atomic.Bool
	var refusals, writers sync.WaitGroup
	turns := make(chan struct{}, each)
	refusals.Go(func() {
		for !done.Load() {
			if every > 0 {
				<-turns
			}
			if err := mark(); !errors.Is(err, errSealed) {
				t.Errorf("a second marker: %v", err)
				return
			}
		}
	})
	for w := range count {
		writers.Go(func() {
			for i := range each {
				id := fmt.Sprintf("e-%d-%d", w, i)
				results, err := j.Append(ctx, app.ID, Event{
					ID: id, Type: MessageSent, Conversation: "g", ConversationType: Group, Sender: "ann", Data: []byte(`{"bodies":[{"type":"txt","msg":"x"}]}`),
				})
				if err == nil {
					err = results[0].Err
				}
				tag, tagErr := j.Tag(ctx, app.ID, kms.KindEvent, id)
				if err = errors.Join(err, tagErr); err != nil {
					t.Errorf("%s: %v", id, err)
					return
				}
				if w == 0 && every > 0 && i%every == 0 {
					turns <- struct{}{}
				}
				told.Store(tag, results[0].Position)
				if !audit.covers(name, uint64(results[0].Position)) {
					t.Errorf("%s was acknowledged at %s before it was synced", id, results[0].Position)
				}
			}
		})
	}
	writers.Wait()
	done.Store(true)
	close(turns)
	refusals.Wait()
	stream, err := j.js.Stream(ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for seq := uint64(1); seq <= stream.CachedInfo().State.LastSeq; seq++ {
		msg, err := stream.GetMsg(ctx, seq)
		if err != nil {
			t.Fatal(err)
		}
		if msg.Subject == marker {
			continue
		}
		header, _, err := ParseRecord(msg.Data)
		if err != nil {
			t.Fatal(err)
		}
		at, ok := told.LoadAndDelete(header.Event)
		if !ok {
			t.Errorf("sequence %d holds a second copy of an event", seq)
			continue
		}
		if want := Position(seq); at != want {
			t.Errorf("an event at %s was acknowledged at %v", want, at)
		}
		found++
	}
	if found != count*each {
		t.Errorf("%d events of %d are stored", found, count*each)
	}
}

// TestHalves: a round takes half of many writers where syncing is cheap beside the
// rest, and never a part of a call.
func TestHalves(t *testing.T) {
	for _, c := range []struct {
		known      int
		cost, pace time.Duration
		most       int
	}{
		{known: 1024, cost: time.Millisecond, pace: 4 * time.Microsecond, most: 512},
		{known: 1024, cost: 5 * time.Millisecond, pace: 4 * time.Microsecond, most: maxCommitEvents},
		{known: halfFrom - 1, pace: 4 * time.Microsecond, most: maxCommitEvents},
		{known: 4 * maxCommitEvents, cost: time.Millisecond, pace: 4 * time.Microsecond, most: maxCommitEvents},
	} {
		r := &rounds{known: c.known, cost: c.cost, pace: c.pace}
		if got := r.most(); got != c.most {
			t.Errorf("%d known, a sync of %s, %s an event: at most %d, want %d", c.known, c.cost, c.pace, got, c.most)
		}
	}
	s := &stream{}
	calls := []*appending{{}, {}}
	for i := range 1000 {
		s.pending = append(s.pending, &entry{call: calls[i/600]})
	}
	for _, want := range []int{600, 400, 0} {
		if got := len(s.take(nil, 300, 4096)); got != want {
			t.Errorf("took %d events of calls of 600 and 400, want %d", got, want)
		}
	}
	for range 8 {
		s.pending = append(s.pending, &entry{call: calls[0]})
	}
	if got := len(s.take(nil, 2, 5)); got != 5 {
		t.Errorf("took %d events of a call where there was room for 5", got)
	}
}
