package journal_test

import (
	"fmt"
	"slices"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/journal"
)

// TestListReadsItsPrefix: what a list asks of the server does not grow with the
// rows of other prefixes, of which there may be a hundred thousand.
func TestListReadsItsPrefix(t *testing.T) {
	w := begin(t, t.TempDir(), false, nil)
	nc, err := w.srv.Connect() // of its own, so that what it receives are the list's answers
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	rows := journal.NewRows(js, journal.KeyringBucket(region().ID), w.config().Sync)
	var want []string
	for i := range 5 {
		name := fmt.Sprintf("recall.app%d.x", i)
		revision, err := rows.Create(t.Context(), name, []byte("1"))
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 { // a marker stays
			if err := rows.Delete(t.Context(), name, revision); err != nil {
				t.Fatal(err)
			}
			continue
		}
		want = append(want, name)
	}
	list := func(prefix string, want []string) (messages, bytes uint64) {
		t.Helper()
		before := nc.Stats()
		var got []string
		for name, err := range rows.List(t.Context(), prefix) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, name)
		}
		if slices.Sort(got); !slices.Equal(got, want) {
			t.Errorf("list of %q: %q, want %q", prefix, got, want)
		}
		after := nc.Stats()
		return after.InMsgs - before.InMsgs, after.InBytes - before.InBytes
	}
	list("recall.", want) // and what only the first one asks for
	messages, bytes := list("recall.", want)
	const others = 300
	for i := range others {
		if _, err := rows.Create(t.Context(), fmt.Sprintf("recalled.app%d", i), []byte("1")); err != nil {
			t.Fatal(err)
		}
	}
	again, more := list("recall.", want)
	t.Logf("%d answers of %d bytes, and with %d rows of others %d of %d", messages, bytes, others, again, more)
	if again > messages+others/10 || more > bytes+10*others {
		t.Errorf("a list got %d answers of %d bytes before, and %d of %d with %d rows of others", messages, bytes, again, more, others)
	}
	// A prefix may end within a token, and need not have any row.
	list("recall.app", want)
	list("recall.app3", []string{"recall.app3.x"})
	list("recall.app3.x", []string{"recall.app3.x"})
	list("recall.app3.x.", nil)
	list("rec", slices.Concat(want, func() (all []string) {
		for i := range others {
			all = append(all, fmt.Sprintf("recalled.app%d", i))
		}
		slices.Sort(all)
		return all
	}()))
}
