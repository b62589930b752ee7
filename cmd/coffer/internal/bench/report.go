package bench

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"runtime"
	"slices"
	"time"
)

// Options of a benchmark. The zero value of each field is its default.
type Options struct {
	// Name chooses the benchmark for [Run]: append, replay, history, tail, keys or
	// callbacks.
	Name string
	// Dir is where folders for the data are made, and removed at the end; the
	// system's folder for temporary files. The result depends on its disk. The
	// Postgres cluster is made in the system's folder where the user that it
	// runs as cannot reach this one.
	Dir string
	// Rounds is how often each side is measured; 5.
	Rounds int
	// Size is the size of a stored record in bytes; 1024.
	Size int
	// Duration is the length of a round of one side, for append and tail; 2 s.
	Duration time.Duration
	// Writers are the numbers of concurrent writers, for append; 1, 64, 1024.
	Writers []int
	// Events is how many events are replayed; 300,000.
	Events int
	// Memory lists numbers of events whose replays' memory is measured, for
	// replay; none.
	Memory []int
	// Short and Long are the numbers of messages in the two conversations, for
	// history; 1,000 and 100,000.
	Short, Long int
	// Pages is how many pages are read in a round, for history; 2,000.
	Pages int
	// Tails is how many tails there are, for tail, and Rate how many events the
	// writer appends a second; 1,000 and 20.
	Tails, Rate int
	// Reader is the command that calls [ReadTails], for tail; this program.
	Reader []string
	// KMS is the setting of the key provider, for keys, as a region's
	// configuration has it: vault+https://… or awskms:///…; a local file.
	KMS string
	// Rows is how many app keys are rewrapped, for keys; 100,000.
	Rows int
	// Messages and Day are what is sealed in a day and how long that takes here,
	// for keys; 1,000,000 and 9.6 s.
	Messages int
	Day      time.Duration
	// Deliveries is how many events a round delivers, Past how many deliveries
	// are made before the throughput is measured again, and Endpoints how many
	// there are, of which one in a hundred hangs, for callbacks; 5,000,
	// 1,000,000 and 1,000. Rate is then 200.
	Deliveries, Past, Endpoints int
	// NoPostgres leaves Postgres out.
	NoPostgres bool
	// Log receives what is being done; nil discards it.
	Log *slog.Logger
}

func (o Options) withDefaults() Options {
	def := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&o.Rounds, 5)
	def(&o.Size, 1024)
	def(&o.Events, 300_000)
	def(&o.Short, 1000)
	def(&o.Long, 100_000)
	def(&o.Pages, 2000)
	def(&o.Tails, 1000)
	if o.Name == "callbacks" {
		def(&o.Rate, 200)
	}
	def(&o.Rate, 20)
	def(&o.Deliveries, 5000)
	def(&o.Past, 1_000_000)
	def(&o.Endpoints, 1000)
	def(&o.Rows, 100_000)
	def(&o.Messages, 1_000_000)
	if o.Day <= 0 {
		o.Day = 9600 * time.Millisecond
	}
	if o.Duration <= 0 {
		o.Duration = 2 * time.Second
	}
	if len(o.Writers) == 0 {
		o.Writers = []int{1, 64, 1024}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}

// ErrUnknown means that there is no benchmark of this name: use append, replay,
// history, tail, keys or callbacks.
var ErrUnknown = errors.New("no such benchmark")

// Run runs the benchmark that the options name.
func Run(ctx context.Context, o Options) (Report, error) {
	switch o.Name {
	case "append":
		return Append(ctx, o)
	case "replay":
		return Replay(ctx, o)
	case "history":
		return History(ctx, o)
	case "tail":
		return Tail(ctx, o)
	case "keys":
		return Keys(ctx, o)
	case "callbacks":
		return Callbacks(ctx, o)
	}
	return Report{}, fmt.Errorf("benchmark %q: %w", o.Name, ErrUnknown)
}

