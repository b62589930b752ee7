package bench

import (
	"cmp"
	"context"
	"errors"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"go.uber.org/goleak"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

// readerArgument makes this program the process that has the tails.
const readerArgument = "the-tails-of-a-benchmark"

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == readerArgument {
		if err := ReadTails(context.Background(), os.Stdin, os.Stdout); err != nil {
			panic(err)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

// small are sizes at which the figures mean nothing and every step is taken.
func small(t *testing.T, name string) Options {
	t.Helper()
	return Options{
		Name: name, Dir: t.TempDir(), Rounds: 2, Duration: 20 * time.Millisecond, Writers: []int{1, 64},
		Events: 2000, Memory: []int{500, 1000}, Short: 200, Long: 1000, Pages: 20,
		Tails: 30, Rate: 200, Reader: []string{os.Args[0], readerArgument},
	}
}

func TestRun(t *testing.T) {
	for _, name := range []string{"append", "replay", "history", "tail"} {
		t.Run(name, func(t *testing.T) {
			o := small(t, name)
			r, err := Run(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			text, err := json.Marshal(r)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%s", text)
			if r.Name != name || r.Unit == "" || r.Rounds != 2 || r.Compared == "" || len(r.Cases) == 0 {
				t.Error("the report is not complete")
			}
			worst := slices.MinFunc(r.Cases, func(a, b Case) int { return cmp.Compare(a.Ratio, b.Ratio) })
			if name == "tail" {
				worst = slices.MaxFunc(r.Cases, func(a, b Case) int { return cmp.Compare(a.Ratio, b.Ratio) })
			}
			if r.Ratio != worst.Ratio || r.Ours != worst.Ours || r.Raw != worst.Raw {
				t.Errorf("the whole is %v/%v/%v, the worst case %+v", r.Ours, r.Raw, r.Ratio, worst)
			}
			for _, c := range r.Cases {
				if c.Ours <= 0 || c.Raw <= 0 || c.Ratio <= 0 || len(c.OursRounds) != 2 || len(c.RawRounds) != 2 {
					t.Errorf("the case is not complete: %+v", c)
				}
				if name == "append" && runtime.GOOS == "linux" && (c.Paired <= 0 || c.CPU <= 0 || c.RawCPU <= 0 || r.Machine.Load <= 0) {
					t.Errorf("append without processor time, pairs or load: %+v", c)
				}
				for _, b := range c.Beside {
					switch {
					case b.Skipped != "" && os.Getenv("COFFER_TEST_REQUIRE") == "all":
						t.Errorf("%s: skipped: %s", b.Name, b.Skipped)
					case b.Skipped == "" && (b.Value <= 0 || b.Ratio <= 0 || len(b.Rounds) != 2):
						t.Errorf("the figure beside is not complete: %+v", b)
					}
				}
			}
			if name == "replay" && (r.Memory == nil || len(r.Memory.Cases) != 2 || r.Memory.Ratio <= 0 || r.Memory.Cases[1].PeakHeap == 0) {
				t.Errorf("memory: %+v", r.Memory)
			}
			// Counts, which hold on a busy machine too.
			if name == "replay" && (r.Cases[1].Allocations <= 0 || r.Cases[1].Allocations > 3) {
				t.Errorf("a replay over HTTP allocates %v objects an event", r.Cases[1].Allocations)
			}
			if name == "tail" && len(r.Idle) != len(tailForms()) {
				t.Errorf("idle tails: %+v", r.Idle)
			}
			for _, i := range r.Idle {
				most := 2.5
				if i.Form == formHTTP2 {
					most = 3.5 // one reads frames
				}
				if i.Goroutines < 1 || i.Goroutines > most || i.Bytes <= 0 {
					t.Errorf("an idle tail: %+v", i)
				}
			}
			left, err := os.ReadDir(o.Dir)
			if err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
	}
}

// TestCallbacks takes every step of it: nothing is lost, and nothing comes twice.
func TestCallbacks(t *testing.T) {
	o := Options{
		Name: "callbacks", Dir: t.TempDir(), Rounds: 2, Duration: 20 * time.Millisecond,
		Deliveries: 10, Past: 30, Endpoints: 20, // fewer than the first that is refused
	}
	r, err := Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Cases) != 3 || r.Deliveries == nil || r.Deliveries.Sent < 60 || r.Deliveries.Lost != 0 || r.Deliveries.Again != 0 || r.Ratio <= 0 {
		t.Fatalf("%+v, %+v", r, r.Deliveries)
	}
	c, d := r.Cases[1], r.Deliveries
	if len(c.Beside) != 1 || c.Beside[0].Value <= 0 || c.Beside[0].Ratio <= 0 || len(c.Beside[0].Rounds) != 2 {
		t.Errorf("the same endpoint at the start: %+v", c.Beside)
	}
	if d.HeapBefore <= 0 || d.HeapRatio <= 0 || len(d.Past) != pastSteps || d.PastRatio <= 0 {
		t.Errorf("the past: %+v", d)
	}
	for _, p := range d.Past {
		if p.Rate <= 0 || p.Heap <= 0 || runtime.GOOS == "linux" && (p.CPU <= 0 || p.Peak <= 0) {
			t.Errorf("a tenth of the past: %+v", p)
		}
	}
	if runtime.GOOS == "linux" && (c.CPU <= 0 || c.RawCPU <= 0 || c.Beside[0].CPU <= 0 || d.PastCPURatio <= 0 || d.ResidentBefore <= 0 || d.ResidentAfter <= 0) {
		t.Errorf("without processor time or memory: %+v, %+v", c, d)
	}
}

// TestTally counts what a receiver gets, and refuses one in so many once.
func TestTally(t *testing.T) {
	var c tally
	c.refuse(3)
	for _, body := range []string{`{"number":"3"}`, `{"data":{"number":"9"},"number":"1"}`, `{"number":"3"}`, `{"number":"130"}`, `{"number":"130"}`} {
		n, ok := numberOf([]byte(body))
		if !ok {
			t.Errorf("%s has no number", body)
		}
		c.take(n)
	}
	if c.count() != 3 || c.again() != 1 {
		t.Errorf("%d, %d again; want 3, 1", c.count(), c.again())
	}
	for _, body := range []string{``, `{}`, `{"number":"x"}`, `{"number":"`} {
		if n, ok := numberOf([]byte(body)); ok {
			t.Errorf("%s has the number %d", body, n)
		}
	}
}

func TestUnknown(t *testing.T) {
	if _, err := Run(t.Context(), Options{Name: "delete"}); !errors.Is(err, ErrUnknown) {
		t.Errorf("got %v", err)
	}
}

func TestRefusedOptions(t *testing.T) {
	o := small(t, "append")
	o.Size = 100
	if _, err := Run(t.Context(), o); err == nil {
		t.Error("a record smaller than its header was accepted")
	}
	o = small(t, "history")
	o.Short = 20
	if _, err := Run(t.Context(), o); err == nil {
		t.Error("a conversation shorter than a page was accepted")
	}
}

// The record must have the size that the raw side's payload has.
func TestTemplate(t *testing.T) {
	for _, size := range []int{600, 1024, 4096} {
		e, err := template(size)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range []int{0, 7, 12_345} {
			e.ID, e.Sender, e.Conversation = eventID(n, n), makeNames("user", senders).at(n), makeNames("group", conversations).at(n)
			if err := e.Normalize(time.Now(), journal.Limits{}); err != nil {
				t.Fatal(err)
			}
			if got := len(e.AppendJSON(nil, journal.AppID{})) + journal.HeaderSize + kms.Overhead; got != size {
				t.Errorf("the record has %d bytes, want %d", got, size)
			}
		}
	}
}

func TestFigures(t *testing.T) {
	for _, tt := range []struct {
		in   []float64
		want float64
	}{{nil, 0}, {[]float64{3}, 3}, {[]float64{5, 1, 3}, 3}, {[]float64{4, 1, 3, 2}, 2.5}} {
		if got := median(tt.in); got != tt.want {
			t.Errorf("the median of %v is %v, want %v", tt.in, got, tt.want)
		}
	}
	for in, want := range map[float64]float64{0: 0, 123456: 123500, 0.123456: 0.1235, 1: 1, 99999: 100000} {
		if got := rounded(in); got != want {
			t.Errorf("%v is rounded to %v, want %v", in, got, want)
		}
	}
	s := side{latencies: []time.Duration{1e6, 2e6, 3e6, 4e6}}
	if s.quantile(0.5) != 3 || s.quantile(0.99) != 4 || (&side{}).quantile(0.5) != 0 {
		t.Errorf("quantiles %v and %v", s.quantile(0.5), s.quantile(0.99))
	}
}
