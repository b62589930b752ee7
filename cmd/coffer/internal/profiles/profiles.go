// Package profiles keeps what apps store about their users: a JSON object for
// each, sealed under the user's own key, until it is deleted or nobody has used
// it for a time (package shelf).
//
// Reading and writing a profile uses it. A read is written down at most once in
// journal.Retention.Refresh, so most reads write nothing.
//
// docs/format/profiles.md is normative.
package profiles

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/cmd/coffer/internal/shelf"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

var (
	// ErrInvalid means that a profile is no JSON object, or nested too deeply.
	// Correct it; nothing was stored.
	ErrInvalid = errors.New("invalid profile")
	// ErrTooLarge means that a profile is over MaxBytes. Send less; nothing was
	// stored.
	ErrTooLarge = errors.New("the profile is too large")
	// ErrNotFound means that the user has no profile, or none any more.
	ErrNotFound = errors.New("no such profile")
)

const (
	// MaxBytes is the largest profile.
	MaxBytes = 8 << 10
	maxDepth = 8

	version    = 1
	domain     = "coffer/v1 profile"
	epochClass = "profiles"
)

// Profile is what is kept of a user.
type Profile struct {
	User    string         `json:"user"`
	Content jsontext.Value `json:"profile"`
	Created time.Time      `json:"created"`
	Changed time.Time      `json:"changed"`
	// Ends is when it ends without another use.
	Ends time.Time `json:"ends"`
}

// row is a profile as it is stored, in JSON.
type row struct {
	Version int       `json:"version"`
	Created time.Time `json:"created"`
	Changed time.Time `json:"changed"`
	Used    time.Time `json:"used"`
	Private []byte    `json:"private"`
}

// private is what is sealed.
type private struct {
	User    string         `json:"user"`
	Profile jsontext.Value `json:"profile"`
}

// Config is what a store works on. Rows and Keyring are required.
type Config struct {
	Rows      kms.Rows // of the region's bucket of profiles
	Keyring   *kms.Keyring
	Retention journal.Retention
	Log       *slog.Logger
	Now       func() time.Time
}

// Store keeps the profiles of one region.
type Store struct {
	rows kms.Rows
	keys shelf.Keys
	life shelf.Life
	log  *slog.Logger
	now  func() time.Time

	mu         sync.Mutex // guards refreshing
	refreshing map[string]bool
}

// New returns the store. It calls nothing.
func New(cfg Config) *Store {
	retention := cfg.Retention.WithDefaults()
	s := &Store{
		rows: cfg.Rows, keys: shelf.Keys{Keyring: cfg.Keyring, Domain: domain}, log: cfg.Log, now: cfg.Now, refreshing: map[string]bool{},
		life: shelf.Life{Class: epochClass, Lifetime: retention.Profiles, Warning: retention.Warning, Refresh: retention.Refresh},
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.now == nil {
		s.now = time.Now
	}
	return s
}

func rowName(app journal.AppID, subject kms.Tag) string { return app.String() + "." + subject.String() }

// Put stores the profile of a user, whose tag is given too, in place of the one
// before. created tells that there was none.
func (s *Store) Put(ctx context.Context, app journal.AppID, user string, subject kms.Tag, content jsontext.Value) (p Profile, created bool, err error) {
	if err := check(content); err != nil {
		return Profile{}, false, err
	}
	for {
		old, revision, err := s.load(ctx, app, subject)
		if err != nil && !errors.Is(err, ErrNotFound) {
			return Profile{}, false, err
		}
		created := errors.Is(err, ErrNotFound)
		now := s.now().UTC().Truncate(time.Millisecond)
		r := row{Version: version, Created: now, Changed: now, Used: now}
		if !created {
			r.Created = old.Created
		}
		err = s.store(ctx, app, subject, r, private{User: user, Profile: content}, revision)
		if errors.Is(err, kms.ErrRowConflict) {
			continue // another was faster: this one comes after it
		}
		if err != nil {
			return Profile{}, false, err
		}
		return s.profile(r, private{User: user, Profile: content}), created, nil
	}
}

// check refuses what is no profile.
func check(content jsontext.Value) error {
	if len(content) > MaxBytes {
		return fmt.Errorf("%w: over %d bytes", ErrTooLarge, MaxBytes)
	}
	if content.Kind() != '{' || !content.IsValid() {
		return fmt.Errorf("%w: a profile is a JSON object without duplicate names", ErrInvalid)
	}
	depth := 0
	for decoder := jsontext.NewDecoder(strings.NewReader(string(content))); ; {
		token, err := decoder.ReadToken()
		if err != nil {
			return nil //nolint:nilerr // the end: it is valid
		}
		switch token.Kind() {
		case '{', '[':
			if depth++; depth > maxDepth {
				return fmt.Errorf("%w: nested deeper than %d levels", ErrInvalid, maxDepth)
			}
		case '}', ']':
			depth--
		default:
		}
	}
}

// Get returns the profile of a user and, when that is due, has the use written
// down by write, which must not block, in the background.
func (s *Store) Get(ctx context.Context, app journal.AppID, subject kms.Tag, write func(func(context.Context))) (Profile, error) {
	r, _, err := s.load(ctx, app, subject)
	if err != nil {
		return Profile{}, err
	}
	p, err := s.open(ctx, app, subject, r)
	if err != nil {
		return Profile{}, err
	}
	if name := rowName(app, subject); s.life.Due(r.Used, s.now()) && s.begin(name) {
		write(func(ctx context.Context) {
			defer s.done(name)
			if err := s.refresh(ctx, app, subject); err != nil {
				s.log.WarnContext(ctx, "the use of a profile was not written down", "app", app.String(), "err", err)
			}
		})
	}
	return s.profile(r, p), nil
}

// begin keeps reads at the same time from writing one use down twice.
func (s *Store) begin(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refreshing[name] {
		return false
	}
	s.refreshing[name] = true
	return true
}

func (s *Store) done(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.refreshing, name)
}

