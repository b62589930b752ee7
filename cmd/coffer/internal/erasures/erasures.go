// Package erasures erases users: it destroys their keys, tells whoever replays,
// and leaves a signed receipt that says what was destroyed and what is left.
//
// An erasure that was accepted is done, also after a crash: its row is durable
// before anything is destroyed, and whoever starts the region next goes on with
// it. Every step may be repeated. See docs/adr/0013-erasure.md.
package erasures

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/cmd/coffer/internal/signing"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

// Errors that callers branch on.
var (
	// ErrNotFound means that there is no such erasure.
	ErrNotFound = errors.New("erasures: not found")
	// ErrReceipt means that a receipt is not one of this region.
	ErrReceipt = errors.New("erasures: not a receipt of this region")
	// ErrCorrupt means that a row is damaged. An operator must look.
	ErrCorrupt = errors.New("erasures: a row is damaged")
)

// ReceiptType is the typ of a receipt's JWS.
const ReceiptType = "coffer-erasure"

const (
	pendingPrefix = "erasing."
	donePrefix    = "erasure."
	headRow       = "erasures"
	purpose       = "erasure"
	version       = 1

	retryEvery = time.Minute
)

// State is how an erasure stands.
type State string

// The states of an erasure.
const (
	Pending State = "pending" // accepted; the user can no longer be read once its keys are gone
	Done    State = "done"
)

// Erasure is the erasure of one user of an app.
type Erasure struct {
	ID        string     `json:"id"`
	Subject   string     `json:"subject"              doc:"the user's tag, which stands for it outside of sealed data"`
	State     State      `json:"state"`
	Requested time.Time  `json:"requested"`
	Completed *time.Time `json:"completed,omitempty"`
	Receipt   string     `json:"receipt,omitempty"    doc:"compact JWS (EdDSA) by the region's key, see GET /v1/region/keys"`
}

// Receipt is what a receipt says.
type Receipt struct {
	Version   int         `json:"version"`
	Erasure   string      `json:"erasure"`
	Region    string      `json:"region"`
	App       string      `json:"app"`
	Subject   string      `json:"subject"`
	Requested time.Time   `json:"requested"`
	Completed time.Time   `json:"completed"`
	Destroyed []Destroyed `json:"destroyed"`
	Remains   []Remains   `json:"remains"`
}

// Destroyed is something that was destroyed, and where.
type Destroyed struct {
	What  string `json:"what"`
	Where string `json:"where"`
}

// Remains is something that is left, and until when at the latest.
type Remains struct {
	What  string    `json:"what"`
	Where string    `json:"where"`
	Until time.Time `json:"until,omitzero"`
}

// Options is what erasing takes.
type Options struct {
	Region  journal.Region
	Journal *journal.Journal
	Rows    kms.Rows // of the registry
	Signing *signing.Key
	// KeyringAt returns the last sequence of the keyring's stream.
	KeyringAt func(ctx context.Context) (uint64, error)
	// Also erase what is kept of a user elsewhere, a profile for instance, and
	// say so. Each may be called again.
	Also []func(ctx context.Context, app journal.AppID, user string) (Destroyed, error)
	// Copies returns where else the keyring's rows are kept, and until when.
	Copies func(ctx context.Context) ([]Remains, error)
	Log    *slog.Logger
	Now    func() time.Time
}

// Erasures erases users. Its methods may be called concurrently.
type Erasures struct {
	o      Options
	wakeup chan struct{}
}

// New returns the erasures of a region.
func New(o Options) *Erasures {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return &Erasures{o: o, wakeup: make(chan struct{}, 1)}
}

// pendingRow is an erasure that is to be done.
type pendingRow struct {
	Version   int       `json:"version"`
	App       string    `json:"app"`
	Subject   string    `json:"subject"`
	Number    int       `json:"number"` // of the user's erasures, from 1
	User      []byte    `json:"user"`   // sealed
	Actor     string    `json:"actor"`
	Requested time.Time `json:"requested"`
}

// doneRow is the last erasure of a user.
type doneRow struct {
	Version   int       `json:"version"`
	Number    int       `json:"number"`
	Requested time.Time `json:"requested"`
	Completed time.Time `json:"completed"`
	Receipt   string    `json:"receipt"`
	// Registered is when the user was registered again.
	Registered time.Time `json:"registered,omitzero"`
}

// headRecord tells a keyring that was restored.
type headRecord struct {
	Keyring uint64 `json:"keyring"` // last sequence of its stream at the last erasure
}

func suffix(app journal.AppID, subject kms.Tag) string { return app.String() + "." + subject.String() }

func erasureID(subject string, number int) string { return fmt.Sprintf("%s-%d", subject, number) }

