package history

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/pebble"
)

// start is when the tests' events begin.
var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func appN(n byte) journal.AppID { return journal.AppID{0: 3, 15: n} }

// tagOf stands in for the keyed tags of an app.
func tagOf(kind, id string) kms.Tag {
	sum := sha256.Sum256([]byte(kind + "/" + id))
	return kms.Tag(sum[:16])
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
	data         []byte
}

func tagOrZero(kind, id string) kms.Tag {
	if id == "" {
		return kms.Tag{}
	}
	return tagOf(kind, id)
}

// A maker seals events with real envelopes.
type maker struct {
	t    testing.TB
	keys map[string]*kms.DataKey // by app and sender
}

func newMaker(t testing.TB) *maker { return &maker{t: t, keys: make(map[string]*kms.DataKey)} }

func (m *maker) key(app journal.AppID, sender string) *kms.DataKey {
	name := sender + string(app[:])
	if k := m.keys[name]; k != nil {
		return k
	}
	epoch, subject := sha256.Sum256([]byte("epoch"+app.String())), sha256.Sum256([]byte(name))
	k, err := kms.DeriveDataKey("eu", app.String(), 1, tagOf("subject", sender), epoch[:], subject[:])
	if err != nil {
		m.t.Fatal(err)
	}
	m.keys[name] = k
	return k
}

// aad is as long as the journal's.
func aad(dst []byte, app journal.AppID, header []byte) []byte {
	dst = binary.BigEndian.AppendUint32(dst, 2)
	dst = append(dst, "eu"...)
	dst = binary.BigEndian.AppendUint32(dst, 32)
	dst, _ = app.AppendText(dst)
	dst = binary.BigEndian.AppendUint32(dst, 16)
	dst = append(dst, make([]byte, 16)...)
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(header)))
	return append(dst, header...)
}

func (m *maker) seal(s spec) journal.Sealed {
	if s.plan == "" {
		s.plan = "enterprise"
	}
	if s.time.IsZero() {
		s.time = start.Add(time.Duration(s.position) * time.Second)
	}
	if s.stored.IsZero() {
		s.stored = s.time
	}
	if s.kind == 0 {
		s.kind = journal.MessageSent
	}
	if s.data == nil {
		s.data = fmt.Appendf(nil, `{"id":%q,"position":%d}`, s.id, s.position)
	}
	header := journal.Header{
		Type: s.kind, Millis: s.time.UnixMilli(), Event: tagOf("event", s.id),
		Conversation: tagOrZero("conversation", s.conversation),
		Peer:         tagOrZero("subject", s.peer), Target: tagOrZero("event", s.target),
	}.Append(nil)
	record := m.key(s.app, s.sender).Seal(header, aad(nil, s.app, header), s.data)
	return journal.Sealed{
		App: s.app, Position: journal.Position(s.position), Sequence: s.position,
		Stored: s.stored, Plan: s.plan, Record: record,
	}
}

// open opens a record: what the journal does for the server.
func (m *maker) open(dst []byte, app journal.AppID, sender string, record []byte) ([]byte, error) {
	room := aadPool.Get().(*[160]byte)
	defer aadPool.Put(room)
	return m.key(app, sender).Open(dst, aad(room[:0], app, record[:journal.HeaderSize]), record[journal.HeaderSize:])
}

var aadPool = sync.Pool{New: func() any { return new([160]byte) }}

func (m *maker) text(app journal.AppID, sender string, record []byte) string {
	m.t.Helper()
	b, err := m.open(nil, app, sender, record)
	if err != nil {
		m.t.Fatalf("open a record: %v", err)
	}
	return string(b)
}

func newStore(t testing.TB) *pebble.Store {
	t.Helper()
	s := openStore(t, filepath.Join(t.TempDir(), "views"))
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close the store: %v", err)
		}
	})
	return s
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
