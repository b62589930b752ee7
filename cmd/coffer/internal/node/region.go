package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/cmd/coffer/internal/accounts"
	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/deletion"
	"github.com/cofferdb/coffer/cmd/coffer/internal/erasures"
	"github.com/cofferdb/coffer/cmd/coffer/internal/exports"
	"github.com/cofferdb/coffer/cmd/coffer/internal/keys"
	"github.com/cofferdb/coffer/cmd/coffer/internal/monitor"
	"github.com/cofferdb/coffer/cmd/coffer/internal/profiles"
	"github.com/cofferdb/coffer/cmd/coffer/internal/recalls"
	"github.com/cofferdb/coffer/cmd/coffer/internal/server"
	"github.com/cofferdb/coffer/cmd/coffer/internal/signing"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/attachments"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/history"
	"github.com/cofferdb/coffer/projections/pebble"
	"github.com/cofferdb/coffer/projections/roaming"
)

type regionOptions struct {
	config      config.Config
	region      config.Region
	connections int
	log         *slog.Logger
	now         func() time.Time
	day         time.Duration // how long it lasts; 0 means 24 hours
}

// region is everything of one region, in the order in which it is opened.
type region struct {
	config    config.Region
	log       *slog.Logger
	elsewhere map[byte]server.Place

	nats     *embedded.Server // nil for an external one
	conn     *nats.Conn
	provider kms.Provider
	audit    *keyAudit
	keys     *keys.Admin
	store    *pebble.Store
	view     *history.View
	roaming  *roaming.View
	journal  *journal.Journal
	runner   *projections.Runner
	accounts *accounts.Store
	exports  *exports.Exports
	attached *attachments.Store
	signing  *signing.Key
	erasures *erasures.Erasures
	rows     *journal.Rows // of the registry

	deletions *deletion.Deletions
	profiles  *profiles.Store
	shelf     *journal.Rows // of profiles

	metrics *monitor.Metrics
	meter   *monitor.Meter
	swept   *swept

	callbacks *deliveries
	mover     *journal.Mover
	moved     chan struct{} // of capacity 1: a plan change is done
	listener  net.Listener
	server    *server.Server
	http      *http.Server
	url       string
	compat    *compat // nil without one

	options   regionOptions
	residency surveyor

	mu           sync.Mutex // guards what follows
	checked      time.Time
	keysAnswered time.Time // when the provider last answered well
	probe        keyProbe
	reasons      []server.Unready
	told         string // the reasons as they were logged
	failure      error  // of the runner
}

// openRegion opens a region up to its listener, which run then serves. The
// region is returned also with an error, for close.
func openRegion(ctx context.Context, o regionOptions) (*region, error) {
	r := &region{config: o.region, log: o.log, options: o}
	dir := regionDir(o.config.DataDir, o.region.ID)
	views := filepath.Join(dir, "views")
	_, err := os.Stat(views)
	fresh := errors.Is(err, fs.ErrNotExist)
	if err := secureDir(dir); err != nil {
		return r, err
	}
	// The address first: it fails at once when another process has it.
	if r.listener, err = listen(ctx, o.region.Listen, o.connections); err != nil {
		return r, err
	}
	r.url = o.region.URL
	if r.url == "" {
		r.url = scheme(o.region) + r.listener.Addr().String()
	}
	if err := r.listenCompat(ctx, o.connections); err != nil {
		return r, err
	}
	r.metrics = monitor.NewMetrics(r.config.ID, o.log)
	r.swept = newSwept("keys", "accounts", "profiles", "exports")
	r.audit = &keyAudit{metrics: r.metrics}
	if r.provider, err = openProvider(ctx, o.region, fresh, r.audit, o.log); err != nil {
		return r, err
	}
	if r.store, err = openStore(views, o.log); err != nil {
		return r, err
	}
	if r.view, err = history.New(history.Config{Store: r.store, Plans: o.config.PlanTable, Hour: o.hour()}); err != nil {
		return r, err
	}
	if r.roaming, err = roaming.New(roaming.Config{Store: r.store, Plans: o.config.PlanTable}); err != nil {
		return r, err
	}
	if err := r.connect(ctx, filepath.Join(dir, "nats")); err != nil {
		return r, err
	}
	if err := r.openJournal(ctx); err != nil {
		return r, err
	}
	if err := checkWitness(dir, r.journal.Streams()); err != nil {
		return r, err
	}
	r.audit.journal.Store(r.journal)
	r.metrics.Gather(gauges(), r.look)
	r.residency.region = r
	return r, r.prepareHTTP()
}

