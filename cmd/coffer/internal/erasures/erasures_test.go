package erasures_test

import (
	"context"
	"encoding/json"
	"errors"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/cmd/coffer/internal/erasures"
	"github.com/cofferdb/coffer/cmd/coffer/internal/signing"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/journal/journaltest"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/local"
)

type world struct {
	*testing.T

	js      jetstream.JetStream
	rows    *journal.Rows // of the registry
	keys    *journal.Rows // of the keyring
	journal *journal.Journal
	signing *signing.Key
	app     journal.AppID
	backups []erasures.Remains
	fail    error // of what is erased besides
	also    []string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{T: t}
	provider, err := local.Open(t.Context(), local.Options{Path: filepath.Join(t.TempDir(), "key"), Create: true, Region: "eu"})
	if err != nil {
		t.Fatal(err)
	}
	server, conn := journaltest.Start(t, embedded.Options{})
	var sync journal.Syncer
	if s := server.Syncer(); s != nil {
		sync = s
	}
	if w.journal, err = journal.Open(t.Context(), journal.Config{Region: journal.DefaultRegions()[2], Conn: conn, Sync: sync, KMS: provider}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.journal.Close(); err != nil {
			t.Error(err)
		}
	})
	app, err := w.journal.CreateApp(t.Context(), journal.AppSpec{Plan: "pro"})
	if err != nil {
		t.Fatal(err)
	}
	if w.js, err = jetstream.New(conn); err != nil {
		t.Fatal(err)
	}
	w.app = app.ID
	w.rows = journal.NewRows(w.js, journal.RegistryBucket("eu"), sync)
	w.keys = journal.NewRows(w.js, journal.KeyringBucket("eu"), sync)
	w.signing = signing.New(w.rows, w.journal.Keyring())
	return w
}

func (w *world) open(edit ...func(*erasures.Options)) *erasures.Erasures {
	o := erasures.Options{
		Region: w.journal.Region(), Journal: w.journal, Rows: w.rows, Signing: w.signing,
		KeyringAt: func(ctx context.Context) (uint64, error) {
			stream, err := w.js.Stream(ctx, "KV_"+journal.KeyringBucket("eu"))
			if err != nil {
				return 0, err
			}
			return stream.CachedInfo().State.LastSeq, nil
		},
		Also: []func(context.Context, journal.AppID, string) (erasures.Destroyed, error){
			func(_ context.Context, _ journal.AppID, user string) (erasures.Destroyed, error) {
				w.also = append(w.also, user)
				return erasures.Destroyed{What: "profile", Where: "profiles"}, w.fail
			},
		},
		Copies: func(context.Context) ([]erasures.Remains, error) { return w.backups, nil },
	}
	for _, e := range edit {
		e(&o)
	}
	return erasures.New(o)
}

// sent appends a message of the user and returns its record.
func (w *world) sent(id, user string) []byte {
	w.Helper()
	results, err := w.journal.Append(w.Context(), w.app, message(id, user))
	if err == nil {
		err = results[0].Err
	}
	if err != nil {
		w.Fatal(err)
	}
	stream, sequence, err := w.journal.Locate(w.Context(), w.app, results[0].Position)
	if err != nil {
		w.Fatal(err)
	}
	handle, err := w.js.Stream(w.Context(), stream)
	if err != nil {
		w.Fatal(err)
	}
	stored, err := handle.GetMsg(w.Context(), sequence)
	if err != nil {
		w.Fatal(err)
	}
	return stored.Data
}

func message(id, user string) journal.Event {
	return journal.Event{
		ID: id, Type: journal.MessageSent, Sender: user, Conversation: "g", ConversationType: journal.Group,
		Data: []byte(`{"bodies":[{"type":"txt","msg":"x"}]}`),
	}
}

func (w *world) readable(record []byte) error {
	_, err := w.journal.OpenRecord(w.Context(), nil, w.app, record)
	return err
}

func (w *world) request(e *erasures.Erasures, user string) erasures.Erasure {
	w.Helper()
	got, err := e.Request(w.Context(), "app", w.app, user)
	if err != nil {
		w.Fatal(err)
	}
	return got
}

func (w *world) wantErased(record []byte) {
	w.Helper()
	if err := w.readable(record); !errors.Is(err, kms.ErrSubjectErased) {
		w.Errorf("opening it: %v", err)
	}
}

