package bench

import (
	"errors"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"go.uber.org/goleak"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// small are sizes at which the figures mean nothing and every step is taken.
func small(t *testing.T, name string) Options {
	t.Helper()
	return Options{
		Name: name, Dir: t.TempDir(), Rounds: 2, Duration: 20 * time.Millisecond, Writers: []int{1, 64},
		Events: 2000, Memory: []int{500, 1000}, Short: 200, Long: 1000, Pages: 20,
	}
}

func TestRun(t *testing.T) {
	for _, name := range []string{"append", "replay", "history"} {
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
			lowest := slices.MinFunc(r.Cases, func(a, b Case) int {
				if a.Ratio < b.Ratio {
					return -1
				}
				return 1
			})
			if r.Ratio != lowest.Ratio || r.Ours != lowest.Ours || r.Raw != lowest.Raw {
				t.Errorf("the whole is %v/%v/%v, the lowest case %+v", r.Ours, r.Raw, r.Ratio, lowest)
			}
			for _, c := range r.Cases {
				if c.Ours <= 0 || c.Raw <= 0 || c.Ratio <= 0 || len(c.OursRounds) != 2 || len(c.RawRounds) != 2 {
					t.Errorf("the case is not complete: %+v", c)
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
			left, err := os.ReadDir(o.Dir)
			if err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
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
