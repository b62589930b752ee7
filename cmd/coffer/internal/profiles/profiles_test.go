package profiles_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/cmd/coffer/internal/profiles"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/journal/journaltest"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/local"
)

const day = 24 * time.Hour

// region is a region with a clock that the test moves.
type region struct {
	*testing.T

	*journal.Journal

	dir   string
	js    jetstream.JetStream
	rows  *journal.Rows
	app   journal.AppID
	shift atomic.Int64
	uses  sync.WaitGroup
}

func newRegion(t *testing.T) *region {
	t.Helper()
	r := &region{T: t, dir: t.TempDir()}
	provider, err := local.Open(t.Context(), local.Options{Path: filepath.Join(t.TempDir(), "key"), Create: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = provider.Close() })
	_, nc := journaltest.Start(t, embedded.Options{StoreDir: r.dir, SyncAlways: true})
	r.Journal, err = journal.Open(t.Context(), journal.Config{Region: journal.DefaultRegions()[2], Conn: nc, KMS: provider, Now: r.now})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.uses.Wait()
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	if r.js, err = jetstream.New(nc); err != nil {
		t.Fatal(err)
	}
	r.rows = journal.NewRows(r.js, journal.ProfileBucket("eu"), nil)
	app, err := r.CreateApp(t.Context(), journal.AppSpec{Plan: "pro"})
	if err != nil {
		t.Fatal(err)
	}
	r.app = app.ID
	return r
}

func (r *region) now() time.Time { return time.Now().Add(time.Duration(r.shift.Load())) }

func (r *region) advance(d time.Duration) { r.shift.Add(int64(d)) }

// store is what one process has.
func (r *region) store() *profiles.Store {
	return profiles.New(profiles.Config{Rows: r.rows, Keyring: r.Keyring(), Now: r.now})
}

func (r *region) tag(user string) kms.Tag {
	r.Helper()
	tag, err := r.Tag(r.Context(), r.app, kms.KindSubject, user)
	if err != nil {
		r.Fatal(err)
	}
	return tag
}

// get reads a profile as a request does, and waits for what it leaves to be done.
func (r *region) get(s *profiles.Store, user string) (profiles.Profile, error) {
	p, err := s.Get(r.Context(), r.app, r.tag(user), func(f func(context.Context)) {
		r.uses.Go(func() { f(context.WithoutCancel(r.Context())) })
	})
	return p, err
}

// writes is how often a row was written since the bucket was made.
func (r *region) writes() uint64 {
	r.Helper()
	s, err := r.js.Stream(r.Context(), "KV_"+journal.ProfileBucket("eu"))
	if err != nil {
		r.Fatal(err)
	}
	return s.CachedInfo().State.LastSeq
}

func (r *region) put(s *profiles.Store, user, content string) {
	r.Helper()
	if _, _, err := s.Put(r.Context(), r.app, user, r.tag(user), jsontext.Value(content)); err != nil {
		r.Fatal(err)
	}
}

// TestOneWriteADay counts the writes of a profile that is read all the time, by
// two processes at once: one a day.
func TestOneWriteADay(t *testing.T) {
	r := newRegion(t)
	processes := []*profiles.Store{r.store(), r.store()}
	r.put(processes[0], "ann", `{"nickname":"Ann"}`)
	start := r.writes()
	const days = 20
	for n := range days {
		for range 4 { // times a day
			var readers sync.WaitGroup
			for i := range 10 {
				readers.Go(func() {
					if p, err := r.get(processes[i%2], "ann"); err != nil || string(p.Content) != `{"nickname":"Ann"}` {
						t.Errorf("read %s, %v", p.Content, err)
					}
				})
			}
			readers.Wait()
			r.uses.Wait()
			if wrote := r.writes() - start; wrote != uint64(n) {
				t.Fatalf("on day %d it was written %d times", n, wrote)
			}
			if p, err := r.get(processes[0], "ann"); err != nil || p.Ends.Sub(r.now()) < 178*day {
				t.Fatalf("on day %d it ends at %v, %v", n, p.Ends, err)
			}
			r.advance(day / 4)
		}
	}
}

