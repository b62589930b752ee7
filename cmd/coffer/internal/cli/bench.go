package cli

import (
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/bench"
)

type benchCmd struct {
	Name       string        `arg:"" enum:"append,replay,history,tail,keys,callbacks" help:"append, replay, history, tail, keys or callbacks."`
	JSON       bool          `name:"json" help:"Print the report as one JSON object."`
	Dir        string        `placeholder:"DIR" help:"Where the data is put for the time being; the result depends on its disk."`
	Rounds     int           `placeholder:"N" help:"How often each side is measured (5)."`
	Size       int           `placeholder:"BYTES" help:"Size of a record (1024)."`
	Duration   time.Duration `placeholder:"TIME" help:"append, tail: length of a round (2s)."`
	Writers    []int         `placeholder:"N" help:"append: numbers of concurrent writers (1,64,1024)."`
	Events     int           `placeholder:"N" help:"replay: events (300000)."`
	Memory     []int         `placeholder:"N" help:"replay: also measure the memory of replays of so many events."`
	Short      int           `placeholder:"N" help:"history: messages of the short conversation (1000)."`
	Long       int           `placeholder:"N" help:"history: messages of the long conversation (100000)."`
	Pages      int           `placeholder:"N" help:"history: pages of a round (2000)."`
	Tails      int           `placeholder:"N" help:"tail: live tails (1000)."`
	Reader     bool          `hidden:"" help:"tail: be the process that has the tails."`
	Rate       int           `placeholder:"N" help:"tail, callbacks: events that are appended a second (20; callbacks: 200)."`
	KMS        string        `name:"kms" env:"COFFER_BENCH_KMS" placeholder:"SETTING" help:"keys: the key provider, vault+https://… or awskms:///… (a local file)."`
	Rows       int           `placeholder:"N" help:"keys: app keys to rewrap (100000)."`
	Messages   int           `placeholder:"N" help:"keys: messages of the simulated day (1000000)."`
	Day        time.Duration `placeholder:"TIME" help:"keys: how long the simulated day takes (9.6s)."`
	Deliveries int           `placeholder:"N" help:"callbacks: events of a round (5000)."`
	Past       int           `placeholder:"N" help:"callbacks: deliveries before the throughput is measured again (1000000)."`
	Endpoints  int           `placeholder:"N" help:"callbacks: endpoints, of which one in a hundred hangs (1000)."`
	NoPostgres bool          `help:"Leave Postgres out."`
}

func (*benchCmd) Help() string {
	return `Measures what Coffer does beside the same done by bare means, in the same run and on the same disk, and beside
Postgres where it is installed. ratio is ours over bare, the lowest of the cases.

    coffer bench append --json
    coffer bench replay --events 20000 --rounds 1`
}

func (c *benchCmd) Run(r *runner) error {
	if c.Reader {
		return bench.ReadTails(r.interrupt, r.Stdin, r.Stdout)
	}
	rep, err := bench.Run(r.interrupt, bench.Options{
		Name: c.Name, Dir: c.Dir, Rounds: c.Rounds, Size: c.Size, Duration: c.Duration, Writers: c.Writers, Events: c.Events,
		Memory: c.Memory, Short: c.Short, Long: c.Long, Pages: c.Pages, Tails: c.Tails, Rate: c.Rate, NoPostgres: c.NoPostgres,
		KMS: c.KMS, Rows: c.Rows, Messages: c.Messages, Day: c.Day, Log: r.log, Deliveries: c.Deliveries, Past: c.Past, Endpoints: c.Endpoints,
	})
	if err != nil {
		return err
	}
	if c.JSON {
		return printJSON(r, rep)
	}
	r.say("%s", rep.Compared)
	w := tabwriter.NewWriter(r.Stdout, 0, 8, 2, ' ', 0)
	_, _ = fmt.Fprintf(w, "CASE\tOURS\tBARE\tRATIO\t(%s)\n", rep.Unit)
	for _, k := range rep.Cases {
		_, _ = fmt.Fprintf(w, "%s\t%.*f\t%.*f\t%.2f\n", k.Name, digits(k.Ours), k.Ours, digits(k.Raw), k.Raw, k.Ratio)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if d := rep.Deliveries; d != nil {
		r.say("%d deliveries, %d lost, %d again; heap %.1f MiB before, %.1f MiB after", d.Sent, d.Lost, d.Again, d.HeapBefore, d.HeapAfter)
		for _, p := range d.Past {
			r.say("after %d: %.0f deliveries/s with their appends, %.0f µs of processor time each, heap %.1f MiB", p.Done, p.Rate, p.CPU, p.Heap)
		}
	}
	for _, i := range rep.Idle {
		r.say("an idle tail, %s: %.1f KiB, %.1f goroutines", i.Form, i.Bytes/1024, i.Goroutines)
	}
	return nil
}

// digits keeps what is below a thousand readable.
func digits(v float64) int {
	if v < 1000 {
		return 2
	}
	return 0
}
