package journal

import (
	"context"
	"fmt"
	"iter"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/kms"
)

// A Syncer makes what a NATS server of this process has acknowledged survive a
// power cut; journal/embedded has one. It must be safe for concurrent use.
type Syncer interface {
	// Sync returns once every message of the stream that was acknowledged
	// before the call is on disk. After an error it must go on failing for the
	// stream until what is on disk has been read anew.
	Sync(stream string) error
	// SyncMeta returns once the stream's existence is on disk.
	SyncMeta(stream string) error
	// SyncFolder returns once earlier replacements of the stream's files are
	// on disk: a message that was securely deleted stays deleted.
	SyncFolder(stream string) error
}

// An Index answers whether an event was stored before, for as long as the event
// is kept; the history view is one. It must be safe for concurrent use.
type Index interface {
	// Lookup returns the record and position of the event with the tag. A
	// record that is only a header is one whose content is gone, by a recall
	// for instance.
	Lookup(ctx context.Context, app AppID, event kms.Tag) (record []byte, position Position, ok bool, err error)
	// Applied returns the last sequence of the stream up to which Lookup knows
	// every event.
	Applied(stream string) uint64
}

// Config says what a [Journal] works on. Region, Conn and one of KMS and
// Keyring are required; every other zero value is the default.
type Config struct {
	Region Region
	// Plans is the plan table; nil means [DefaultPlans].
	Plans []Plan
	// Conn leads to the region's NATS server. It must have been made with
	// nats.ReconnectBufSize(-1): what became of an append is found out after a
	// reconnect, and a client that sends again on its own would double events.
	// The caller closes it, after the journal.
	Conn *nats.Conn
	// Sync is set for a server of this process that does not sync by itself.
	// Nil means that the server syncs always (sync_interval: always), or
	// acknowledges on a quorum; appends are then committed as atomic batches.
	Sync Syncer
	// Health reports why the server takes no writes, and is asked when a commit
	// is not answered: embedded.Server.Check. An error that wraps ENOSPC
	// becomes [ErrFull], one that wraps EAGAIN passes and is waited for. Nil
	// means that only time tells.
	Health func(context.Context) error
	// Replicas is the number of servers that keep each stream; 0 means 1.
	Replicas int
	// KMS wraps the keys of new apps; the journal makes a keyring over it.
	KMS kms.Provider
	// Keyring is used instead of one over KMS. It must keep its rows in the
	// region's keyring bucket, see [NewRows]. The caller closes it.
	Keyring *kms.Keyring
	// KeySoft and KeyHard are the lifetimes of keys in memory, in the keyring
	// that the journal makes: Soft and Hard of kms.Config.
	KeySoft, KeyHard time.Duration
	// Index answers for idempotency beyond the events of this process's recent
	// past. Nil means that only the last 65,536 events of each stream since the
	// start are told to be duplicates.
	Index Index
	// Limits bound an event.
	Limits Limits
	// CommitTimeout is how long a commit is tried, across reconnects and
	// changes of leader, before its appends fail with [ErrUnavailable];
	// 10 seconds.
	CommitTimeout time.Duration
	// Retention says how long the data is kept that no plan governs.
	Retention Retention
	// Log receives what an operator should know; nil discards it.
	Log *slog.Logger
	// Now is the clock of event times and retention; time.Now when nil.
	Now func() time.Time
}

const (
	defaultCommitTimeout = 10 * time.Second

	sweepTimeout = time.Minute
	sweepGrace   = time.Second
	sweepRetry   = 5 * time.Second
	sweepEvery   = time.Hour
)

// A Journal appends to and reads from the streams of one region. Its methods
// may be called concurrently.
type Journal struct {
	cfg      Config
	region   Region
	plans    map[string]Plan
	log      *slog.Logger
	now      func() time.Time
	js       jetstream.JetStream
	registry *Registry
	rows     *Rows
	keyring  *kms.Keyring
	auditor  *auditor
	logID    LogID
	streams  map[string]*stream // by name; not changed after Open
	order    []StreamInfo       // those of messages

	callbacks *Callbacks
	recalled  chan struct{} // of capacity 1; see Recalled

	closed atomic.Bool
	stop   context.CancelFunc
	ctx    context.Context //nolint:containedctx // the life of the background work
	work   sync.WaitGroup
}

