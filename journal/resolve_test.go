package journal

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/journal/journaltest"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/local"
)

// syncing fails as often as it is told to.
type syncing struct {
	Syncer
	fail atomic.Int32
}

func (s *syncing) Sync(stream string) error {
	if s.fail.Add(-1) >= 0 {
		return errors.New("no sync")
	}
	return s.Syncer.Sync(stream)
}

// TestSearchGoesOn looks for entries in doubt behind thousands of events of
// others, one of which was deleted.
func TestSearchGoesOn(t *testing.T) {
	ctx := t.Context()
	provider, err := local.Open(ctx, local.Options{Path: filepath.Join(t.TempDir(), "key"), Create: true, Region: "eu"})
	if err != nil {
		t.Fatal(err)
	}
	server, conn := journaltest.Start(t, embedded.Options{})
	syncer := &syncing{Syncer: server.Syncer()}
	j, err := Open(ctx, Config{Region: DefaultRegions()[2], Conn: conn, Sync: syncer, KMS: provider})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = j.Close() })
	app, err := j.CreateApp(ctx, AppSpec{Plan: "free"})
	if err != nil {
		t.Fatal(err)
	}
	const events, there, deleted, reached = 3000, 2000, 1000, 100
	batch := make([]Event, events)
	for i := range batch {
		batch[i] = Event{
			ID: fmt.Sprint("e", i), Type: MessageSent, Conversation: "g", ConversationType: Group, Sender: "ann", Data: []byte(`{"bodies":[{"type":"txt","msg":"x"}]}`),
		}
	}
	for len(batch) > 0 {
		if _, err := j.Append(ctx, app.ID, batch[:500]...); err != nil {
			t.Fatal(err)
		}
		batch = batch[500:]
	}
	// One without a committer, to whom everything of j's own belongs.
	s := &stream{j: j, info: j.streams[StreamName("eu", app.Plan, app.Shard)].info, recent: newRecent(), gated: true}
	handle, err := j.js.Stream(ctx, s.info.Name)
	if err != nil {
		t.Fatal(err)
	}
	msg, err := handle.GetMsg(ctx, there)
	if err != nil {
		t.Fatal(err)
	}
	if err := handle.DeleteMsg(ctx, deleted); err != nil {
		t.Fatal(err)
	}
	slots := make([]*slot, 2)
	for i := range slots {
		slots[i], _ = s.recent.reserve(kms.Tag{byte(i)}, bodySum{}, 0, 0)
	}
	stored := &entry{subject: msg.Subject, record: msg.Data, slot: slots[0], doubtful: true}
	lost := &entry{subject: msg.Subject, record: []byte("never stored"), slot: slots[1], doubtful: true}
	s.doubt = []*entry{stored, lost}

	// A search that is interrupted has got somewhere.
	search := newSearch(s, handle, s.doubt)
	if err := search.rest(ctx, reached); err != nil {
		t.Fatal(err)
	}
	over, cancel := context.WithCancel(ctx)
	cancel()
	if err := s.resolve(over, s.doubt); err == nil || s.last != reached || !stored.doubtful || !lost.doubtful {
		t.Fatalf("interrupted: %v, looked up to %d", err, s.last)
	}

	var gets atomic.Int64
	for _, subject := range []string{"$JS.API.DIRECT.GET.>", "$JS.API.STREAM.MSG.GET.>"} {
		if _, err := conn.Subscribe(subject, func(*nats.Msg) { gets.Add(1) }); err != nil {
			t.Fatal(err)
		}
	}
	syncer.fail.Store(1)
	if err := s.settleDoubt(ctx); err == nil {
		t.Error("settled without a sync")
	}
	if s.last != events || stored.seq != there || stored.doubtful || lost.seq != 0 || lost.doubtful {
		t.Errorf("looked up to %d: stored %d (%t), lost %d (%t)", s.last, stored.seq, stored.doubtful, lost.seq, lost.doubtful)
	}
	if err := s.settleDoubt(ctx); err != nil || len(s.doubt) != 0 {
		t.Errorf("%d in doubt: %v", len(s.doubt), err)
	}
	if slots[0].seq != there || !slots[1].failed {
		t.Errorf("found at %d, the other is free: %t", slots[0].seq, slots[1].failed)
	}
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	if n := gets.Load(); n != 1 { // the deleted one
		t.Errorf("%d messages were got one by one", n)
	}
}

// TestAnsweredTwice: two servers that take themselves for the leader answer the
// same publish. The second answer comes during the next round.
func TestAnsweredTwice(t *testing.T) {
	_, conn := journaltest.Start(t, embedded.Options{})
	const subject = "twice"
	var first string
	if _, err := conn.Subscribe(subject, func(m *nats.Msg) {
		answer := func(to string, seq int) {
			if err := conn.Publish(to, fmt.Appendf(nil, `{"stream":"S","seq":%d}`, seq)); err != nil {
				t.Error(err)
			}
		}
		if first == "" {
			first = m.Reply
			answer(m.Reply, 1)
			return
		}
		answer(first, 77)
		answer(m.Reply, 2)
	}); err != nil {
		t.Fatal(err)
	}
	p, err := newPlain(conn, "S", func(context.Context) error { return nil }, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	for want := range uint64(2) {
		e := &entry{subject: subject, record: []byte("x")}
		if err := p.publish(t.Context(), []*entry{e}); err != nil || e.err != nil || e.seq != want+1 {
			t.Errorf("entry %d is at %d: %v, %v", want+1, e.seq, err, e.err)
		}
	}
}
