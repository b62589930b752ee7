package roaming

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/storetest"
)

// counted counts what a transaction writes.
type counted struct {
	projections.Txn

	writes int
}

func (c *counted) Set(key, value []byte) {
	c.writes++
	c.Txn.Set(key, value)
}

// TestLargeGroup shows that a message of a group of 10,000 costs what one of a
// group of two does.
func TestLargeGroup(t *testing.T) {
	store := openStore(t, t.TempDir()+"/views")
	defer store.Close()
	v := newView(t, store)
	position := uint64(0)
	event := func(kind journal.Type, sender string) journal.Sealed {
		position++
		return seal(spec{
			app: appN(1), position: position, id: fmt.Sprint("e", position), kind: kind, conversation: "g",
			sender: sender, time: start, stored: start, plan: "free",
		})
	}
	cost := func(batch ...journal.Sealed) int {
		c := &counted{}
		err := store.Update(func(txn projections.Txn) error {
			c.Txn = txn
			return v.Apply(t.Context(), c, "stream", batch)
		})
		if err != nil {
			t.Fatal(err)
		}
		return c.writes
	}
	cost(event(journal.MemberJoined, "m0"), event(journal.MemberJoined, "m1"), event(journal.MessageSent, "m0"))
	small := cost(event(journal.MessageSent, "m0"))
	for n := 0; n < 10_000; n += 1000 {
		var batch []journal.Sealed
		for i := range 1000 {
			batch = append(batch, event(journal.MemberJoined, fmt.Sprint("m", n+i)))
		}
		cost(batch...)
	}
	large := cost(event(journal.MessageSent, "m0"))
	if small != large || large > 5 {
		t.Errorf("a message costs %d keys with 2 members, %d with 10,000", small, large)
	}
	list, _, err := v.Conversations(t.Context(), appN(1), tagOf("subject", "m9999"), ListQuery{Oldest: start})
	if err != nil || len(list) != 1 || list[0].Unread != 3 {
		t.Errorf("the last member has %+v, %v", list, err)
	}
}

func TestUnreadIsCountedUpToALimit(t *testing.T) {
	v := newView(t, openAndClose(t))
	batch := []journal.Sealed{seal(spec{
		app: appN(1), position: 1, id: "j", kind: journal.MemberJoined, conversation: "g", sender: "x", time: start, stored: start, plan: "free",
	})}
	for i := range uint64(MaxUnread + 5) {
		batch = append(batch, seal(spec{
			app: appN(1), position: 2 + i, id: fmt.Sprint("m", i), kind: journal.MessageSent, conversation: "g", sender: "y",
			time: start, stored: start, plan: "free",
		}))
	}
	apply(t, v, batch...)
	list, _, err := v.Conversations(t.Context(), appN(1), tagOf("subject", "x"), ListQuery{})
	if err != nil || len(list) != 1 || list[0].Unread != MaxUnread {
		t.Errorf("%+v, %v", list, err)
	}
}

func openAndClose(t *testing.T) projections.Store {
	store := openStore(t, t.TempDir()+"/views")
	t.Cleanup(func() { _ = store.Close() })
	return store
}

