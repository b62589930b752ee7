package server

import (
	"fmt"
	"math"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/cofferdb/coffer/journal"
)

// quotas is what each app, and each user of one, may take of the server, so that
// one that asks for everything leaves the others theirs. Only requests with a
// valid credential count: nobody else can use up a share.
//
// An app's entry stays for the life of the process. There are as many as apps
// that have called, and each is some 200 bytes. A user's goes when it is as new.
type quotas struct {
	app, user allowance

	mu    sync.Mutex // guards what follows and the entries' streams
	apps  map[journal.AppID]*quota
	users map[userOfApp]*quota
	sweep int // users are looked through when there are so many
}

// allowance is what one app or user may take.
type allowance struct {
	perSecond rate.Limit
	burst     int
	streams   int
}

type userOfApp struct {
	app  journal.AppID
	user string
}

type quota struct {
	requests *rate.Limiter
	streams  int
}

// leastSweep is how many users are kept without a look at which are needed.
const leastSweep = 1024

func newQuotas(l Limits) *quotas {
	return &quotas{
		app:  allowance{rate.Limit(l.AppRequests), l.AppBurst, l.AppStreams},
		user: allowance{rate.Limit(l.UserRequests), l.UserBurst, l.UserStreams},
		apps: make(map[journal.AppID]*quota), users: make(map[userOfApp]*quota), sweep: leastSweep,
	}
}

func (a allowance) quota() *quota { return &quota{requests: rate.NewLimiter(a.perSecond, a.burst)} }

// of returns the entries of an app and of its user, which is nil for a caller
// that is none; q.mu is held.
func (q *quotas) of(who userOfApp) (app, user *quota) {
	if app = q.apps[who.app]; app == nil {
		app = q.app.quota()
		q.apps[who.app] = app
	}
	if who.user == "" {
		return app, nil
	}
	if user = q.users[who]; user == nil {
		if len(q.users) >= q.sweep {
			q.forget()
		}
		user = q.user.quota()
		q.users[who] = user
	}
	return app, user
}

// forget drops the users whose entries are as new ones would be. What it costs
// is shared by as many users that have come since the last time.
func (q *quotas) forget() {
	for who, entry := range q.users {
		if entry.streams == 0 && entry.requests.Tokens() >= float64(q.user.burst) {
			delete(q.users, who)
		}
	}
	q.sweep = max(leastSweep, 2*len(q.users))
}

// refusal says which allowance is used up, and for how long.
type refusal struct {
	user bool
	wait time.Duration
}

// request takes one request from the allowances of an app and its user. A
// request that is refused takes nothing from either.
func (q *quotas) request(who userOfApp, now time.Time) *refusal {
	q.mu.Lock()
	app, user := q.of(who)
	q.mu.Unlock()
	var own *rate.Reservation
	if user != nil {
		own = user.requests.ReserveN(now, 1)
		if wait := own.DelayFrom(now); wait > 0 {
			own.CancelAt(now)
			return &refusal{true, wait}
		}
	}
	r := app.requests.ReserveN(now, 1)
	if wait := r.DelayFrom(now); wait > 0 {
		r.CancelAt(now)
		if own != nil {
			own.CancelAt(now)
		}
		return &refusal{false, wait}
	}
	return nil
}

// stream takes one of the streams of an app and its user; the function gives it
// back.
func (q *quotas) stream(who userOfApp) (func(), *refusal) {
	q.mu.Lock()
	defer q.mu.Unlock()
	app, user := q.of(who)
	switch {
	case user != nil && user.streams >= q.user.streams:
		return nil, &refusal{user: true}
	case app.streams >= q.app.streams:
		return nil, &refusal{}
	}
	app.streams++
	if user != nil {
		user.streams++
	}
	return func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		app.streams--
		if user != nil {
			user.streams--
		}
	}, nil
}

// who is whose allowances a call uses.
func (c *call) who() userOfApp { return userOfApp{c.app.ID, c.caller.user} }

// admit counts a request of an app and its user.
func (s *Server) admit(c *call) error {
	// The machine's clock, which does not jump with the one that judges tokens.
	r := s.quotas.request(c.who(), time.Now())
	if r == nil {
		return nil
	}
	whose, limit := "app", s.quotas.app
	if r.user {
		whose, limit = "user", s.quotas.user
	}
	p := s.kinds.overloaded.problem(fmt.Sprintf("the %s makes more than %d requests a second", whose, int(limit.perSecond)))
	p.retryAfter = max(1, int(math.Ceil(r.wait.Seconds())))
	return p
}

// holdStream takes a stream of the server and, unless it is a page, of the app
// and its user.
func (s *Server) holdStream(c *call, form answerForm) (func(), error) {
	release := func() {}
	if form != formPage {
		var r *refusal
		if release, r = s.quotas.stream(c.who()); r != nil {
			whose, limit := "app", s.quotas.app
			if r.user {
				whose, limit = "user", s.quotas.user
			}
			return nil, s.kinds.overloaded.problem(fmt.Sprintf("the %s has %d streams open, which is the most it may", whose, limit.streams))
		}
	}
	if !s.streams.TryAcquire(1) {
		release()
		return nil, s.kinds.overloaded.problem("too many replays are under way; try again")
	}
	return func() {
		s.streams.Release(1)
		release()
	}, nil
}
