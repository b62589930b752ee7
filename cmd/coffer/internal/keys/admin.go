package keys

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

// The sentinels below are what callers branch on.
var (
	// ErrSpec means that an operation does not make sense as it was asked for.
	// Correct it.
	ErrSpec = errors.New("not a key operation")
	// ErrNoJob means that no job has this id.
	ErrNoJob = errors.New("no such job")
	// ErrBusy means that another job is under way; it names it. Wait for it.
	ErrBusy = errors.New("another key job is under way")
	// ErrNeeded means that a version, or a whole KEK, still unwraps something
	// that is kept. Rewrap or migrate, or let the named backups run out.
	ErrNeeded = errors.New("the key is still needed")
	// ErrNotSupported means that the provider cannot do this itself. Do it where
	// the KEK lives.
	ErrNotSupported = errors.New("the provider cannot do this")
	// ErrCorrupt means that a row of the administration does not parse.
	ErrCorrupt = errors.New("the row does not parse")
)

// Auditor is the region's audit log.
type Auditor interface {
	Audit(ctx context.Context, entry journal.AuditEntry) error
}

// Options configure an [Admin]. Keyring, Rows, Audit, Primary and Open are
// required.
type Options struct {
	Keyring *kms.Keyring
	Rows    kms.Rows // of the keyring's bucket
	Audit   Auditor
	// Primary is the provider of the configuration.
	Primary kms.Provider
	// Open opens the provider that a setting names. A setting holds no secret:
	// those are in the files it names.
	Open func(ctx context.Context, setting string) (kms.Provider, error)
	// Lease is how long a worker may be silent before another takes over; 30 s.
	Lease time.Duration
	Log   *slog.Logger
	Now   func() time.Time
}

const (
	defaultLease = 30 * time.Second
	providersRow = "providers"
	idBytes      = 8
)

// Admin administers the keys of one region. It is safe for concurrent use, also
// by several processes.
type Admin struct {
	keyring *kms.Keyring
	rows    kms.Rows
	auditor Auditor
	open    func(context.Context, string) (kms.Provider, error)
	lease   time.Duration
	log     *slog.Logger
	now     func() time.Time
	owner   string
	wakeup  chan struct{}

	mu        sync.Mutex // guards what follows
	primary   kms.Identity
	providers map[kms.Identity]kms.Provider
	opened    map[string]kms.Identity // by setting
	closers   []kms.Provider          // that this Admin has opened
}

// providerSet is the row "providers": which KEKs the region uses beside the
// configured one, and which of all wraps new apps' keys.
type providerSet struct {
	Settings []string      `json:"settings"`
	Primary  *kms.Identity `json:"primary,omitempty"`
}

// New returns the administration of a region. It opens the providers that
// earlier migrations have brought in; one that cannot be opened now is an
// error, because apps may need it.
func New(ctx context.Context, o Options) (*Admin, error) {
	if o.Keyring == nil || o.Rows == nil || o.Audit == nil || o.Primary == nil || o.Open == nil {
		return nil, fmt.Errorf("%w: an option is missing", ErrSpec)
	}
	a := &Admin{
		keyring: o.Keyring, rows: o.Rows, auditor: o.Audit, open: o.Open, lease: o.Lease, log: o.Log, now: o.Now,
		owner: newID(), wakeup: make(chan struct{}, 1),
		providers: map[kms.Identity]kms.Provider{}, opened: map[string]kms.Identity{},
	}
	if a.lease <= 0 {
		a.lease = defaultLease
	}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	if a.now == nil {
		a.now = time.Now
	}
	id, err := a.keyring.AddProvider(ctx, o.Primary)
	if err != nil {
		return nil, fmt.Errorf("key administration: %w", err)
	}
	a.primary = id
	a.providers[id] = o.Primary
	if err := a.readProviders(ctx); err != nil {
		return nil, errors.Join(err, a.Close())
	}
	return a, nil
}

// Close closes the providers that this Admin has opened.
func (a *Admin) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	var errs []error
	for _, p := range a.closers {
		errs = append(errs, p.Close())
	}
	a.closers = nil
	return errors.Join(errs...)
}

// Primary names the KEK that wraps the keys of new apps.
func (a *Admin) Primary() kms.Identity {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.primary
}

func (a *Admin) provider(id kms.Identity) (kms.Provider, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p, ok := a.providers[id]
	return p, ok
}

func (a *Admin) identities() []kms.Identity {
	a.mu.Lock()
	defer a.mu.Unlock()
	ids := make([]kms.Identity, 0, len(a.providers))
	for id := range a.providers {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, func(x, y kms.Identity) int { return strings.Compare(x.String(), y.String()) })
	return ids
}

