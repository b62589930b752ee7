package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/journal"
)

const (
	// refusedShare is the share of the past deliveries that are refused at first:
	// they wait, and leave the tables of what waits.
	refusedShare = 100
	// pastBatch is how many events are appended at a time, and pastAhead how far
	// the journal may be in front of the endpoint.
	pastBatch, pastAhead = 10_000, 40_000
	pastSteps            = 10
)

// afterMany compares an endpoint that has had many deliveries with one of a
// region that is new.
func (b *callbacksRig) afterMany(ctx context.Context, o Options) (c Case, err error) {
	base, err := template(o.Size)
	if err != nil {
		return c, err
	}
	old, err := b.openLong(ctx, base, o.Deliveries)
	if err != nil {
		return c, err
	}
	defer old.close()
	if err := old.run(ctx, o); err != nil {
		return c, err
	}
	b.heapAfter = heap()
	fresh, err := openCallbacksRig(ctx, filepath.Join(b.dir, "fresh"), o)
	if err != nil {
		return c, err
	}
	defer func() { err = joinClose(err, fresh.close) }()
	young, err := fresh.openLong(ctx, base, o.Deliveries)
	if err != nil {
		return c, err
	}
	defer young.close()
	ours := &side{name: "old", round: func(ctx context.Context) (sample, error) { return old.more(ctx, o.Deliveries) }}
	raw := &side{name: "new", round: func(ctx context.Context) (sample, error) { return young.more(ctx, o.Deliveries) }}
	if err := warmUp(ctx, o, ours, raw); err != nil {
		return c, err
	}
	if err := alternate(ctx, o, 1, ours, raw); err != nil {
		return c, err
	}
	c = compare(fmt.Sprintf("after %d deliveries", old.tally.count()), "deliveries/s", ours, raw)
	c.Paired = paired(ours, raw)
	c.CPU, c.RawCPU = rounded(median(ours.cpus)), rounded(median(raw.cpus))
	for _, l := range []*long{old, young} {
		b.sent += l.events
		b.lost += l.events - l.tally.count()
		b.again += l.tally.again()
	}
	return c, nil
}

// long is an endpoint that gets everything of its app, and what it has got.
type long struct {
	*callbacksRig

	base     journal.Event
	endpoint endpoints.Endpoint
	events   int // of the app
	tally    *tally
	server   *httptest.Server
}

// openLong makes the endpoint, in a region whose app has so many events.
func (b *callbacksRig) openLong(ctx context.Context, base journal.Event, events int) (*long, error) {
	l := &long{callbacksRig: b, base: base, events: events, tally: &tally{}}
	l.server = newHTTPS(b.roots, l.tally.serve)
	var err error
	l.endpoint, err = b.endpoint(ctx, l.server.URL, func(e *endpoints.Endpoint) {
		e.Mode, e.Concurrency = endpoints.Full, callbackWidth
	})
	if err == nil {
		err = l.arrive(ctx, 0)
	}
	if err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

func (l *long) close() {
	l.server.CloseClientConnections()
	l.server.Close()
}

// run makes the past: events are appended and delivered at the same time.
func (l *long) run(ctx context.Context, o Options) error {
	l.tally.refuse(refusedShare)
	step := max(o.Past/pastSteps, 1)
	from, start := l.tally.count(), time.Now()
	for made := 0; made < o.Past; {
		n := min(pastBatch, step, o.Past-made)
		if err := l.fill(ctx, l.base, n, func(i int) string { return l.groups.at(i) }); err != nil {
			return err
		}
		l.events += n
		made += n
		if err := l.arrive(ctx, pastAhead); err != nil {
			return err
		}
		if done := l.tally.count(); done-from >= step {
			rate := float64(done-from) / time.Since(start).Seconds()
			l.past = append(l.past, Past{Done: done, Rate: rounded(rate), Heap: heap()})
			o.Log.InfoContext(ctx, "delivered", "deliveries", done, "rate", int(rate))
			from, start = done, time.Now()
		}
	}
	err := l.arrive(ctx, 0)
	l.tally.refuse(0)
	return err
}

// arrive waits until all but so many outcomes are on disk.
func (l *long) arrive(ctx context.Context, ahead int) error {
	last, since := uint64(0), time.Now()
	for {
		p, err := l.view.Progress(ctx, l.endpoint.App, l.endpoint.ID)
		switch {
		case err != nil:
			return err
		case p.Done+uint64(ahead) >= uint64(l.events):
			return nil
		case p.Done > last:
			last, since = p.Done, time.Now()
		case time.Since(since) > stall:
			return fmt.Errorf("%d of %d events: %w", p.Done, l.events, errStall)
		}
		if err := pauseFor(ctx, time.Millisecond); err != nil {
			return err
		}
	}
}

// more appends events while the endpoint is disabled, and measures their
// delivery once it is enabled.
func (l *long) more(ctx context.Context, n int) (sample, error) {
	if err := l.enable(ctx, endpoints.Disabled); err != nil {
		return sample{}, err
	}
	if err := pauseFor(ctx, time.Second/4); err != nil { // its worker ends
		return sample{}, err
	}
	before := l.events
	if err := l.fill(ctx, l.base, n, func(i int) string { return l.groups.at(i) }); err != nil {
		return sample{}, err
	}
	l.events += n
	if l.tally.count() != before {
		return sample{}, errors.New("deliveries were made to a disabled endpoint")
	}
	start := time.Now()
	if err := l.enable(ctx, endpoints.Enabled); err != nil {
		return sample{}, err
	}
	err := l.arrive(ctx, 0)
	return sample{count: n, elapsed: time.Since(start)}, err
}

func (l *long) enable(ctx context.Context, state endpoints.State) error {
	_, err := l.endpoints.Change(ctx, l.endpoint.App, l.endpoint.ID, func(e *endpoints.Endpoint) error {
		e.State = state
		return nil
	})
	return err
}

// tally counts requests by the numbers in their bodies, in little memory.
type tally struct {
	mu      sync.Mutex // guards what follows
	share   uint64     // one in so many is refused at first; 0: none
	refused map[uint64]struct{}
	seen    []uint64 // a bit for each number
	found   int
	twice   int
}

// refuse has one in so many be refused from now on.
func (t *tally) refuse(share uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.share, t.refused = share, make(map[uint64]struct{})
}

func (t *tally) serve(w http.ResponseWriter, q *http.Request) {
	body, err := io.ReadAll(q.Body)
	if err != nil {
		return
	}
	number, ok := numberOf(body)
	if !ok || !t.take(number) {
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// take notes a number, and reports whether its request is answered well.
func (t *tally) take(number uint64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.share > 0 && number%t.share == 0 {
		if _, before := t.refused[number]; !before {
			t.refused[number] = struct{}{}
			return false
		}
		delete(t.refused, number)
	}
	for uint64(len(t.seen)) <= number/64 {
		t.seen = append(t.seen, 0)
	}
	if bit := uint64(1) << (number % 64); t.seen[number/64]&bit != 0 {
		t.twice++
	} else {
		t.seen[number/64] |= bit
		t.found++
	}
	return true
}

func (t *tally) count() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.found
}

func (t *tally) again() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.twice
}

// numberOf reads the number at the end of a body in full.
func numberOf(body []byte) (uint64, bool) {
	const name = `"number":"`
	at := bytes.LastIndex(body, []byte(name))
	if at < 0 {
		return 0, false
	}
	digits, _, _ := bytes.Cut(body[at+len(name):], []byte(`"`))
	n, err := strconv.ParseUint(string(digits), 10, 64)
	return n, err == nil
}
