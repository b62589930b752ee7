package server

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/cofferdb/coffer/journal"
)

// TestTurns: apps come in turn, and within an app its users, however many
// replays one of them has.
func TestTurns(t *testing.T) {
	var line turns // with no turn to spare: all wait
	app := func(n byte) journal.AppID { return journal.AppID{n} }
	type entry struct {
		name   string
		called chan struct{}
	}
	var entries []entry
	join := func(n byte, user string, replays int) {
		for range replays {
			called := line.queue(userOfApp{app(n), user})
			entries = append(entries, entry{fmt.Sprint(n, user), called})
		}
	}
	join(1, "", 50) // a greedy app
	join(2, "", 2)
	join(3, "a", 40) // a greedy user beside one that is not
	join(3, "b", 2)
	var order []string
	for range len(entries) {
		line.next()
		i := slices.IndexFunc(entries, func(e entry) bool {
			select {
			case <-e.called:
				return true
			default:
				return false
			}
		})
		if i < 0 {
			t.Fatal("nobody was called")
		}
		order = append(order, entries[i].name)
		entries = slices.Delete(entries, i, i+1)
	}
	if got := strings.Join(order[:13], " "); got != "1 2 3a 1 2 3b 1 3a 1 3b 1 3a 1" {
		t.Errorf("the order is %s", got)
	}
	if len(line.apps) != 0 || line.free != 0 {
		t.Errorf("%d turns are free and %d apps wait", line.free, len(line.apps))
	}
}

// TestTurnsLeft: a replay that has gone does not keep a turn, nor its place.
func TestTurnsLeft(t *testing.T) {
	line := turns{free: 1}
	who := userOfApp{app: journal.AppID{1}}
	done, err := line.take(t.Context(), who)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	// The turn may have been passed on by time: then it is taken, and given back.
	for range 100 {
		if again, err := line.take(ctx, who); err == nil {
			again()
		}
	}
	done()
	done() // once counts
	line.mu.Lock()
	defer line.mu.Unlock()
	if line.free != 1 || len(line.apps) != 0 {
		t.Errorf("%d turns are free and %d apps wait", line.free, len(line.apps))
	}
}

// TestUsersAreForgotten: entries of users do not pile up.
func TestUsersAreForgotten(t *testing.T) {
	q := newQuotas(Limits{}.withDefaults())
	who := func(i int) userOfApp { return userOfApp{journal.AppID{1}, fmt.Sprint("user-", i)} }
	release, refused := q.stream(who(0))
	if refused != nil {
		t.Fatal(refused)
	}
	for i := range 20 * leastSweep {
		q.mu.Lock()
		q.of(who(i)) // takes nothing, so the entry is as new
		q.mu.Unlock()
	}
	if n := len(q.users); n > leastSweep {
		t.Errorf("%d users are kept", n)
	}
	if q.users[who(0)] == nil {
		t.Error("a user with an open stream was forgotten")
	}
	release()
}
