package journal_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/local"
)

// manyRows is more than a sweep overwrites one by one.
const manyRows = 260

func manyName(i int) string            { return fmt.Sprintf("app.%04d", i) }
func manyValue(i int, v string) []byte { return fmt.Appendf(nil, "row %d of version %s.", i, v) }
func stayName(i int) string            { return fmt.Sprintf("sub.%04d._", i) }
func present(rows kms.Rows, name string) (string, uint64) {
	row, err := rows.Load(context.Background(), name)
	if err != nil {
		return err.Error(), 0
	}
	return string(row.Value), row.Revision
}

// replaceMany writes a version of all rows, in groups of some size.
func replaceMany(ctx context.Context, rows *journal.Rows, version string, group int) error {
	names := make([]string, manyRows)
	for i := range names {
		names[i] = manyName(i)
	}
	have, errs := rows.LoadGroup(ctx, names)
	for from := 0; from < manyRows; from += group {
		var updates []kms.RowUpdate
		for i := from; i < min(from+group, manyRows); i++ {
			if errs[i] != nil {
				return errs[i]
			}
			updates = append(updates, kms.RowUpdate{Name: names[i], Value: manyValue(i, version), Revision: have[i].Revision})
		}
		if err := errors.Join(rows.UpdateGroup(ctx, updates)...); err != nil {
			return err
		}
	}
	return nil
}

func createMany(ctx context.Context, rows *journal.Rows, version string) error {
	for i := range manyRows {
		if _, err := rows.Create(ctx, manyName(i), manyValue(i, version)); err != nil {
			return err
		}
	}
	for i := range 3 {
		if _, err := rows.Create(ctx, stayName(i), []byte(stayName(i))); err != nil {
			return err
		}
	}
	revision, err := rows.Create(ctx, "app.deleted", []byte("deleted"))
	if err != nil {
		return err
	}
	return rows.Delete(ctx, "app.deleted", revision)
}

// checkMany fails unless the rows have the version, and nothing of another one is
// on disk.
func checkMany(t *testing.T, w *world, rows kms.Rows, version string, gone ...string) {
	t.Helper()
	listed := map[string]bool{}
	for name, err := range rows.List(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		listed[name] = true
	}
	for i := range manyRows {
		if value, _ := present(rows, manyName(i)); value != string(manyValue(i, version)) || !listed[manyName(i)] {
			t.Fatalf("row %d is %q, listed %v, want version %s", i, value, listed[manyName(i)], version)
		}
	}
	for i := range 3 {
		if value, _ := present(rows, stayName(i)); value != stayName(i) || !listed[stayName(i)] {
			t.Fatalf("row %s is %q, listed %v", stayName(i), value, listed[stayName(i)])
		}
	}
	if _, err := rows.Load(t.Context(), "app.deleted"); !errors.Is(err, kms.ErrRowNotFound) || len(listed) != manyRows+3 {
		t.Errorf("the deleted row: %v; %d rows are listed", err, len(listed))
	}
	for _, version := range gone {
		if search(t, w.dir, fmt.Appendf(nil, " of version %s.", version)) {
			t.Errorf("version %s is still on disk", version)
		}
	}
}

// TestEraseReplaced: what many updates have replaced is gone from the disk, the
// rows that stay are there, and those who hold them learn of it.
func TestEraseReplaced(t *testing.T) {
	for _, group := range []int{manyRows, 20} { // with a mark before the first, and without
		t.Run(fmt.Sprintf("groups of %d", group), func(t *testing.T) {
			w := begin(t, t.TempDir(), false, nil)
			rows := rowsOn(t, w).(*journal.Rows)
			if err := createMany(t.Context(), rows, "first"); err != nil {
				t.Fatal(err)
			}
			for _, version := range []string{"second", "third"} {
				if err := replaceMany(t.Context(), rows, version, group); err != nil {
					t.Fatal(err)
				}
			}
			_, before := present(rows, stayName(0))
			for _, version := range []string{"first", "second"} {
				if !search(t, w.dir, fmt.Appendf(nil, " of version %s.", version)) {
					t.Fatalf("version %s is gone already, so the test shows nothing", version)
				}
			}
			eraseReplaced(t, rows)
			checkMany(t, w, rows, "third", "first", "second")
			if _, err := rows.Update(t.Context(), stayName(0), []byte("x"), before); !errors.Is(err, kms.ErrRowConflict) {
				t.Errorf("an update of a row that was moved: %v", err)
			}
			// Nothing is left to do, and the next time is as this one.
			eraseReplaced(t, rows)
			if err := replaceMany(t.Context(), rows, "fourth", group); err != nil {
				t.Fatal(err)
			}
			eraseReplaced(t, rows)
			checkMany(t, w, rows, "fourth", "first", "second", "third")
		})
	}
}

// eraseReplaced erases, after the sweep of the journal's own start if need be.
func eraseReplaced(t *testing.T, rows *journal.Rows) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		err := rows.EraseReplaced(t.Context())
		if err == nil {
			return
		}
		if !errors.Is(err, journal.ErrUnavailable) || time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// TestLoadGroup: each row, or its error; and one request for each.
