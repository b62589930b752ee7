package keys

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/local"
)

const (
	childDir  = "COFFER_KEYS_TEST_CHILD"
	childApps = 60
)

// TestKill: a process that rewraps is killed with -9 again and again. The job is
// finished once, and counts every app once.
func TestKill(t *testing.T) {
	dir := t.TempDir()
	kills := 0
	for {
		cmd := exec.Command(os.Args[0], "-test.run=^$")  //nolint:noctx // killed below
		cmd.Env = append(os.Environ(), childDir+"="+dir) //nolint:forbidigo // for this test's own subprocess
		cmd.Stderr = t.Output()
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		in := bufio.NewReader(out)
		line, err := in.ReadString('\n')
		if err != nil {
			t.Fatalf("the process did not begin: %v", err)
		}
		if strings.HasPrefix(line, "working") && kills < 8 {
			time.Sleep(time.Duration(rand.IntN(120)) * time.Millisecond) //nolint:gosec // any moment will do
			must(t, cmd.Process.Kill())
			_ = cmd.Wait()
			kills++
			continue
		}
		if strings.HasPrefix(line, "working") {
			line, err = in.ReadString('\n')
			must(t, err)
		}
		must(t, cmd.Wait())
		if want := fmt.Sprintf("done %d 0 0 jobs 1\n", childApps); line != want {
			t.Fatalf("after %d kills: %q, want %q", kills, line, want)
		}
		t.Logf("killed %d times", kills)
		return
	}
}

// child rewraps the apps of a data directory. It prints that it works, and how
// the job ended.
func child(dir string) {
	ctx := context.Background()
	check := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1) //nolint:forbidigo // a process of its own
		}
	}
	srv, err := embedded.Start(ctx, embedded.Options{StoreDir: filepath.Join(dir, "nats")})
	check(err)
	nc, err := srv.Connect()
	check(err)
	provider, err := local.Open(ctx, local.Options{Path: filepath.Join(dir, "kek"), Create: true})
	check(err)
	var syncer journal.Syncer
	if s := srv.Syncer(); s != nil {
		syncer = s
	}
	j, err := journal.Open(ctx, journal.Config{Region: journal.DefaultRegions()[2], Conn: nc, Sync: syncer, KMS: provider})
	check(err)
	js, err := jetstream.New(nc)
	check(err)
	a, err := New(ctx, Options{
		Keyring: j.Keyring(), Rows: journal.NewRows(js, journal.KeyringBucket(region), syncer), Audit: j, Primary: provider,
		Open: func(context.Context, string) (kms.Provider, error) { return nil, ErrSpec }, Lease: 90 * time.Millisecond,
	})
	check(err)
	a.chunks = 4
	jobs, err := a.Jobs(ctx)
	check(err)
	if len(jobs) == 0 {
		for i := range childApps {
			check(j.Keyring().CreateApp(ctx, fmt.Sprintf("app%03d", i)))
		}
		_, err = a.Rotate(ctx, actor)
		check(err)
	}
	go func() { check(a.Run(ctx)) }()
	job := Job{}
	if len(jobs) > 0 {
		job = jobs[0]
	} else {
		job, err = a.Start(ctx, Spec{Kind: Rewrap, Actor: actor})
		check(err)
	}
	fmt.Fprintln(os.Stdout, "working")
	for job.Finished.IsZero() {
		time.Sleep(time.Millisecond)
		job, err = a.Job(ctx, job.ID)
		check(err)
	}
	jobs, err = a.Jobs(ctx)
	check(err)
	fmt.Fprintln(os.Stdout, job.State, job.Done, job.Skipped, job.Failed, "jobs", len(jobs))
}
