package keys

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
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
	ErrSpec = errors.New("not possible as asked")
	// ErrNoJob means that no job has this id.
	ErrNoJob = errors.New("no such job")
	// ErrNoApp means that the keyring has no app of this id.
	ErrNoApp = errors.New("no such app in the keyring")
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
	// Primary is the provider of the configuration, and Setting what names it
	// there.
	Primary kms.Provider
	Setting string
	// Others are the settings of further KEKs in the configuration.
	Others []string
	// Open opens the provider that a setting names, and asks it nothing. A
	// setting holds no secret: those are in the files it names.
	Open func(ctx context.Context, setting string) (kms.Provider, error)
	// Lease is how long a worker may be silent before another takes over; 30 s.
	Lease time.Duration
	Log   *slog.Logger
	Now   func() time.Time
}

const (
	defaultLease = 30 * time.Second
	firstPause   = 100 * time.Millisecond // before a provider that did not answer is asked again
	startWait    = 3 * time.Second        // for the providers, at the start
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
	pause   time.Duration // the first one of an outage
	chunks  int           // apps between two checkpoints; 0: as the kind of job says
	log     *slog.Logger
	now     func() time.Time
	owner   string
	wakeup  chan struct{}

	configured kms.Provider
	setting    string
	others     []string

	settling chan struct{} // holds a token while nobody asks the providers

	mu        sync.Mutex // guards what follows
	primary   kms.Identity
	providers map[kms.Identity]kms.Provider
	opened    map[string]*opened // by setting
	closers   []kms.Provider     // that this Admin has opened
	state     settlement
}

// New returns the administration of a region. The providers are asked what they
// are called; while one does not answer [Admin.Run] asks again, and a region can
// be started without it.
func New(ctx context.Context, o Options) (*Admin, error) {
	if o.Keyring == nil || o.Rows == nil || o.Audit == nil || o.Primary == nil || o.Open == nil {
		return nil, fmt.Errorf("%w: an option is missing", ErrSpec)
	}
	a := &Admin{
		keyring: o.Keyring, rows: o.Rows, auditor: o.Audit, open: o.Open, lease: o.Lease, pause: firstPause, log: o.Log, now: o.Now,
		owner: newID(), wakeup: make(chan struct{}, 1),
		configured: o.Primary, setting: o.Setting, others: o.Others, settling: make(chan struct{}, 1),
		providers: map[kms.Identity]kms.Provider{}, opened: map[string]*opened{},
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
	a.settling <- struct{}{}
	wait, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	if err := a.Settle(wait); err != nil {
		if ctx.Err() != nil {
			return nil, errors.Join(err, a.Close())
		}
		a.log.Warn("key providers cannot be asked at the start", "error", err)
	}
	return a, nil
}

// Close closes the providers that this Admin has opened. Run must have ended.
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
	if j.Ended() && action != "keys.job_started" {
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