func TestLoadGroup(t *testing.T) {
	w := begin(t, t.TempDir(), false, nil)
	rows := rowsOn(t, w).(*journal.Rows)
	if err := createMany(t.Context(), rows, "first"); err != nil {
		t.Fatal(err)
	}
	names := []string{"app.none", "app.deleted", "not a name"}
	for i := range manyRows {
		names = append(names, manyName(i))
	}
	before := w.nc.Stats().OutMsgs
	have, errs := rows.LoadGroup(t.Context(), names)
	if sent := w.nc.Stats().OutMsgs - before; sent > manyRows+20 {
		t.Errorf("%d requests for %d rows", sent, len(names))
	}
	if !errors.Is(errs[0], kms.ErrRowNotFound) || !errors.Is(errs[1], kms.ErrRowNotFound) || !errors.Is(errs[2], journal.ErrInvalid) {
		t.Errorf("errors %v", errs[:3])
	}
	for i := range manyRows {
		if errs[3+i] != nil || string(have[3+i].Value) != string(manyValue(i, "first")) || have[3+i].Revision == 0 {
			t.Fatalf("row %d: %q, %v", i, have[3+i].Value, errs[3+i])
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, errs := rows.LoadGroup(ctx, names[3:5]); errs[0] == nil || errs[1] == nil {
		t.Errorf("cancelled: %v", errs)
	}
}

// TestEraseKilled kills a process with SIGKILL before each of the requests that
// an erasure consists of, and while the last one is under way: the next process
// finishes it, and no row is lost.
func TestEraseKilled(t *testing.T) {
	dir := t.TempDir()
	w := begin(t, dir, false, nil)
	if err := createMany(t.Context(), rowsOn(t, w).(*journal.Rows), "0"); err != nil {
		t.Fatal(err)
	}
	w.end(t)
	var gone []string
	steps := []string{"publish _fill.1", "publish _fill.6", "publish _roll", "publish sub.0000._", "publish sub.0002._", "purge", "purging", "purged"}
	for i, step := range steps {
		version := fmt.Sprint(i + 1)
		killAt(t, dir, version, step)
		gone = append(gone, fmt.Sprint(i))
		w := begin(t, dir, false, nil)
		rows := rowsOn(t, w).(*journal.Rows)
		eraseReplaced(t, rows)
		t.Run(step, func(t *testing.T) { checkMany(t, w, rows, version, gone...) })
		w.end(t)
	}
}

const (
	eraserEnv = "COFFER_TEST_ROWS_CHILD"
	stepEnv   = "COFFER_TEST_ROWS_STEP"
)

// killAt runs a process that writes a version of the rows and erases the one
// before, and kills it at a step.
func killAt(t *testing.T, dir, version, step string) {
	t.Helper()
	cmd := exec.Command(os.Args[0]) //nolint:gosec // the test itself
	cmd.Env = append(os.Environ(), eraserEnv+"="+dir, modeEnv+"="+version, stepEnv+"="+step)
	cmd.Stderr = t.Output()
	in, err := cmd.StdinPipe() // its end ends the child, should the test end first
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	_ = in.Close()
	if err != nil || line != "at "+step+"\n" {
		t.Fatalf("the process did not come to %q: %q, %v", step, line, err)
	}
}

// childEraser prints when it has come to its step, and stops there: but at
// "purging", where it goes on to be killed somewhere in it.
func childEraser(dir, version, stop string) error {
	ctx := context.Background()
	go func() {
		_, _ = bufio.NewReader(os.Stdin).ReadByte()
		os.Exit(1)
	}()
	keys, err := local.Open(ctx, local.Options{Path: filepath.Join(dir, "keys"), Create: true, Region: region().Cloud})
	if err != nil {
		return err
	}
	srv, err := embedded.Start(ctx, embedded.Options{StoreDir: filepath.Join(dir, "nats"), MaxStore: 8 << 30})
	if err != nil {
		return err
	}
	nc, err := srv.Connect()
	if err != nil {
		return err
	}
	j, err := journal.Open(ctx, journal.Config{Region: region(), Conn: nc, KMS: keys, Sync: srv.Syncer()})
	if err != nil {
		return err
	}
	defer func() { _ = j.Close() }()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	bucket := journal.KeyringBucket(region().ID)
	// In small groups no mark is set ahead, so that the erasure has every step.
	if err := replaceMany(ctx, journal.NewRows(js, bucket, srv.Syncer()), version, 20); err != nil {
		return err
	}
	at := func(step string) {
		if step == stop {
			_, _ = os.Stdout.WriteString("at " + step + "\n")
			if step != "purging" {
				select {}
			}
		}
	}
	steps := stepping{JetStream: js, prefix: "$KV." + bucket + ".", at: at}
	if err := journal.NewRows(steps, bucket, srv.Syncer()).EraseReplaced(ctx); err != nil {
		return err
	}
	select {} // the kill was late: it is one after the last step
}

// stepping tells of each request that changes something before it is made.
type stepping struct {
	jetstream.JetStream

	prefix string
	at     func(step string)
}

func (s stepping) PublishMsg(ctx context.Context, msg *nats.Msg, opts ...jetstream.PublishOpt) (*jetstream.PubAck, error) {
	s.at("publish " + strings.TrimPrefix(msg.Subject, s.prefix))
	return s.JetStream.PublishMsg(ctx, msg, opts...)
}

func (s stepping) Stream(ctx context.Context, name string) (jetstream.Stream, error) {
	stream, err := s.JetStream.Stream(ctx, name)
	return steppingStream{stream, s.at}, err
}

type steppingStream struct {
	jetstream.Stream

	at func(step string)
}

func (s steppingStream) Purge(ctx context.Context, opts ...jetstream.StreamPurgeOpt) error {
	s.at("purge")
	s.at("purging")
	err := s.Stream.Purge(ctx, opts...)
	s.at("purged")
	return err
}
