package roaming_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/pebble"
	"github.com/cofferdb/coffer/projections/roaming"
)

// A runner gives the view what the journal has; here, three events by hand.
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
	view, err := roaming.New(roaming.Config{Store: store})
	if err != nil {
		log.Fatal(err)
	}

	app, _ := journal.ParseAppID("03000000000000000000000000000001")
	group, ann, ben := kms.Tag{1}, kms.Tag{2}, kms.Tag{3} // Journal.Tag gives the tags of an app's ids
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	sealed := func(p journal.Position, sender kms.Tag, kind journal.Type) journal.Sealed {
		key, err := kms.DeriveDataKey("eu", app.String(), 1, sender, make([]byte, 32), make([]byte, 32))
		if err != nil {
			log.Fatal(err)
		}
		header := journal.Header{Type: kind, Millis: now.UnixMilli(), Event: kms.Tag{9, byte(p)}, Conversation: group}.Append(nil)
		return journal.Sealed{
			App: app, Position: p, Sequence: uint64(p), Stored: now, Plan: "pro",
			Record: key.Seal(header, header, []byte(`{"id":"…"}`)),
		}
	}
	batch := []journal.Sealed{
		sealed(7, ben, journal.MemberJoined), sealed(8, ann, journal.MessageSent), sealed(9, ann, journal.MessageSent),
	}
	ctx := context.Background()
	err = store.Update(func(txn projections.Txn) error { return view.Apply(ctx, txn, "stream", batch) })
	if err != nil {
		log.Fatal(err)
	}

	list, _, err := view.Conversations(ctx, app, ben, roaming.ListQuery{})
	if err != nil {
		log.Fatal(err)
	}
	box, err := view.Inbox(ctx, app, ben, roaming.InboxQuery{})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("newest message", list[0].Last, "unread", list[0].Unread, "inbox", box.Positions)
	// Output:
	// newest message 9 unread 2 inbox [8 9]
}
