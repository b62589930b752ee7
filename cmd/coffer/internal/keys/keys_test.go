package keys

import (
	"context"
	"errors"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/cofferdb/coffer/kms"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" { //nolint:forbidigo // this test's own subprocess
		child(dir)
		return
	}
	goleak.VerifyTestMain(m)
}

// TestJobs runs every kind of job to its end. The dry run before each changes
// nothing and counts the same.
func TestJobs(t *testing.T) {
	w := newWorld(t)
	a := w.admin(w.rows())
	defer w.run(a)()
	w.apps(a, 7)
	dry := func(spec Spec, todo int) {
		t.Helper()
		before := keysOf(t, w.rows())
		spec.DryRun = true
		w.want(w.do(a, spec), Done, todo, 7-todo, 0)
		if after := keysOf(t, w.rows()); !maps.Equal(before, after) {
			t.Errorf("a dry run of %s has changed rows", spec.Kind)
		}
	}
	rewrap, migrate := Spec{Kind: Rewrap}, Spec{Kind: Migrate, To: "local:b"}
	dry(rewrap, 0)
	version, err := a.Rotate(t.Context(), actor)
	must(t, err)
	if version != "2" {
		t.Fatalf("version %s", version)
	}
	dry(rewrap, 7)
	w.want(w.do(a, rewrap), Done, 7, 0, 0)
	w.all(a, w.ida, "2")
	w.want(w.do(a, rewrap), Done, 0, 7, 0)
	dry(migrate, 7)
	if a.Primary() != w.ida {
		t.Error("a dry run has moved the primary")
	}
	w.want(w.do(a, migrate), Done, 7, 0, 0)
	w.all(a, w.idb, "1")
	must(t, a.keyring.CreateApp(t.Context(), "app999"))
	w.all(a, w.idb, "1")
	must(t, a.Shred(t.Context(), actor, "app999"))
	w.want(w.do(a, Spec{Kind: Verify}), Done, 7, 1, 0)
	before := keysOf(t, w.rows())
	w.want(w.do(a, Spec{Kind: Replace}), Done, 7, 1, 0)
	for name, row := range keysOf(t, w.rows()) {
		if name != "app.app999" && row == before[name] {
			t.Errorf("%s was not replaced", name)
		}
	}
	w.want(w.do(a, Spec{Kind: Verify}), Done, 7, 1, 0)
	// An app of its own stays where it is when the region moves.
	w.want(w.do(a, Spec{Kind: Migrate, To: "local:a", App: "app003"}), Done, 1, 0, 0)
	if got := w.wraps(a); got["app003"] != w.ida.String()+"#2" || a.Primary() != w.idb {
		t.Errorf("after moving one app: %v, primary %s", got, a.Primary())
	}
	w.want(w.do(a, Spec{Kind: Migrate, To: "local:b"}), Done, 0, 8, 0)
	if got := w.wraps(a); got["app003"] != w.ida.String()+"#2" {
		t.Errorf("the region's migration took an app with its own KEK along: %s", got["app003"])
	}
	w.recorded(map[string]int{
		"keys.rotate begun": 1, "keys.rotate ok": 1, "keys.shredded ok": 1,
		"keys.job_started ok": 11, "keys.job_finished ok": 11, "keys.job_failed": 0,
	})
	for _, bad := range []Spec{
		{Kind: "x", Actor: actor},
		{Kind: Migrate, Actor: actor},
		{Kind: Rewrap, To: "local:b", Actor: actor},
		{Kind: Rewrap},
		{Kind: Migrate, To: "local:c", Actor: actor},
	} {
		if _, err := a.Start(t.Context(), bad); !errors.Is(err, ErrSpec) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	if _, err := a.Job(t.Context(), "current"); !errors.Is(err, ErrNoJob) {
		t.Errorf("a job that is none: %v", err)
	}
}

// TestResume lets the process die at every write of the job's row, before it and
// after it. Another process takes over when the lease has run out: every app is
// done, and counted, once.
func TestResume(t *testing.T) {
	const apps = 5
	w := newWorld(t)
	first := w.admin(w.rows())
	w.apps(first, apps)
	at := "local:a"
	for _, kind := range []Kind{Rewrap, Migrate, Replace} {
		for cut, lived := 1, false; !lived; cut++ {
			for _, before := range []bool{false, true} {
				spec := Spec{Kind: kind}
				switch kind {
				case Rewrap:
					_, err := first.Rotate(t.Context(), actor)
					must(t, err)
				case Migrate:
					at = map[string]string{"local:a": "local:b", "local:b": "local:a"}[at]
					spec.To = at
				case Replace, Verify:
				}
				ctx, die := context.WithCancel(t.Context())
				rows := &cutRows{Rows: w.rows(), left: cut, before: before, die: die}
				dying := w.admin(rows)
				job := w.start(first, spec)
				ended := make(chan error, 1)
				go func() { ended <- dying.Run(ctx) }()
				for rows.survived() {
					j, err := first.Job(t.Context(), job.ID)
					must(t, err)
					if lived = !j.Finished.IsZero(); lived {
						break
					}
					time.Sleep(time.Millisecond)
				}
				die()
				must(t, <-ended)
				w.shift.Add(int64(time.Minute))
				second := w.admin(w.rows())
				stop := w.run(second)
				j := w.end(second, job.ID)
				stop()
				if j.State != Done || j.Done != apps || j.Skipped != 0 || j.Failed != 0 || len(j.Pending) != 0 {
					t.Fatalf("%s cut at write %d (before it: %t): %s", kind, cut, before, pretty(j))
				}
			}
		}
	}
	stop := w.run(first)
	defer stop()
	w.want(w.do(first, Spec{Kind: Verify}), Done, apps, 0, 0)
	w.audited()
}

// TestTwoAtOnce: two processes start and work on the same job, and one takes it
// from the other in the middle. Each app is done once.
func TestTwoAtOnce(t *testing.T) {
	const apps = 30
	w := newWorld(t)
	one, two := w.admin(w.rows()), w.admin(w.rows())
	w.apps(one, apps)
	_, err := one.Rotate(t.Context(), actor)
	must(t, err)
	w.a.Delay(2 * time.Millisecond)
	var jobs [2]Job
	var wg sync.WaitGroup
	for i, a := range []*Admin{one, two} {
		defer w.run(a)()
		wg.Go(func() { jobs[i] = w.start(a, Spec{Kind: Rewrap}) })
	}
	wg.Wait()
	if jobs[0].ID != jobs[1].ID {
		t.Fatalf("two jobs: %s, %s", jobs[0].ID, jobs[1].ID)
	}
	if _, err := two.Start(t.Context(), Spec{Kind: Verify, Actor: actor}); !errors.Is(err, ErrBusy) {
		t.Errorf("another job meanwhile: %v", err)
	}
	owners := map[string]bool{}
	for {
		j, err := one.Job(t.Context(), jobs[0].ID)
		must(t, err)
		if j.Ended() {
			break
		}
		if j.Owner != "" && !owners[j.Owner] && len(owners) < 2 && j.Done > len(owners)*apps/4 {
			owners[j.Owner] = true
			w.shift.Add(int64(time.Minute)) // its lease has run out
			one.wake()
			two.wake()
		}
		time.Sleep(time.Millisecond)
	}
	w.want(w.end(one, jobs[0].ID), Done, apps, 0, 0)
	w.all(one, w.ida, "2")
	if len(owners) < 2 {
		t.Logf("the job was not taken over in time")
	}
	w.recorded(map[string]int{"keys.job_started ok": 1})
}

// TestOutage: a short one is waited for, a long one stops the job, and the same
// command goes on with it.
func TestOutage(t *testing.T) {
	w := newWorld(t)
	a := w.admin(w.rows())
	defer w.run(a)()
	w.apps(a, 10)
	rotate := func() {
		t.Helper()
		_, err := a.Rotate(t.Context(), actor)
		must(t, err)
	}
	rotate()
	w.a.FailNext(3, kms.ErrThrottled, "rewrap")
	w.want(w.do(a, Spec{Kind: Rewrap}), Done, 10, 0, 0)
	rotate()
	w.a.FailNext(4, kms.ErrUnavailable, "unwrap") // some apps of a chunk
	w.want(w.do(a, Spec{Kind: Rewrap}), Done, 10, 0, 0)
	for _, out := range []struct { // in this order: the second moves back what the first moved
		class error
		to    string
	}{{kms.ErrUnavailable, "local:b"}, {kms.ErrAccessDenied, "local:a"}} {
		w.b.Fail(out.class, "wrap", "unwrap")
		w.a.Fail(out.class, "wrap", "unwrap")
		j := w.do(a, Spec{Kind: Migrate, To: out.to})
		if j.State != Stopped || j.Error != snake(out.class) {
			t.Fatalf("in an outage: %s", pretty(j))
		}
		w.a.Heal()
		w.b.Heal()
		again := w.do(a, Spec{Kind: Migrate, To: out.to})
		if again.ID != j.ID {
			t.Error("another job instead of the same one")
		}
		w.want(again, Done, 10, 0, 0)
	}
	w.recorded(map[string]int{"keys.job_failed unavailable": 1, "keys.job_failed access_denied": 1, "keys.job_resumed ok": 2})
}

// TestOneAppFails: an app that cannot be done is named, the others are done.
func TestOneAppFails(t *testing.T) {
	w := newWorld(t)
	a := w.admin(w.rows())
	defer w.run(a)()
	w.apps(a, 6)
	_, idc := w.kek(t.TempDir()+"/c", "local:c")
	other, err := kms.NewKeyring(kms.Config{Region: region, Provider: w.opened["local:c"], Rows: w.rows()})
	must(t, err)
	must(t, other.CreateApp(t.Context(), "app003x"))
	must(t, other.Close())
	_, err = a.Rotate(t.Context(), actor)
	must(t, err)
	for _, spec := range []Spec{{Kind: Rewrap}, {Kind: Verify}, {Kind: Replace}} {
		j := w.do(a, spec)
		w.want(j, Failed, 6, 0, 1)
		if f := j.Failures; len(f) != 1 || f[0].App != "app003x" || f[0].Error != "key_not_found" {
			t.Errorf("%s: failures %v", spec.Kind, f)
		}
	}
	findings, err := a.Doctor(t.Context(), region)
	must(t, err)
	if text := pretty(findings); !strings.Contains(text, "1 wraps are under "+idc.String()+", which no setting names") {
		t.Errorf("doctor: %s", text)
	}
	// Naming its KEK mends it.
	b, err := New(t.Context(), Options{
		Keyring: a.keyring, Rows: w.rows(), Audit: w.journal, Primary: w.opened["local:a"], Setting: "local:a",
		Others: []string{"local:c"}, Open: w.open,
	})
	must(t, err)
	defer func() { must(t, b.Close()) }()
	w.want(w.do(a, Spec{Kind: Verify}), Done, 7, 0, 0)
}

// TestRetire: refused while a row or a kept copy needs the version, which it
// names, and done when nothing does.
func TestRetire(t *testing.T) {
	w := newWorld(t)
	a := w.admin(w.rows())
	defer w.run(a)()
	w.apps(a, 3)
	ctx := t.Context()
	_, err := a.AddBackup(ctx, actor, "weekly", w.now().Add(time.Hour))
	must(t, err)
	_, err = a.Rotate(ctx, actor)
	must(t, err)
	refused := func(id kms.Identity, before string, needed int, uses ...string) {
		t.Helper()
		for _, dry := range []bool{true, false} {
			r, err := a.Retire(ctx, actor, id, before, dry)
			if !dry && !errors.Is(err, ErrNeeded) || dry && err != nil || r.Needed != needed || r.Done {
				t.Fatalf("retire %s before %q: %+v, %v", id, before, r, err)
			}
			for _, use := range uses {
				if !slices.ContainsFunc(r.Uses, func(u Use) bool { return u.App == use || u.Backup == use }) {
					t.Errorf("%s is not named: %+v", use, r.Uses)
				}
			}
		}
	}
	refused(w.ida, "2", 4, "app000", "app001", "app002", "weekly")
	w.want(w.do(a, Spec{Kind: Rewrap}), Done, 3, 0, 0)
	refused(w.ida, "2", 1, "weekly")
	w.shift.Add(int64(2 * time.Hour)) // the copy is no longer kept
	r, err := a.Retire(ctx, actor, w.ida, "2", false)
	must(t, err)
	if d, err := w.a.Describe(ctx); err != nil || !r.Done || d.MinVersion != "2" {
		t.Errorf("retired %+v: %+v, %v", r, d, err)
	}
	if _, err := a.Retire(ctx, actor, w.ida, "", false); !errors.Is(err, ErrNeeded) {
		t.Errorf("retiring the KEK of new apps: %v", err)
	}
	w.want(w.do(a, Spec{Kind: Migrate, To: "local:b"}), Done, 3, 0, 0)
	w.want(w.do(a, Spec{Kind: Migrate, To: "local:a"}), Done, 3, 0, 0)
	_, err = a.AddBackup(ctx, actor, "monthly", w.now().Add(time.Hour))
	must(t, err)
	w.want(w.do(a, Spec{Kind: Migrate, To: "local:b"}), Done, 3, 0, 0)
	refused(w.ida, "", 1, "monthly")
	must(t, a.EndBackup(ctx, actor, "monthly"))
	r, err = a.Retire(ctx, actor, w.ida, "", false)
	must(t, err)
	var set providerSet
	_, err = loadJSON(ctx, w.rows(), providersRow, &set)
	must(t, err)
	if has(set.Settings, "local:a") || !r.Done {
		t.Errorf("retired %s: %t; settings %v", w.ida, r.Done, set.Settings)
	}
	w.want(w.do(a, Spec{Kind: Verify}), Done, 3, 0, 0)
	w.recorded(map[string]int{
		"keys.retire begun": 2, "keys.retire ok": 2, "keys.backup_registered ok": 2, "keys.backup_ended ok": 1,
	})
	for id, until := range map[string]time.Time{"": w.now().Add(time.Hour), "A": w.now().Add(time.Hour), "old": w.now(), "long": w.now().Add(maxBackupLife * 2)} {
		if _, err := a.AddBackup(ctx, actor, id, until); !errors.Is(err, ErrSpec) {
			t.Errorf("backup %q until %s: %v", id, until, err)
		}
	}
}

// TestStartWithoutProviders: a region starts while its KEKs are away, and knows
// them when they come back.
func TestStartWithoutProviders(t *testing.T) {
	w := newWorld(t)
	a := w.admin(w.rows())
	stop := w.run(a)
	w.apps(a, 3)
	w.want(w.do(a, Spec{Kind: Migrate, To: "local:b"}), Done, 3, 0, 0)
	stop()
	w.a.Fail(kms.ErrUnavailable)
	w.b.Fail(kms.ErrUnavailable)
	again := w.admin(w.rows())
	w.a.Heal()
	half := w.admin(w.rows())
	if _, err := half.keyring.Tagger(t.Context(), "app001"); !errors.Is(err, kms.ErrUnavailable) {
		t.Errorf("a key under the KEK that is away, while the other is there: %v", err)
	}
	w.a.Fail(kms.ErrUnavailable)
	if err := again.Settle(t.Context()); !errors.Is(err, kms.ErrUnavailable) {
		t.Errorf("while they are away: %v", err)
	}
	s, err := again.Status(t.Context(), region)
	must(t, err)
	if len(s.Unknown) != 2 || s.Unknown[0].Error != "unavailable" || s.Apps != 3 {
		t.Errorf("status: %s", pretty(s))
	}
	if _, err := again.keyring.Tagger(t.Context(), "app001"); !errors.Is(err, kms.ErrUnavailable) {
		t.Errorf("using a key: %v", err)
	}
	w.b.Heal() // the KEK that was left may stay away
	must(t, again.Settle(t.Context()))
	if again.Primary() != w.idb {
		t.Errorf("the primary is %s", again.Primary())
	}
	must(t, again.keyring.CreateApp(t.Context(), "later"))
	w.all(again, w.idb, "1")
}