// TestExpiryLeavesNothing fills a view, lets everything expire in several
// transactions, and looks at what is left.
func TestExpiryLeavesNothing(t *testing.T) {
	store := openAndClose(t)
	v := newView(t, store)
	var batch []journal.Sealed
	for i := range uint64(3 * expireKeys) {
		kinds := []journal.Type{
			journal.MessageSent, journal.MessageRecalled, journal.ReceiptRead, journal.MemberJoined, journal.InboxAcked, journal.MessageSent,
		}
		s := spec{
			app: appN(1), position: 1 + i, id: fmt.Sprint("e", i), kind: kinds[i%6], conversation: fmt.Sprint("c", i%5),
			sender: fmt.Sprint("u", i%7), time: start, stored: start, plan: "free",
		}
		switch s.kind {
		case journal.MessageSent, journal.MemberJoined:
		case journal.InboxAcked:
			s.target, s.conversation = fmt.Sprint("e", i-4), ""
		default:
			s.target = fmt.Sprint("e", i-i%6)
			s.conversation = fmt.Sprint("c", (i-i%6)%5)
		}
		if i%100 == 1 {
			s.target = "nothing"
		}
		batch = append(batch, seal(s))
	}
	apply(t, v, batch...)
	retention := journal.DefaultPlans()[0].Retention
	if n, err := v.Expire(t.Context(), start.Add(retention)); n != 0 || err != nil {
		t.Fatalf("before its time: %d, %v", n, err)
	}
	n, err := v.Expire(t.Context(), start.Add(retention+2*time.Hour))
	if err != nil || n != 2*expireKeys-expireKeys/2 {
		t.Errorf("%d events have gone, %v", n, err)
	}
	err = store.View(func(r projections.Reader) error {
		c := r.Iterate([]byte{1}, nil, false)
		defer c.Close()
		for c.Next() {
			t.Errorf("left: %x", c.Key())
		}
		return c.Close()
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestExpiryCostsWhatItRemoves takes 500 messages and their receipts out beside 10,000
// that stay and beside 100,000, for the same keys read and bytes written.
func TestExpiryCostsWhatItRemoves(t *testing.T) {
	var read, written [2]int
	least, most := 10_000, 100_000
	if testing.Short() {
		least, most = 1000, 5000
	}
	for i, live := range []int{least, most} {
		store := &storetest.Tally{Store: openAndClose(t)}
		v := newView(t, store)
		position := uint64(0)
		fill := func(n int, stored time.Time) {
			var batch []journal.Sealed
			for range n / 2 {
				position += 2
				s := spec{
					app: appN(1), position: position - 1, id: fmt.Sprint("e", position), kind: journal.MessageSent,
					conversation: fmt.Sprint("c", position%10), sender: "x", time: stored, stored: stored, plan: "free",
				}
				receipt := s
				receipt.position, receipt.id, receipt.kind, receipt.sender, receipt.target = position, s.id+"r", journal.ReceiptRead, "y", s.id
				if batch = append(batch, seal(s), seal(receipt)); len(batch) >= 5000 {
					apply(t, v, batch...)
					batch = batch[:0]
				}
			}
			apply(t, v, batch...)
		}
		fill(1000, start)
		fill(live, start.Add(24*time.Hour))
		store.Read, store.Written = 0, 0
		n, err := v.Expire(t.Context(), start.Add(journal.DefaultPlans()[0].Retention+2*time.Hour))
		if err != nil || n != 500 {
			t.Fatalf("%d events, %v", n, err)
		}
		read[i], written[i] = store.Read, store.Written
	}
	if read[0] != read[1] || written[0] != written[1] {
		t.Errorf("taking 500 events out: %d keys read beside %d, %d beside %d; %d and %d bytes written", read[0], least, read[1], most, written[0], written[1])
	}
	t.Logf("500 events: %d keys read, %d bytes written", read[1], written[1])
}

func TestGate(t *testing.T) {
	v := newView(t, &storetest.Memory{})
	v.Gate(projections.ErrRebuilding)
	if _, err := v.TakesPart(t.Context(), appN(1), tagOf("c", "c"), tagOf("s", "s"), start); !errors.Is(err, projections.ErrRebuilding) {
		t.Errorf("while it is rebuilt: %v", err)
	}
	v.Gate(nil)
	if _, err := v.TakesPart(t.Context(), appN(1), tagOf("c", "c"), tagOf("s", "s"), start); err != nil {
		t.Error(err)
	}
}

func TestUnknownPlanStops(t *testing.T) {
	v := newView(t, &storetest.Memory{})
	err := v.store.Update(func(txn projections.Txn) error {
		return v.Apply(t.Context(), txn, "stream", []journal.Sealed{seal(spec{
			app: appN(1), position: 1, id: "e", kind: journal.MessageSent, conversation: "g", sender: "x", time: start, stored: start, plan: "none",
		})})
	})
	if _, ok := errors.AsType[*projections.RecordError](err); !ok {
		t.Errorf("got %v", err)
	}
}
