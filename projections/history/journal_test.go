package history

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"testing"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/journal/journaltest"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/local"
	"github.com/cofferdb/coffer/projections"
)

// The runner reads a journal.
var _ projections.Source = (*journal.Journal)(nil)

// TestJournal has a real journal: what is appended is replayed, opened, folded,
// answered when it is appended again, and the same after a rebuild.
func TestJournal(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir()
	server, conn := journaltest.Start(t, embedded.Options{StoreDir: filepath.Join(dir, "nats")})
	provider, err := local.Open(ctx, local.Options{Path: filepath.Join(dir, "key.json"), Create: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = provider.Close() })
	store := newStore(t)
	v := newView(t, store)
	cfg := journal.Config{Region: journal.DefaultRegions()[2], Conn: conn, KMS: provider, Index: v}
	if s := server.Syncer(); s != nil {
		cfg.Sync = s
	}
	j, err := journal.Open(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := j.Close(); err != nil {
			t.Errorf("close the journal: %v", err)
		}
	})
	r, err := projections.NewRunner(projections.RunnerConfig{Journal: j, Store: store, Projections: []projections.Projection{v}})
	if err != nil {
		t.Fatal(err)
	}
	runCtx, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- r.Run(runCtx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	app, err := j.CreateApp(ctx, journal.AppSpec{Name: "test", Plan: "enterprise"})
	if err != nil {
		t.Fatal(err)
	}

	data := jsontext.Value(`{"bodies":[{"type":"txt","msg":"hello"}]}`)
	var events []journal.Event
	for i := range 300 {
		e := journal.Event{
			ID: fmt.Sprint("m", i), Type: journal.MessageSent, Conversation: fmt.Sprint("g", i%3),
			ConversationType: journal.Group, Sender: fmt.Sprint("u", i%7), Data: data,
		}
		switch i % 10 {
		case 7:
			e.Type, e.Target = journal.MessageEdited, fmt.Sprint("m", i-3)
		case 9:
			e.Type, e.Target, e.Data = journal.MessageRecalled, fmt.Sprint("m", i-6), nil
		}
		events = append(events, e)
	}
	results, err := j.Append(ctx, app.ID, events...)
	if err != nil {
		t.Fatal(err)
	}
	var last journal.Position
	for i, res := range results {
		if res.Err != nil {
			t.Fatalf("event %d: %v", i, res.Err)
		}
		last = max(last, res.Position)
	}
	if err := r.Wait(ctx, app.ID, last); err != nil {
		t.Fatal(err)
	}

	check := func() {
		t.Helper()
		n, tombstones := 0, 0
		if _, err := v.ReplayOpened(ctx, app.ID, Query{}, func(dst []byte, i Item) ([]byte, error) {
			if i.Recalled {
				return dst, nil
			}
			return j.OpenRecord(ctx, dst, app.ID, i.Record)
		}, func(i Item, plain []byte) error {
			if i.Position != results[n].Position {
				t.Fatalf("event %d is at %d, want %d", n, i.Position, results[n].Position)
			}
			if i.Recalled {
				tombstones++
			} else if id := jsontext.Value(plain); !id.IsValid() {
				t.Fatalf("event %d is %q", n, plain)
			}
			n++
			return nil
		}); err != nil || n != len(events) || tombstones != 30 {
			t.Fatalf("replayed %d events with %d tombstones, %v", n, tombstones, err)
		}
	}
	check()
	before := dump(t, store)

	conversation, err := j.Tag(ctx, app.ID, kms.KindConversation, "g1")
	if err != nil {
		t.Fatal(err)
	}
	p, err := v.Messages(ctx, app.ID, conversation, PageQuery{Limit: 1000})
	if err != nil || len(p.Messages) != 80 {
		t.Fatalf("%d messages, %v; want 80", len(p.Messages), err)
	}
	user, err := j.Tag(ctx, app.ID, kms.KindSubject, "u3")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	if _, err := v.Replay(ctx, app.ID, Query{User: &user}, func(Item) error { n++; return nil }); err != nil || n != 43 {
		t.Errorf("u3 has %d events, %v; want 43", n, err)
	}

	again, err := j.Append(ctx, app.ID, events...)
	if err != nil {
		t.Fatal(err)
	}
	for i, res := range again {
		if !res.Duplicate || res.Position != results[i].Position || res.Err != nil {
			t.Fatalf("event %d again: %+v", i, res)
		}
	}
	if err := r.Rebuild(ctx, "history"); err != nil {
		t.Fatal(err)
	}
	check()
	if after := dump(t, store); !slices.Equal(before, after) {
		t.Errorf("the rebuilt view has %d entries and differs from the %d before", len(after), len(before))
	}
	if _, err := v.Replay(ctx, app.ID, Query{After: last}, func(Item) error { return errors.New("something follows") }); err != nil {
		t.Error(err)
	}
}
