package attachments_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/attachments"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/journal/journaltest"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/local"
)

const limit = 1 << 20

type world struct {
	*testing.T

	dir     string
	js      jetstream.JetStream
	journal *journal.Journal
	store   *attachments.Store
	app     journal.AppID
	shift   atomic.Int64 // of the clock
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{T: t, dir: t.TempDir()}
	provider, err := local.Open(t.Context(), local.Options{Path: filepath.Join(t.TempDir(), "key"), Create: true, Region: "eu"})
	if err != nil {
		t.Fatal(err)
	}
	server, conn := journaltest.Start(t, embedded.Options{StoreDir: w.dir})
	var sync journal.Syncer
	if s := server.Syncer(); s != nil {
		sync = s
	}
	now := func() time.Time { return time.Now().Add(time.Duration(w.shift.Load())) }
	w.journal, err = journal.Open(t.Context(), journal.Config{
		Region: journal.DefaultRegions()[2], Conn: conn, Sync: sync, KMS: provider, Now: now,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.journal.Close(); err != nil {
			t.Error(err)
		}
	})
	app, err := w.journal.CreateApp(t.Context(), journal.AppSpec{Plan: "free"})
	if err != nil {
		t.Fatal(err)
	}
	w.app = app.ID
	if w.js, err = jetstream.New(conn); err != nil {
		t.Fatal(err)
	}
	w.store = attachments.New(attachments.Config{Journal: w.journal, JetStream: w.js, Sync: sync, Limit: limit, Now: now})
	return w
}

func (w *world) put(id, sender string, content []byte) {
	w.Helper()
	_, _, err := w.store.Put(w.Context(), w.app, attachments.Upload{ID: id, Sender: sender, Media: "image/png"}, bytes.NewReader(content))
	if err != nil {
		w.Fatal(err)
	}
}

func (w *world) get(id string) ([]byte, error) {
	c, err := w.store.Open(w.Context(), w.app, id)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close() }()
	return io.ReadAll(c)
}

// want checks that reading fails as it should.
func (w *world) want(id string, class error) {
	w.Helper()
	if content, err := w.get(id); !errors.Is(err, class) {
		w.Errorf("%s: %d bytes, %v; want %v", id, len(content), err, class)
	}
}