// Open opens the journal of a region: it makes the streams of a region that has
// none yet, checks those that are registered, and starts a committer for each.
// It fails with [ErrIncarnation], naming the stream, when a registered stream
// is missing or is another one.
func Open(ctx context.Context, cfg Config) (*Journal, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("open the journal: %w", err)
	}
	js, err := jetstream.New(cfg.Conn)
	if err != nil {
		return nil, fmt.Errorf("open the journal: %w", err)
	}
	j := &Journal{
		cfg: cfg, region: cfg.Region, log: cfg.Log.With("region", cfg.Region.ID), now: cfg.Now, js: js,
		plans:   make(map[string]Plan, len(cfg.Plans)),
		streams: make(map[string]*stream), recalled: make(chan struct{}, 1),
	}
	for _, p := range cfg.Plans {
		j.plans[p.ID] = p
	}
	j.callbacks = &Callbacks{j: j, retention: cfg.Retention.Callbacks}
	j.ctx, j.stop = context.WithCancel(context.Background())
	if err := j.open(ctx); err != nil {
		_ = j.Close()
		return nil, fmt.Errorf("open the journal of region %s: %w", cfg.Region.ID, err)
	}
	return j, nil
}

func (c Config) withDefaults() (Config, error) {
	if err := c.Region.Validate(); err != nil {
		return c, err
	}
	if c.Plans == nil {
		c.Plans = DefaultPlans()
	}
	seen := make(map[string]bool)
	for _, p := range c.Plans {
		if err := p.Validate(); err != nil {
			return c, err
		}
		if seen[p.ID] {
			return c, fmt.Errorf("%w: plan %s is there twice", ErrInvalid, p.ID)
		}
		seen[p.ID] = true
	}
	switch {
	case c.Conn == nil:
		return c, fmt.Errorf("%w: no connection", ErrInvalid)
	case c.Conn.Opts.ReconnectBufSize != -1:
		return c, fmt.Errorf("%w: the connection sends again after a reconnect; it needs nats.ReconnectBufSize(-1)", ErrInvalid)
	case c.KMS == nil && c.Keyring == nil:
		return c, fmt.Errorf("%w: no key provider", ErrInvalid)
	case c.Sync != nil && c.Replicas > 1:
		return c, fmt.Errorf("%w: replicated streams are not synced by the process", ErrInvalid)
	}
	c.Replicas = max(c.Replicas, 1)
	if c.CommitTimeout <= 0 {
		c.CommitTimeout = defaultCommitTimeout
	}
	if err := c.Retention.Validate(); err != nil {
		return c, err
	}
	c.Retention = c.Retention.WithDefaults()
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return c, nil
}

func (j *Journal) open(ctx context.Context) error {
	if err := checkServer(j.cfg.Conn); err != nil {
		return err
	}
	states, err := j.openStreams(ctx)
	if err != nil {
		return err
	}
	j.keyring = j.cfg.Keyring
	keys := NewRows(j.js, KeyringBucket(j.region.ID), j.cfg.Sync)
	if j.keyring == nil {
		j.keyring, err = kms.NewKeyring(kms.Config{
			Region: j.region.ID, Provider: j.cfg.KMS, Rows: keys, Log: j.log, Now: j.now, Soft: j.cfg.KeySoft, Hard: j.cfg.KeyHard,
			Tombstones: j.cfg.Retention.Tombstones,
		})
		if err != nil {
			return err
		}
	}
	for _, rows := range []*Rows{j.rows, keys, NewRows(j.js, ProfileBucket(j.region.ID), j.cfg.Sync)} {
		j.work.Go(func() { j.sweep(rows) }) //nolint:contextcheck // its life is not the caller's
	}
	j.auditor = newAuditor(j) //nolint:contextcheck // its life is not the caller's
	j.registry = newRegistry(j.region, j.cfg.Plans, j.rows, j.keyring, j.now)
	j.work.Go(func() { j.registry.watch(j.ctx, j.log) })
	for _, st := range states {
		s, err := j.newStream(st)
		if err != nil {
			return err
		}
		j.streams[st.info.Name] = s
		if st.info.Plan == "" {
			j.callbacks.streams = append(j.callbacks.streams, st.info)
			continue
		}
		j.order = append(j.order, st.info)
	}
	return nil
}

