package server

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/cofferdb/coffer/journal"
)

// turnLife is how long a turn counts. Opening a batch takes well under a
// millisecond; who takes longer waits for a key, and not for a processor.
const turnLife = 50 * time.Millisecond

// turns share the processors among the replays that are under way. A replay
// needs a turn for each batch that it opens. While more want one than there are,
// apps come in turn, and within an app its users: an app with a hundred replays,
// or a user with all its devices, gets as much as one with a single replay.
type turns struct {
	mu   sync.Mutex // guards what follows
	free int
	apps []*appInLine // who waits, the next one first
}

type appInLine struct {
	app   journal.AppID
	users []*userInLine
}

type userInLine struct {
	user    string
	waiting []chan struct{} // closed when it is the replay's turn
}

// take waits for a turn; the function gives it back. It fails when ctx ends.
func (t *turns) take(ctx context.Context, who userOfApp) (func(), error) {
	t.mu.Lock()
	if t.free > 0 {
		t.free--
		t.mu.Unlock()
		return t.begin(), nil
	}
	called := t.queue(who)
	t.mu.Unlock()
	select {
	case <-called:
		return t.begin(), nil
	case <-ctx.Done():
		t.leave(who, called)
		return nil, ctx.Err()
	}
}

// begin returns what ends a turn, which time does too.
func (t *turns) begin() func() {
	var once sync.Once
	end := func() { once.Do(t.next) }
	timer := time.AfterFunc(turnLife, end)
	return func() {
		timer.Stop()
		end()
	}
}

// queue puts a replay at the end of its user's line; t.mu is held.
func (t *turns) queue(who userOfApp) chan struct{} {
	i := slices.IndexFunc(t.apps, func(a *appInLine) bool { return a.app == who.app })
	if i < 0 {
		i = len(t.apps)
		t.apps = append(t.apps, &appInLine{app: who.app})
	}
	a := t.apps[i]
	j := slices.IndexFunc(a.users, func(u *userInLine) bool { return u.user == who.user })
	if j < 0 {
		j = len(a.users)
		a.users = append(a.users, &userInLine{user: who.user})
	}
	called := make(chan struct{})
	a.users[j].waiting = append(a.users[j].waiting, called)
	return called
}

// next gives a turn to whose it is. Who still has somebody waiting goes to the
// end of the line.
func (t *turns) next() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.apps) == 0 {
		t.free++
		return
	}
	a := t.apps[0]
	u := a.users[0]
	called := u.waiting[0]
	u.waiting = u.waiting[1:]
	a.users = a.users[1:]
	if len(u.waiting) > 0 {
		a.users = append(a.users, u)
	}
	t.apps = t.apps[1:]
	if len(a.users) > 0 {
		t.apps = append(t.apps, a)
	}
	close(called)
}

// leave takes a replay out of its line. One that was called at the same moment
// passes its turn on.
func (t *turns) leave(who userOfApp, called chan struct{}) {
	t.mu.Lock()
	for i, a := range t.apps {
		for j, u := range a.users {
			k := slices.Index(u.waiting, called)
			if a.app != who.app || k < 0 {
				continue
			}
			if u.waiting = slices.Delete(u.waiting, k, k+1); len(u.waiting) == 0 {
				a.users = slices.Delete(a.users, j, j+1)
			}
			if len(a.users) == 0 {
				t.apps = slices.Delete(t.apps, i, i+1)
			}
			t.mu.Unlock()
			return
		}
	}
	t.mu.Unlock()
	t.next()
}
