package deletion

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/cmd/coffer/internal/accounts"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/local"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/history"
	"github.com/cofferdb/coffer/projections/pebble"
)

const (
	childDir = "COFFER_DELETION_TEST_CHILD"
	dieAt    = "COFFER_DELETION_TEST_DIE"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" { //nolint:forbidigo // this test's own subprocess
		child(dir, os.Getenv(dieAt)) //nolint:forbidigo // likewise
		return
	}
	os.Exit(m.Run()) //nolint:forbidigo // as testing asks for
}

// moments are where a process that deletes an account with two apps can end.
func moments() []string {
	all := []string{"before mark", "after mark", "before apps"}
	for _, step := range []string{stepMark, stepKeys, stepRows, "more", stepMessages, stepViews, stepRest, stepEnd} {
		all = append(all, "before apps/"+step)
	}
	return append(all, "after apps", "before registration", "after registration", "before end", "after end")
}

// TestKilled kills a process that deletes an account at every moment, one after
// the other, with -9. What is left at the end is what one that is never killed
// leaves.
func TestKilled(t *testing.T) {
	dir := t.TempDir()
	for _, moment := range append(moments(), "") {
		cmd := exec.Command(os.Args[0], "-test.run=^$")                    //nolint:noctx // it ends by itself
		cmd.Env = append(os.Environ(), childDir+"="+dir, dieAt+"="+moment) //nolint:forbidigo // for this test's own subprocess
		cmd.Stderr = t.Output()
		out, err := cmd.Output()
		var exit *exec.ExitError
		if moment == "" {
			if err != nil {
				t.Fatalf("the last process: %v", err)
			}
			checkLeft(t, out)
			return
		}
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Fatalf("%q: the process was not killed: %v, it said %s", moment, err, out)
		}
	}
}

// left is what a process finds when the deletion is done.
type left struct {
	Job      Job
	Account  accounts.State
	Apps     int    // of the account that are not deleted
	Stays    int    // messages of the app of another account
	Counted  int    // messages of the deleted ones
	Viewed   int    // events of the deleted ones in the view
	Keys     string // of the deleted ones
	Audit    string
	Rows     []string
	Readable string
}

func checkLeft(t *testing.T, out []byte) {
	t.Helper()
	var l left
	if err := json.Unmarshal(out, &l); err != nil {
		t.Fatalf("%s: %v", out, err)
	}
	if l.Job.State != Done || l.Job.Finished.IsZero() || l.Job.Error != "" || l.Job.Owner != "" {
		t.Errorf("the deletion is %+v", l.Job)
	}
	if l.Account != accounts.Deleted || l.Apps != 0 {
		t.Errorf("the account is %s and has %d apps", l.Account, l.Apps)
	}
	if l.Stays != 6 || l.Readable != "6 events" {
		t.Errorf("of the other account's app %d messages are left; read: %s", l.Stays, l.Readable)
	}
	// The newest message of the stream is another's.
	if l.Counted != 0 || l.Viewed != 0 {
		t.Errorf("of the deleted apps %d messages are left, %d in the view", l.Counted, l.Viewed)
	}
	if l.Keys != "destroyed destroyed" {
		t.Errorf("their keys are %s", l.Keys)
	}
	if want := []string{"account.acme", "account.other", "endpoint.stays"}; !slices.Equal(l.Rows, want) {
		t.Errorf("rows %v, want %v", l.Rows, want)
	}
	if l.Audit != "account.deletion_started account.deleted" {
		t.Errorf("audited: %s", l.Audit)
	}
}

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1) //nolint:forbidigo // a process of its own
	}
}

// child opens a region in a folder, which it fills if it is new, and deletes an
// account of it until it is done or the moment to die has come.
func child(dir, moment string) {
	ctx := context.Background()
	srv, err := embedded.Start(ctx, embedded.Options{StoreDir: filepath.Join(dir, "nats")})
	must(err)
	nc, err := srv.Connect()
	must(err)
	provider, err := local.Open(ctx, local.Options{Path: filepath.Join(dir, "kek"), Create: true})
	must(err)
	var syncer journal.Syncer
	if s := srv.Syncer(); s != nil {
		syncer = s
	}
	j, err := journal.Open(ctx, journal.Config{Region: journal.DefaultRegions()[2], Conn: nc, Sync: syncer, KMS: provider})
	must(err)
	js, err := jetstream.New(nc)
	must(err)
	rows := journal.NewRows(js, journal.RegistryBucket("eu"), syncer)
	store, err := pebble.Open(pebble.Options{Dir: filepath.Join(dir, "views")})
	must(err)
	view, err := history.New(history.Config{Store: store})
	must(err)
	runner, err := projections.NewRunner(projections.RunnerConfig{Journal: j, Store: store, Projections: []projections.Projection{view}})
	must(err)
	go func() { must(runner.Run(ctx)) }()
	owners := accounts.New(rows, j.Keyring(), journal.Retention{}, nil)
	d := New(Options{
		Journal: j, Accounts: owners, Rows: rows, Views: runner, Lease: 30 * time.Millisecond,
		Steps: []Step{{Name: "more", Do: func(context.Context, journal.AppID) (int, error) { return 0, nil }}},
	})
	d.at = func(at string) {
		if at == moment {
			must(syscall.Kill(os.Getpid(), syscall.SIGKILL))
			select {} // the signal is on its way
		}
	}
	if err := owners.Known(ctx, "acme"); errors.Is(err, accounts.ErrNotFound) {
		fill(ctx, j, owners, rows, dir)
		_, err := d.StartAccount(ctx, "acme", "operator:test")
		must(err)
	}
	go d.Run(ctx)
	var l left
	for l.Job.State != Done {
		time.Sleep(time.Millisecond)
		l.Job, err = d.Job(ctx, "account-acme")
		must(err)
	}
	report(ctx, &l, j, owners, rows, view, dir)
	must(json.NewEncoder(os.Stdout).Encode(l))
}

