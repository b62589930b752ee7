package keys

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

// TestWhileAppending: events are appended and opened while the keys are rewrapped,
// moved and replaced. No stored record changes, and every one opens afterwards.
func TestWhileAppending(t *testing.T) {
	w := newWorld(t)
	a := w.adminOver(w.journal.Keyring(), w.rows())
	defer w.run(a)()
	ctx := t.Context()
	var apps []journal.AppID
	for i := range 4 {
		app, err := w.journal.CreateApp(ctx, journal.AppSpec{Name: fmt.Sprint(i), Account: "acme", Plan: "pro"})
		must(t, err)
		apps = append(apps, app.ID)
	}
	total := len(apps)
	n := 0
	appendOne := func(app journal.AppID) {
		n++
		results, err := w.journal.Append(ctx, app, journal.Event{
			ID: fmt.Sprintf("e%d", n), Type: journal.MessageSent, Sender: fmt.Sprintf("user%d", n%7), Recipient: "ben",
			Data: jsontext.Value(`{"bodies":[{"type":"txt","msg":"hello"}]}`),
		})
		if err == nil {
			err = results[0].Err
		}
		if err != nil {
			t.Errorf("append %d: %v", n, err)
		}
	}
	for range 100 {
		for _, app := range apps {
			appendOne(app)
		}
	}
	before := w.records(100 * len(apps))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			for _, app := range apps {
				appendOne(app)
			}
			for _, r := range before[:10] {
				a.keyring.Evict(r.App.String()) // as a process that has just started
				if _, err := w.journal.OpenRecord(ctx, nil, r.App, r.Record); err != nil {
					t.Errorf("reading meanwhile: %v", err)
				}
			}
			select {
			case <-stop:
				return
			default:
			}
		}
	})
	for _, spec := range []Spec{{Kind: Migrate, To: "local:b"}, {Kind: Rewrap}, {Kind: Replace}, {Kind: Migrate, To: "local:a"}, {Kind: Verify}} {
		_, err := a.Rotate(ctx, actor)
		must(t, err)
		if j := w.do(a, spec); j.State != Done || j.Failed != 0 || j.Done+j.Skipped != total {
			t.Errorf("%s", pretty(j))
		}
	}
	close(stop)
	wg.Wait()
	after := w.records(n)
	if len(after) != n {
		t.Fatalf("%d records, want %d", len(after), n)
	}
	for i, r := range before {
		if !bytes.Equal(r.Record, after[i].Record) {
			t.Fatalf("record %d has changed", i)
		}
	}
	fresh := w.admin(w.rows())
	for _, r := range after {
		a.keyring.Evict(r.App.String())
		if _, err := w.journal.OpenRecord(ctx, nil, r.App, r.Record); err != nil {
			t.Fatal(err)
		}
	}
	for _, app := range apps {
		if ids := w.wraps(fresh)[app.String()]; ids == "" || bytes.Contains([]byte(ids), []byte(" ")) {
			t.Errorf("app %s is under %q", app, ids)
		}
	}
}

// records reads the first records of the region's stream.
func (w *world) records(n int) []journal.Sealed {
	w.t.Helper()
	var all []journal.Sealed
	enough := errors.New("enough")
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
	defer cancel()
	for _, s := range w.journal.Streams() {
		if s.Plan != "pro" {
			continue
		}
		err := w.journal.Read(ctx, s.Name, 0, s.Incarnation, func(batch []journal.Sealed) error {
			for _, r := range batch {
				r.Record = bytes.Clone(r.Record)
				all = append(all, r)
			}
			if len(all) >= n {
				return enough
			}
			return nil
		})
		if !errors.Is(err, enough) {
			w.t.Fatal(err)
		}
	}
	return all
}

// meanwhile are rows that do something before each write of a job's row.
type meanwhile struct {
	kms.Rows

	do func(j Job)
}

func (m meanwhile) Update(ctx context.Context, name string, value []byte, revision uint64) (uint64, error) {
	var j Job
	if strings.HasPrefix(name, jobPrefix) && name != currentRow && json.Unmarshal(value, &j) == nil {
		m.do(j)
	}
	return m.Rows.Update(ctx, name, value, revision)
}

// TestNewApps: apps that another process, which has not heard of the migration
// yet, makes behind the cursor are not left under the old KEK.
func TestNewApps(t *testing.T) {
	w := newWorld(t)
	two := w.admin(w.rows())
	made := 0
	one := w.admin(meanwhile{w.rows(), func(j Job) {
		if j.Phase == phasePrefer && made == 0 || j.Phase == phaseDrop && j.Done > 3 && made == 1 {
			made++
			must(t, two.keyring.CreateApp(t.Context(), fmt.Sprintf("app000-new%d", made)))
		}
	}})
	w.apps(one, 8)
	defer w.run(one)()
	w.want(w.do(one, Spec{Kind: Migrate, To: "local:b"}), Done, 10, 0, 0)
	if made != 2 {
		t.Fatalf("%d apps were made meanwhile", made)
	}
	w.all(one, w.idb, "1")
}
