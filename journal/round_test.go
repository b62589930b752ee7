package journal

import (
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/journal/journaltest"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/local"
)

// TestRefusedInARound: rounds in which the server refuses something, while others
// are full and on their way, store every event once, at the position that its
// caller is told.
func TestRefusedInARound(t *testing.T) {
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
	j, err := Open(ctx, Config{Region: DefaultRegions()[2], Conn: conn, Sync: syncer, KMS: provider})
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
	refusals.Go(func() {
		for !done.Load() {
			if err := mark(); !errors.Is(err, errSealed) {
				t.Errorf("a second marker: %v", err)
				return
			}
		}
	})
	for w := range 64 {
		writers.Go(func() {
			for i := range 40 {
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
				told.Store(tag, results[0].Position)
			}
		})
	}
	writers.Wait()
	done.Store(true)
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
	if found != 64*40 {
		t.Errorf("%d events of %d are stored", found, 64*40)
	}
}
