package journal_test

import (
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

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

// writers runs f from n goroutines for d, and returns how often it returned.
func writers(b *testing.B, n int, f func(worker, i int) error) {
	var count atomic.Int64
	var wg sync.WaitGroup
	b.ResetTimer()
	start := time.Now()
	for worker := range n {
		wg.Go(func() {
			for i := 0; count.Add(1) <= int64(b.N); i++ {
				if err := f(worker, i); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), "events/s")
}

func BenchmarkAppendRaw(b *testing.B) {
	for _, n := range []int{1, 64, 1024} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
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
			defer close(c.in)
			data := make([]byte, 1024)
			done := make([]chan error, n)
			for i := range done {
				done[i] = make(chan error, 1)
			}
			writers(b, n, func(worker, _ int) error {
				c.in <- rawEvent{data, done[worker]}
				return <-done[worker]
			})
		})
	}
}

func BenchmarkAppend(b *testing.B) {
	for _, n := range []int{1, 64, 1024} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			w := begin(b, b.TempDir(), false, nil)
			app := newApp(b, w.Journal)
			// 1 KiB as JSON.
			event := message("", "alice", 1024-317)
			writers(b, n, func(worker, _ int) error {
				_, err := appendOne(b.Context(), w.Journal, app, event)
				return err
			})
		})
	}
}
