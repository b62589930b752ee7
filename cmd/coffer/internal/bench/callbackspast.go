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
	// manyBits is how many times in a round a bit of each side is measured.
	manyBits = 2
)

// afterMany compares an endpoint that has had many deliveries with one of a
// region that is new, and with itself before it had them.
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
	first := &side{name: "start", round: func(ctx context.Context) (sample, error) { return old.more(ctx, o.Deliveries) }}
	if err := warmUp(ctx, o, first); err != nil {
		return c, err
	}
	if err := alternate(ctx, o, manyBits, first); err != nil {
		return c, err
	}
	b.found.HeapBefore, b.found.ResidentBefore = heap(), residentNow()
	if err := old.run(ctx, o); err != nil {
		return c, err
	}
	b.found.HeapAfter, b.found.ResidentAfter = heap(), residentNow()
	b.found.HeapRatio = ratio(b.found.HeapAfter, b.found.HeapBefore)
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
	if err := alternate(ctx, o, manyBits, ours, raw); err != nil {
		return c, err
	}
	c = compare(fmt.Sprintf("after %d deliveries", old.tally.count()), "deliveries/s", ours, raw, first)
	c.Beside[0].Name, c.Beside[0].CPU = "the same endpoint at the start", rounded(median(first.cpus))
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

// run makes the past.
func (l *long) run(ctx context.Context, o Options) error {
	l.tally.refuse(refusedShare)
	defer l.tally.refuse(0)
	steps := min(pastSteps, o.Past)
	for i := range steps {
		p, err := l.pass(ctx, o.Past*(i+1)/steps-o.Past*i/steps)
		if err != nil {
			return err
		}
		l.found.Past = append(l.found.Past, p)
		o.Log.InfoContext(ctx, "delivered", "deliveries", p.Done, "rate", int(p.Rate), "cpu_us", p.CPU)
	}
	first, last := l.found.Past[0], l.found.Past[len(l.found.Past)-1]
	l.found.PastRatio, l.found.PastCPURatio = ratio(last.Rate, first.Rate), ratio(last.CPU, first.CPU)
	return l.arrive(ctx, 0)
}

// pass appends events and delivers them at the same time, until all but those
// that wait after a refusal have outcomes and the compactions are done that they
// have caused: what is left undone would fall on those that come next.
func (l *long) pass(ctx context.Context, n int) (p Past, err error) {
	from := l.tally.count()
	resetPeak()
	start, used := time.Now(), processTime()
	for made := 0; made < n; made += pastBatch {
		if err := l.extend(ctx, min(pastBatch, n-made)); err != nil {
			return p, err
		}
	}
	if err := l.arrive(ctx, 2*n/refusedShare); err != nil {
		return p, err
	}
	if err := l.store.Settle(ctx); err != nil {
		return p, err
	}
	elapsed, cpu := time.Since(start), processTime()-used
	p.Done = l.tally.count()
	done := float64(p.Done - from)
	p.Rate, p.CPU = rounded(done/elapsed.Seconds()), rounded(float64(cpu.Nanoseconds())/1000/done)
	p.Peak = rounded(float64(peakResident()) / (1 << 20))
	p.Heap = heap()
	return p, nil
}

// extend appends events, and waits while the endpoint is far behind.
func (l *long) extend(ctx context.Context, n int) error {
	if err := l.fill(ctx, l.base, n, func(i int) string { return l.groups.at(i) }); err != nil {
		return err
	}
	l.events += n
	return l.arrive(ctx, pastAhead)
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
// delivery once it is enabled. Compactions of what was appended end before that,
// and those of the outcomes before anything else is measured.
func (l *long) more(ctx context.Context, n int) (out sample, err error) {
	if err := l.enable(ctx, endpoints.Disabled); err != nil {
		return out, err
	}
	if err := pauseFor(ctx, time.Second/4); err != nil { // its worker ends
		return out, err
	}
	before := l.events
	if err := l.fill(ctx, l.base, n, func(i int) string { return l.groups.at(i) }); err != nil {
		return out, err
	}
	l.events += n
	if l.tally.count() != before {
		return out, errors.New("deliveries were made to a disabled endpoint")
	}
	if err := l.store.Settle(ctx); err != nil {
		return out, err
	}
	start, used := time.Now(), processTime()
	if err := l.enable(ctx, endpoints.Enabled); err != nil {
		return out, err
	}
	if err := l.arrive(ctx, 0); err != nil {
		return out, err
	}
	out = sample{count: n, elapsed: time.Since(start), cpu: processTime() - used}
	return out, l.store.Settle(ctx)
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
