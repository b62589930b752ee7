package history

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/cofferdb/coffer/journal"
)

// filled returns a view of n events of 1 KiB of one app, in conversations of
// the given size that take turns, as different senders write them.
func filled(b *testing.B, n, conversation int) (*View, *maker) {
	b.Helper()
	v, m := newView(b, newStore(b)), newMaker(b)
	data := make([]byte, 1024)
	conversations := max(n/conversation, 1)
	batch := make([]journal.Sealed, 0, 512)
	var spent time.Duration
	for i := range n {
		r := rand.NewChaCha8([32]byte{byte(i), byte(i >> 8), byte(i >> 16)})
		r.Read(data)
		batch = append(batch, m.seal(spec{
			app: appN(1), position: uint64(i + 1), id: fmt.Sprint("m", i), sender: fmt.Sprint("u", i%8),
			conversation: fmt.Sprint("c", i%conversations), data: data,
		}))
		if len(batch) == cap(batch) || i == n-1 {
			began := time.Now()
			apply(b, v, batch...)
			spent += time.Since(began)
			batch = batch[:0]
		}
	}
	fmt.Printf("applied %d events at %.0f a second\n", n, float64(n)/spent.Seconds())
	settle()
	return v, m
}

// settle waits until the store's compactions have ended, as far as the
// process's use of the processor tells.
func settle() {
	used := func() time.Duration {
		var u syscall.Rusage
		_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	for range 100 {
		before := used()
		time.Sleep(200 * time.Millisecond)
		if used()-before < 10*time.Millisecond {
			return
		}
	}
}

func BenchmarkReplay(b *testing.B) {
	const n = 300_000
	v, m := filled(b, n, 1000)
	for i := range 8 {
		m.key(appN(1), fmt.Sprint("u", i))
	}
	keys := make(map[[16]byte]string)
	for i := range 8 {
		keys[tagOf("subject", fmt.Sprint("u", i))] = fmt.Sprint("u", i)
	}
	open := func(dst []byte, i Item) ([]byte, error) {
		return m.open(dst, appN(1), keys[[16]byte(i.Record[84:100])], i.Record)
	}
	rate := func(b *testing.B) {
		b.ReportMetric(float64(n)*float64(b.N)/b.Elapsed().Seconds(), "events/s")
	}
	conv, user := tagOf("conversation", "c7"), tagOf("subject", "u3")
	for _, test := range []struct {
		name string
		q    Query
	}{{"forward", Query{}}, {"reverse", Query{Reverse: true}}} {
		b.Run("sealed/"+test.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				count := 0
				if _, err := v.Replay(b.Context(), appN(1), test.q, func(Item) error { count++; return nil }); err != nil || count != n {
					b.Fatal(count, err)
				}
			}
			rate(b)
		})
	}
	b.Run("opened/one core", func(b *testing.B) {
		b.ReportAllocs()
		buf := make([]byte, 0, 2048)
		for b.Loop() {
			if _, err := v.Replay(b.Context(), appN(1), Query{}, func(i Item) error {
				_, err := open(buf, i)
				return err
			}); err != nil {
				b.Fatal(err)
			}
		}
		rate(b)
	})
	b.Run("opened/all cores", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			count := 0
			if _, err := v.ReplayOpened(b.Context(), appN(1), Query{}, open, func(Item, []byte) error { count++; return nil }); err != nil || count != n {
				b.Fatal(count, err)
			}
		}
		rate(b)
	})
	for _, test := range []struct {
		name string
		q    Query
	}{{"conversation", Query{Conversation: &conv}}, {"user", Query{User: &user}}} {
		b.Run("filtered/"+test.name, func(b *testing.B) {
			total := 0
			for b.Loop() {
				if _, err := v.Replay(b.Context(), appN(1), test.q, func(Item) error { total++; return nil }); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(total)/b.Elapsed().Seconds(), "events/s")
		})
	}
}

func BenchmarkPage(b *testing.B) {
	for _, size := range []int{1_000, 100_000} {
		b.Run(fmt.Sprint("conversation of ", size), func(b *testing.B) {
			const n = 200_000
			v, m := filled(b, n, size)
			conversations := n / size
			sender := make(map[[16]byte]string)
			for i := range 8 {
				sender[tagOf("subject", fmt.Sprint("u", i))] = fmt.Sprint("u", i)
			}
			rng := rand.New(rand.NewPCG(1, 2))
			buf := make([]byte, 0, 2048)
			var times []time.Duration
			b.ReportAllocs()
			for b.Loop() {
				q := PageQuery{Before: journal.Position(rng.IntN(n-60*conversations) + 60*conversations)}
				c := tagOf("conversation", fmt.Sprint("c", rng.IntN(conversations)))
				began := time.Now()
				p, err := v.Messages(b.Context(), appN(1), c, q)
				if err != nil || len(p.Messages) != 50 {
					b.Fatal(len(p.Messages), err)
				}
				for i := range p.Messages {
					r := p.Messages[i].Record
					if _, err := m.open(buf, appN(1), sender[[16]byte(r[84:100])], r); err != nil {
						b.Fatal(err)
					}
				}
				times = append(times, time.Since(began))
			}
			slices.Sort(times)
			b.ReportMetric(float64(times[len(times)/2].Nanoseconds())/1000, "p50-µs")
			b.ReportMetric(float64(times[len(times)*99/100].Nanoseconds())/1000, "p99-µs")
		})
	}
}

func BenchmarkLookup(b *testing.B) {
	const n = 200_000
	v, _ := filled(b, n, 1000)
	for _, test := range []struct {
		name, id string
		there    bool
	}{{"absent", "x", false}, {"present", "m", true}} {
		b.Run(test.name, func(b *testing.B) {
			tags := make([][16]byte, 4096)
			for i := range tags {
				tags[i] = tagOf("event", fmt.Sprint(test.id, (i*7919)%n))
			}
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				_, _, ok, err := v.Lookup(b.Context(), appN(1), tags[i%len(tags)])
				if err != nil || ok != test.there {
					b.Fatal(ok, err)
				}
				i++
			}
		})
	}
}
