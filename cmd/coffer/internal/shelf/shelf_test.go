package shelf_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/cmd/coffer/internal/shelf"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/journal/journaltest"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/local"
)

const day = 24 * time.Hour

func life() shelf.Life {
	return shelf.Life{Class: "test", Lifetime: 180 * day, Warning: 30 * day, Refresh: day}
}

// counting counts the rows that a sweep looks at.
type counting struct {
	*journal.Rows
	looked int
}

func (c *counting) InOrder(ctx context.Context, prefix string, after uint64) iter.Seq2[journal.WrittenRow, error] {
	return func(yield func(journal.WrittenRow, error) bool) {
		for row, err := range c.Rows.InOrder(ctx, prefix, after) {
			c.looked++
			if !yield(row, err) {
				return
			}
		}
	}
}

func region(t *testing.T) (*journal.Journal, jetstream.JetStream, *journal.Rows) {
	t.Helper()
	dir := t.TempDir()
	provider, err := local.Open(t.Context(), local.Options{Path: dir + "/keys", Create: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = provider.Close() })
	_, nc := journaltest.Start(t, embedded.Options{StoreDir: dir + "/nats", SyncAlways: true})
	j, err := journal.Open(t.Context(), journal.Config{Region: journal.DefaultRegions()[2], Conn: nc, KMS: provider})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := j.Close(); err != nil {
			t.Error(err)
		}
	})
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	return j, js, journal.NewRows(js, journal.RegistryBucket("eu"), nil)
}

