package history

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/pebble"
)

// script is a journal that is the same in every process, except for nonces.
type script struct{ records []journal.Sealed }

func newScript(t testing.TB, n int) *script {
	m, s := newMaker(t), &script{}
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range n {
		e := spec{
			app: appN(byte(1 + rng.IntN(3))), position: uint64(i + 1), id: fmt.Sprint("e", i),
			conversation: fmt.Sprint("c", rng.IntN(5)), sender: fmt.Sprint("u", rng.IntN(5)),
			data: fmt.Appendf(nil, "%0500d", i),
		}
		switch rng.IntN(8) {
		case 0:
			e.kind, e.target = edited, fmt.Sprint("e", rng.IntN(n))
		case 1:
			e.kind, e.target = recalled, fmt.Sprint("e", rng.IntN(n))
		case 2:
			e.id = fmt.Sprint("e", rng.IntN(n)) // again, or too early
		}
		s.records = append(s.records, m.seal(e))
	}
	return s
}

func (*script) Streams() []journal.StreamInfo {
	return []journal.StreamInfo{{Name: "stream", Plan: "enterprise", Incarnation: "first"}}
}

func (s *script) Read(ctx context.Context, _ string, after uint64, _ string, fn func([]journal.Sealed) error) error {
	for rest := s.records[after:]; len(rest) > 0; {
		n := min(len(rest), 20)
		if err := fn(rest[:n]); err != nil {
			return err
		}
		rest = rest[n:]
	}
	<-ctx.Done()
	return ctx.Err()
}

func (s *script) Last(context.Context, string) (uint64, error) { return uint64(len(s.records)), nil }

func (s *script) Locate(_ context.Context, _ journal.AppID, p journal.Position) (string, uint64, error) {
	return "stream", p.Sequence(), nil
}

const (
	killEnv    = "COFFER_TEST_KILL_DIR"
	killEvents = 6000
)

func smallStore(dir string) (*pebble.Store, error) {
	return pebble.Open(pebble.Options{Dir: dir, MemTable: 512 << 10, FlushEvery: 20 * time.Millisecond})
}

// follow fills the store in a folder from the script. It says so on standard
// output when the first records are on disk.
func follow(t *testing.T, dir string, s *script) {
	store, err := smallStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	v := newView(t, store)
	r, err := projections.NewRunner(projections.RunnerConfig{Journal: s, Store: store, Projections: []projections.Projection{v}, Batch: 20})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()
	if err := r.Wait(ctx, appN(1), 20); err != nil {
		t.Error(err)
	}
	if err := store.Flush(); err != nil {
		t.Error(err)
	}
	_, _ = os.Stdout.WriteString("begun\n") // whoever listens may have gone
	if err := r.Wait(ctx, appN(1), killEvents); err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := store.Close(); err != nil {
		t.Error(err)
	}
}

// TestKilledAndResumed kills a process that fills a view, at random moments and
// again and again, and compares the view with one that was filled in peace.
func TestKilledAndResumed(t *testing.T) {
	s := newScript(t, killEvents)
	if dir := os.Getenv(killEnv); dir != "" {
		follow(t, dir, s)
		return
	}
	dir := filepath.Join(t.TempDir(), "killed")
	rounds, resumed := 0, 0
	for ; rounds < 8; rounds++ {
		// Its nonces differ, so what it wrote is compared by header and size.
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestKilledAndResumed$")
		cmd.Env = append(os.Environ(), killEnv+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// The first line comes when something is on disk; nothing comes if the
		// process has failed.
		_, _ = bufio.NewReader(out).ReadString('\n')
		time.Sleep(time.Duration(rand.IntN(100)) * time.Millisecond)
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
		store, err := smallStore(dir)
		if errors.Is(err, projections.ErrCorrupt) {
			t.Fatalf("round %d: %v", rounds, err)
		}
		if err != nil {
			t.Fatal(err)
		}
		if n := len(dump(t, store)); n > 0 {
			resumed++
		}
		if err := store.Close(); err != nil {
			t.Fatal(err)
		}
	}
	follow(t, dir, s)
	peace := filepath.Join(t.TempDir(), "peace")
	follow(t, peace, s)
	if a, b := shape(t, dir), shape(t, peace); !slices.Equal(a, b) {
		t.Errorf("after %d kills the view has %d entries and differs from one of %d", rounds, len(a), len(b))
	}
	t.Logf("%d rounds, in %d of them the view had something", rounds, resumed)
	if resumed == 0 {
		t.Error("no process got as far as to write")
	}
}

// shape lists the keys and the sizes of the values.
func shape(t *testing.T, dir string) []string {
	store, err := smallStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	var list []string
	if err := store.View(func(r projections.Reader) error {
		c := r.Iterate([]byte{1}, nil, false)
		defer c.Close()
		for c.Next() {
			list = append(list, fmt.Sprintf("%x %d", c.Key(), len(c.Value())))
		}
		return c.Close()
	}); err != nil {
		t.Fatal(err)
	}
	return list
}
