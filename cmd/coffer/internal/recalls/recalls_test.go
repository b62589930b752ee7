package recalls

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/journal/journaltest"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/local"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/history"
	"github.com/cofferdb/coffer/projections/pebble"
	"github.com/cofferdb/coffer/projections/roaming"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// views are a store with both views, following the journal.
type views struct {
	store  *pebble.Store
	view   *history.View
	runner *projections.Runner
}

type world struct {
	*testing.T

	dir     string
	nats    []string // folders of the NATS servers
	js      jetstream.JetStream
	journal *journal.Journal
	app     journal.AppID

	views
}

func newWorld(t *testing.T) *world {
	t.Helper()
	return openWorld(t, t.TempDir(), func(s *embedded.Syncer) journal.Syncer { return s })
}

// openWorld opens a folder, which may have been used before. What syncs can be
// wrapped.
func openWorld(t *testing.T, dir string, wrap func(*embedded.Syncer) journal.Syncer) *world {
	t.Helper()
	nats := filepath.Join(dir, "nats")
	server, conn := journaltest.Start(t, embedded.Options{StoreDir: nats})
	var syncer journal.Syncer
	if s := server.Syncer(); s != nil {
		syncer = wrap(s)
	}
	return worldOf(t, dir, []string{nats}, journal.Config{Conn: conn, Sync: syncer})
}

// worldOf opens a journal with its views, and its one app.
func worldOf(t *testing.T, dir string, nats []string, cfg journal.Config) *world {
	t.Helper()
	w := &world{T: t, dir: dir, nats: nats}
	provider, err := local.Open(t.Context(), local.Options{Path: filepath.Join(w.dir, "key.json"), Create: true})
	must(t, err)
	t.Cleanup(func() { must(t, provider.Close()) })
	w.store, w.view = openViews(t, filepath.Join(w.dir, "views"))
	cfg.Region, cfg.KMS, cfg.Index = journal.DefaultRegions()[2], provider, w.view
	w.journal, err = journal.Open(t.Context(), cfg)
	must(t, err)
	t.Cleanup(func() { must(t, w.journal.Close()) })
	w.runner = follow(t, w.journal, w.store, w.view)
	w.js, err = jetstream.New(cfg.Conn)
	must(t, err)
	for app, err := range w.journal.Apps(t.Context()) {
		must(t, err)
		w.app = app.ID
		// After a kill the view may be filled again first.
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
			_, err := w.view.Messages(t.Context(), w.app, w.conversation(), history.PageQuery{Limit: 1})
			if err == nil {
				return w
			}
			if time.Now().After(deadline) {
				t.Fatal(err)
			}
		}
	}
	app, err := w.journal.CreateApp(t.Context(), journal.AppSpec{Plan: "pro"})
	must(t, err)
	w.app = app.ID
	return w
}

func openViews(t *testing.T, dir string) (*pebble.Store, *history.View) {
	t.Helper()
	store, err := pebble.Open(pebble.Options{Dir: dir})
	must(t, err)
	t.Cleanup(func() { must(t, store.Close()) })
	view, err := history.New(history.Config{Store: store})
	must(t, err)
	return store, view
}

func follow(t *testing.T, j *journal.Journal, store *pebble.Store, view *history.View) *projections.Runner {
	t.Helper()
	users, err := roaming.New(roaming.Config{Store: store})
	must(t, err)
	runner, err := projections.NewRunner(projections.RunnerConfig{Journal: j, Store: store, Projections: []projections.Projection{view, users}})
	must(t, err)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- runner.Run(ctx) }()
	t.Cleanup(func() { stop(); must(t, <-ended) })
	return runner
}

// append stores events and waits until the views have them.
func (w *world) append(events ...journal.Event) []journal.Position {
	w.Helper()
	results, err := w.journal.Append(w.Context(), w.app, events...)
	must(w.T, err)
	var positions []journal.Position
	for _, r := range results {
		must(w.T, r.Err)
		positions = append(positions, r.Position)
	}
	must(w.T, w.runner.Wait(w.Context(), w.app, positions[len(positions)-1]))
	return positions
}

func message(id, text string) journal.Event {
	return journal.Event{
		ID: id, Type: journal.MessageSent, Sender: "ann", Conversation: "g", ConversationType: journal.Group,
		Data: jsontext.Value(fmt.Sprintf(`{"bodies":[{"type":"txt","msg":%q}]}`, text)),
	}
}

func edit(id, target, text string) journal.Event {
	e := message(id, text)
	e.Type, e.Target = journal.MessageEdited, target
	return e
}

func recall(id, target string) journal.Event {
	return journal.Event{ID: id, Type: journal.MessageRecalled, Sender: "ann", Conversation: "g", ConversationType: journal.Group, Target: target}
}