// TestSweep holds a sweep against what it promises: what is unused ends, once,
// after one warning; what is used does neither; and what it looks at goes by
// what it ends and warns of, not by what there is.
func TestSweep(t *testing.T) {
	_, _, rows := region(t)
	start := time.Unix(1_700_000_000, 0).UTC()
	const records = 40
	write := func(name string, used time.Time, revision uint64) {
		t.Helper()
		value := []byte(strconv.FormatInt(used.Unix(), 10))
		var err error
		if revision == 0 {
			_, err = rows.Create(t.Context(), name, value)
		} else {
			_, err = rows.Update(t.Context(), name, value, revision)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for i := range records {
		write(fmt.Sprintf("rec.%02d", i), start.Add(time.Duration(i)*day), 0)
	}
	counted := &counting{Rows: rows}
	var ended, warned []string
	sweep := shelf.Sweep{
		Name: "test", Places: rows, Rows: counted, Prefix: "rec.", Life: life(),
		Used: func(row journal.WrittenRow) (time.Time, bool, error) {
			seconds, err := strconv.ParseInt(string(row.Value), 10, 64)
			return time.Unix(seconds, 0), true, err
		},
		End: func(ctx context.Context, row journal.WrittenRow) error {
			if err := rows.Delete(ctx, row.Name, row.Revision); err != nil {
				return err
			}
			ended = append(ended, row.Name)
			return nil
		},
		Warn: func(_ context.Context, row journal.WrittenRow) error {
			warned = append(warned, row.Name)
			return nil
		},
	}
	limit := 0
	run := func(after time.Duration, end, warn int) {
		t.Helper()
		done, err := sweep.Run(t.Context(), start.Add(after))
		if err != nil {
			t.Fatal(err)
		}
		if done != (shelf.Result{Ended: end, Warned: warn}) {
			t.Errorf("after %v: %+v, want %d ended and %d warned of", after, done, end, warn)
		}
		// What was deleted left a marker, which is passed once.
		if limit += 3*(end+warn) + 3; counted.looked > limit {
			t.Errorf("after %v: %d rows were looked at, at most %d should be", after, counted.looked, limit)
		}
	}
	run(149*day, 0, 0)
	run(150*day-time.Second, 0, 0)
	run(150*day, 0, 1)
	run(150*day, 0, 0)
	run(155*day, 0, 5)
	// One that was warned of is used, and begins anew.
	row, err := rows.Load(t.Context(), "rec.03")
	if err != nil {
		t.Fatal(err)
	}
	write("rec.03", start.Add(156*day), row.Revision)
	run(180*day-time.Second, 0, 24)
	run(180*day, 1, 1)
	run(190*day, 9, 9) // 1 to 10 without 3; 31 to 39
	if slices.Contains(ended, "rec.03") || len(ended) != 10 || len(warned) != records {
		t.Errorf("ended %v, warned of %v", ended, warned)
	}
	run((156+150)*day, 29, 1)
	run((156+180)*day, 1, 0)
	if _, err := rows.Load(t.Context(), "rec.03"); !errors.Is(err, kms.ErrRowNotFound) || ended[len(ended)-1] != "rec.03" {
		t.Errorf("the one that was used: %v, last of %v", err, ended)
	}
}

// TestTold: who is to be told of a warning is told once, in spite of another record
// whose owner cannot be told, which is tried again until it is used or ends; and
// after a sweep that was killed before it had noted how far it was, again.
func TestTold(t *testing.T) {
	_, _, rows := region(t)
	start := time.Unix(1_700_000_000, 0).UTC()
	revisions := make(map[string]uint64)
	write := func(name string, used time.Time) {
		t.Helper()
		value := []byte(strconv.FormatInt(used.Unix(), 10))
		var err error
		if revisions[name] == 0 {
			revisions[name], err = rows.Create(t.Context(), name, value)
		} else {
			revisions[name], err = rows.Update(t.Context(), name, value, revisions[name])
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for i, name := range []string{"rec.a", "rec.bad", "rec.b", "rec.worse", "rec.c"} {
		write(name, start.Add(time.Duration(i)*time.Second))
	}
	away := errors.New("its key is away")
	failing := map[string]bool{"rec.bad": true, "rec.worse": true}
	var told, warned []string
	sweep := shelf.Sweep{
		Name: "told", Places: rows, Rows: rows, Prefix: "rec.", Life: life(),
		Used: func(row journal.WrittenRow) (time.Time, bool, error) {
			seconds, err := strconv.ParseInt(string(row.Value), 10, 64)
			return time.Unix(seconds, 0), true, err
		},
		End: func(ctx context.Context, row journal.WrittenRow) error {
			return rows.Delete(ctx, row.Name, row.Revision)
		},
		Warn: func(_ context.Context, row journal.WrittenRow) error {
			warned = append(warned, row.Name)
			return nil
		},
		Tell: func(_ context.Context, row journal.WrittenRow) error {
			if failing[row.Name] {
				return away
			}
			told = append(told, row.Name)
			return nil
		},
	}
	run := func(after time.Duration, want shelf.Result, tell ...string) {
		t.Helper()
		told = nil
		done, err := sweep.Run(t.Context(), start.Add(after))
		if err != nil || done != want || !slices.Equal(told, tell) {
			t.Errorf("after %v: %+v, %v, told of %v, want %+v and %v", after, done, err, told, want, tell)
		}
	}
	run(151*day, shelf.Result{Warned: 5, Untold: 2}, "rec.a", "rec.b", "rec.c")
	run(151*day, shelf.Result{Untold: 2})
	if len(warned) != 5 {
		t.Errorf("warned of %v", warned)
	}
	failing["rec.bad"] = false
	run(152*day, shelf.Result{Untold: 1}, "rec.bad")
	// Used, so that there is nothing to tell.
	write("rec.worse", start.Add(153*day))
	failing["rec.worse"] = false
	run(153*day, shelf.Result{})
	// One that cannot be told at all ends without a word.
	failing["rec.worse"] = true
	run((153+150)*day, shelf.Result{Ended: 4, Warned: 1, Untold: 1})
	run((153+180)*day, shelf.Result{Ended: 1})

	// A process that is killed has told, and has not noted it: the next tells again.
	write("rec.d", start.Add(400*day))
	killed, kill := context.WithCancel(t.Context())
	tell := sweep.Tell
	sweep.Tell = func(ctx context.Context, row journal.WrittenRow) error {
		kill()
		return errors.Join(tell(ctx, row), ctx.Err())
	}
	if done, err := sweep.Run(killed, start.Add(551*day)); !errors.Is(err, context.Canceled) || done.Warned != 0 {
		t.Errorf("killed: %+v, %v", done, err)
	}
	sweep.Tell = tell
	run(551*day, shelf.Result{Warned: 1}, "rec.d")
	run(551*day, shelf.Result{})
}

// TestKeys: a record opens as itself only, and no more once the key of its epoch
// or of its subject is gone.
func TestKeys(t *testing.T) {
	j, _, _ := region(t)
	app, err := j.CreateApp(t.Context(), journal.AppSpec{Plan: "pro"})
	if err != nil {
		t.Fatal(err)
	}
	id := app.ID.String()
	keys := shelf.Keys{Keyring: j.Keyring(), Domain: "test/v1"}
	subject, err := j.Tag(t.Context(), app.ID, kms.KindSubject, "ann")
	if err != nil {
		t.Fatal(err)
	}
	other, err := j.Tag(t.Context(), app.ID, kms.KindSubject, "ben")
	if err != nil {
		t.Fatal(err)
	}
	used := time.Now()
	seal := func(subject kms.Tag) []byte {
		t.Helper()
		envelope, err := keys.Seal(t.Context(), life(), id, subject, used, []byte("canary"), "one")
		if err != nil {
			t.Fatal(err)
		}
		return envelope
	}
	envelope := seal(subject)
	if content, err := keys.Open(t.Context(), id, subject, envelope, "one"); err != nil || string(content) != "canary" {
		t.Fatalf("opened %q, %v", content, err)
	}
	for name, open := range map[string]func() ([]byte, error){
		"another record":  func() ([]byte, error) { return keys.Open(t.Context(), id, subject, envelope, "two") },
		"another subject": func() ([]byte, error) { return keys.Open(t.Context(), id, other, envelope, "one") },
		"another kind": func() ([]byte, error) {
			return shelf.Keys{Keyring: j.Keyring(), Domain: "test/v2"}.Open(t.Context(), id, subject, envelope, "one")
		},
	} {
		if content, err := open(); !errors.Is(err, kms.ErrAuthentication) {
			t.Errorf("as %s: %q, %v", name, content, err)
		}
	}
	if err := j.Keyring().EraseSubject(t.Context(), id, subject); err != nil {
		t.Fatal(err)
	}
	if _, err := keys.Open(t.Context(), id, subject, envelope, "one"); !errors.Is(err, kms.ErrSubjectErased) {
		t.Errorf("of an erased subject: %v", err)
	}
	envelope = seal(other)
	// A tenth of the lifetime after its end the key of its epoch is destroyed.
	if n, err := j.Keyring().DestroyEpochs(t.Context(), id, used.Add(180*day-time.Second)); err != nil || n != 0 {
		t.Errorf("before the end %d epochs were destroyed, %v", n, err)
	}
	if n, err := j.Keyring().DestroyEpochs(t.Context(), id, used.Add(198*day)); err != nil || n != 1 {
		t.Errorf("after the end %d epochs were destroyed, %v", n, err)
	}
	if _, err := keys.Open(t.Context(), id, other, envelope, "one"); !errors.Is(err, kms.ErrEpochDestroyed) {
		t.Errorf("after its epoch: %v", err)
	}
}
