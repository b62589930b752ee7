package roaming

import (
	"crypto/sha256"
	"sync"
	"testing"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/pebble"
)

// tagOf stands in for the keyed tags of an app.
func tagOf(kind, id string) kms.Tag {
	sum := sha256.Sum256([]byte(kind + "/" + id))
	return kms.Tag(sum[:16])
}

func tagOrZero(kind, id string) kms.Tag {
	if id == "" {
		return kms.Tag{}
	}
	return tagOf(kind, id)
}

// A spec is an event to be made.
type spec struct {
	app          journal.AppID
	position     uint64
	id           string
	kind         journal.Type
	conversation string
	sender, peer string
	target       string
	time, stored time.Time
	plan         string
}

// envelopes holds one for each sender: the view reads no more of it than whose
// it is.
var envelopes sync.Map //nolint:gochecknoglobals // see above

func envelope(sender string) []byte {
	if e, ok := envelopes.Load(sender); ok {
		return e.([]byte)
	}
	app := appN(1).String()
	epoch, subject := sha256.Sum256([]byte("epoch")), sha256.Sum256([]byte(sender))
	k, err := kms.DeriveDataKey("eu", app, 1, tagOf("subject", sender), epoch[:], subject[:])
	if err != nil {
		panic(err)
	}
	e := k.Seal(nil, []byte("bound to nothing"), []byte("{}"))
	envelopes.Store(sender, e)
	return e
}

func seal(s spec) journal.Sealed {
	record := journal.Header{
		Type: s.kind, Millis: s.time.UnixMilli(), Event: tagOf("event", s.id),
		Conversation: tagOrZero("conversation", s.conversation),
		Peer:         tagOrZero("subject", s.peer), Target: tagOrZero("event", s.target),
	}.Append(nil)
	return journal.Sealed{
		App: s.app, Position: journal.Position(s.position), Sequence: s.position,
		Stored: s.stored, Plan: s.plan, Record: append(record, envelope(s.sender)...),
	}
}

func openStore(t testing.TB, dir string) *pebble.Store {
	t.Helper()
	s, err := pebble.Open(pebble.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newView(t testing.TB, s projections.Store) *View {
	t.Helper()
	v, err := New(Config{Store: s})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// apply gives events to the view, in one transaction.
func apply(t testing.TB, v *View, batch ...journal.Sealed) {
	t.Helper()
	err := v.store.Update(func(txn projections.Txn) error {
		return v.Apply(t.Context(), txn, "stream", batch)
	})
	if err != nil {
		t.Fatalf("Apply: %v", err)
	}
}