// sealed returns the sealed content of the record at a position: what must not be
// found afterwards.
func (w *world) sealed(at journal.Position) []byte {
	w.Helper()
	stream, sequence, err := w.journal.Locate(w.Context(), w.app, at)
	must(w.T, err)
	handle, err := w.js.Stream(w.Context(), stream)
	must(w.T, err)
	msg, err := handle.GetMsg(w.Context(), sequence)
	must(w.T, err)
	return msg.Data[journal.HeaderSize+56:]
}

// holds reports whether a file of the views, or of a NATS server, has the bytes.
func (w *world) holds(dir string, content []byte) bool {
	w.Helper()
	if dir == "nats" {
		return slices.ContainsFunc(w.nats, func(dir string) bool { return len(w.files(dir, content)) > 0 })
	}
	return len(w.files(filepath.Join(w.dir, dir), content)) > 0
}

// files are those below a folder that have the bytes.
func (w *world) files(dir string, content []byte) (found []string) {
	w.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || err == nil && !d.Type().IsRegular() {
			return nil
		}
		if err != nil {
			return err
		}
		text, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // a table that has just been replaced
		}
		if bytes.Contains(text, content) {
			found = append(found, path)
		}
		return err
	})
	must(w.T, err)
	return found
}

// rows are everything that the views have, but for the order of what expires in an
// hour, and for the roaming view's notes of recalls that came before their message:
// in a rebuilt view, whatever was erased is such one.
func rows(t *testing.T, store projections.Store) map[string]string {
	t.Helper()
	all := map[string]string{}
	must(t, store.View(func(r projections.Reader) error {
		c := r.Iterate([]byte{1}, nil, false)
		defer c.Close()
		for c.Next() {
			key, value := string(c.Key()), slices.Clone(c.Value())
			if key[0] == 'c' || key[0] == 'h' && key[9] == 5 {
				continue
			}
			if key[0] == 'X' {
				slices.Sort(value)
			}
			all[key] = string(value)
		}
		return c.Close()
	}))
	return all
}

// equalsRebuilt holds the views against ones that are filled from the journal as
// it is now.
func (w *world) equalsRebuilt(dir string, last journal.Position) {
	w.Helper()
	store, view := openViews(w.T, filepath.Join(w.dir, dir))
	runner := follow(w.T, w.journal, store, view)
	must(w.T, runner.Wait(w.Context(), w.app, last))
	must(w.T, w.runner.Wait(w.Context(), w.app, last))
	old, rebuilt := rows(w.T, w.store), rows(w.T, store)
	for _, key := range slices.Sorted(maps.Keys(old)) {
		if rebuilt[key] != old[key] {
			w.Errorf("row %q: rebuilt %x, before %x", key, rebuilt[key], old[key])
		}
	}
	for _, key := range slices.Sorted(maps.Keys(rebuilt)) {
		if _, ok := old[key]; !ok {
			w.Errorf("row %q is there only when rebuilt: %x", key, rebuilt[key])
		}
	}
}

// sweep works until nothing is left.
func (w *world) sweep(r *Recalls) {
	w.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		left, err := r.Sweep(w.Context())
		must(w.T, err)
		if left == 0 {
			return
		}
		if time.Now().After(deadline) {
			w.Fatalf("%d recalls are left", left)
		}
	}
}

func (w *world) erased(t string, content []byte) {
	w.Helper()
	for _, dir := range []string{"nats", "views"} {
		if w.holds(dir, content) {
			w.Errorf("%s has the sealed bytes of %s", dir, t)
		}
	}
}

func (w *world) there(t string, content []byte) {
	w.Helper()
	must(w.T, w.store.Flush())
	for _, dir := range []string{"nats", "views"} {
		if !w.holds(dir, content) {
			w.Errorf("%s lacks the sealed bytes of %s, so this test shows nothing", dir, t)
		}
	}
}

