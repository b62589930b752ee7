package journal_test

import (
	"context"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/journal/journaltest"
)

// rawCommitter is the comparator of the append benchmarks: what somebody would
// write over nats.go who wants the same durability and nothing else. Whatever
// arrived while the last commit was under way is published asynchronously, all
// acknowledgements are awaited, the stream is synced, everybody is told.
type rawCommitter struct {
	js     jetstream.JetStream
	syncer *embedded.Syncer
	in     chan rawEvent
}

type rawEvent struct {
	data []byte
	done chan error
}

func (c *rawCommitter) run() {
	var batch []rawEvent
	for first := range c.in {
		batch = append(batch[:0], first)
	gather:
		for len(batch) < 4096 {
			select {
			case e, ok := <-c.in:
				if !ok {
					break gather
				}
				batch = append(batch, e)
			default:
				break gather
			}
		}
		acks := make([]jetstream.PubAckFuture, len(batch))
		var err error
		for i, e := range batch {
			if acks[i], err = c.js.PublishAsync("raw.a", e.data); err != nil {
				break
			}
		}
		if err == nil {
			for _, a := range acks {
				select {
				case <-a.Ok():
				case err = <-a.Err():
				}
			}
		}
		if err == nil {
			err = c.syncer.Sync("RAW")
		}
		for _, e := range batch {
			e.done <- err
		}
	}
}

// cpu returns the processor time of the process: on a machine that others use,
// it says more than the clock.
func cpu() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u) // cannot fail for oneself
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// slice is what one side did in one slice of time.
type slice struct {
	rate float64 // events/s
	cpu  float64 // µs of processor time for an event
}

// writeFor runs f from n goroutines for about d.
func writeFor(b *testing.B, n int, d time.Duration, f func(worker int) error) slice {
	var count atomic.Int64
	var stop atomic.Bool
	var wg sync.WaitGroup
	start, used := time.Now(), cpu()
	for worker := range n {
		wg.Go(func() {
			for !stop.Load() {
				if err := f(worker); err != nil {
					b.Error(err)
					return
				}
				count.Add(1)
			}
		})
	}
	time.Sleep(d)
	stop.Store(true)
	wg.Wait()
	took, events := time.Since(start), float64(count.Load())
	return slice{events / took.Seconds(), float64((cpu() - used).Microseconds()) / events}
}

func rawWriter(b *testing.B, n int) func(worker int) error {
	srv, nc := journaltest.Start(b, embedded.Options{})
	js, err := jetstream.New(nc, jetstream.WithPublishAsyncMaxPending(8192))
	if err != nil {
		b.Fatal(err)
	}
	_, err = js.CreateStream(b.Context(), jetstream.StreamConfig{Name: "RAW", Subjects: []string{"raw.>"}, Storage: jetstream.FileStorage})
	if err != nil {
		b.Fatal(err)
	}
	c := &rawCommitter{js: js, syncer: srv.Syncer(), in: make(chan rawEvent, 4096)}
	go c.run()
	b.Cleanup(func() { close(c.in) })
	data := make([]byte, 1024)
	done := make([]chan error, n)
	for i := range done {
		done[i] = make(chan error, 1)
	}
	return func(worker int) error {
		c.in <- rawEvent{data, done[worker]}
		return <-done[worker]
	}
}

// BenchmarkAppend compares appends of 1 KiB events with the raw comparator, by
// turns in slices, and reports medians. b.N is the number of slices of each:
// -benchtime 11x.
func BenchmarkAppend(b *testing.B) {
	for _, n := range []int{1, 64, 1024} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			raw := rawWriter(b, n)
			w := begin(b, b.TempDir(), false, nil)
			app := newApp(b, w.Journal)
			event := parsedMessage(b, app, 1024)
			// Each writer has a context of its own, as a request has.
			contexts := make([]context.Context, n)
			for i := range contexts {
				var cancel context.CancelFunc
				contexts[i], cancel = context.WithCancel(b.Context())
				defer cancel()
			}
			ours := func(worker int) error {
				_, err := appendOne(contexts[worker], w.Journal, app, event)
				return err
			}
			var rawSlices, ourSlices []slice
			for b.Loop() {
				rawSlices = append(rawSlices, writeFor(b, n, 500*time.Millisecond, raw))
				ourSlices = append(ourSlices, writeFor(b, n, 500*time.Millisecond, ours))
			}
			var ratios []float64
			for i := range rawSlices {
				ratios = append(ratios, ourSlices[i].rate/rawSlices[i].rate)
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(median(rawSlices, func(s slice) float64 { return s.rate }), "raw/s")
			b.ReportMetric(median(ourSlices, func(s slice) float64 { return s.rate }), "ours/s")
			b.ReportMetric(median(ratios, func(r float64) float64 { return r }), "ratio")
			b.ReportMetric(median(rawSlices, func(s slice) float64 { return s.cpu }), "raw-cpu-µs")
			b.ReportMetric(median(ourSlices, func(s slice) float64 { return s.cpu }), "ours-cpu-µs")
		})
	}
}

// BenchmarkWays compares the ways of the decision record, at 64 writers: one
// publish for each event with sync always, the journal's atomic batches with
// sync always, and the journal with syncs of its own. By turns, medians.
func BenchmarkWays(b *testing.B) {
	const n = 64
	_, nc := journaltest.Start(b, embedded.Options{SyncAlways: true})
	js, err := jetstream.New(nc)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := js.CreateStream(b.Context(), jetstream.StreamConfig{Name: "RAW", Subjects: []string{"raw.>"}, Storage: jetstream.FileStorage}); err != nil {
		b.Fatal(err)
	}
	data := make([]byte, 1024)
	ways := map[string]func(int) error{"single": func(int) error {
		_, err := js.Publish(b.Context(), "raw.a", data)
		return err
	}}
	for name, always := range map[string]bool{"batches": true, "own": false} {
		w := begin(b, b.TempDir(), always, nil)
		app := newApp(b, w.Journal)
		event := parsedMessage(b, app, 1024)
		ways[name] = func(int) error {
			_, err := appendOne(b.Context(), w.Journal, app, event)
			return err
		}
	}
	done := map[string][]slice{}
	for b.Loop() {
		for name, way := range ways {
			done[name] = append(done[name], writeFor(b, n, 500*time.Millisecond, way))
		}
	}
	b.ReportMetric(0, "ns/op")
	for name, slices := range done {
		b.ReportMetric(median(slices, func(s slice) float64 { return s.rate }), name+"/s")
	}
}

// parsedMessage returns an event of size bytes of JSON as a request would bring
// it: parsed, and so checked.
func parsedMessage(b *testing.B, app journal.AppID, size int) journal.Event {
	e := message("", "alice", 0)
	e.Data = message("", "alice", size-len(e.AppendJSON(nil, app))-len(journal.NewEventID(time.Now()))).Data
	wire := `{"type":"message.sent","conversation":"room-alice","conversationtype":"group","sender":"alice","data":` + string(e.Data) + `}`
	parsed, err := journal.ParseEvent([]byte(wire), app, journal.Limits{})
	if err != nil {
		b.Fatal(err)
	}
	return parsed
}

func median[T any](all []T, of func(T) float64) float64 {
	var values []float64
	for _, v := range all {
		values = append(values, of(v))
	}
	slices.Sort(values)
	return values[len(values)/2]
}
