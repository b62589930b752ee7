package bench

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/journal"
)

const callbacksCompared = "Receivers are HTTPS servers of this process on loopback that record the webhook-id of each request; %d requests at a time over HTTP/2. " +
	"one endpoint: %d stored events delivered to a new endpoint in full bodies, from the change that makes it to the last outcome on disk; " +
	"raw: the same number of signed bodies of the same size posted by %d goroutines with one http.Client, nothing recorded. " +
	"after many: %d events that an endpoint had missed, which has had %d deliveries before, one in a hundred of them refused at first, from the change that enables it " +
	"to the last outcome on disk, compactions being done before; raw is the same in a region that is new, in turn in the same rounds, and beside it the same endpoint before " +
	"the many deliveries. past, in tenths: appended and delivered at the same time, until the compactions of that are done. " +
	"hanging: %d endpoints with a conversation each, %d events a second whenever they are due (open loop), each to one endpoint; " +
	"ours is one over the p99 from the append to the receiver while one in a hundred endpoints hangs, raw the same without any that hangs. " +
	"lost and again are counted over everything: again are requests with a webhook-id that was answered before."

const (
	callbackWidth = 32 // requests at a time
	hangingShare  = 100
	hangFor       = 30 * time.Second
)

// Deliveries is what became of all events in a benchmark of callbacks, and what
// the many deliveries to one endpoint took.
type Deliveries struct {
	Sent  int `json:"sent"`
	Lost  int `json:"lost"`
	Again int `json:"again"`
	// The live heap and the resident set of the process before and after the
	// many deliveries, after the same rounds.
	HeapBefore     float64 `json:"heap_before_mib"`
	HeapAfter      float64 `json:"heap_after_mib"`
	HeapRatio      float64 `json:"heap_ratio"`
	ResidentBefore float64 `json:"resident_before_mib"`
	ResidentAfter  float64 `json:"resident_after_mib"`
	// PastRatio is the rate of the last tenth of the many deliveries divided by
	// that of the first, PastCPURatio the same of the processor time, where less
	// is better.
	PastRatio    float64 `json:"past_ratio,omitzero"`
	PastCPURatio float64 `json:"past_cpu_ratio,omitzero"`
	Past         []Past  `json:"past,omitempty"`
}

// Past is a tenth of the many deliveries, with all that they cause: events are
// appended, indexed, delivered and received, and compactions of that are done. Some
// of the processor time is that of the receiver.
type Past struct {
	Done int     `json:"done"`
	Rate float64 `json:"per_second"`
	CPU  float64 `json:"cpu_us"` // for each
	// Heap is the live heap at the end, Peak the most of the process that was
	// resident.
	Heap float64 `json:"heap_mib"`
	Peak float64 `json:"peak_resident_mib"`
}

// Callbacks measures deliveries to webhook endpoints.
func Callbacks(ctx context.Context, o Options) (rep Report, err error) {
	o = o.withDefaults()
	dir, remove, err := tempDir(o)
	if err != nil {
		return rep, err
	}
	defer remove()
	b, err := openCallbacksRig(ctx, filepath.Join(dir, "ours"), o)
	if err != nil {
		return rep, fmt.Errorf("measure callbacks: %w", err)
	}
	defer func() { err = joinClose(err, b.close) }()
	var cases []Case
	for _, measure := range []func(context.Context, Options) (Case, error){b.oneEndpoint, b.afterMany, b.hanging} {
		c, err := measure(ctx, o)
		if err != nil {
			return rep, fmt.Errorf("measure callbacks: %w", err)
		}
		cases = append(cases, c)
	}
	compared := fmt.Sprintf(callbacksCompared, callbackWidth, o.Deliveries, callbackWidth, o.Deliveries, o.Past, o.Endpoints, o.Rate)
	rep = report("callbacks", "deliveries/s", compared, o.Rounds, cases)
	d := b.found
	d.Sent, d.Lost, d.Again = b.sent, b.lost, b.receiver.again()+b.again
	rep.Deliveries = &d
	return rep, nil
}

// residentNow is the resident set in MiB, without what is free.
func residentNow() float64 {
	debug.FreeOSMemory()
	return rounded(float64(resident("VmRSS:")) / (1 << 20))
}

// heap is the live heap in MiB. What pools hold goes with the second collection.
func heap() float64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return rounded(float64(m.HeapAlloc) / (1 << 20))
}

// deliverAll delivers the stored events to a new endpoint.
func (b *callbacksRig) deliverAll(ctx context.Context, o Options) (sample, error) {
	start := time.Now()
	target, done := b.receiver.target(o.Deliveries)
	e, err := b.endpoint(ctx, b.receiver.url(), func(e *endpoints.Endpoint) { e.Mode, e.Concurrency = endpoints.Full, callbackWidth })
	if err != nil {
		return sample{}, err
	}
	if err := wait(ctx, done); err != nil {
		return sample{}, fmt.Errorf("%d of %d events came: %w", target.count(), o.Deliveries, err)
	}
	for { // until the last outcome is on disk
		p, err := b.view.Progress(ctx, e.App, e.ID)
		if err != nil {
			return sample{}, err
		}
		if p.Done >= uint64(o.Deliveries) {
			break
		}
		if err := pauseFor(ctx, time.Millisecond); err != nil {
			return sample{}, err
		}
	}
	elapsed := time.Since(start)
	b.sent += o.Deliveries
	b.lost += o.Deliveries - target.count()
	return sample{count: o.Deliveries, elapsed: elapsed}, b.endpoints.Delete(ctx, e.App, e.ID)
}