// readProviders takes over what the row says: at the start, and when another
// process has changed it.
func (a *Admin) readProviders(ctx context.Context) error {
	var set providerSet
	_, err := loadJSON(ctx, a.rows, providersRow, &set)
	if errors.Is(err, kms.ErrRowNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("key providers: %w", err)
	}
	for _, setting := range set.Settings {
		if _, err := a.openSetting(ctx, setting); err != nil {
			return fmt.Errorf("key providers: %w", err)
		}
	}
	if set.Primary == nil || *set.Primary == a.Primary() {
		return nil
	}
	return a.usePrimary(ctx, *set.Primary)
}

// openSetting opens a provider once, and lets the keyring use it.
func (a *Admin) openSetting(ctx context.Context, setting string) (kms.Identity, error) {
	a.mu.Lock()
	id, known := a.opened[setting]
	a.mu.Unlock()
	if known {
		return id, nil
	}
	p, err := a.open(ctx, setting)
	if err != nil {
		return kms.Identity{}, err
	}
	id, err = a.keyring.AddProvider(ctx, p)
	if err != nil {
		return kms.Identity{}, errors.Join(err, p.Close())
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.opened[setting] = id
	if _, known := a.providers[id]; known {
		return id, p.Close() // the same KEK by another spelling
	}
	a.providers[id] = p
	a.closers = append(a.closers, p)
	return id, nil
}

func (a *Admin) usePrimary(ctx context.Context, id kms.Identity) error {
	if err := a.keyring.SetPrimary(ctx, id); err != nil {
		return fmt.Errorf("primary key provider: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.primary = id
	return nil
}

// adopt makes the row name a setting, and its KEK the one for new apps when
// primary is set. Every process follows.
func (a *Admin) adopt(ctx context.Context, setting string, id kms.Identity, primary bool) error {
	for {
		var set providerSet
		revision, err := loadJSON(ctx, a.rows, providersRow, &set)
		if err != nil && !errors.Is(err, kms.ErrRowNotFound) {
			return err
		}
		known := slices.Contains(set.Settings, setting)
		if known && (!primary || set.Primary != nil && *set.Primary == id) {
			break
		}
		if !known {
			set.Settings = append(set.Settings, setting)
		}
		if primary {
			set.Primary = &id
		}
		_, err = storeJSON(ctx, a.rows, providersRow, set, revision)
		if err == nil {
			break
		}
		if !errors.Is(err, kms.ErrRowConflict) {
			return fmt.Errorf("key providers: %w", err)
		}
	}
	if !primary {
		return nil
	}
	return a.usePrimary(ctx, id)
}

// record writes an audit entry about a job.
func (a *Admin) record(ctx context.Context, actor, action string, j Job, outcome string) error {
	detail := map[string]string{"kind": string(j.Kind)}
	if j.App != "" {
		detail["app"] = j.App
	}
	if j.Target != nil {
		detail["to"] = j.Target.String()
	}
	if j.DryRun {
		detail["dry_run"] = "true"
	}
	if j.Ended() {
		detail["done"], detail["skipped"], detail["failed"] = strconv.Itoa(j.Done), strconv.Itoa(j.Skipped), strconv.Itoa(j.Failed)
	}
	return a.auditor.Audit(ctx, journal.AuditEntry{Actor: actor, Action: action, Target: "job:" + j.ID, Outcome: outcome, Detail: detail})
}

// recorded runs an operation with an audit entry before it and one after it.
func (a *Admin) recorded(ctx context.Context, actor, action, target string, detail map[string]string, do func() error) error {
	entry := journal.AuditEntry{Actor: actor, Action: action, Target: target, Outcome: "begun", Detail: detail}
	if err := a.auditor.Audit(ctx, entry); err != nil {
		return err
	}
	failed := do()
	if entry.Outcome = "ok"; failed != nil {
		entry.Outcome = classOf(failed)
	}
	// What was done is recorded even when the caller has gone meanwhile.
	return errors.Join(failed, a.auditor.Audit(context.WithoutCancel(ctx), entry))
}

// classOf names an error without the texts that are wrapped in it.
func classOf(err error) string {
	for _, class := range []error{ErrNeeded, ErrNotSupported, ErrBusy, ErrSpec, kms.ErrLastWrap, kms.ErrAppUnknown, kms.ErrAppDestroyed, kms.ErrKeyringCorrupt} {
		if errors.Is(err, class) {
			return snake(class)
		}
	}
	if class := kms.Class(err); class != nil {
		return snake(class)
	}
	return "failed"
}

func snake(class error) string {
	return strings.ReplaceAll(strings.TrimPrefix(class.Error(), "kms: "), " ", "_")
}

func newID() string {
	var id [idBytes]byte
	rand.Read(id[:]) // never fails; it ends the process instead
	return hex.EncodeToString(id[:])
}
