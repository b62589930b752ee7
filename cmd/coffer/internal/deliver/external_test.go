package deliver_test

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/cofferdb/coffer/cmd/coffer/internal/deliver"
	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

// external is a NATS server of its own that syncs always.
type external struct {
	t       *testing.T
	options *server.Options
	server  *server.Server
}

func startExternal(t *testing.T) *external {
	t.Helper()
	x := &external{t: t, options: &server.Options{
		Host: "127.0.0.1", Port: server.RANDOM_PORT, NoSigs: true, NoLog: true, JetStream: true, StoreDir: t.TempDir(), SyncAlways: true,
		JetStreamMaxStore: 8 << 30, JetStreamMaxMemory: 256 << 20,
	}}
	x.start()
	x.options.Port = x.server.Addr().(*net.TCPAddr).Port //nolint:errcheck,forcetypeassert // a TCP listener has no other
	t.Cleanup(x.stop)
	return x
}

func (x *external) start() {
	x.t.Helper()
	var err error
	if x.server, err = server.NewServer(x.options); err != nil {
		x.t.Fatal(err)
	}
	x.server.Start()
	if !x.server.ReadyForConnections(patience) {
		x.t.Fatal("the NATS server does not start")
	}
}

func (x *external) stop() {
	x.server.Shutdown()
	x.server.WaitForShutdown()
}

// TestRestartOfNATS restarts the server in the middle of delivery: every event
// comes, and none twice, because each outcome that was taken is kept until it is
// on disk.
func TestRestartOfNATS(t *testing.T) {
	t.Parallel()
	x := startExternal(t)
	r := newRig(t, func(r *rig) { r.external = x })
	rc := r.receive(nil)
	e := r.endpoint(rc.URL)
	positions := r.append(600, "group-1")
	r.eventually("some of them", func() bool { return len(rc.all()) > 50 })
	x.stop()
	x.start()
	r.eventually("every event", func() bool { return r.progress(e).Done == 600 })
	if found, again := rc.counts(positions); found != 600 || again != 0 {
		t.Errorf("%d of 600 events, %d again", found, again)
	}
}

// TestTwoProcesses has two engines share a region: each endpoint is one's, and
// the other takes over what one leaves that ends without a word.
func TestTwoProcesses(t *testing.T) {
	t.Parallel()
	x := startExternal(t)
	lease := func(r *rig) { r.external, r.beat = x, 150*time.Millisecond }
	a := newRig(t, lease)
	rc := a.receive(nil)
	var eps []endpoints.Endpoint
	for range 12 {
		eps = append(eps, a.endpoint(rc.URL))
	}
	b := newRig(t, lease, func(r *rig) { r.provider, r.app, r.roots = a.own, a.app, a.roots })
	all := func(r *rig, n uint64) func() bool {
		return func() bool {
			for _, e := range eps {
				if r.progress(e).Done != n {
					return false
				}
			}
			return true
		}
	}
	a.append(30, "group-1")
	a.eventually("every event at every endpoint", all(a, 30))
	a.eventually("both to have some", func() bool {
		ours, theirs := 0, 0
		for _, e := range eps {
			if _, ok, _ := a.leases.Holds(e.ID); ok {
				ours++
			}
			if _, ok, _ := b.leases.Holds(e.ID); ok {
				theirs++
			}
		}
		return ours > 0 && theirs > 0 && ours+theirs == len(eps)
	})
	// The second ends without giving its leases back.
	b.stopLeases(false)
	b.stopEngine()
	positions := a.append(30, "group-1")
	a.eventually("every event after one has ended", all(a, 60))
	rc.mu.Lock()
	defer rc.mu.Unlock()
	for _, p := range positions {
		if n := rc.times[p.String()]; n != len(eps) {
			t.Errorf("the event at %s came %d times to %d endpoints", p, n, len(eps))
		}
	}
}

// The environment of the process that is killed.
const (
	childDir    = "COFFER_TEST_DELIVER_DIR"
	killRounds  = "COFFER_TEST_DELIVER_KILLS"
	killEvents  = "COFFER_TEST_DELIVER_EVENTS"
	childRegion = "roots.pem"
)

// TestKilledChild is the process that TestKill kills.
func TestKilledChild(t *testing.T) {
	dir := os.Getenv(childDir)
	if dir == "" {
		return // only TestKill runs it
	}
	r := &rig{t: t, dir: dir, timeout: 10 * time.Second}
	r.trust(filepath.Join(dir, childRegion))
	r.open()
	time.Sleep(time.Hour) // until it is killed
}