// Request erases a user, and returns when that is done or when it cannot be
// finished now: it is pending then, and will be. Asking again for a user that is
// erased changes nothing.
func (e *Erasures) Request(ctx context.Context, actor string, app journal.AppID, user string) (Erasure, error) {
	subject, err := e.o.Journal.Tag(ctx, app, kms.KindSubject, user)
	if err != nil {
		return Erasure{}, err
	}
	var done doneRow
	_, err = e.load(ctx, donePrefix+suffix(app, subject), &done)
	if err != nil && !errors.Is(err, kms.ErrRowNotFound) {
		return Erasure{}, err
	}
	if err == nil && done.Registered.IsZero() {
		return done.erasure(subject.String()), nil
	}
	sealed, err := e.o.Journal.Keyring().SealBlob(ctx, app.String(), purpose, []byte(user))
	if err != nil {
		return Erasure{}, err
	}
	p := pendingRow{
		Version: version, App: app.String(), Subject: subject.String(), Number: done.Number + 1, User: sealed,
		Actor: actor, Requested: e.now(),
	}
	err = e.create(ctx, pendingPrefix+suffix(app, subject), p)
	if errors.Is(err, kms.ErrRowConflict) {
		_, err = e.load(ctx, pendingPrefix+suffix(app, subject), &p)
	}
	if err != nil {
		return Erasure{}, err
	}
	finished, err := e.finish(ctx, p)
	if err != nil {
		e.o.Log.Warn("an erasure is not done yet", "erasure", erasureID(p.Subject, p.Number), "err", err)
		e.wake()
		return p.erasure(), nil
	}
	return finished, nil
}

// Erasure returns an erasure of an app.
func (e *Erasures) Erasure(ctx context.Context, app journal.AppID, id string) (Erasure, error) {
	digits, _, ok := strings.Cut(id, "-")
	subject, err := kms.ParseTag(digits)
	if err != nil || !ok {
		return Erasure{}, ErrNotFound
	}
	var p pendingRow
	_, err = e.load(ctx, pendingPrefix+suffix(app, subject), &p)
	if err == nil && p.erasure().ID == id {
		return p.erasure(), nil
	}
	if err != nil && !errors.Is(err, kms.ErrRowNotFound) {
		return Erasure{}, err
	}
	var done doneRow
	_, err = e.load(ctx, donePrefix+suffix(app, subject), &done)
	if errors.Is(err, kms.ErrRowNotFound) {
		return Erasure{}, ErrNotFound
	}
	if err != nil {
		return Erasure{}, err
	}
	if found := done.erasure(digits); found.ID == id {
		return found, nil
	}
	return Erasure{}, ErrNotFound
}

// Register gives an erased user a new key. What was sealed before stays erased.
// It reports whether the user was erased; one that is being erased is not.
func (e *Erasures) Register(ctx context.Context, actor string, app journal.AppID, user string) (bool, error) {
	subject, err := e.o.Journal.Tag(ctx, app, kms.KindSubject, user)
	if err != nil {
		return false, err
	}
	var done doneRow
	revision, err := e.load(ctx, donePrefix+suffix(app, subject), &done)
	if errors.Is(err, kms.ErrRowNotFound) || err == nil && !done.Registered.IsZero() {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	done.Registered = e.now()
	value, err := json.Marshal(done, json.Deterministic(true))
	if err != nil {
		return false, fmt.Errorf("erasures: %w", err)
	}
	if err := e.audit(ctx, actor, "user.registered", app.String(), subject.String(), erasureID(subject.String(), done.Number)); err != nil {
		return false, err
	}
	// The row first: a crash in between leaves a user without a key, who can be
	// erased and registered again, and never a key that a restore would not
	// destroy.
	if _, err := e.o.Rows.Update(ctx, donePrefix+suffix(app, subject), value, revision); err != nil {
		return false, fmt.Errorf("erasures: %w", err)
	}
	_, err = e.o.Journal.Keyring().RegisterSubject(ctx, app.String(), subject)
	return err == nil, err
}

func (p pendingRow) erasure() Erasure {
	return Erasure{ID: erasureID(p.Subject, p.Number), Subject: p.Subject, State: Pending, Requested: p.Requested}
}

func (d doneRow) erasure(subject string) Erasure {
	return Erasure{
		ID: erasureID(subject, d.Number), Subject: subject, State: Done, Requested: d.Requested, Completed: &d.Completed, Receipt: d.Receipt,
	}
}

func (e *Erasures) now() time.Time { return e.o.Now().UTC().Truncate(time.Millisecond) }

func (e *Erasures) wake() {
	select {
	case e.wakeup <- struct{}{}:
	default:
	}
}

func (e *Erasures) load(ctx context.Context, name string, into any) (uint64, error) {
	row, err := e.o.Rows.Load(ctx, name)
	if err != nil {
		return 0, fmt.Errorf("erasures: %w", err)
	}
	if err := json.Unmarshal(row.Value, into, json.RejectUnknownMembers(true)); err != nil {
		return 0, fmt.Errorf("%w: %s", ErrCorrupt, name)
	}
	return row.Revision, nil
}

func (e *Erasures) create(ctx context.Context, name string, value any) error {
	encoded, err := json.Marshal(value, json.Deterministic(true))
	if err != nil {
		return fmt.Errorf("erasures: %w", err)
	}
	_, err = e.o.Rows.Create(ctx, name, encoded)
	return err
}

func (e *Erasures) audit(ctx context.Context, actor, action, app, subject, erasure string) error {
	return e.o.Journal.Audit(ctx, journal.AuditEntry{
		Actor: actor, Action: action, Target: "app:" + app, Outcome: "ok",
		Detail: map[string]string{"subject": subject, "erasure": erasure},
	})
}