// openStore opens the view store. One that is damaged is put aside and a new
// one is filled from the journal: a view holds nothing of its own.
func openStore(dir string, log *slog.Logger) (*pebble.Store, error) {
	store, err := pebble.Open(pebble.Options{Dir: dir, Log: log})
	if !errors.Is(err, projections.ErrCorrupt) {
		return store, err
	}
	aside := dir + ".damaged"
	log.Error("the view store is damaged; it is put aside and rebuilt from the journal", "err", err, "aside", aside)
	if err := os.RemoveAll(aside); err != nil {
		return nil, fmt.Errorf("removing an older damaged view store: %w", err)
	}
	if err := os.Rename(dir, aside); err != nil {
		return nil, fmt.Errorf("putting the damaged view store aside: %w", err)
	}
	return pebble.Open(pebble.Options{Dir: dir, Log: log})
}

// connect starts the region's NATS server, or connects to it.
func (r *region) connect(ctx context.Context, dir string) error {
	var err error
	if r.config.NATS.URL != "" {
		r.conn, err = connectExternal(ctx, r.config, r.log)
		return err
	}
	r.nats, err = embedded.Start(ctx, embedded.Options{StoreDir: dir, Name: "coffer-" + r.config.ID, Log: r.log})
	if err != nil {
		return err
	}
	r.conn, err = r.nats.Connect()
	return err
}

func (r *region) openJournal(ctx context.Context) error {
	// A nil *Syncer in the interface would not be nil.
	var syncer journal.Syncer
	var health func(context.Context) error
	if r.nats != nil {
		health = r.nats.Check
		if s := r.nats.Syncer(); s != nil {
			syncer = s
		}
	}
	var err error
	r.journal, err = journal.Open(ctx, journal.Config{
		Region: r.config.Journal(), Plans: r.options.config.PlanTable, Retention: r.options.retention(), Conn: r.conn, Sync: syncer, Replicas: r.config.NATS.Replicas,
		KMS: r.provider, KeySoft: time.Duration(r.config.Keys.Revalidate), KeyHard: time.Duration(r.config.Keys.Outage),
		Index: r.view, Health: health, Log: r.log, Now: r.options.now,
	})
	if err != nil {
		return err
	}
	r.meter = monitor.NewMeter(r.journal, r.metrics, r.log, r.options.now)
	r.runner, err = projections.NewRunner(projections.RunnerConfig{
		Journal: r.journal, Store: r.store, Projections: []projections.Projection{r.view, r.roaming}, Log: r.log,
	})
	if err != nil {
		return err
	}
	if err := r.openMover(); err != nil {
		return err
	}
	js, err := jetstream.New(r.conn)
	if err != nil {
		return fmt.Errorf("opening the registry: %w", err)
	}
	r.rows = journal.NewRows(js, journal.RegistryBucket(r.config.ID), syncer)
	r.accounts = accounts.New(r.rows, r.journal.Keyring(), r.journal.Retention(), r.options.now)
	r.attached = attachments.New(attachments.Config{
		Journal: r.journal, JetStream: js, Sync: syncer, Limit: r.options.config.Limits.AttachmentBytes, Now: r.options.now,
	})
	r.exports = exports.New(exports.Options{
		Region: r.config.Journal(), Journal: r.journal, History: r.view, Runner: r.runner, Rows: r.rows, Log: r.log, Now: r.options.now,
		Passed: func(began time.Time) { r.swept.done("exports", began) },
	})
	if err := r.openCallbacks(); err != nil {
		return err
	}
	r.openDeletions(js, syncer)
	if err := r.openKeys(ctx, js, syncer); err != nil {
		return err
	}
	return r.openErasures(ctx, js)
}