// TestErase: the sealed bytes of what was recalled leave every file, whatever step
// the process was ended after; readers take the gap for no loss, and rebuilt views
// equal those from before.
func TestErase(t *testing.T) {
	w := newWorld(t)
	at := w.append(message("hidden", "one"))
	hidden := w.sealed(at[0])
	w.append(recall("r0", "hidden"))
	if _, err := w.journal.Registry().SetOnRecall(t.Context(), w.app, journal.RecallErases); err != nil {
		t.Fatal(err)
	}
	at = w.append(message("m1", "secret"), message("kept", "two"), edit("x1", "m1", "changed"), edit("x2", "m1", "again"), edit("x3", "kept", "three"))
	doomed := map[string][]byte{"m1": w.sealed(at[0]), "x1": w.sealed(at[2]), "x2": w.sealed(at[3])}
	kept := w.sealed(at[1])
	for name, content := range doomed {
		w.there(name, content)
	}
	last := w.append(recall("r1", "m1"))[0]

	killed := errors.New("killed")
	for _, after := range []string{"journal", "views", "audit"} {
		r := New(Options{Journal: w.journal, History: w.view, step: func(name string) error {
			if name == after {
				return killed
			}
			return nil
		}})
		if _, err := r.Sweep(t.Context()); !errors.Is(err, killed) {
			t.Fatalf("%s: %v", after, err)
		}
		if left, err := w.journal.Recalls(t.Context()); err != nil || len(left) != 1 {
			t.Fatalf("after %s: %v, %v", after, left, err)
		}
	}
	w.sweep(New(Options{Journal: w.journal, History: w.view}))
	for name, content := range doomed {
		w.erased(name, content)
	}
	w.there("kept", kept)
	if !w.holds("nats", hidden) {
		t.Error("what was recalled before the setting was made is erased too")
	}
	// A recall that comes before its message.
	w.append(recall("r2", "m2"))
	if left, err := New(Options{Journal: w.journal, History: w.view}).Sweep(t.Context()); err != nil || left != 1 {
		t.Fatalf("%d, %v", left, err)
	}
	at = w.append(message("m2", "late"))
	late := w.sealed(at[0])
	w.sweep(New(Options{Journal: w.journal, History: w.view}))
	w.erased("m2", late)
	last = max(last, at[0], w.append(message("m3", "end"))[0])
	// The ids stay taken.
	if results, err := w.journal.Append(t.Context(), w.app, message("m1", "another")); err != nil || !results[0].Duplicate {
		t.Errorf("the id of an erased message is free: %+v, %v", results, err)
	}
	w.equalsRebuilt("rebuilt", last)
	entries := 0
	must(t, w.journal.AuditLog(t.Context(), 0, func(payload []byte) error {
		entries += bytes.Count(payload, []byte(`"message.erased"`))
		return nil
	}))
	if entries < 2 {
		t.Errorf("the audit log has %d entries", entries)
	}
}

// TestEraseOverAPlanChange: of an app that has changed its plan the copy goes and
// the original too; a change that comes later carries the stubs on.
func TestEraseOverAPlanChange(t *testing.T) {
	w := newWorld(t)
	_, err := w.journal.Registry().SetOnRecall(t.Context(), w.app, journal.RecallErases)
	must(t, err)
	at := w.append(message("m1", "one"), message("m2", "two"), message("m3", "three"))
	first, original := w.sealed(at[0]), w.sealed(at[1])
	w.append(recall("r1", "m1"))
	r := New(Options{Journal: w.journal, History: w.view})
	w.sweep(r)
	w.erased("m1", first)

	w.move("enterprise")
	var copied []byte
	stream, err := w.js.Stream(t.Context(), journal.StreamName("eu", "enterprise", 0))
	must(t, err)
	for seq := uint64(1); seq <= stream.CachedInfo().State.LastSeq; seq++ {
		msg, err := stream.GetMsg(t.Context(), seq)
		must(t, err)
		if h, err := journal.ParseHeader(msg.Data); err == nil && h.Event == w.tag("m2") {
			copied = msg.Data[journal.HeaderSize+56:]
		}
	}
	w.there("the copy", copied)
	w.append(recall("r2", "m2"))
	w.sweep(r)
	w.erased("the original", original)
	w.erased("the copy", copied)

	w.move("basic")
	last := w.append(message("m4", "four"))[0]
	page, err := w.view.Messages(t.Context(), w.app, w.conversation(), history.PageQuery{Limit: 10})
	must(t, err)
	var shown []string
	for _, m := range page.Messages {
		shown = append(shown, fmt.Sprint(m.Position, m.Recalled))
	}
	if len(page.Messages) != 4 || page.Messages[3].Recalled != true || page.Messages[2].Recalled != true || page.Messages[1].Recalled {
		t.Errorf("after two plan changes the conversation has %v", shown)
	}
	if last == 0 {
		t.Error("no position")
	}
}

func (w *world) tag(id string) kms.Tag {
	w.Helper()
	tag, err := w.journal.Tag(w.Context(), w.app, kms.KindEvent, id)
	must(w.T, err)
	return tag
}

func (w *world) conversation() kms.Tag {
	w.Helper()
	tag, err := w.journal.Tag(w.Context(), w.app, kms.KindConversation, "g")
	must(w.T, err)
	return tag
}

// move changes the app's plan and waits for the end. It calls what is given after
// each step.
func (w *world) move(plan string, progress ...func(journal.Move)) {
	w.Helper()
	done := make(chan struct{})
	mover, err := journal.NewMover(journal.MoverConfig{Journal: w.journal, Views: w.runner, Progress: func(_ journal.AppID, m journal.Move) {
		for _, tell := range progress {
			tell(m)
		}
		if m.Step == journal.MoveDone {
			close(done)
		}
	}})
	must(w.T, err)
	_, err = mover.ChangePlan(w.Context(), w.app, plan, "test")
	must(w.T, err)
	ctx, stop := context.WithCancel(w.Context())
	ended := make(chan error, 1)
	go func() { ended <- mover.Run(ctx) }()
	select {
	case <-done:
	case <-time.After(time.Minute):
		w.Error("the plan change does not end")
	}
	stop()
	<-ended
}
