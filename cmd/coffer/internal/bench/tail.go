package bench

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"time"

	"github.com/go-json-experiment/json"
)

const tailCompared = "%d live tails, each with a TLS connection of its own, and one writer that appends %d events a second over HTTP, for %s a round; " +
	"tails and writer are in a process of their own beside the server's, on the same cores. " +
	"ours: the 99th percentile, in milliseconds, from the call of an append to the event's arrival at each of the tails; raw: that of the same appends, until they are acknowledged. " +
	"A lower ratio is better. Every tail must get every event once and in order. " +
	"idle: what the server's process has for a tail that waits, after a collection of garbage: heap, stacks and the runtime's own structures in use, and resident memory."

// tailForms are the forms in which events are tailed.
func tailForms() []string { return []string{"sse", formHTTP2, formSocket} }

const (
	formHTTP2  = "sse, http/2"
	formSocket = "websocket"
)

// IdleTail is what a tail that waits takes of the server, of which there were
// Tails.
type IdleTail struct {
	Form  string `json:"form"`
	Tails int    `json:"tails"`
	// Bytes are heap, stacks and structures of the runtime that are in use.
	Bytes float64 `json:"bytes"`
	Heap  float64 `json:"heap_bytes"`
	Stack float64 `json:"stack_bytes"`
	// Resident is the growth of the process's memory; 0 where the system does
	// not tell.
	Resident   float64 `json:"resident_bytes"`
	Goroutines float64 `json:"goroutines"`
}

// Tail measures live tails.
func Tail(ctx context.Context, o Options) (rep Report, err error) {
	o = o.withDefaults()
	dir, remove, err := tempDir(o)
	if err != nil {
		return rep, err
	}
	defer remove()
	s, err := serve(ctx, dir)
	if err != nil {
		return rep, err
	}
	var cases []Case
	var idle []IdleTail
	for n, form := range tailForms() {
		c, i, formErr := tailCase(ctx, o, readerSpec{caller: s.caller, Form: form, Tails: o.Tails, First: n * 100_000_000})
		if formErr != nil {
			return rep, joinClose(fmt.Errorf("measure tails: %s: %w", form, formErr), s.close)
		}
		cases, idle = append(cases, c), append(idle, i)
	}
	if err := s.close(); err != nil {
		return rep, err
	}
	rep = report("tail", "ms", fmt.Sprintf(tailCompared, o.Tails, o.Rate, o.Duration), o.Rounds, cases)
	for _, c := range cases { // the worst is the highest
		if c.Ratio > rep.Ratio {
			rep.Ours, rep.Raw, rep.Ratio = c.Ours, c.Raw, c.Ratio
		}
	}
	rep.Idle = idle
	return rep, nil
}

func tailCase(ctx context.Context, o Options, spec readerSpec) (c Case, idle IdleTail, err error) {
	before := takeUsage()
	r, err := startReader(ctx, o, spec)
	if err != nil {
		return c, idle, err
	}
	defer func() { err = joinClose(err, r.close) }()
	if _, err := r.answer(); err != nil {
		return c, idle, fmt.Errorf("open the tails: %w", err)
	}
	idle = takeUsage().since(before, spec.Form, o.Tails)
	o.Log.InfoContext(ctx, "measured idle tails", "form", spec.Form, "bytes", idle.Bytes, "goroutines", idle.Goroutines)

	arrivals, appends := &side{name: "ours"}, &side{name: "raw"}
	events := max(1, int(o.Duration.Seconds()*float64(o.Rate)))
	for round := range o.Rounds + 1 {
		runtime.GC()
		if err := r.order(readerOrder{Events: events, Rate: o.Rate}); err != nil {
			return c, idle, err
		}
		got, err := r.answer()
		if err != nil {
			return c, idle, err
		}
		if round == 0 {
			continue // warming up
		}
		for _, part := range []struct {
			side *side
			took []int64
		}{{arrivals, got.Arrivals}, {appends, got.Appends}} {
			one := side{}
			for _, ns := range part.took {
				one.latencies = append(one.latencies, time.Duration(ns))
			}
			slices.Sort(one.latencies)
			part.side.rates = append(part.side.rates, one.quantile(0.99))
			part.side.latencies = append(part.side.latencies, one.latencies...)
		}
		o.Log.InfoContext(ctx, "measured tails", "form", spec.Form, "round", round, "p99_ms", arrivals.rates[round-1], "append_p99_ms", appends.rates[round-1])
	}
	slices.Sort(arrivals.latencies)
	slices.Sort(appends.latencies)
	c = compare(fmt.Sprintf("%d tails, %s", o.Tails, spec.Form), "ms", arrivals, appends)
	// Of all rounds together: a round has few appends.
	c.Ours, c.Raw, c.Ratio = c.P99, c.RawP99, ratio(c.P99, c.RawP99)
	return c, idle, nil
}

// usage is what the process has.
type usage struct {
	heap, stack, other, resident uint64
	goroutines                   int
}

func takeUsage() usage {
	// Twice: what a pool holds goes with the second.
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return usage{
		heap: m.HeapInuse, stack: m.StackInuse, other: m.MSpanInuse + m.MCacheInuse + m.OtherSys, resident: resident("VmRSS:"),
		goroutines: runtime.NumGoroutine(),
	}
}

func (u usage) since(before usage, form string, tails int) IdleTail {
	each := func(now, then uint64) float64 { return rounded((float64(now) - float64(then)) / float64(tails)) }
	return IdleTail{
		Form: form, Tails: tails,
		Bytes: each(u.heap+u.stack+u.other, before.heap+before.stack+before.other),
		Heap:  each(u.heap, before.heap), Stack: each(u.stack, before.stack), Resident: each(u.resident, before.resident),
		Goroutines: rounded(float64(u.goroutines-before.goroutines) / float64(tails)),
	}
}

// reader is the process that has the tails and the writer. It is told what to do
// in lines of JSON, and answers each with one.
type reader struct {
	command *exec.Cmd
	in      io.WriteCloser
	out     *bufio.Reader
}

func startReader(ctx context.Context, o Options, spec readerSpec) (*reader, error) {
	argv := o.Reader
	if len(argv) == 0 {
		self, err := os.Executable()
		if err != nil {
			return nil, fmt.Errorf("find this program: %w", err)
		}
		argv = []string{self, "bench", "tail", "--reader"}
	}
	r := &reader{command: exec.CommandContext(ctx, argv[0], argv[1:]...)} //nolint:gosec // this program
	r.command.Stderr = os.Stderr
	var err error
	if r.in, err = r.command.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := r.command.StdoutPipe()
	if err != nil {
		return nil, err
	}
	r.out = bufio.NewReaderSize(out, 1<<20)
	if err := r.command.Start(); err != nil {
		return nil, fmt.Errorf("start the readers' process: %w", err)
	}
	return r, r.order(spec)
}

func (r *reader) order(v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = r.in.Write(append(text, '\n'))
	return err
}

func (r *reader) answer() (readerAnswer, error) {
	var a readerAnswer
	line, err := r.out.ReadBytes('\n')
	if err != nil {
		return a, fmt.Errorf("the readers' process has ended: %w", err)
	}
	if err := json.Unmarshal(line, &a); err != nil {
		return a, err
	}
	if a.Problem != "" {
		return a, errors.New(a.Problem)
	}
	return a, nil
}

// close ends the process: it ends with its input.
func (r *reader) close() error {
	_ = r.in.Close()
	if err := r.command.Wait(); err != nil {
		return fmt.Errorf("the readers' process: %w", err)
	}
	return nil
}
