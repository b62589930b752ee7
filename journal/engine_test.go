package journal_test

import (
	"context"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/nats-io/nats.go"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/journal/journaltest"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/local"
)

// world is one region: a folder with the server's files and the key file.
type world struct {
	dir string
	srv *embedded.Server
	nc  *nats.Conn
	kms kms.Provider
	*journal.Journal
}

func region() journal.Region { return journal.DefaultRegions()[2] }

func provider(tb testing.TB, dir string) kms.Provider {
	tb.Helper()
	p, err := local.Open(tb.Context(), local.Options{Path: filepath.Join(dir, "keys"), Create: true, Region: region().Cloud})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = p.Close() })
	return p
}

// begin starts a region in dir. The change, which may be nil, sees the
// configuration before the journal is opened.
func begin(tb testing.TB, dir string, syncAlways bool, change func(*journal.Config)) *world {
	tb.Helper()
	w := &world{dir: dir, kms: provider(tb, dir)}
	w.srv, w.nc = journaltest.Start(tb, embedded.Options{StoreDir: filepath.Join(dir, "nats"), SyncAlways: syncAlways})
	cfg := w.config()
	if change != nil {
		change(&cfg)
	}
	var err error
	if w.Journal, err = journal.Open(tb.Context(), cfg); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := w.Close(); err != nil {
			tb.Error(err)
		}
	})
	return w
}

func (w *world) config() journal.Config {
	cfg := journal.Config{Region: region(), Conn: w.nc, KMS: w.kms, Health: w.srv.Check}
	if s := w.srv.Syncer(); s != nil {
		cfg.Sync = s
	}
	return cfg
}

// end stops what begin started, in the right order.
func (w *world) end(tb testing.TB) {
	tb.Helper()
	if err := w.Close(); err != nil {
		tb.Error(err)
	}
	w.nc.Close()
	if err := w.srv.Close(); err != nil {
		tb.Error(err)
	}
}

func newApp(tb testing.TB, j *journal.Journal) journal.AppID {
	tb.Helper()
	app, err := j.CreateApp(tb.Context(), journal.AppSpec{Plan: "enterprise", Name: "test"})
	if err != nil {
		tb.Fatal(err)
	}
	return app.ID
}

// message returns a group message with the given id and a body of size bytes.
func message(id, sender string, size int) journal.Event {
	return journal.Event{
		ID: id, Type: journal.MessageSent, Conversation: "room-" + sender, ConversationType: journal.Group, Sender: sender,
		Data: jsontext.Value(`{"bodies":[{"type":"txt","msg":"` + strings.Repeat("x", size) + `"}]}`),
	}
}

func appendOne(ctx context.Context, j *journal.Journal, app journal.AppID, e journal.Event) (journal.Result, error) {
	results, err := j.Append(ctx, app, e)
	if err != nil {
		return journal.Result{}, err
	}
	return results[0], results[0].Err
}

// readAll returns the events of a stream up to sequence last, opened.
func readAll(tb testing.TB, j *journal.Journal, stream string, last uint64) []string {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), time.Minute)
	defer cancel()
	var out []string
	done := fmt.Errorf("done")
	if last == 0 {
		return nil
	}
	err := j.Read(ctx, stream, 0, "", func(batch []journal.Sealed) error {
		for _, s := range batch {
			plain, err := j.OpenRecord(ctx, nil, s.App, s.Record)
			if err != nil {
				return err
			}
			out = append(out, string(plain))
			if s.Sequence == last {
				return done
			}
		}
		return nil
	})
	if err != done { //nolint:errorlint // Read returns what fn returned
		tb.Fatal(err)
	}
	return out
}

// idOf returns the id in an event's canonical JSON.
func idOf(event string) string {
	_, rest, _ := strings.Cut(event, `"id":"`)
	id, _, _ := strings.Cut(rest, `"`)
	return id
}

func enterprise() string { return journal.StreamName(region().ID, "enterprise", 0) }

func TestAppendAndRead(t *testing.T) {
	for name, always := range map[string]bool{"own sync": false, "sync always": true} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			w := begin(t, dir, always, nil)
			app := newApp(t, w.Journal)
			const n = 300
			for i := range n {
				r, err := appendOne(t.Context(), w.Journal, app, message("m"+strconv.Itoa(i), "alice", 100))
				if err != nil {
					t.Fatal(err)
				}
				if r.Position.Sequence() != uint64(i+1) || r.Duplicate || r.ID != "m"+strconv.Itoa(i) {
					t.Fatalf("result %d: %+v", i, r)
				}
			}
			batch := make([]journal.Event, n)
			for i := range batch {
				batch[i] = message("b"+strconv.Itoa(i), "bob", 100)
			}
			results, err := w.Append(t.Context(), app, batch...)
			if err != nil {
				t.Fatal(err)
			}
			for i, r := range results {
				if r.Err != nil || r.Position.Sequence() != uint64(n+i+1) {
					t.Fatalf("result %d of the batch: %+v", i, r)
				}
			}
			check := func(w *world) {
				t.Helper()
				last, err := w.Last(t.Context(), enterprise())
				if err != nil || last != 2*n {
					t.Fatalf("last sequence %d, %v", last, err)
				}
				for i, event := range readAll(t, w.Journal, enterprise(), last) {
					want := "m" + strconv.Itoa(i)
					if i >= n {
						want = "b" + strconv.Itoa(i-n)
					}
					if idOf(event) != want {
						t.Fatalf("event %d: %s", i, event)
					}
				}
			}
			check(w)
			w.end(t)
			check(begin(t, dir, always, nil))
		})
	}
}
