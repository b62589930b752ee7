package server

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/history"
	"github.com/cofferdb/coffer/projections/storetest"
)

// countedStore counts the snapshots that are open.
type countedStore struct {
	projections.Store

	open atomic.Int32
}

func (s *countedStore) View(fn func(projections.Reader) error) error {
	s.open.Add(1)
	defer s.open.Add(-1)
	return s.Store.View(fn)
}

// sealedEvents are events with envelopes that nobody opens.
func sealedEvents(t *testing.T, app journal.AppID, n int) []journal.Sealed {
	t.Helper()
	secret := make([]byte, 32)
	key, err := kms.DeriveDataKey("eu", app.String(), 1, kms.Tag{1}, secret, secret)
	if err != nil {
		t.Fatal(err)
	}
	events := make([]journal.Sealed, n)
	for i := range events {
		sum := sha256.Sum256(binary.BigEndian.AppendUint32(nil, uint32(i)))
		at := time.Now().UTC()
		header := journal.Header{Type: journal.MessageSent, Millis: at.UnixMilli(), Event: kms.Tag(sum[:16]), Conversation: kms.Tag{2}}.Append(nil)
		events[i] = journal.Sealed{
			App: app, Position: journal.Position(i + 1), Sequence: uint64(i + 1), Stored: at, Plan: "enterprise",
			Record: key.Seal(header, nil, make([]byte, 3000)),
		}
	}
	return events
}

// TestStalledReaderHoldsNoSnapshot: while nobody takes what is read, the view is
// let go, and reading goes on without a gap or a repetition.
func TestStalledReaderHoldsNoSnapshot(t *testing.T) {
	const events = 400
	store := &countedStore{Store: &storetest.Memory{}}
	view, err := history.New(history.Config{Store: store})
	if err != nil {
		t.Fatal(err)
	}
	app := journal.NewAppID(3)
	sealed := sealedEvents(t, app, events)
	if err := store.Update(func(txn projections.Txn) error { return view.Apply(t.Context(), txn, "stream", sealed) }); err != nil {
		t.Fatal(err)
	}
	for name, q := range map[string]history.Query{
		"all": {}, "limited": {Limit: 300}, "backwards": {Reverse: true}, "backwards, limited": {Reverse: true, Limit: 300}, "after": {After: 100},
	} {
		t.Run(name, func(t *testing.T) {
			var want []journal.Position
			if _, err := view.Replay(t.Context(), app, q, func(i history.Item) error {
				want = append(want, i.Position)
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			l := newLineSource(&Server{history: view}, userOfApp{app: app})
			done := make(chan struct{})
			go func() {
				defer close(done)
				defer close(l.sealed)
				l.read(ctx, q)
			}()
			var held []*sealedBatch
			var got []journal.Position
			for b := range l.sealed {
				if b.err != nil {
					t.Fatal(b.err)
				}
				for _, item := range b.items {
					got = append(got, item.position)
				}
				if held = append(held, b); len(held) < batches || len(got) >= len(want) {
					continue
				}
				for store.open.Load() != 0 { // it is let go, sooner or later
					if ctx.Err() != nil {
						t.Fatal("the snapshot is held for a reader that takes nothing")
					}
					runtime.Gosched()
				}
				for _, b := range held {
					l.recycle(b)
				}
				held = held[:0]
			}
			<-done
			if !slices.Equal(got, want) {
				t.Errorf("%d events, not the %d there are in their order", len(got), len(want))
			}
			if l.count != len(want) {
				t.Errorf("count %d, want %d", l.count, len(want))
			}
		})
	}
}
