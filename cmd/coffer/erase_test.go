//go:build unix

package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/journal/journaltest"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/local"
)

// erasing is a journal on a folder, whose steps towards the disk can be counted.
type erasing struct {
	srv     *embedded.Server
	keys    *local.Provider
	journal *journal.Journal
	rows    *journal.Rows
	killer  *journaltest.Killer
	close   func()
}

func openErasing(ctx context.Context, dir string) (*erasing, error) {
	var e erasing
	var err error
	if e.keys, err = local.Open(ctx, local.Options{Path: filepath.Join(dir, "kek.json"), Create: true}); err != nil {
		return nil, err
	}
	if e.srv, err = embedded.Start(ctx, embedded.Options{StoreDir: filepath.Join(dir, "nats")}); err != nil {
		return nil, err
	}
	nc, err := e.srv.Connect()
	if err != nil {
		return nil, err
	}
	e.killer = &journaltest.Killer{Syncer: e.srv.Syncer()}
	e.journal, err = journal.Open(ctx, journal.Config{Region: journal.DefaultRegions()[2], Conn: nc, Sync: e.killer, KMS: e.keys})
	if err != nil {
		return nil, err
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, err
	}
	e.rows = journal.NewRows(js, journal.KeyringBucket("eu"), e.killer)
	e.close = func() {
		_ = e.journal.Close()
		nc.Close()
		_ = e.srv.Close()
		_ = e.keys.Close()
	}
	return &e, nil
}

// subjectKeys are the wrapped keys of the app's subjects, by their tags.
func (e *erasing) subjectKeys(ctx context.Context, app string) (map[kms.Tag][]byte, error) {
	found := map[kms.Tag][]byte{}
	for name, err := range e.rows.List(ctx, "sub."+app+".") {
		if err != nil {
			return nil, err
		}
		row, err := e.rows.Load(ctx, name)
		if err != nil {
			return nil, err
		}
		var page struct {
			Subjects []struct {
				Tag kms.Tag `json:"tag"`
				Key []byte  `json:"key"`
			} `json:"subjects"`
		}
		if err := json.Unmarshal(row.Value, &page); err != nil {
			return nil, err
		}
		for _, s := range page.Subjects {
			if len(s.Key) > 0 {
				found[s.Tag] = s.Key
			}
		}
	}
	return found, nil
}

const (
	eraseDirEnv   = "COFFER_TEST_ERASE_DIR"
	eraseAppEnv   = "COFFER_TEST_ERASE_APP"
	eraseUserEnv  = "COFFER_TEST_ERASE_USER"
	eraseStepsEnv = "COFFER_TEST_ERASE_STEPS"
)