// A Report is the result of a benchmark. Ours, Raw and Ratio are those of the
// case with the lowest ratio.
type Report struct {
	Name     string  `json:"name"`
	Unit     string  `json:"unit"`
	Ours     float64 `json:"ours"`
	Raw      float64 `json:"raw"`
	Ratio    float64 `json:"ratio"`
	Rounds   int     `json:"rounds"`
	Compared string  `json:"compared"`
	Machine  Machine `json:"machine"`
	Cases    []Case  `json:"cases"`
	// Memory is there when it was asked for.
	Memory *Memory `json:"memory,omitzero"`
	// Deliveries is what became of all events, for callbacks.
	Deliveries *Deliveries `json:"deliveries,omitzero"`
	// Idle is what tails that wait take of the server, for tail.
	Idle []IdleTail `json:"idle,omitzero"`
}

// Machine says where the figures come from.
type Machine struct {
	CPUs int    `json:"cpus"`
	OS   string `json:"os"`
	Arch string `json:"arch"`
	Go   string `json:"go"`
	// Load is how many threads ran or waited to, on average over the last
	// minute, when the report was made. The benchmark itself is a few of them.
	Load float64 `json:"load,omitzero"`
}

// A Case is one comparison. The latencies are in milliseconds.
type Case struct {
	Name       string    `json:"name"`
	Unit       string    `json:"unit"`
	Ours       float64   `json:"ours"`
	Raw        float64   `json:"raw"`
	Ratio      float64   `json:"ratio"`
	OursRounds []float64 `json:"ours_rounds"`
	RawRounds  []float64 `json:"raw_rounds"`
	P50        float64   `json:"p50_ms,omitzero"`
	P99        float64   `json:"p99_ms,omitzero"`
	RawP50     float64   `json:"raw_p50_ms,omitzero"`
	RawP99     float64   `json:"raw_p99_ms,omitzero"`
	// Paired is the median of the rounds' ratios: it says more than Ratio where
	// a neighbour's load comes and goes.
	Paired float64 `json:"paired_ratio,omitzero"`
	// CPU and RawCPU are the processor time for an event in microseconds, user
	// and system, on all processors together, where all the work is done in
	// this process and nothing else is.
	CPU    float64 `json:"cpu_us,omitzero"`
	RawCPU float64 `json:"raw_cpu_us,omitzero"`
	// Allocations are heap objects for each event of ours, where they are counted.
	Allocations float64 `json:"allocations_per_event,omitzero"`
	// Beside are figures of other things in the same rounds, which do not count
	// for the ratio.
	Beside []Beside `json:"beside,omitzero"`
}

// Beside is a figure for orientation. Ratio is ours divided by it.
type Beside struct {
	Name   string    `json:"name"`
	Unit   string    `json:"unit"`
	Value  float64   `json:"value"`
	Ratio  float64   `json:"ratio"`
	Rounds []float64 `json:"rounds,omitzero"`
	P50    float64   `json:"p50_ms,omitzero"`
	P99    float64   `json:"p99_ms,omitzero"`
	// CPU is the processor time as in [Case].
	CPU float64 `json:"cpu_us,omitzero"`
	// Skipped says why there is no figure.
	Skipped string `json:"skipped,omitzero"`
}

// side is what is measured round by round: ours, raw, or something beside.
type side struct {
	name  string
	round func(ctx context.Context) (sample, error)

	rates     []float64
	cpus      []float64 // microseconds for each of what is counted
	latencies []time.Duration
}

// sample is the result of one round, or of a bit of it.
type sample struct {
	count     int
	elapsed   time.Duration
	cpu       time.Duration   // of this process; of the whole round where that does not say it
	latencies []time.Duration // may be empty
}