// run serves until closeListener; it returns an error when the listener or the
// views failed.
func (r *region) run(ctx context.Context) error {
	limits := r.options.config.Limits
	r.server = server.New(server.Options{
		Mover: r.mover,
		Meter: r.meter, Metrics: r.metrics,
		Region: r.config.Journal(), Journal: r.journal, History: r.view, Roaming: r.roaming, Runner: r.runner, Accounts: r.accounts, Keys: r.keys,
		Exports: r.exports, Callbacks: r.callbacks.engine, Presend: r.callbacks.presend,
		Deletions: r.deletions, Profiles: r.profiles,
		Attached: r.attached,
		Erasures: r.erasures, Signing: r.signing, Residency: r.residency.manifest,
		Operators: r.options.config.Operators, Elsewhere: r.elsewhere, Ready: r.ready, Log: r.log, Now: r.options.now,
		Limits: server.Limits{
			RequestBytes: limits.RequestBytes, BatchEvents: limits.BatchEvents,
			BodyTimeout: time.Duration(limits.BodyTimeout), WriteTimeout: time.Duration(limits.WriteTimeout),
			Streams: limits.Streams, AppRequests: limits.AppRequests, AppBurst: limits.AppBurst, AppStreams: limits.AppStreams,
			UserRequests: limits.UserRequests, UserBurst: limits.UserBurst, UserStreams: limits.UserStreams,
			AttachmentBytes: limits.AttachmentBytes,
		},
	})
	r.http.Handler = r.server
	r.prepareCompat()
	r.http.RegisterOnShutdown(r.server.Stop)
	var views sync.WaitGroup
	defer views.Wait()
	views.Go(func() {
		// A store that has failed makes the region unready, and reads answer
		// with its error. The listener stays: /readyz must say why.
		if err := r.runner.Run(ctx); err != nil {
			r.log.Error("the views have stopped", "err", err)
			r.mu.Lock()
			defer r.mu.Unlock()
			r.failure = err
		}
	})
	views.Go(func() { r.clean(ctx) })
	views.Go(func() { r.meter.Run(ctx, r.options.every(time.Minute)) })
	views.Go(func() { r.deliver(ctx) })
	views.Go(func() { r.sweepShelves(ctx) })
	views.Go(func() { r.deletions.Run(ctx) })
	views.Go(func() { _ = r.keys.Run(ctx) }) // it ends with ctx only, and without an error
	views.Go(func() { r.exports.Run(ctx) })
	views.Go(func() { r.erasures.Run(ctx) })
	views.Go(func() {
		recalls.New(recalls.Options{Journal: r.journal, History: r.view, Log: r.log, Now: r.options.now}).Run(ctx)
	})
	views.Go(func() { _ = r.mover.Run(ctx) }) // as keys.Run
	views.Go(func() { r.serveCompat() })
	if err := r.serve(); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("listener: %w", err)
	}
	return nil
}

// closeListener stops taking requests and lets those under way finish.
func (r *region) closeListener(ctx context.Context) error {
	if err := r.closeCompat(ctx); err != nil {
		return err
	}
	if r.http != nil {
		if err := r.http.Shutdown(ctx); err != nil {
			return errors.Join(fmt.Errorf("requests were cut: %w", err), r.http.Close())
		}
	}
	if r.server != nil {
		if err := r.server.Wait(ctx); err != nil {
			return fmt.Errorf("WebSockets were cut: %w", err)
		}
	}
	if r.listener != nil {
		_ = r.listener.Close() // closed already when it was served
	}
	return nil
}

// close ends everything below the listener, the last opened first.
func (r *region) close() error {
	var errs []error
	if r.callbacks != nil {
		r.callbacks.transport.Close()
	}
	if r.journal != nil {
		errs = append(errs, r.journal.Close())
	}
	if r.keys != nil {
		errs = append(errs, r.keys.Close())
	}
	if r.conn != nil {
		r.conn.Close()
	}
	if r.nats != nil {
		errs = append(errs, r.nats.Close())
	}
	if r.store != nil {
		errs = append(errs, r.store.Close())
	}
	if r.provider != nil {
		errs = append(errs, r.provider.Close())
	}
	return errors.Join(errs...)
}