// oneEndpoint compares deliveries to one fast endpoint with a bare loop.
func (b *callbacksRig) oneEndpoint(ctx context.Context, o Options) (Case, error) {
	ours := &side{name: "ours", round: func(ctx context.Context) (sample, error) { return b.deliverAll(ctx, o) }}
	raw := &side{name: "raw", round: func(ctx context.Context) (sample, error) { return b.bareLoop(ctx, o.Deliveries) }}
	if err := warmUp(ctx, o, ours, raw); err != nil {
		return Case{}, err
	}
	if err := alternate(ctx, o, 1, ours, raw); err != nil {
		return Case{}, err
	}
	c := compare(fmt.Sprintf("one endpoint, %d events", o.Deliveries), "deliveries/s", ours, raw)
	c.Paired = paired(ours, raw)
	return c, nil
}

// hanging measures the latency of endpoints beside others that hang.
func (b *callbacksRig) hanging(ctx context.Context, o Options) (Case, error) {
	var list []endpoints.Endpoint
	good := b.receiver.url()
	for i := range o.Endpoints {
		conversation := fmt.Sprintf("group-%05d", i)
		e, err := b.endpoint(ctx, good, func(e *endpoints.Endpoint) {
			e.Conversations = []string{conversation}
			e.After = b.last
			e.App = b.apps[i%len(b.apps)].ID
		})
		if err != nil {
			return Case{}, err
		}
		list = append(list, e)
	}
	// Once unmeasured: connections are made.
	if _, err := b.openLoop(ctx, o, list, nil); err != nil {
		return Case{}, err
	}
	without, err := b.openLoop(ctx, o, list, nil)
	if err != nil {
		return Case{}, err
	}
	hangs := make(map[int]bool)
	for i := 0; i < len(list); i += hangingShare {
		hangs[i] = true
		e, err := b.endpoints.Change(ctx, list[i].App, list[i].ID, func(e *endpoints.Endpoint) error {
			e.URL = b.hang.URL
			return nil
		})
		if err != nil {
			return Case{}, err
		}
		list[i] = e
	}
	// The change is noticed before anything is sent.
	if err := pauseFor(ctx, time.Second); err != nil {
		return Case{}, err
	}
	with, err := b.openLoop(ctx, o, list, hangs)
	if err != nil {
		return Case{}, err
	}
	slices.Sort(without)
	slices.Sort(with)
	bare, ours := &side{latencies: without}, &side{latencies: with}
	c := Case{
		Name: fmt.Sprintf("%d endpoints, %d hang, %d events/s", len(list), len(hangs), o.Rate), Unit: "1/s of the p99",
		Ours: rounded(1000 / ours.quantile(0.99)), Raw: rounded(1000 / bare.quantile(0.99)),
		P50: ours.quantile(0.5), P99: ours.quantile(0.99), RawP50: bare.quantile(0.5), RawP99: bare.quantile(0.99),
	}
	c.Ratio = ratio(c.Ours, c.Raw)
	return c, nil
}

// openLoop appends events when they are due, whatever becomes of those before,
// and returns how long each took to its endpoint; those of the endpoints that
// hang are left out.
func (b *callbacksRig) openLoop(ctx context.Context, o Options, list []endpoints.Endpoint, hangs map[int]bool) ([]time.Duration, error) {
	base, err := template(o.Size)
	if err != nil {
		return nil, err
	}
	n := int(o.Duration.Seconds() * float64(o.Rate) * openLoopRounds)
	expected := 0
	for i := range n {
		if !hangs[i%len(list)] {
			expected++
		}
	}
	target, done := b.receiver.target(expected)
	var work sync.WaitGroup
	var mu sync.Mutex
	var failed error
	appended := make(map[string]time.Time, n)
	begin := time.Now()
	for i := range n {
		due := begin.Add(time.Duration(float64(i) / float64(o.Rate) * float64(time.Second)))
		if err := pauseFor(ctx, time.Until(due)); err != nil {
			return nil, err
		}
		work.Go(func() {
			at := i % len(list)
			e := base
			e.ID = eventID(b.serial(), i)
			e.Sender, e.Conversation = b.users.at(i), list[at].Conversations[0]
			started := time.Now()
			results, err := b.journal.Append(ctx, list[at].App, e)
			if err == nil {
				err = results[0].Err
			}
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed = err
				return
			}
			if !hangs[at] {
				id, err := b.messageID(ctx, &list[at], results[0].Position)
				if err != nil {
					failed = err
				}
				appended[id] = started
			}
		})
	}
	work.Wait()
	if failed != nil {
		return nil, failed
	}
	err = wait(ctx, done)
	b.sent += expected
	b.lost += expected - target.count()
	if err != nil {
		return nil, fmt.Errorf("%d of %d events came: %w", target.count(), expected, err)
	}
	latencies := make([]time.Duration, 0, n)
	for id, at := range b.receiver.arrivals(target) {
		if started, ok := appended[id]; ok {
			latencies = append(latencies, at.Sub(started))
		}
	}
	return latencies, nil
}

// openLoopRounds is how many times the duration of a round an open loop lasts.
const openLoopRounds = 5

// messageID is what the engine gives an event.
func (b *callbacksRig) messageID(ctx context.Context, e *endpoints.Endpoint, position journal.Position) (string, error) {
	input := binary.BigEndian.AppendUint64(bytes.Clone(e.ID[:]), uint64(position))
	mac, err := b.journal.MAC(ctx, e.App, "webhook-id", input)
	return fmt.Sprintf("msg_%x", mac[:16]), err
}