// alternate measures the sides in turn, and in each round several times a bit of
// each: a neighbour's load that comes and goes within a round then falls on all.
// Every other time it goes through them in the opposite order, so that none
// always follows the same one.
func alternate(ctx context.Context, o Options, bits int, sides ...*side) error {
	order := slices.Clone(sides)
	for round := range o.Rounds {
		sums := make(map[*side]sample, len(sides))
		for range bits {
			for _, s := range order {
				runtime.GC()
				before := processTime()
				got, err := s.round(ctx)
				if err != nil {
					return fmt.Errorf("%s, round %d: %w", s.name, round+1, err)
				}
				sum := sums[s]
				sum.count += got.count
				sum.elapsed += got.elapsed
				if got.cpu == 0 {
					got.cpu = processTime() - before
				}
				sum.cpu += got.cpu
				sums[s] = sum
				s.latencies = append(s.latencies, got.latencies...)
			}
			slices.Reverse(order)
		}
		for _, s := range sides {
			rate := float64(sums[s].count) / sums[s].elapsed.Seconds()
			s.rates = append(s.rates, rate)
			s.cpus = append(s.cpus, float64(sums[s].cpu.Nanoseconds())/1000/float64(sums[s].count))
			o.Log.InfoContext(ctx, "measured", "side", s.name, "round", round+1, "rate", math.Round(rate))
		}
	}
	for _, s := range sides {
		slices.Sort(s.latencies)
	}
	return nil
}

// warmUp goes through the sides once: what is only slow the first time is not
// measured.
func warmUp(ctx context.Context, o Options, sides ...*side) error {
	o.Rounds = 1
	if err := alternate(ctx, o, 1, sides...); err != nil {
		return err
	}
	for _, s := range sides {
		s.rates, s.cpus, s.latencies = nil, nil, nil
	}
	return nil
}

func (s *side) median() float64 { return median(s.rates) }

// quantile returns a latency in milliseconds.
func (s *side) quantile(q float64) float64 {
	if len(s.latencies) == 0 {
		return 0
	}
	i := min(int(q*float64(len(s.latencies))), len(s.latencies)-1)
	return rounded(s.latencies[i].Seconds() * 1000)
}

func median(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// rounded keeps four digits: more would be noise.
func rounded(v float64) float64 {
	if v == 0 || math.IsNaN(v) || math.IsInf(v, 0) {
		return 0
	}
	scale := math.Pow(10, 3-math.Floor(math.Log10(math.Abs(v))))
	return math.Round(v*scale) / scale
}

func roundedAll(values []float64) []float64 {
	out := make([]float64, len(values))
	for i, v := range values {
		out[i] = rounded(v)
	}
	return out
}

func ratio(a, b float64) float64 {
	if b == 0 {
		return 0
	}
	return rounded(a / b)
}

// paired returns the median of the ratios of two sides' rounds.
func paired(ours, raw *side) float64 {
	ratios := make([]float64, len(ours.rates))
	for i := range ratios {
		ratios[i] = ratio(ours.rates[i], raw.rates[i])
	}
	return rounded(median(ratios))
}

func compare(name, unit string, ours, raw *side, beside ...*side) Case {
	c := Case{
		Name: name, Unit: unit, Ours: rounded(ours.median()), Raw: rounded(raw.median()), Ratio: ratio(ours.median(), raw.median()),
		OursRounds: roundedAll(ours.rates), RawRounds: roundedAll(raw.rates),
		P50: ours.quantile(0.5), P99: ours.quantile(0.99), RawP50: raw.quantile(0.5), RawP99: raw.quantile(0.99),
	}
	for _, b := range beside {
		if b != nil {
			c.Beside = append(c.Beside, Beside{
				Name: b.name, Unit: unit, Value: rounded(b.median()), Ratio: ratio(ours.median(), b.median()), Rounds: roundedAll(b.rates),
				P50: b.quantile(0.5), P99: b.quantile(0.99),
			})
		}
	}
	return c
}

func report(name, unit, compared string, rounds int, cases []Case) Report {
	r := Report{
		Name: name, Unit: unit, Rounds: rounds, Compared: compared, Cases: cases,
		Machine: Machine{CPUs: runtime.NumCPU(), OS: runtime.GOOS, Arch: runtime.GOARCH, Go: runtime.Version(), Load: loadAverage()},
	}
	for i, c := range cases {
		if i == 0 || c.Ratio < r.Ratio {
			r.Ours, r.Raw, r.Ratio = c.Ours, c.Raw, c.Ratio
		}
	}
	return r
}
