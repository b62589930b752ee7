package server

import (
	"fmt"
	"math"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/cofferdb/coffer/journal"
)

// quotas is what each app may take of the server, so that one that asks for
// everything leaves the others theirs. Only requests with a valid credential of
// the app count: nobody else can use up its share.
//
// An app's entry stays for the life of the process. There are as many as apps
// that have called, and each is some 200 bytes.
type quotas struct {
	perSecond rate.Limit
	burst     int
	streams   int

	mu   sync.Mutex // guards apps and the entries' streams
	apps map[journal.AppID]*quota
}

type quota struct {
	requests *rate.Limiter
	streams  int
}

func newQuotas(l Limits) *quotas {
	return &quotas{
		perSecond: rate.Limit(l.AppRequests), burst: l.AppBurst, streams: l.AppStreams, apps: make(map[journal.AppID]*quota),
	}
}

// of returns the entry of an app; q.mu is held.
func (q *quotas) of(app journal.AppID) *quota {
	entry, ok := q.apps[app]
	if !ok {
		entry = &quota{requests: rate.NewLimiter(q.perSecond, q.burst)}
		q.apps[app] = entry
	}
	return entry
}

// request takes one request from the app's allowance, or says after how long
// there will be one.
func (q *quotas) request(app journal.AppID, now time.Time) (time.Duration, bool) {
	q.mu.Lock()
	limiter := q.of(app).requests
	q.mu.Unlock()
	r := limiter.ReserveN(now, 1)
	wait := r.DelayFrom(now)
	if wait > 0 {
		r.CancelAt(now)
	}
	return wait, wait == 0
}

// stream takes one of the app's streams; the function gives it back.
func (q *quotas) stream(app journal.AppID) (func(), bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	entry := q.of(app)
	if entry.streams >= q.streams {
		return nil, false
	}
	entry.streams++
	return func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		entry.streams--
	}, true
}

// admit counts a request of an app.
func (s *Server) admit(c *call) error {
	// The machine's clock, which does not jump with the one that judges tokens.
	wait, ok := s.quotas.request(c.app.ID, time.Now())
	if ok {
		return nil
	}
	p := s.kinds.overloaded.problem(fmt.Sprintf("the app makes more than %d requests a second", int(s.quotas.perSecond)))
	p.retryAfter = max(1, int(math.Ceil(wait.Seconds())))
	return p
}

// holdStream takes a stream of the server and, unless it is a page, of the app.
func (s *Server) holdStream(c *call, form answerForm) (func(), error) {
	release := func() {}
	if form != formPage {
		var ok bool
		if release, ok = s.quotas.stream(c.app.ID); !ok {
			return nil, s.kinds.overloaded.problem(fmt.Sprintf("the app has %d streams open, which is the most it may", s.quotas.streams))
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