func (w *world) state(e *erasures.Erasures, id string) erasures.State {
	w.Helper()
	got, err := e.Erasure(w.Context(), w.app, id)
	if err != nil {
		w.Fatal(err)
	}
	return got.State
}

// TestErase: the user's events cannot be opened, the receipt says what was
// destroyed and what is left, and asking again changes nothing.
func TestErase(t *testing.T) {
	w := newWorld(t)
	until := time.Now().Add(time.Hour).UTC().Truncate(time.Second)
	w.backups = []erasures.Remains{{What: "key", Where: "copy 1", Until: until}}
	e := w.open()
	ann, ben := w.sent("a1", "ann"), w.sent("b1", "ben")
	got := w.request(e, "ann")
	if got.State != erasures.Done || got.ID != got.Subject+"-1" || w.state(e, got.ID) != erasures.Done {
		t.Fatalf("%+v", got)
	}
	w.wantErased(ann)
	if err := w.readable(ben); err != nil {
		t.Error(err)
	}
	var receipt erasures.Receipt
	if err := w.signing.Verify(t.Context(), erasures.ReceiptType, got.Receipt, &receipt); err != nil {
		t.Fatal(err)
	}
	if receipt.Region != "eu" || receipt.App != w.app.String() || receipt.Subject != got.Subject || receipt.Erasure != got.ID ||
		len(receipt.Destroyed) != 2 || receipt.Destroyed[1].What != "profile" ||
		!slices.ContainsFunc(receipt.Remains, func(r erasures.Remains) bool { return r.Where == "copy 1" && r.Until.Equal(until) }) {
		t.Errorf("the receipt says %+v", receipt)
	}
	if again := w.request(e, "ann"); again.Receipt != got.Receipt || len(w.also) != 1 {
		t.Errorf("again: %+v, erased besides %v", again, w.also)
	}
	results, err := w.journal.Append(t.Context(), w.app, message("a2", "ann"))
	if err == nil {
		err = results[0].Err
	}
	if !errors.Is(err, kms.ErrSubjectErased) {
		t.Errorf("an erased user sends: %v", err)
	}
	for _, id := range []string{"", "x", got.Subject, got.Subject + "-2", got.Subject + "-01"} {
		if _, err := e.Erasure(t.Context(), w.app, id); !errors.Is(err, erasures.ErrNotFound) {
			t.Errorf("erasure %q: %v", id, err)
		}
	}
}

// TestRegister: a user that comes back has a new key; what it had is gone, and
// goes again.
func TestRegister(t *testing.T) {
	w := newWorld(t)
	e := w.open()
	register := func(want bool) {
		t.Helper()
		if got, err := e.Register(t.Context(), "app", w.app, "ann"); err != nil || got != want {
			t.Errorf("registered: %v %v, want %v", got, err, want)
		}
	}
	register(false)
	first := w.sent("a1", "ann")
	w.request(e, "ann")
	register(true)
	register(false)
	second := w.sent("a2", "ann")
	w.wantErased(first)
	if err := w.readable(second); err != nil {
		t.Error(err)
	}
	if got := w.request(e, "ann"); got.ID != got.Subject+"-2" {
		t.Errorf("%+v", got)
	}
	w.wantErased(first)
	w.wantErased(second)
}

// TestInterrupted: an erasure that cannot be finished is pending, and the next
// process finishes it, whatever it had got to.
func TestInterrupted(t *testing.T) {
	w := newWorld(t)
	record := w.sent("a1", "ann")
	w.fail = errors.New("the store is away")
	e := w.open()
	got := w.request(e, "ann")
	if got.State != erasures.Pending || w.state(e, got.ID) != erasures.Pending || got.Receipt != "" {
		t.Fatalf("%+v", got)
	}
	w.wantErased(record)
	if again := w.request(e, "ann"); again.ID != got.ID || again.State != erasures.Pending {
		t.Errorf("again: %+v", again)
	}
	w.fail = nil
	next := w.open()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		next.Run(ctx)
	}()
	for deadline := time.Now().Add(time.Minute); w.state(next, got.ID) != erasures.Done; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it is not finished")
		}
	}
	cancel()
	<-done
}