// sweep finishes interrupted erasures: those that a killed process left, and
// from then on those that failed.
func (j *Journal) sweep(rows *Rows) {
	for {
		// A sweep that has begun is finished while the journal closes, if the
		// server answers.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(j.ctx), sweepTimeout)
		stop := context.AfterFunc(j.ctx, func() { time.AfterFunc(sweepGrace, cancel) })
		err := rows.Sweep(ctx)
		stop()
		cancel()
		wait := sweepEvery
		if err != nil {
			j.log.Warn("replaced rows are not erased yet", "bucket", rows.stream, "error", err)
			wait = sweepRetry
		}
		select {
		case <-j.ctx.Done():
			return
		case <-time.After(wait):
		case <-rows.left:
			if !pause(j.ctx, sweepRetry) {
				return
			}
		}
	}
}

// Close ends the committers and readers and releases what Open made. Appends
// that are under way finish first; later ones fail with [ErrUnavailable].
func (j *Journal) Close() error {
	if j.closed.Swap(true) {
		return nil
	}
	for _, s := range j.streams {
		s.close()
	}
	j.stop()
	j.work.Wait()
	if j.auditor != nil {
		<-j.auditor.done
	}
	if j.keyring != nil && j.cfg.Keyring == nil {
		if err := j.keyring.Close(); err != nil {
			return fmt.Errorf("close the journal: %w", err)
		}
	}
	return nil
}

// Region returns the journal's region.
func (j *Journal) Region() Region { return j.region }

// Plan returns a plan of the region's table.
func (j *Journal) Plan(id string) (Plan, bool) {
	p, ok := j.plans[id]
	return p, ok
}

// Keyring returns the keyring, for the operations on keys.
func (j *Journal) Keyring() *kms.Keyring { return j.keyring }

// Registry returns the registry of apps, for changing them.
func (j *Journal) Registry() *Registry { return j.registry }

// LogID returns the random id of the region's set of data.
func (j *Journal) LogID() LogID { return j.logID }

// Streams returns the region's message streams.
func (j *Journal) Streams() []StreamInfo { return append([]StreamInfo(nil), j.order...) }

// CreateApp makes an app and its keys, and returns when both are durable.
func (j *Journal) CreateApp(ctx context.Context, spec AppSpec) (App, error) {
	return j.registry.Create(ctx, spec)
}

// App returns an app of the region, from memory when it was asked for before.
func (j *Journal) App(ctx context.Context, id AppID) (App, error) { return j.registry.App(ctx, id) }

// Apps yields the apps of the region, in the order of their ids.
func (j *Journal) Apps(ctx context.Context) iter.Seq2[App, error] { return j.registry.Apps(ctx) }

// Tag returns the tag of an id of an app: kind is one of kms.KindEvent,
// kms.KindConversation and kms.KindSubject.
func (j *Journal) Tag(ctx context.Context, app AppID, kind, id string) (kms.Tag, error) {
	t, err := j.keyring.Tagger(ctx, app.String())
	if err != nil {
		return kms.Tag{}, fmt.Errorf("tag of app %s: %w", app, err)
	}
	return t.Tag(kind, id), nil
}

// MAC returns a keyed hash of msg under a key of the app, for one purpose.
func (j *Journal) MAC(ctx context.Context, app AppID, purpose string, msg []byte) ([32]byte, error) {
	t, err := j.keyring.Tagger(ctx, app.String())
	if err != nil {
		return [32]byte{}, fmt.Errorf("hash of app %s: %w", app, err)
	}
	return t.MAC(purpose, msg), nil
}
