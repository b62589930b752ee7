package keys

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/cmd/coffer/internal/keyserverstest"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/local"
	"github.com/cofferdb/coffer/kms/vault"
)

const (
	childDir  = "COFFER_KEYS_TEST_CHILD"
	childKMS  = "COFFER_KEYS_TEST_CHILD_KMS"
	childApps = 60
)

// rewrapping is a process that rewraps, in which two work on the job.
type rewrapping struct {
	*exec.Cmd

	in *bufio.Reader // what it prints
}

func startRewrap(t *testing.T, dir, setting string) rewrapping {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^$")                        //nolint:noctx // killed by the test
	cmd.Env = append(os.Environ(), childDir+"="+dir, childKMS+"="+setting) //nolint:forbidigo // for this test's own subprocess
	cmd.Stderr = t.Output()
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	return rewrapping{cmd, bufio.NewReader(out)}
}

// works waits until it works on the job.
func (r rewrapping) works(t *testing.T) {
	t.Helper()
	if line, err := r.in.ReadString('\n'); err != nil || line != "working\n" {
		t.Fatalf("the process did not begin: %q, %v", line, err)
	}
}

// ends waits for its end, and checks that every app was done and counted once.
func (r rewrapping) ends(t *testing.T) {
	t.Helper()
	line, err := r.in.ReadString('\n')
	must(t, err)
	must(t, r.Wait())
	if want := fmt.Sprintf("done %d 0 0 jobs 1\n", childApps); line != want {
		t.Fatalf("%q, want %q", line, want)
	}
}

// TestKill: a process that rewraps is killed with -9 again and again. The job is
// finished once, and counts every app once.
func TestKill(t *testing.T) {
	dir := t.TempDir()
	for range 8 {
		r := startRewrap(t, dir, "")
		r.works(t)
		time.Sleep(time.Duration(rand.IntN(120)) * time.Millisecond) //nolint:gosec // any moment will do
		must(t, r.Process.Kill())
		_ = r.Wait()
	}
	r := startRewrap(t, dir, "")
	r.works(t)
	r.ends(t)
}

// TestKillOnVault is TestKill with a real Vault. The first process is killed when
// it asks for the first rewrap, the next one at its second request from there on,
// and so forth: keys are wrapped, verified and being written then.
func TestKillOnVault(t *testing.T) {
	v := keyserverstest.NewVault(t)
	v.Permit(`path "transit/keys/coffer-eu/rotate" { capabilities = ["update"] }`)
	dir := t.TempDir()
	const kills = 8
	for n := range kills {
		reached := make(chan struct{})
		asked := 0
		var mu sync.Mutex // guards asked
		v.Front.Before(func(r *http.Request) {
			mu.Lock()
			defer mu.Unlock()
			switch {
			case asked == 0 && !strings.Contains(r.URL.Path, "/rewrap/"):
			case asked == n:
				asked++
				close(reached)
			default:
				asked++
			}
		})
		r := startRewrap(t, dir, v.Setting())
		r.works(t)
		select {
		case <-reached:
		case <-time.After(2 * time.Minute): // only bounds a hang
			t.Fatalf("request %d of the rewrap does not come", n)
		}
		must(t, r.Process.Kill())
		_ = r.Wait()
	}
	v.Front.Before(nil)
	r := startRewrap(t, dir, v.Setting())
	r.works(t)
	r.ends(t)
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
	provider, err := childProvider(ctx, dir)
	check(err)
	var syncer journal.Syncer
	if s := srv.Syncer(); s != nil {
		syncer = s
	}
	j, err := journal.Open(ctx, journal.Config{Region: journal.DefaultRegions()[2], Conn: nc, Sync: syncer, KMS: provider})
	check(err)
	js, err := jetstream.New(nc)
	check(err)
	rows := journal.NewRows(js, journal.KeyringBucket(region), syncer)
	admin := func(keyring *kms.Keyring) *Admin {
		a, err := New(ctx, Options{
			Keyring: keyring, Rows: rows, Audit: j, Primary: provider, Lease: 200 * time.Millisecond,
			Open: func(context.Context, string) (kms.Provider, error) { return nil, ErrSpec },
		})
		check(err)
		a.chunks = 4
		return a
	}
	a := admin(j.Keyring())
	again, err := kms.NewKeyring(kms.Config{Region: region, Provider: provider, Rows: rows})
	check(err)
	two := []*Admin{a, admin(again)} // as two processes
	jobs, err := a.Jobs(ctx)
	check(err)
	if len(jobs) == 0 {
		for i := range childApps {
			check(j.Keyring().CreateApp(ctx, fmt.Sprintf("app%03d", i)))
		}
		_, err = a.Rotate(ctx, actor)
		check(err)
	}
	job := Job{}
	if len(jobs) > 0 {
		job = jobs[0]
	}
	if job.Finished.IsZero() {
		for _, starting := range two { // the second one resumes, whichever process began it
			started, err := starting.Start(ctx, Spec{Kind: Rewrap, Actor: actor})
			check(err)
			if job.ID != "" && started.ID != job.ID {
				check(fmt.Errorf("job %s instead of %s", started.ID, job.ID))
			}
			job = started
		}
	}
	for _, working := range two {
		go func() { check(working.Run(ctx)) }()
	}
	fmt.Fprintln(os.Stdout, "working")
	for job.Finished.IsZero() {
		time.Sleep(time.Millisecond)
		job, err = a.Job(ctx, job.ID)
		check(err)
	}
	jobs, err = a.Jobs(ctx)
	check(err)
	now, err := provider.Describe(ctx)
	check(err)
	check(a.Inventory(ctx, func(app AppInventory) error {
		for _, key := range app.Keys {
			for _, wrap := range key.Wraps {
				if now.Version != "2" || wrap.Version != now.Version {
					return fmt.Errorf("app %s is under version %s, the latest is %s", app.App, wrap.Version, now.Version)
				}
			}
		}
		return nil
	}))
	fmt.Fprintln(os.Stdout, job.State, job.Done, job.Skipped, job.Failed, "jobs", len(jobs))
}

// childProvider is the one that the environment names, or a file.
func childProvider(ctx context.Context, dir string) (kms.Provider, error) {
	setting := os.Getenv(childKMS) //nolint:forbidigo // this test's own subprocess
	if setting == "" {
		return local.Open(ctx, local.Options{Path: filepath.Join(dir, "kek"), Create: true})
	}
	o, err := vault.ParseURL(setting)
	if err != nil {
		return nil, err
	}
	return vault.New(o)
}