// TestUses: 10,000 reads of a profile in one day, by two processes, are one write.
func TestUses(t *testing.T) {
	r := newRegion(t)
	processes := []*profiles.Store{r.store(), r.store()}
	r.put(processes[0], "ann", `{"nickname":"Ann"}`)
	start := r.writes()
	const uses, workers = 10_000, 8
	for range 2 { // a day, and the one after it
		before := r.writes()
		var readers sync.WaitGroup
		for w := range workers {
			readers.Go(func() {
				for range uses / workers {
					r.advance(day / uses)
					if _, err := r.get(processes[w%2], "ann"); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		readers.Wait()
		r.uses.Wait()
		if wrote := r.writes() - before; wrote > 1 {
			t.Errorf("%d reads in a day were %d writes", uses, wrote)
		}
	}
	if wrote := r.writes() - start; wrote == 0 {
		t.Error("no use was written down")
	}
}

// TestUnused: a profile that nobody uses is warned of once, refused at its end
// though it is still there, and gone from the disk after the sweep.
func TestUnused(t *testing.T) {
	r := newRegion(t)
	s := r.store()
	const canary = "canary-profile-7d1f"
	r.put(s, "ann", `{"nickname":"`+canary+`"}`)
	r.put(s, "ben", `{"nickname":"Ben"}`)
	row, err := r.rows.Load(t.Context(), r.app.String()+"."+r.tag("ann").String())
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(row.Value, []byte(canary)) {
		t.Error("the row has the content")
	}
	sealed := bytes.Clone(row.Value)
	places := journal.NewRows(r.js, journal.RegistryBucket("eu"), nil)
	var warned, told []string
	sweep := func(ended, warnings int) {
		t.Helper()
		done, err := s.Sweep(r.rows, places, func(_ context.Context, w profiles.Warning) error {
			if w.App != r.app || w.Ends.Sub(r.now()) > 30*day || w.Ends.Sub(w.Used) != 180*day {
				t.Errorf("warned of %+v", w)
			}
			warned = append(warned, w.Subject.String())
			return nil
		}, func(ctx context.Context, w profiles.Warning) error {
			user, err := w.User(ctx)
			told = append(told, user)
			return err
		}).Run(t.Context(), r.now())
		if err != nil || done.Ended != ended || done.Warned != warnings {
			t.Errorf("the sweep did %+v, %v, want %d and %d", done, err, ended, warnings)
		}
	}
	r.advance(149 * day)
	sweep(0, 0)
	r.advance(day + time.Minute)
	sweep(0, 2)
	sweep(0, 0)
	if _, err := r.get(s, "ben"); err != nil { // used, and noticed
		t.Fatal(err)
	}
	r.uses.Wait()
	r.advance(30 * day)
	if p, err := r.get(s, "ann"); !errors.Is(err, profiles.ErrNotFound) {
		t.Errorf("at its end it is served: %s, %v", p.Content, err)
	}
	if n, err := s.CountApp(t.Context(), r.app); err != nil || n != 2 {
		t.Errorf("before the sweep there are %d rows, %v", n, err)
	}
	sweep(1, 0)
	if n, err := s.CountApp(t.Context(), r.app); err != nil || n != 1 {
		t.Errorf("after the sweep there are %d rows, %v", n, err)
	}
	if _, err := r.get(s, "ben"); err != nil {
		t.Errorf("the one that was used: %v", err)
	}
	if len(warned) != 2 || strings.Join(told, " ") != "ann ben" {
		t.Errorf("warned of %v, told of %v", warned, told)
	}
	if found := grep(t, r.dir, sealed[len(sealed)/2:]); found != "" {
		t.Errorf("the sealed bytes are still in %s", found)
	}
	// A tenth of its life later no key opens a copy.
	if n, err := r.Keyring().DestroyEpochs(t.Context(), r.app.String(), r.now().Add(18*day)); err != nil || n != 1 {
		t.Errorf("%d keys were destroyed, %v", n, err)
	}
	if _, err := r.get(s, "ben"); err != nil {
		t.Errorf("the one that was used, after that: %v", err)
	}
}

func grep(t *testing.T, dir string, what []byte) (found string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		if bytes.Contains(content, what) {
			found = path
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestErasedUser(t *testing.T) {
	r := newRegion(t)
	s := r.store()
	r.put(s, "ann", `{"nickname":"Ann"}`)
	r.put(s, "ben", `{"nickname":"Ben"}`)
	if err := r.Keyring().EraseSubject(t.Context(), r.app.String(), r.tag("ann")); err != nil {
		t.Fatal(err)
	}
	if p, err := r.get(s, "ann"); !errors.Is(err, kms.ErrSubjectErased) {
		t.Errorf("read: %s, %v", p.Content, err)
	}
	if _, _, err := s.Put(t.Context(), r.app, "ann", r.tag("ann"), jsontext.Value(`{}`)); !errors.Is(err, kms.ErrSubjectErased) {
		t.Errorf("stored: %v", err)
	}
	if err := s.Delete(t.Context(), r.app, r.tag("ann")); err != nil {
		t.Errorf("deleted: %v", err)
	}
	if p, err := r.get(s, "ben"); err != nil || p.User != "ben" {
		t.Errorf("another's: %+v, %v", p, err)
	}
	// A row of another user is not taken for one's own.
	row, err := r.rows.Load(t.Context(), r.app.String()+"."+r.tag("ben").String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.rows.Create(t.Context(), r.app.String()+"."+r.tag("eve").String(), row.Value); err != nil {
		t.Fatal(err)
	}
	if p, err := r.get(s, "eve"); !errors.Is(err, kms.ErrAuthentication) {
		t.Errorf("exchanged: %+v, %v", p, err)
	}
	if n, err := s.DeleteApp(t.Context(), r.app); err != nil || n != 2 {
		t.Errorf("of the app %d were deleted, %v", n, err)
	}
	if _, err := r.get(s, "ben"); !errors.Is(err, profiles.ErrNotFound) {
		t.Errorf("afterwards: %v", err)
	}
}

func TestRefused(t *testing.T) {
	r := newRegion(t)
	s := r.store()
	for name, c := range map[string]struct {
		content string
		class   error
	}{
		"nothing":        {``, profiles.ErrInvalid},
		"a list":         {`[]`, profiles.ErrInvalid},
		"a text":         {`"x"`, profiles.ErrInvalid},
		"cut":            {`{"a":1`, profiles.ErrInvalid},
		"a name twice":   {`{"a":1,"a":2}`, profiles.ErrInvalid},
		"invalid UTF-8":  {"{\"a\":\"\xff\"}", profiles.ErrInvalid},
		"nested":         {strings.Repeat(`{"a":`, 9) + `1` + strings.Repeat(`}`, 9), profiles.ErrInvalid},
		"large":          {`{"a":"` + strings.Repeat("x", profiles.MaxBytes) + `"}`, profiles.ErrTooLarge},
		"two":            {`{}{}`, profiles.ErrInvalid},
		"with a comment": {`{/**/}`, profiles.ErrInvalid},
	} {
		if _, _, err := s.Put(t.Context(), r.app, "ann", r.tag("ann"), jsontext.Value(c.content)); !errors.Is(err, c.class) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := r.writes(); n != 0 {
		t.Errorf("%d writes", n)
	}
	deep := strings.Repeat(`{"a":`, 8) + `1` + strings.Repeat(`}`, 8)
	r.put(s, "ann", deep)
	if p, err := r.get(s, "ann"); err != nil || string(p.Content) != deep {
		t.Errorf("%s, %v", p.Content, err)
	}
}