// TestKill kills the delivering process again and again. Every event comes at
// least once. One comes twice only where a kill cut its acknowledgement: its
// outcome never reached the stream, which has one of each event.
//
// With COFFER_TEST_DELIVER_KILLS=100 and COFFER_TEST_DELIVER_EVENTS=100000 it is
// the run of docs/reliability.md, which takes some minutes.
func TestKill(t *testing.T) {
	t.Parallel()
	rounds, events := number(t, killRounds, 4), number(t, killEvents, 4000)
	r := newRig(t)
	r.stopEngine()
	rc := r.receive(nil)
	e := r.endpoint(rc.URL)
	positions := r.append(events, "group-1")
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: rc.Certificate().Raw})
	if err := os.WriteFile(filepath.Join(r.dir, childRegion), certificate, 0o600); err != nil {
		t.Fatal(err)
	}
	r.stopEngine = func() {}
	r.close()
	kills := 0
	for found := 0; kills < rounds && found < events; kills++ {
		// The last one has little left to do; it may come to its end.
		found = r.killAt(rc, positions, 1+rand.IntN(max(2*events/rounds-1, 1))) //nolint:gosec // any moment will do
	}
	r.open()
	r.eventually("every event", func() bool { return r.progress(e).Done == uint64(events) })
	found, again := rc.counts(positions)
	t.Logf("%d of %d events, %d again, %d kills", found, events, again, kills)
	if most := kills * 1024; found != events || again > most {
		t.Errorf("%d of %d events, %d again, at most %d may", found, events, again, most)
	}
	outcomes := r.outcomesOf()
	for _, p := range positions {
		if n := outcomes[p]; n != 1 {
			t.Errorf("the stream has %d outcomes of the event at %s, which came %d times", n, p, rc.times[p.String()])
			break
		}
	}
}

// killAt runs a process that delivers, and kills it after so many requests, or
// when all events have come. It returns how many have.
func (r *rig) killAt(rc *receiver, positions []journal.Position, requests int) (found int) {
	t := r.t
	var out bytes.Buffer
	child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestKilledChild$", "-test.timeout=10m") //nolint:gosec // this program
	child.Env = append(os.Environ(), childDir+"="+r.dir)
	child.Stdout, child.Stderr = &out, &out
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	last := rc.requests()
	target, deadline := last+requests, time.Now().Add(patience)
	for {
		now := rc.requests()
		if now >= target {
			break
		}
		if now > last {
			last, deadline = now, time.Now().Add(patience)
		}
		if found, _ = rc.counts(positions); found == len(positions) {
			break
		}
		if time.Now().After(deadline) {
			_ = child.Process.Signal(syscall.SIGQUIT) // says where its goroutines are
			_ = child.Wait()
			t.Fatalf("nothing has come for %v, with %d of %d events: %s", patience, found, len(positions), out.String())
		}
		time.Sleep(time.Millisecond)
	}
	_ = child.Process.Kill()
	_ = child.Wait()
	found, _ = rc.counts(positions)
	return found
}

// outcomesOf counts the deliveries that the callback stream has of each position.
func (r *rig) outcomesOf() map[journal.Position]int {
	r.t.Helper()
	source := r.journal.Callbacks()
	stream := source.Streams()[0]
	last := must[uint64](r.t)(source.Last(r.t.Context(), stream.Name))
	outcomes := make(map[journal.Position]int)
	ended := errors.New("everything has been read")
	err := source.Read(r.t.Context(), stream.Name, 0, stream.Incarnation, func(batch []journal.Sealed) error {
		for i := range batch {
			a, _, err := journal.ParseAttempts(batch[i].Record)
			if err != nil {
				return err
			}
			for _, entry := range a.Entries {
				if entry.State == journal.DeliveryDone {
					outcomes[entry.Position]++
				}
			}
			if batch[i].Sequence >= last {
				return ended
			}
		}
		return nil
	})
	if !errors.Is(err, ended) {
		r.t.Fatal(err)
	}
	return outcomes
}

func number(t *testing.T, name string, without int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return without
	}
	return must[int](t)(strconv.Atoi(text))
}

// startLeases gives the rig's engine leases.
func (r *rig) startLeases() deliver.Leases {
	if r.beat == 0 {
		return nil
	}
	rows := &cutRows{Rows: r.rows}
	r.leases = deliver.NewLeases(deliver.LeaseOptions{Rows: rows, Beat: r.beat, Log: slog.New(slog.DiscardHandler)})
	ctx, stop := context.WithCancel(context.Background())
	var work sync.WaitGroup
	work.Go(func() { r.leases.Run(ctx) })
	var once sync.Once
	r.stopLeases = func(word bool) {
		rows.cut.Store(!word)
		once.Do(func() { stop(); work.Wait() })
	}
	return r.leases
}

// cutRows are rows that can no longer be reached.
type cutRows struct {
	*journal.Rows

	cut atomic.Bool
}

func (c *cutRows) Load(ctx context.Context, name string) (kms.Row, error) {
	if c.cut.Load() {
		return kms.Row{}, journal.ErrUnavailable
	}
	return c.Rows.Load(ctx, name)
}
