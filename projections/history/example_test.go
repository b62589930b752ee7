package history_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/history"
	"github.com/cofferdb/coffer/projections/pebble"
)

// A runner gives the view what the journal has; here, two events by hand.
func Example() {
	dir, err := os.MkdirTemp("", "views")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	store, err := pebble.Open(pebble.Options{Dir: dir})
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	view, err := history.New(history.Config{Store: store})
	if err != nil {
		log.Fatal(err)
	}

	app, _ := journal.ParseAppID("03000000000000000000000000000001")
	group := kms.Tag{1} // Journal.Tag gives the tags of an app's ids
	message, recall := kms.Tag{2}, kms.Tag{3}
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	key, err := kms.DeriveDataKey("eu", app.String(), 1, kms.Tag{9}, make([]byte, 32), make([]byte, 32))
	if err != nil {
		log.Fatal(err)
	}
	record := func(h journal.Header) []byte {
		header := h.Append(nil)
		return key.Seal(header, header, []byte(`{"id":"…"}`))
	}
	batch := []journal.Sealed{
		{App: app, Position: 7, Sequence: 7, Stored: now, Plan: "pro", Record: record(journal.Header{
			Type: journal.MessageSent, Millis: now.UnixMilli(), Event: message, Conversation: group,
		})},
		{App: app, Position: 9, Sequence: 9, Stored: now, Plan: "pro", Record: record(journal.Header{
			Type: journal.MessageRecalled, Millis: now.UnixMilli(), Event: recall, Conversation: group, Target: message,
		})},
	}
	ctx := context.Background()
	err = store.Update(func(txn projections.Txn) error { return view.Apply(ctx, txn, "stream", batch) })
	if err != nil {
		log.Fatal(err)
	}

	next, err := view.Replay(ctx, app, history.Query{}, func(i history.Item) error {
		fmt.Println(i.Position, i.Type, "recalled:", i.Recalled)
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	page, err := view.Messages(ctx, app, group, history.PageQuery{})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("next", next, "messages", len(page.Messages), "changed at", page.Messages[0].Changed)
	// Output:
	// 7 message.sent recalled: true
	// 9 message.recalled recalled: false
	// next 9 messages 1 changed at 9
}
