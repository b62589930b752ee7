package server

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections/history"
)

// newsLife is how long a batch is shared. It holds plaintext, so it does not
// stay until the app's next event, which may be far.
const newsLife = time.Second

// news shares what has come among the tails that wait for it: a thousand tails
// of an app read, open and encode an event once.
//
// A batch is found under the channel that its reader took before reading. A tail
// that took the same channel gets what it would have read itself: whatever is
// committed after that, a recall too, closes the channel, and the next reading
// is another.
type news struct {
	mu   sync.Mutex // guards apps
	apps map[journal.AppID]*newsOfApp
}

type newsOfApp struct {
	changed <-chan struct{}
	batches map[newsKey]*sharedBatch
}

// newsKey says what a tail reads. The limit is not in it: it is applied to the
// reading.
type newsKey struct {
	after   journal.Position
	binding string
	limit   int
	oldest  time.Time
}

type sharedBatch struct {
	once  sync.Once
	batch sealedBatch
}

// of returns what comes next for a tail: read now, or by another.
func (n *news) of(t *stream) *sealedBatch {
	limit := batchEvents
	if t.q.Limit > 0 {
		limit = min(limit, t.q.Limit)
	}
	// To the next full second: nothing is served for longer than it is kept, and
	// tails that read at the same time read the same.
	oldest := t.s.oldest(t.c.app).Add(time.Second - 1).Truncate(time.Second)
	key := newsKey{after: t.q.After, binding: string(t.out.b.bytes()), limit: limit, oldest: oldest}
	b := n.find(t.c.app.ID, t.changed, key)
	b.once.Do(func() {
		// Whoever reads first reads for all, also when its caller has left.
		ctx := context.WithoutCancel(t.c.r.Context())
		q := t.q
		q.Limit, q.Oldest = limit, oldest
		b.batch.shared = true
		b.batch.read(ctx, t.s, t.c.app.ID, q)
	})
	return &b.batch
}

func (n *news) find(app journal.AppID, changed <-chan struct{}, key newsKey) *sharedBatch {
	n.mu.Lock()
	defer n.mu.Unlock()
	a := n.apps[app]
	if a == nil || a.changed != changed {
		if n.apps == nil {
			n.apps = make(map[journal.AppID]*newsOfApp)
		}
		a = &newsOfApp{changed: changed, batches: make(map[newsKey]*sharedBatch)}
		n.apps[app] = a
		time.AfterFunc(newsLife, func() { n.forget(app, a) })
	}
	b := a.batches[key]
	if b == nil {
		b = &sharedBatch{}
		a.batches[key] = b
	}
	return b
}

func (n *news) forget(app journal.AppID, a *newsOfApp) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.apps[app] == a {
		delete(n.apps, app)
	}
}

// read fills the batch from the view and opens it.
func (b *sealedBatch) read(ctx context.Context, s *Server, app journal.AppID, q history.Query) {
	next, err := s.history.Replay(ctx, app, q, func(item history.Item) error {
		if b.full(item) {
			return errFull
		}
		b.add(item)
		return nil
	})
	b.more = errors.Is(err, errFull) || err == nil && len(b.items) == q.Limit
	if err != nil && !b.more {
		b.err = err
	} else {
		b.scanned = next
	}
	s.openBatch(ctx, app, b)
	b.records = nil
}
