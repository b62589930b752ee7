package bench

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/nats-io/nats.go"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/local"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/history"
	"github.com/cofferdb/coffer/projections/pebble"
)

const (
	// planID is the plan of the app that is measured.
	planID = "enterprise"
	// senders is how many users send; each has a key of its own, made before
	// anything is measured.
	senders = 256
	// conversations is how many groups they send to.
	conversations = 64
)

// rig is a region as the server runs it, without its listener.
type rig struct {
	dir      string
	server   *embedded.Server
	conn     *nats.Conn
	provider *local.Provider
	journal  *journal.Journal
	app      journal.App
	users    names
	groups   names
	fills    int // how often events were filled in; their ids begin with it

	// The view is there when it was asked for.
	store   *pebble.Store
	view    *history.View
	runner  *projections.Runner
	stop    context.CancelFunc
	stopped chan error
}

// openRig opens the region in a folder, and makes its app when it has none.
func openRig(ctx context.Context, dir string, withView bool, log *slog.Logger) (*rig, error) {
	r := &rig{dir: dir, users: makeNames("user", senders), groups: makeNames("group", conversations)}
	if err := r.open(ctx, withView, log); err != nil {
		return nil, errors.Join(fmt.Errorf("open the region to measure: %w", err), r.close())
	}
	return r, nil
}

func (r *rig) open(ctx context.Context, withView bool, log *slog.Logger) error {
	quiet := slog.New(slog.DiscardHandler)
	if err := os.MkdirAll(r.dir, 0o700); err != nil {
		return err
	}
	var err error
	if r.server, err = embedded.Start(ctx, embedded.Options{StoreDir: filepath.Join(r.dir, "nats"), Log: quiet}); err != nil {
		return err
	}
	if reason := r.server.Fallback(); reason != "" {
		log.WarnContext(ctx, "the embedded server syncs by itself", "reason", reason)
	}
	if r.conn, err = r.server.Connect(); err != nil {
		return err
	}
	if r.provider, err = local.Open(ctx, local.Options{Path: filepath.Join(r.dir, "key.json"), Create: true}); err != nil {
		return err
	}
	config := journal.Config{Region: journal.DefaultRegions()[2], Conn: r.conn, KMS: r.provider, Log: quiet}
	if s := r.server.Syncer(); s != nil { // a nil *Syncer in the interface would not be nil
		config.Sync = s
	}
	if withView {
		if r.store, err = pebble.Open(pebble.Options{Dir: filepath.Join(r.dir, "views"), Log: quiet}); err != nil {
			return err
		}
		if r.view, err = history.New(history.Config{Store: r.store}); err != nil {
			return err
		}
		config.Index = r.view
	}
	if r.journal, err = journal.Open(ctx, config); err != nil {
		return err
	}
	if withView {
		if err := r.run(); err != nil { //nolint:contextcheck // its life is not the caller's
			return err
		}
	}
	for app, err := range r.journal.Apps(ctx) {
		if err != nil {
			return err
		}
		r.app = app
	}
	if r.app.ID.IsZero() {
		r.app, err = r.journal.CreateApp(ctx, journal.AppSpec{Name: "bench", Plan: planID})
	}
	return err
}

// run starts the runner, which ends with close.
func (r *rig) run() error {
	var err error
	r.runner, err = projections.NewRunner(projections.RunnerConfig{
		Journal: r.journal, Store: r.store, Projections: []projections.Projection{r.view}, Batch: 4096,
	})
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	r.stop, r.stopped = stop, make(chan error, 1)
	go func() { r.stopped <- r.runner.Run(ctx) }()
	return nil
}

func (r *rig) close() error {
	var errs []error
	if r.stop != nil {
		r.stop()
		errs = append(errs, <-r.stopped)
	}
	if r.journal != nil {
		errs = append(errs, r.journal.Close())
	}
	if r.store != nil {
		errs = append(errs, r.store.Close())
	}
	if r.provider != nil {
		errs = append(errs, r.provider.Close())
	}
	if r.conn != nil {
		r.conn.Close()
	}
	if r.server != nil {
		errs = append(errs, r.server.Close())
	}
	return errors.Join(errs...)
}

func (r *rig) stream() string {
	return journal.StreamName(r.app.Region, r.app.Plan, r.app.Shard)
}

// template is an event whose stored record has the given size. Its id is set by
// eventID, which keeps its length. Its data has been checked, as that of an
// event from journal.ParseEvent has.
func template(size int) (journal.Event, error) {
	e := journal.Event{
		ID: eventID(0, 0), Type: journal.MessageSent, Time: time.Now(),
		Conversation: makeNames("group", 1)[0], ConversationType: journal.Group, Sender: makeNames("user", 1)[0],
	}
	fill := func(n int) error {
		e.Data = jsontext.Value(`{"bodies":[{"type":"txt","msg":"` + strings.Repeat("m", n) + `"}],"ext":{}}`)
		return e.Normalize(time.Now(), journal.Limits{})
	}
	if err := fill(0); err != nil {
		return e, err
	}
	least := len(e.AppendJSON(nil, journal.AppID{})) + journal.HeaderSize + kms.Overhead
	if size < least {
		return e, fmt.Errorf("a record has at least %d bytes, %d were asked for", least, size)
	}
	if err := fill(size - least); err != nil {
		return e, err
	}
	e.ID, e.Time = "", time.Time{}
	return e, nil
}

