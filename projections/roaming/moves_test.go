package roaming

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections"
)

// TestMoves moves an app from a plan of 3 days to one of 90: what was copied stays
// as long as the new plan says, also in a view that has seen nothing but copies,
// and copying twice changes nothing.
func TestMoves(t *testing.T) {
	var first, copies []journal.Sealed
	add := func(kind journal.Type, sender, target string) {
		n := uint64(len(first) + 1)
		s := spec{
			app: appN(1), position: n, id: fmt.Sprint("e", n), kind: kind, conversation: "g", sender: sender, target: target,
			time: start.Add(time.Duration(n) * time.Minute), stored: start.Add(time.Duration(n) * time.Minute), plan: "free",
		}
		if kind == journal.InboxAcked {
			s.conversation = ""
		}
		event := seal(s)
		first = append(first, event)
		event.Role, event.From, event.Plan, event.Generation = journal.RoleCopy, "free", "pro", 1
		copies = append(copies, event)
	}
	add(journal.MemberJoined, "x", "") // 1
	add(journal.MemberJoined, "z", "") // 2
	add(journal.MessageSent, "y", "")  // 3
	add(journal.MessageSent, "y", "")  // 4
	add(journal.MessageSent, "y", "")  // 5
	add(journal.MessageRecalled, "y", "e4")
	add(journal.ReceiptRead, "x", "e3")
	add(journal.InboxAcked, "x", "e3")
	add(journal.MemberLeft, "z", "")
	add(journal.MemberJoined, "w", "")

	plans := journal.DefaultPlans()
	free, pro := plans[0].Retention, plans[2].Retention
	moved := newView(t, openAndClose(t))
	apply(t, moved, first...)
	apply(t, moved, copies[:4]...)
	apply(t, moved, copies...)
	rebuilt := newView(t, openAndClose(t))
	apply(t, rebuilt, copies...)
	for name, v := range map[string]*View{"moved": moved, "rebuilt": rebuilt} {
		if _, err := v.Expire(t.Context(), start.Add(free+48*time.Hour)); err != nil {
			t.Fatal(err)
		}
		x, oldest := tagOf("subject", "x"), start.Add(free+48*time.Hour-pro)
		list, _, err := v.Conversations(t.Context(), appN(1), x, ListQuery{Oldest: oldest})
		if err != nil || len(list) != 1 || list[0].Last != 5 || list[0].Read != 3 || list[0].Unread != 1 {
			t.Errorf("%s: conversations: %+v, %v", name, list, err)
		}
		box, err := v.Inbox(t.Context(), appN(1), x, InboxQuery{Oldest: oldest})
		if err != nil || box.Acked != 3 || !slices.Equal(box.Positions, []journal.Position{5, 6}) {
			t.Errorf("%s: inbox: %+v, %v", name, box, err)
		}
		receipts, err := v.Receipts(t.Context(), appN(1), tagOf("conversation", "g"), []journal.Position{3}, &x)
		if err != nil || receipts[0] != (Receipt{1, 1, true, true}) {
			t.Errorf("%s: receipts: %+v, %v", name, receipts, err)
		}
		for user, want := range map[string]bool{"w": true, "z": false} {
			takes, err := v.TakesPart(t.Context(), appN(1), tagOf("conversation", "g"), tagOf("subject", user), oldest)
			if err != nil || takes != want {
				t.Errorf("%s: %s takes part: %v, %v", name, user, takes, err)
			}
		}
		if _, err := v.Expire(t.Context(), start.Add(pro+48*time.Hour)); err != nil {
			t.Fatal(err)
		}
		err = v.store.View(func(r projections.Reader) error {
			c := r.Iterate([]byte{1}, nil, false)
			defer c.Close()
			for c.Next() {
				t.Errorf("%s: left: %x", name, c.Key())
			}
			return c.Close()
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}