// refresh writes a use down, unless another process has.
func (s *Store) refresh(ctx context.Context, app journal.AppID, subject kms.Tag) error {
	r, revision, err := s.load(ctx, app, subject)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil || !s.life.Due(r.Used, s.now()) {
		return err
	}
	p, err := s.open(ctx, app, subject, r)
	if err != nil {
		return err
	}
	r.Used = s.now().UTC().Truncate(time.Millisecond)
	err = s.store(ctx, app, subject, r, p, revision)
	if errors.Is(err, kms.ErrRowConflict) {
		return nil // another use, or an end
	}
	return err
}

// Delete removes the profile of a user. It asks for no keys.
func (s *Store) Delete(ctx context.Context, app journal.AppID, subject kms.Tag) error {
	for {
		row, err := s.rows.Load(ctx, rowName(app, subject))
		if err == nil {
			err = s.rows.Delete(ctx, rowName(app, subject), row.Revision)
		}
		switch {
		case errors.Is(err, kms.ErrRowNotFound):
			return ErrNotFound
		case errors.Is(err, kms.ErrRowConflict):
			continue
		case err != nil:
			return fmt.Errorf("delete a profile of app %s: %w", app, err)
		}
		return nil
	}
}

// DeleteApp removes the profiles of an app, and returns how many. It asks for no
// keys, and can be repeated.
func (s *Store) DeleteApp(ctx context.Context, app journal.AppID) (int, error) {
	count := 0
	for subject, err := range s.subjects(ctx, app) {
		if err == nil {
			err = s.Delete(ctx, app, subject)
		}
		if errors.Is(err, ErrNotFound) {
			continue
		}
		if err != nil {
			return count, err
		}
		count++
	}
	return count, nil
}

// CountApp returns how many profiles an app has.
func (s *Store) CountApp(ctx context.Context, app journal.AppID) (int, error) {
	count := 0
	for _, err := range s.subjects(ctx, app) {
		if err != nil {
			return 0, err
		}
		count++
	}
	return count, nil
}

// subjects yields whose profiles an app has.
func (s *Store) subjects(ctx context.Context, app journal.AppID) func(yield func(kms.Tag, error) bool) {
	return func(yield func(kms.Tag, error) bool) {
		for name, err := range s.rows.List(ctx, app.String()+".") {
			var subject kms.Tag
			if err == nil {
				subject, err = kms.ParseTag(strings.TrimPrefix(name, app.String()+"."))
			}
			if !yield(subject, err) || err != nil {
				return
			}
		}
	}
}

// load returns the row of a profile that has not ended.
func (s *Store) load(ctx context.Context, app journal.AppID, subject kms.Tag) (row, uint64, error) {
	stored, err := s.rows.Load(ctx, rowName(app, subject))
	if errors.Is(err, kms.ErrRowNotFound) {
		return row{}, 0, ErrNotFound
	}
	if err != nil {
		return row{}, 0, fmt.Errorf("load a profile of app %s: %w", app, err)
	}
	r, err := parse(stored.Value)
	if err != nil {
		return row{}, 0, fmt.Errorf("profile %s: %w", rowName(app, subject), err)
	}
	if s.life.Ended(r.Used, s.now()) {
		return row{}, stored.Revision, ErrNotFound
	}
	return r, stored.Revision, nil
}

func parse(value []byte) (row, error) {
	var r row
	if err := json.Unmarshal(value, &r, json.RejectUnknownMembers(true)); err != nil || r.Version != version {
		return row{}, fmt.Errorf("%w: unreadable row", journal.ErrCorrupt)
	}
	return r, nil
}

func (s *Store) open(ctx context.Context, app journal.AppID, subject kms.Tag, r row) (private, error) {
	var p private
	plain, err := s.keys.Open(ctx, app.String(), subject, r.Private, r.parts(subject)...)
	if err != nil {
		return p, fmt.Errorf("profile of app %s: %w", app, err)
	}
	if err := json.Unmarshal(plain, &p); err != nil {
		return p, fmt.Errorf("profile of app %s: %w: its content", app, journal.ErrCorrupt)
	}
	return p, nil
}

// store seals a profile and writes its row, at revision 0 a new one.
func (s *Store) store(ctx context.Context, app journal.AppID, subject kms.Tag, r row, p private, revision uint64) error {
	plain, err := json.Marshal(p)
	if err != nil {
		return fmt.Errorf("encode a profile of app %s: %w", app, err)
	}
	defer clear(plain)
	if r.Private, err = s.keys.Seal(ctx, s.life, app.String(), subject, r.Used, plain, r.parts(subject)...); err != nil {
		return fmt.Errorf("profile of app %s: %w", app, err)
	}
	value, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode a profile of app %s: %w", app, err)
	}
	if revision == 0 {
		_, err = s.rows.Create(ctx, rowName(app, subject), value)
	} else {
		_, err = s.rows.Update(ctx, rowName(app, subject), value, revision)
	}
	if err != nil {
		return fmt.Errorf("store a profile of app %s: %w", app, err)
	}
	return nil
}

// parts bind the envelope to its row and its time.
func (r row) parts(subject kms.Tag) []string {
	return []string{subject.String(), r.Changed.UTC().Format(time.RFC3339Nano)}
}

func (s *Store) profile(r row, p private) Profile {
	return Profile{User: p.User, Content: p.Profile, Created: r.Created, Changed: r.Changed, Ends: s.life.Ends(r.Used)}
}