func some(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

// TestSizes: what was put comes back, whole and in ranges, for every size around
// the ends of chunks.
func TestSizes(t *testing.T) {
	w := newWorld(t)
	for _, size := range []int{
		0, 1, attachments.ChunkSize - 1, attachments.ChunkSize, attachments.ChunkSize + 1,
		3 * attachments.ChunkSize, 3*attachments.ChunkSize + 7, limit,
	} {
		id := fmt.Sprintf("size-%d", size)
		content := some(size)
		info, created, err := w.store.Put(t.Context(), w.app, attachments.Upload{ID: id, Media: "a/b", Conversation: "c", Sender: "ann"},
			iotest.HalfReader(bytes.NewReader(content)))
		if err != nil || !created || info.Size != int64(size) || info.Digest != sha256.Sum256(content) {
			t.Fatalf("%s: %+v %v %v", id, info, created, err)
		}
		c, err := w.store.Open(t.Context(), w.app, id)
		if err != nil {
			t.Fatal(err)
		}
		if c.Info != info || c.Media != "a/b" || c.Conversation != "c" || c.Sender != "ann" {
			t.Errorf("%s: %+v, put %+v", id, c.Info, info)
		}
		if err := iotest.TestReader(c, content); err != nil { // reads and seeks in every way
			t.Errorf("%s: %v", id, err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestAgain: the same content is no error, another is a conflict, and neither
// changes what is there.
func TestAgain(t *testing.T) {
	w := newWorld(t)
	u := attachments.Upload{ID: "a", Media: "text/plain", Sender: "ann"}
	content := some(100_000)
	first, _, err := w.store.Put(t.Context(), w.app, u, bytes.NewReader(content))
	if err != nil {
		t.Fatal(err)
	}
	if again, created, err := w.store.Put(t.Context(), w.app, u, bytes.NewReader(content)); err != nil || created || again != first {
		t.Errorf("again: %+v %v %v", again, created, err)
	}
	other := u
	other.Media = "text/html"
	for what, try := range map[string]error{
		"another content": second(w.store.Put(t.Context(), w.app, u, bytes.NewReader(content[1:]))),
		"another type":    second(w.store.Put(t.Context(), w.app, other, bytes.NewReader(content))),
	} {
		if !errors.Is(try, attachments.ErrConflict) {
			t.Errorf("%s: %v", what, try)
		}
	}
	if got, err := w.get("a"); err != nil || !bytes.Equal(got, content) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if err := w.store.Delete(t.Context(), w.app, "a"); err != nil {
		t.Error(err)
	}
	w.want("a", attachments.ErrNotFound)
	for _, id := range []string{"a", "b"} {
		if err := w.store.Delete(t.Context(), w.app, id); !errors.Is(err, attachments.ErrNotFound) {
			t.Errorf("deleting %s, which is not there: %v", id, err)
		}
	}
	w.put("a", "ben", content[:5])
	if got, err := w.get("a"); err != nil || len(got) != 5 {
		t.Errorf("after a deletion: %d bytes, %v", len(got), err)
	}
}

func second(_ attachments.Info, _ bool, err error) error { return err }

// TestRefusedUploads: what ends early, is too long, or is not what its digest
// says leaves nothing that can be read, and the id stays free.
func TestRefusedUploads(t *testing.T) {
	w := newWorld(t)
	cut := errors.New("the line is gone")
	wrong := sha256.Sum256([]byte("x"))
	for _, tt := range []struct {
		content io.Reader
		digest  []byte
		want    error
	}{
		{iotest.ErrReader(cut), nil, cut},
		{io.MultiReader(bytes.NewReader(some(200_000)), iotest.ErrReader(cut)), nil, cut},
		{io.MultiReader(bytes.NewReader(some(10)), iotest.ErrReader(io.ErrUnexpectedEOF)), nil, io.ErrUnexpectedEOF},
		{bytes.NewReader(some(limit + 1)), nil, attachments.ErrTooLarge},
		{io.LimitReader(endless{}, 1<<40), nil, attachments.ErrTooLarge},
		{bytes.NewReader(some(70_000)), wrong[:], attachments.ErrDigest},
	} {
		if _, _, err := w.store.Put(t.Context(), w.app, attachments.Upload{ID: "a", Digest: tt.digest}, tt.content); !errors.Is(err, tt.want) {
			t.Errorf("%v, want %v", err, tt.want)
		}
		w.want("a", attachments.ErrNotFound)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := w.store.Put(ctx, w.app, attachments.Upload{ID: "a"}, bytes.NewReader(some(70_000))); err == nil {
		t.Error("an upload whose caller is gone is stored")
	}
	stream, err := w.js.Stream(t.Context(), "OBJ_"+journal.AttachmentBucket("eu"))
	if err != nil {
		t.Fatal(err)
	}
	if n := stream.CachedInfo().State.Msgs; n != 0 {
		t.Errorf("%d chunks of refused uploads are left", n)
	}
	w.put("a", "", some(70_000))
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// TestEnds: an attachment ends with its retention, to the millisecond, with its
// uploader, and with the key of its epoch; the others stay.
func TestEnds(t *testing.T) {
	w := newWorld(t)
	w.put("of-ann", "ann", some(70_000))
	w.put("of-ben", "ben", some(70_000))
	ann, err := w.journal.Tag(t.Context(), w.app, "subject", "ann")
	if err != nil {
		t.Fatal(err)
	}
	if err := w.journal.Keyring().EraseSubject(t.Context(), w.app.String(), ann); err != nil {
		t.Fatal(err)
	}
	w.want("of-ann", kms.ErrSubjectErased)
	if err := second(w.store.Put(t.Context(), w.app, attachments.Upload{ID: "more", Sender: "ann"}, bytes.NewReader(nil))); !errors.Is(err, kms.ErrSubjectErased) {
		t.Errorf("an erased user uploads: %v", err)
	}
	life := w.journal.Retention().Attachments
	if life != 7*24*time.Hour {
		t.Errorf("attachments are kept %s", life)
	}
	w.shift.Store(int64(life - time.Hour))
	if _, err := w.get("of-ben"); err != nil {
		t.Error(err)
	}
	w.shift.Store(int64(life))
	w.want("of-ben", attachments.ErrNotFound)
	if n, err := w.journal.Keyring().DestroyEpochs(t.Context(), w.app.String(), time.Now().Add(life+life/14)); err != nil || n != 1 {
		t.Errorf("%d epochs destroyed, %v", n, err)
	}
	w.shift.Store(0) // a clock that was set back, or a copy from a backup
	w.want("of-ben", kms.ErrEpochDestroyed)
	stream, err := w.js.Stream(t.Context(), "OBJ_"+journal.AttachmentBucket("eu"))
	if err != nil || stream.CachedInfo().Config.MaxAge != life {
		t.Errorf("the stream keeps messages for %v, %v", stream.CachedInfo().Config.MaxAge, err)
	}
}

// TestDeleteApp: an app's attachments go, also when its keys have gone before,
// and nobody else's.
func TestDeleteApp(t *testing.T) {
	w := newWorld(t)
	other, err := w.journal.CreateApp(t.Context(), journal.AppSpec{Plan: "free"})
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"a", "b", "c"} {
		w.put(id, "ann", some(70_000))
	}
	if _, _, err := w.store.Put(t.Context(), other.ID, attachments.Upload{ID: "a"}, bytes.NewReader(some(10))); err != nil {
		t.Fatal(err)
	}
	if err := w.journal.Keyring().DestroyApp(t.Context(), w.app.String()); err != nil {
		t.Fatal(err)
	}
	count := func(want int) {
		t.Helper()
		if n, err := w.store.CountApp(t.Context(), w.app); err != nil || n != want {
			t.Errorf("%d attachments, %v, want %d", n, err, want)
		}
	}
	count(3)
	for _, want := range []int{3, 0} {
		if n, err := w.store.DeleteApp(t.Context(), w.app); err != nil || n != want {
			t.Errorf("deleted %d, %v, want %d", n, err, want)
		}
	}
	count(0)
	if n, err := w.store.CountApp(t.Context(), other.ID); err != nil || n != 1 {
		t.Errorf("the other app has %d attachments, %v", n, err)
	}
}

// TestDamage: chunks that are exchanged, missing or changed are refused before a
// byte of them is given out, and so is the description of another attachment.
func TestDamage(t *testing.T) {
	w := newWorld(t)
	content := some(3 * attachments.ChunkSize)
	objects, err := w.js.ObjectStore(t.Context(), journal.AttachmentBucket("eu"))
	if err != nil {
		t.Fatal(err)
	}
	// rewrite puts other chunks under the old description.
	rewrite := func(id string, change func(chunks [][]byte) [][]byte) {
		t.Helper()
		w.put(id, "ann", content)
		tag, err := w.journal.Tag(t.Context(), w.app, "attachment", id)
		if err != nil {
			t.Fatal(err)
		}
		name := w.app.String() + "/" + tag.String()
		object, err := objects.GetInfo(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := objects.GetBytes(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		const size = attachments.ChunkSize + kms.Overhead
		chunks := change([][]byte{raw[:size], raw[size : 2*size], raw[2*size:]})
		meta := jetstream.ObjectMeta{Name: name, Opts: &jetstream.ObjectMetaOptions{ChunkSize: size}}
		if _, err := objects.Put(t.Context(), meta, bytes.NewReader(bytes.Join(chunks, nil))); err != nil {
			t.Fatal(err)
		}
		meta.Metadata = object.Metadata
		if err := objects.UpdateMeta(t.Context(), name, meta); err != nil {
			t.Fatal(err)
		}
	}
	rewrite("same", func(c [][]byte) [][]byte { return c })
	if got, err := w.get("same"); err != nil || !bytes.Equal(got, content) {
		t.Fatalf("the test itself: %d bytes, %v", len(got), err)
	}
	for what, change := range map[string]func([][]byte) [][]byte{
		"exchanged": func(c [][]byte) [][]byte { return [][]byte{c[1], c[0], c[2]} },
		"repeated":  func(c [][]byte) [][]byte { return [][]byte{c[0], c[0], c[2]} },
		"changed":   func(c [][]byte) [][]byte { c[1][1000] ^= 1; return c },
	} {
		rewrite(what, change)
		got, err := w.get(what)
		if !errors.Is(err, kms.ErrAuthentication) || len(got) > attachments.ChunkSize || !bytes.HasPrefix(content, got) {
			t.Errorf("%s: %d bytes, %v", what, len(got), err)
		}
	}
	rewrite("short", func(c [][]byte) [][]byte { return c[:2] })
	w.want("short", attachments.ErrCorrupt)
	// The chunks and the description of another attachment, under this name.
	w.put("one", "ann", content)
	w.put("two", "ann", content)
	names := make([]string, 2)
	for i, id := range []string{"one", "two"} {
		tag, err := w.journal.Tag(t.Context(), w.app, "attachment", id)
		if err != nil {
			t.Fatal(err)
		}
		names[i] = w.app.String() + "/" + tag.String()
	}
	one, err := objects.GetInfo(t.Context(), names[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := objects.UpdateMeta(t.Context(), names[1], jetstream.ObjectMeta{Name: names[1], Metadata: one.Metadata}); err != nil {
		t.Fatal(err)
	}
	w.want("two", kms.ErrAuthentication)
	// An upload whose end never came.
	if _, err := objects.PutBytes(t.Context(), names[0], content); err != nil {
		t.Fatal(err)
	}
	w.want("one", attachments.ErrNotFound)
	w.put("one", "ann", content)
	if got, err := w.get("one"); err != nil || !bytes.Equal(got, content) {
		t.Errorf("after an interrupted upload: %d bytes, %v", len(got), err)
	}
}

// TestNothingInClear: no file of the server has a word of the content or of what
// is said about it.
func TestNothingInClear(t *testing.T) {
	w := newWorld(t)
	const canary = "canary-6b1f"
	u := attachments.Upload{ID: canary + "-id", Media: canary + "/media", Conversation: canary + "-conversation", Sender: canary + "-sender"}
	if _, _, err := w.store.Put(t.Context(), w.app, u, strings.NewReader(strings.Repeat(canary+" content ", 10_000))); err != nil {
		t.Fatal(err)
	}
	files := 0
	err := filepath.WalkDir(w.dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if bytes.Contains(b, []byte(canary)) {
			t.Errorf("%s holds it in clear", path)
		}
		if bytes.Contains(b, []byte("$O.coffer_eu_attachments.C.")) {
			files++
		}
		return err
	})
	if err != nil || files == 0 {
		t.Errorf("%d files with attachments, %v", files, err)
	}
}