// TestErasureChild is the process that TestErasureKilled kills.
func TestErasureChild(t *testing.T) {
	dir := os.Getenv(eraseDirEnv)
	if dir == "" {
		return // nothing by itself
	}
	e, err := openErasing(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	steps, err := strconv.Atoi(os.Getenv(eraseStepsEnv))
	if err != nil {
		t.Fatal(err)
	}
	app, err := journal.ParseAppID(os.Getenv(eraseAppEnv))
	if err != nil {
		t.Fatal(err)
	}
	tag, err := e.journal.Tag(t.Context(), app, "subject", os.Getenv(eraseUserEnv))
	if err != nil {
		t.Fatal(err)
	}
	e.killer.Arm(steps)
	if err := e.journal.Keyring().EraseSubject(t.Context(), app.String(), tag); err != nil {
		t.Fatal(err)
	}
	e.killer.Disarm()
	e.close()
}

// TestErasureKilled kills the process that erases a user before and after each
// step towards the disk. Once the region has been started again, the files of the
// keyring hold the user's key only where the erasure had not been stored; and
// nowhere when it has been repeated.
func TestErasureKilled(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir()
	e, err := openErasing(ctx, dir)
	if err != nil {
		t.Fatal(err)
	}
	if e.srv.Syncer() == nil {
		e.close()
		t.Skip("skipped: this file system makes the server sync by itself")
	}
	app, err := e.journal.CreateApp(ctx, journal.AppSpec{Name: "erase", Plan: "pro"})
	if err != nil {
		t.Fatal(err)
	}
	appendFrom := func(e *erasing, user string) {
		t.Helper()
		results, err := e.journal.Append(ctx, app.ID, journal.Event{
			Type: journal.MessageSent, Sender: user, Conversation: "group", ConversationType: journal.Group,
			Data: []byte(`{"bodies":[{"type":"txt","msg":"hello"}]}`),
		})
		if err == nil {
			err = results[0].Err
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	appendFrom(e, "witness")
	killed := 0
	for steps := 1; ; steps++ {
		user := fmt.Sprint("user", steps)
		appendFrom(e, user)
		appendFrom(e, fmt.Sprint("neighbour", steps))
		tag, err := e.journal.Tag(ctx, app.ID, "subject", user)
		if err != nil {
			t.Fatal(err)
		}
		before, err := e.subjectKeys(ctx, app.ID.String())
		if err != nil {
			t.Fatal(err)
		}
		key := before[tag]
		if len(key) == 0 {
			t.Fatal("the user has no key")
		}
		e.close()
		if !keyInFiles(t, dir, key) {
			t.Fatal("the search does not find a key that is there")
		}

		child := exec.Command(os.Args[0], "-test.run=^TestErasureChild$", "-test.count=1") //nolint:gosec // itself
		child.Env = append(os.Environ(), eraseDirEnv+"="+dir, eraseAppEnv+"="+app.ID.String(), eraseUserEnv+"="+user, eraseStepsEnv+"="+strconv.Itoa(steps))
		out, childErr := child.CombinedOutput()
		status, _ := child.ProcessState.Sys().(syscall.WaitStatus)
		wasKilled := status.Signaled() && status.Signal() == syscall.SIGKILL
		if childErr != nil && !wasKilled {
			t.Fatalf("the child failed: %v\n%s", childErr, out)
		}

		if e, err = openErasing(ctx, dir); err != nil {
			t.Fatal(err)
		}
		after, err := e.subjectKeys(ctx, app.ID.String())
		if err != nil {
			t.Fatal(err)
		}
		stored := len(after[tag]) == 0
		if wasKilled {
			killed++
		} else if !stored {
			t.Fatal("an erasure that was reported is not stored")
		}
		if !stored {
			if err := e.journal.Keyring().EraseSubject(ctx, app.ID.String(), tag); err != nil {
				t.Fatal(err)
			}
		}
		// The sweep of the start finishes what was stored and not overwritten.
		for end := time.Now().Add(startLimit); keyInFiles(t, dir, key); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("killed at step %d: the key of %s is still in a file", steps, user)
			}
		}
		if len(after) < len(before)-1 {
			t.Errorf("killed at step %d: %d keys of %d are left", steps, len(after), len(before))
		}
		appendFrom(e, "witness")
		if !wasKilled {
			break
		}
	}
	e.close()
	if killed < 4 {
		t.Errorf("killed at %d steps only", killed)
	}
	t.Logf("killed at each of %d steps", killed)
}

// keyInFiles looks for a wrapped key, as bytes and as the rows have it.
func keyInFiles(t *testing.T, dir string, key []byte) bool {
	t.Helper()
	found := false
	forms := [][]byte{key, []byte(base64.StdEncoding.EncodeToString(key))}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || err == nil && !d.Type().IsRegular() {
			return nil
		}
		if err != nil {
			return err
		}
		text, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) { // a file that was replaced meanwhile
			return nil
		}
		for _, form := range forms {
			found = found || bytes.Contains(text, form)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// TestRecordSwapped: a stored record is opened as what it was stored for, and as
// nothing else.
func TestRecordSwapped(t *testing.T) {
	ctx := t.Context()
	e, err := openErasing(ctx, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer e.close()
	var apps []journal.App
	records := map[string][]byte{}
	for i := range 2 {
		app, err := e.journal.CreateApp(ctx, journal.AppSpec{Name: fmt.Sprint("app", i), Plan: "free"})
		if err != nil {
			t.Fatal(err)
		}
		apps = append(apps, app)
		for _, conversation := range []string{"one", "two"} {
			for _, at := range []time.Time{time.Now(), time.Now().Add(-12 * time.Hour)} { // in two epochs
				results, err := e.journal.Append(ctx, app.ID, journal.Event{
					Type: journal.MessageSent, Sender: "ann", Conversation: conversation, ConversationType: journal.Group,
					Time: at.UTC().Truncate(time.Millisecond), Data: []byte(`{"bodies":[{"type":"txt","msg":"hello"}]}`),
				})
				if err != nil || results[0].Err != nil {
					t.Fatal(err, results)
				}
			}
		}
	}
	streams := map[string]bool{}
	for _, app := range apps {
		streams[journal.StreamName(app.Region, app.Plan, app.Shard)] = true
	}
	enough := errors.New("enough")
	n := map[journal.AppID]int{}
	for stream := range streams {
		err := e.journal.Read(ctx, stream, 0, "", func(batch []journal.Sealed) error {
			for _, s := range batch {
				i := n[s.App]
				n[s.App]++
				which := 0
				if s.App == apps[1].ID {
					which = 1
				}
				records[fmt.Sprintf("app %d, conversation %d, epoch %d", which, i/2, i%2)] = bytes.Clone(s.Record)
			}
			if len(records) == 8 {
				return enough
			}
			return nil
		})
		if !errors.Is(err, enough) && len(records) == 8 {
			t.Fatal(err)
		}
	}
	if len(records) != 8 {
		t.Fatalf("%d records", len(records))
	}
	// Epochs differ in the envelope's header.
	epoch := func(record []byte) uint32 {
		h, err := kms.ParseHeader(record[journal.HeaderSize:])
		if err != nil {
			t.Fatal(err)
		}
		return h.Epoch
	}
	own := records["app 0, conversation 0, epoch 0"]
	if epoch(own) == epoch(records["app 0, conversation 0, epoch 1"]) {
		t.Fatal("both events are in one epoch")
	}
	if _, err := e.journal.OpenRecord(ctx, nil, apps[0].ID, own); err != nil {
		t.Fatal(err)
	}
	refused := func(what string, app journal.AppID, record []byte) {
		t.Helper()
		plaintext, err := e.journal.OpenRecord(ctx, nil, app, record)
		if err == nil || plaintext != nil {
			t.Errorf("%s was opened", what)
			return
		}
		for _, class := range []error{kms.ErrAuthentication, kms.ErrKeyMismatch, kms.ErrKeyUnknown, kms.ErrEnvelope} {
			if errors.Is(err, class) {
				return
			}
		}
		t.Errorf("%s: %v", what, err)
	}
	refused("a record under another app", apps[1].ID, own)
	for name, other := range records {
		if bytes.Equal(other, own) {
			continue
		}
		swapped := append(bytes.Clone(own[:journal.HeaderSize]), other[journal.HeaderSize:]...)
		refused("the envelope of "+name, apps[0].ID, swapped)
		// The envelope's ciphertext under another envelope's header.
		const start = journal.HeaderSize + kms.HeaderSize
		refused("the ciphertext of "+name, apps[0].ID, append(bytes.Clone(own[:start]), other[start:]...))
	}
	for i := range own {
		changed := bytes.Clone(own)
		changed[i] ^= 1
		if _, err := e.journal.OpenRecord(ctx, nil, apps[0].ID, changed); err == nil {
			t.Errorf("a record with a flipped bit in byte %d was opened", i)
		}
	}
}