// fill makes two accounts, with two apps and one, whose messages lie between one
// another's.
func fill(ctx context.Context, j *journal.Journal, owners *accounts.Store, rows kms.Rows, dir string) {
	var apps []journal.AppID
	for _, owner := range []string{"acme", "acme", "other"} {
		_, err := owners.Create(ctx, accounts.Account{ID: owner, Name: owner})
		if !errors.Is(err, accounts.ErrExists) {
			must(err)
		}
		app, err := j.CreateApp(ctx, journal.AppSpec{Plan: "pro", Account: owner})
		must(err)
		apps = append(apps, app.ID)
		name := "endpoint." + app.ID.String() + ".a1"
		if owner == "other" {
			name = "endpoint.stays"
		}
		_, err = rows.Create(ctx, name, []byte("{}"))
		must(err)
	}
	for i := range 6 {
		for _, app := range apps {
			results, err := j.Append(ctx, app, journal.Event{
				ID: fmt.Sprintf("e%d", i), Type: journal.MessageSent, Conversation: "room", ConversationType: journal.Group, Sender: "ann",
				Data: []byte(`{"bodies":[{"type":"txt","msg":"hello"}]}`),
			})
			must(err)
			must(results[0].Err)
		}
	}
	var names []string
	for _, app := range apps {
		names = append(names, app.String())
	}
	must(os.WriteFile(filepath.Join(dir, "apps"), []byte(strings.Join(names, "\n")), 0o600))
}

func report(ctx context.Context, l *left, j *journal.Journal, owners *accounts.Store, rows kms.Rows, view *history.View, dir string) {
	account, err := owners.Account(ctx, "acme")
	must(err)
	l.Account = account.State
	apps, err := j.Registry().AppsOf(ctx, "acme")
	must(err)
	l.Apps = len(apps)
	file, err := os.Open(filepath.Join(dir, "apps"))
	must(err)
	defer func() { _ = file.Close() }()
	var ids []journal.AppID
	for lines := bufio.NewScanner(file); lines.Scan(); {
		id, err := journal.ParseAppID(lines.Text())
		must(err)
		ids = append(ids, id)
	}
	count := func(app journal.AppID) int {
		n, err := j.CountApp(ctx, app)
		must(err)
		return n
	}
	viewed := func(app journal.AppID) (n int) {
		_, err := view.Replay(ctx, app, history.Query{}, func(history.Item) error { n++; return nil })
		must(err)
		return n
	}
	l.Stays, l.Counted = count(ids[2]), count(ids[0])+count(ids[1])
	l.Viewed = viewed(ids[0]) + viewed(ids[1])
	l.Readable = fmt.Sprintf("%d events", viewed(ids[2]))
	var keys []string
	for _, id := range ids[:2] {
		state := "there"
		if err := j.Keyring().CreateApp(ctx, id.String()); errors.Is(err, kms.ErrAppDestroyed) {
			state = "destroyed"
		}
		keys = append(keys, state)
	}
	l.Keys = strings.Join(keys, " ")
	for _, prefix := range []string{"account.", "endpoint."} {
		for name, err := range rows.List(ctx, prefix) {
			must(err)
			l.Rows = append(l.Rows, name)
		}
	}
	slices.Sort(l.Rows)
	var actions []string
	must(j.AuditLog(ctx, 0, func(payload []byte) error {
		var entry struct{ Action, Target string }
		if err := json.Unmarshal(payload, &entry); err != nil {
			return err
		}
		if entry.Target == "account:acme" {
			actions = append(actions, entry.Action)
		}
		return nil
	}))
	l.Audit = strings.Join(actions, " ")
}