// TestRestored: a keyring from before an erasure is erased again before the
// region listens; one from after it is left as it is, with the keys of users that
// came back.
func TestRestored(t *testing.T) {
	w := newWorld(t)
	e := w.open()
	ann := w.sent("a1", "ann")
	page := "sub." + w.app.String() + "._"
	before, err := w.keys.Load(t.Context(), page)
	if err != nil {
		t.Fatal(err)
	}
	receipt := w.request(e, "ann").Receipt
	ben := w.sent("b1", "ben")
	w.request(e, "ben")
	if _, err := e.Register(t.Context(), "app", w.app, "ben"); err != nil {
		t.Fatal(err)
	}
	back := w.sent("b2", "ben")

	// older makes the keyring seem to end before the last erasure.
	older := func(o *erasures.Options) {
		at := o.KeyringAt
		o.KeyringAt = func(ctx context.Context) (uint64, error) {
			last, err := at(ctx)
			return last - min(last, 1000), err
		}
	}
	settle := func(edit func(*erasures.Options), want int) {
		t.Helper()
		if n, err := w.open(edit).Settle(t.Context()); err != nil || n != want {
			t.Errorf("erased again: %d, %v, want %d", n, err, want)
		}
	}
	settle(func(*erasures.Options) {}, 0)
	settle(older, 0) // it knows of both erasures
	if err := w.readable(back); err != nil {
		t.Errorf("a user that came back: %v", err)
	}
	restore := func() {
		t.Helper()
		now, err := w.keys.Load(t.Context(), page)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.keys.Update(t.Context(), page, before.Value, now.Revision); err != nil {
			t.Fatal(err)
		}
		w.journal.Keyring().Evict(w.app.String())
		if err := w.readable(ann); err != nil {
			t.Fatalf("the copy does not bring the user back: %v", err)
		}
	}
	restore()
	w.request(w.open(), "cid") // so that the head is behind again
	settle(older, 2)
	w.wantErased(ann)
	w.wantErased(ben)

	// The registry was restored too: only the receipt knows.
	restore()
	for name, err := range w.rows.List(t.Context(), "erasure.") {
		if err != nil {
			t.Fatal(err)
		}
		row, err := w.rows.Load(t.Context(), name)
		if err == nil {
			err = w.rows.Delete(t.Context(), name, row.Revision)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	r, err := e.Apply(t.Context(), receipt)
	if err != nil || r.App != w.app.String() {
		t.Fatalf("%+v %v", r, err)
	}
	w.wantErased(ann)
	if w.state(e, r.Erasure) != erasures.Done {
		t.Error("the erasure is not known again")
	}
	var kept []string
	if err := e.Receipts(t.Context(), func(text string) error { kept = append(kept, text); return nil }); err != nil || !slices.Contains(kept, receipt) {
		t.Errorf("receipts: %v %v", kept, err)
	}
}

// TestForgedReceipts: only the region's own signature over a receipt counts.
func TestForgedReceipts(t *testing.T) {
	w, other := newWorld(t), newWorld(t)
	e := w.open()
	w.sent("a1", "ann")
	receipt := w.request(e, "ann").Receipt
	if _, err := other.open().Apply(t.Context(), receipt); !errors.Is(err, erasures.ErrReceipt) {
		t.Errorf("another region's: %v", err)
	}
	manifest, err := w.signing.Sign(t.Context(), "coffer-manifest", map[string]string{"region": "eu"})
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := w.signing.Sign(t.Context(), erasures.ReceiptType, erasures.Receipt{Version: 1, Region: "us", App: w.app.String(), Subject: "00112233445566778899aabbccddeeff"})
	if err != nil {
		t.Fatal(err)
	}
	changed := []byte(receipt)
	changed[len(changed)/2] ^= 1
	for what, text := range map[string]string{
		"changed": string(changed), "cut": receipt[:len(receipt)-5], "nothing": "", "of another kind": manifest, "for another region": foreign,
	} {
		if _, err := e.Apply(t.Context(), text); !errors.Is(err, erasures.ErrReceipt) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func FuzzParseLine(f *testing.F) {
	f.Add([]byte(`{"receipt":"eyJhbGciOiJFZERTQSJ9.eyJyZWdpb24iOiJldSJ9.AAAA"}`))
	f.Add([]byte(`{"receipt":"a.b"}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		text, _, err := erasures.ParseLine(line)
		if err != nil {
			if !errors.Is(err, erasures.ErrReceipt) {
				t.Fatalf("an error of another kind: %v", err)
			}
			return
		}
		again, err := json.Marshal(map[string]string{"receipt": text})
		if err != nil {
			t.Fatal(err)
		}
		if second, _, err := erasures.ParseLine(again); err != nil || second != text {
			t.Fatalf("%q does not come back: %v", text, err)
		}
	})
}
