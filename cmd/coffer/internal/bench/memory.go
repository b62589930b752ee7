package bench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cofferdb/coffer/journal"
)

// Memory says what replays of different lengths needed. The process holds the
// region's NATS server and view store too.
type Memory struct {
	// Ratio is the peak of the longest replay divided by that of the shortest,
	// of the heap or of the resident set, whichever is higher.
	Ratio float64       `json:"ratio"`
	Cases []MemoryUsage `json:"cases"`
}

// MemoryUsage is the memory of one replay.
type MemoryUsage struct {
	Events int `json:"events"`
	// PeakHeap is the most bytes of heap objects, garbage that was not yet
	// collected included.
	PeakHeap uint64 `json:"peak_heap_bytes"`
	// PeakResident is the most bytes of the process in memory; 0 where the
	// system does not tell.
	PeakResident uint64  `json:"peak_resident_bytes"`
	Rate         float64 `json:"events_per_second"`
}

// replayMemory replays the first n events of one app for each n.
func replayMemory(ctx context.Context, o Options, base journal.Event) (m *Memory, err error) {
	sizes := slices.Sorted(slices.Values(o.Memory))
	dir, remove, err := tempDir(o)
	if err != nil {
		return nil, err
	}
	defer remove()
	r, err := filledRig(ctx, o, filepath.Join(dir, "ours"), base, sizes[len(sizes)-1])
	if err != nil {
		return nil, err
	}
	defer func() { err = joinClose(err, r.close) }()
	// Caches fill up to their limits with the first replay of everything: it is
	// not the replay that is long or short.
	if _, err := r.replay(ctx, sizes[len(sizes)-1]); err != nil {
		return nil, err
	}
	m = &Memory{}
	for _, n := range sizes {
		debug.FreeOSMemory()
		resetPeak()
		heap := watchHeap()
		got, err := r.replay(ctx, n)
		usage := MemoryUsage{Events: n, PeakHeap: heap(), PeakResident: peakResident()}
		if err != nil {
			return nil, err
		}
		usage.Rate = rounded(float64(got.count) / got.elapsed.Seconds())
		m.Cases = append(m.Cases, usage)
		o.Log.InfoContext(ctx, "measured memory", "events", n, "peak_heap", usage.PeakHeap, "peak_resident", usage.PeakResident)
	}
	first, last := m.Cases[0], m.Cases[len(m.Cases)-1]
	m.Ratio = max(ratio(float64(last.PeakHeap), float64(first.PeakHeap)), ratio(float64(last.PeakResident), float64(first.PeakResident)))
	return m, nil
}

// watchHeap samples the heap every few milliseconds; the function that it
// returns ends that and gives the peak.
func watchHeap() func() uint64 {
	const name = "/memory/classes/heap/objects:bytes"
	var peak uint64
	stop := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		sample := []metrics.Sample{{Name: name}}
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for {
			metrics.Read(sample)
			peak = max(peak, sample[0].Value.Uint64())
			select {
			case <-stop:
				return
			case <-tick.C:
			}
		}
	})
	return func() uint64 {
		close(stop)
		watching.Wait()
		return peak
	}
}

// resetPeak makes Linux forget the peak of the resident set, see proc(5).
func resetPeak() { _ = os.WriteFile("/proc/self/clear_refs", []byte("5"), 0) } // where it cannot, the peak is of the whole run

func peakResident() uint64 { return resident("VmHWM:") }

// resident returns a line of proc(5)'s status, in bytes.
func resident(name string) uint64 {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, name); ok {
			kb, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			if err != nil {
				return 0
			}
			return kb << 10
		}
	}
	return 0
}

// String is for people.
func (u MemoryUsage) String() string {
	return fmt.Sprintf("%d events: heap %d MiB, resident %d MiB", u.Events, u.PeakHeap>>20, u.PeakResident>>20)
}