// idBlock makes a writer's ids, some at a time: an id is its caller's, and what it
// costs is not the journal's.
type idBlock struct {
	text  string // the ids of a block, one after the other
	block int
}

// at returns the n-th id of a writer.
func (b *idBlock) at(writer, n int) string {
	const block, size = 64, len(idForm)
	if b.text == "" || n/block != b.block {
		text := make([]byte, 0, block*size)
		for i := range block {
			text = append(text, eventID(writer, n/block*block+i)...)
		}
		b.text, b.block = string(text), n/block
	}
	i := n % block
	return b.text[i*size : (i+1)*size]
}

// idForm has the length of an id of eventID.
const idForm = "w00000-0000000000"

// eventID is made by hand, and cheaply.
func eventID(writer, n int) string {
	id := [len(idForm)]byte([]byte(idForm))
	digits(id[1:6], writer)
	digits(id[7:], n)
	return string(id[:])
}

func digits(dst []byte, n int) {
	for i := len(dst) - 1; i >= 0; i-- {
		dst[i] = '0' + byte(n%10)
		n /= 10
	}
}

// names are made once.
type names []string

func makeNames(prefix string, n int) names {
	out := make(names, n)
	for i := range out {
		out[i] = fmt.Sprintf("%s%05d", prefix, i)
	}
	return out
}

func (n names) at(i int) string { return n[i%len(n)] }

// warm appends one event of every sender, so that no key has to be made while
// it is measured.
func (r *rig) warm(ctx context.Context, base journal.Event) error {
	events := make([]journal.Event, senders)
	for i := range events {
		events[i] = base
		events[i].ID = eventID(99_999, i)
		events[i].Sender, events[i].Conversation = r.users.at(i), r.groups.at(i)
	}
	return r.append(ctx, events)
}

// append stores events and fails when one was not stored.
func (r *rig) append(ctx context.Context, events []journal.Event) error {
	results, err := r.journal.Append(ctx, r.app.ID, events...)
	if err != nil {
		return err
	}
	for _, result := range results {
		if result.Err != nil {
			return result.Err
		}
		if result.Duplicate {
			return fmt.Errorf("event %s was taken for a duplicate", result.ID)
		}
	}
	return nil
}

// fill appends n events in batches, from a few writers, and waits until the view
// has them. conversation says where the i-th event belongs.
func (r *rig) fill(ctx context.Context, base journal.Event, n int, conversation func(i int) string) error {
	return r.fillPlaces(ctx, base, n, func(i int) (string, string) { return r.users.at(i), conversation(i) })
}

// fillPlaces is fill; place says who sends the i-th event, too.
func (r *rig) fillPlaces(ctx context.Context, base journal.Event, n int, place func(i int) (user, conversation string)) error {
	const batch = 500
	writer := r.fills
	r.fills++
	jobs := make(chan int)
	failed := make(chan error, 4)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	for range cap(failed) {
		go func() {
			var err error
			for from := range jobs {
				events := make([]journal.Event, 0, batch)
				for i := from; i < min(from+batch, n); i++ {
					e := base
					e.ID = eventID(writer, i)
					e.Sender, e.Conversation = place(i)
					events = append(events, e)
				}
				if err = r.append(ctx, events); err != nil {
					cancel(err)
					break
				}
			}
			failed <- err
		}()
	}
feed:
	for from := 0; from < n; from += batch {
		select {
		case jobs <- from:
		case <-ctx.Done():
			break feed
		}
	}
	close(jobs)
	var errs []error
	for range cap(failed) {
		errs = append(errs, <-failed)
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("fill the journal: %w", err)
	}
	return r.caughtUp(ctx)
}

// caughtUp waits until the view has what the stream has.
func (r *rig) caughtUp(ctx context.Context) error {
	last, err := r.journal.Last(ctx, r.stream())
	if err != nil {
		return err
	}
	for r.view.Applied(r.stream()) < last {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-r.stopped:
			r.stopped <- err
			return fmt.Errorf("the view has stopped: %w", err)
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}

// tempDir makes a folder for a benchmark, and returns what removes it.
func tempDir(o Options) (string, func(), error) {
	dir, err := os.MkdirTemp(o.Dir, "coffer-bench-*")
	if err != nil {
		return "", nil, fmt.Errorf("make a folder for the data: %w", err)
	}
	return dir, func() {
		if err := os.RemoveAll(dir); err != nil {
			o.Log.Warn("the benchmark's data was not removed", "dir", dir, "error", err)
		}
	}, nil
}
