package roaming

import (
	"fmt"
	"testing"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections"
)

// fillUser gives a user conversations with messages of others, round by round, so
// that they lie as they would have come.
func fillUser(b *testing.B, v *View, conversations, messages int) {
	b.Helper()
	var batch []journal.Sealed
	position := uint64(0)
	add := func(kind journal.Type, conversation int, sender string) {
		position++
		batch = append(batch, seal(spec{
			app: appN(1), position: position, id: fmt.Sprint("e", position), kind: kind, conversation: fmt.Sprint("c", conversation),
			sender: sender, time: start, stored: start.Add(time.Duration(position) * time.Millisecond), plan: "pro",
		}))
		if len(batch) == 512 {
			flush(b, v, batch)
			batch = batch[:0]
		}
	}
	for c := range conversations {
		add(journal.MemberJoined, c, "me")
	}
	for range messages {
		for c := range conversations {
			add(journal.MessageSent, c, fmt.Sprint("u", c%100))
		}
	}
	flush(b, v, batch)
}

func flush(b *testing.B, v *View, batch []journal.Sealed) {
	b.Helper()
	err := v.store.Update(func(txn projections.Txn) error { return v.Apply(b.Context(), txn, "stream", batch) })
	if err != nil {
		b.Fatal(err)
	}
}

func benchView(b *testing.B) *View {
	b.Helper()
	store := openStore(b, b.TempDir()+"/views")
	b.Cleanup(func() { _ = store.Close() })
	return newView(b, store)
}

func BenchmarkConversations(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		b.Run(fmt.Sprintf("of=%d", n), func(b *testing.B) {
			v := benchView(b)
			fillUser(b, v, n, 100)
			for b.Loop() {
				page, _, err := v.Conversations(b.Context(), appN(1), tagOf("subject", "me"), ListQuery{})
				if err != nil || len(page) != min(n, 50) || page[0].Unread != 100 {
					b.Fatal(len(page), err)
				}
			}
		})
	}
}

func BenchmarkInbox(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		b.Run(fmt.Sprintf("of=%d", n), func(b *testing.B) {
			v := benchView(b)
			fillUser(b, v, n, 100)
			for b.Loop() {
				box, err := v.Inbox(b.Context(), appN(1), tagOf("subject", "me"), InboxQuery{})
				if err != nil || len(box.Positions) != 100 {
					b.Fatal(len(box.Positions), err)
				}
			}
		})
	}
}

func BenchmarkTakesPart(b *testing.B) {
	v := benchView(b)
	fillUser(b, v, 1000, 10)
	for b.Loop() {
		takes, err := v.TakesPart(b.Context(), appN(1), tagOf("conversation", "c7"), tagOf("subject", "me"), start)
		if err != nil || !takes {
			b.Fatal(takes, err)
		}
	}
}

func BenchmarkApply(b *testing.B) {
	v := benchView(b)
	batch := make([]journal.Sealed, 512)
	position := uint64(0)
	for b.Loop() {
		for i := range batch {
			position++
			batch[i] = seal(spec{
				app: appN(1), position: position, id: fmt.Sprint("e", position), kind: journal.MessageSent, conversation: fmt.Sprint("c", position%1000),
				sender: fmt.Sprint("u", position%300), peer: fmt.Sprint("u", position%7), time: start, stored: start, plan: "pro",
			})
		}
		flush(b, v, batch)
	}
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(position), "µs/event")
}
