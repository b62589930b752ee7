package accounts

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/cmd/coffer/internal/shelf"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

const (
	rowPrefix  = "account."
	rowVersion = 2
	// keyringApp is the name under which the keyring keeps the registry's own
	// keys. No app has it: an app's is 32 hex digits.
	keyringApp = "accounts"
	domain     = "coffer/v1 account"
	epochClass = "registration"
)

// row is an account as it is stored, in JSON.
type row struct {
	Version  int       `json:"version"`
	State    State     `json:"state,omitzero"` // empty: active
	Home     string    `json:"home,omitzero"`
	Regions  []string  `json:"regions,omitempty"`
	Disabled bool      `json:"disabled,omitzero"`
	Created  time.Time `json:"created"`
	Used     time.Time `json:"used,omitzero"`
	Private  []byte    `json:"private,omitempty"` // envelope over private
	// Name is that of version 1, which had no last use: a blob of the keyring.
	Name []byte `json:"name,omitempty"`
}

// private is the registration data.
type private struct {
	Name  string `json:"name,omitzero"`
	Email string `json:"email,omitzero"`
}

// Store reads and writes the accounts of one region.
type Store struct {
	rows kms.Rows
	keys shelf.Keys
	life shelf.Life
	now  func() time.Time

	mu    sync.Mutex // guards known
	known map[string]*known
}

// New returns the store over the registry's rows. It calls nothing: a region
// whose key service is away must still start.
func New(rows kms.Rows, keyring *kms.Keyring, retention journal.Retention, now func() time.Time) *Store {
	if now == nil {
		now = time.Now
	}
	retention = retention.WithDefaults()
	return &Store{
		rows: rows, keys: shelf.Keys{Keyring: keyring, Domain: domain}, now: now, known: map[string]*known{},
		life: shelf.Life{Class: epochClass, Lifetime: retention.Accounts, Warning: retention.Warning, Refresh: retention.Refresh},
	}
}

// Create stores a new account and returns it as it is stored. One whose
// registration data has ended is registered again.
func (s *Store) Create(ctx context.Context, a Account) (Account, error) {
	if err := check(a); err != nil {
		return Account{}, err
	}
	if err := s.keys.Keyring.CreateApp(ctx, keyringApp); err != nil {
		return Account{}, fmt.Errorf("making the keys of the accounts: %w", err)
	}
	now := s.moment()
	r := row{Version: rowVersion, Home: a.Home, Regions: a.Regions, Created: now, Used: now}
	value, err := s.encode(ctx, a.ID, r, private{Name: a.Name, Email: a.Email})
	if errors.Is(err, kms.ErrSubjectErased) {
		return Account{}, fmt.Errorf("%w: %s, which was deleted", ErrExists, a.ID)
	}
	if err != nil {
		return Account{}, err
	}
	_, err = s.rows.Create(ctx, rowPrefix+a.ID, value)
	if errors.Is(err, kms.ErrRowConflict) {
		return s.registerAgain(ctx, a)
	}
	if err != nil {
		return Account{}, fmt.Errorf("storing account %s: %w", a.ID, err)
	}
	return s.account(a.ID, r, private{Name: a.Name, Email: a.Email}), nil
}

// registerAgain gives an account whose registration data has ended a new one.
// What an operator decided about it stays.
func (s *Store) registerAgain(ctx context.Context, a Account) (Account, error) {
	again, err := s.change(ctx, a.ID, func(r *row, p *private) error {
		if r.State != Expired {
			return fmt.Errorf("%w: %s", ErrExists, a.ID)
		}
		if r.Home != a.Home {
			return fmt.Errorf("%w: the account's home is %q and does not change", ErrInvalid, r.Home)
		}
		r.State = ""
		*p = private{Name: a.Name, Email: a.Email}
		return nil
	})
	if errors.Is(err, ErrDeleted) {
		return Account{}, fmt.Errorf("%w: %s, which was deleted", ErrExists, a.ID)
	}
	return again, err
}

// Account returns the account with the id, in whatever state. Registration data
// that has come to its end is not returned, whether it was removed or not.
func (s *Store) Account(ctx context.Context, id string) (Account, error) {
	r, _, err := s.load(ctx, id)
	if err != nil {
		return Account{}, err
	}
	p, err := s.open(ctx, id, &r)
	if err != nil {
		return Account{}, err
	}
	return s.account(id, r, p), nil
}

// Accounts returns all accounts, in the order of their ids.
func (s *Store) Accounts(ctx context.Context) ([]Account, error) {
	var ids []string
	for name, err := range s.rows.List(ctx, rowPrefix) {
		if err != nil {
			return nil, fmt.Errorf("listing accounts: %w", err)
		}
		ids = append(ids, strings.TrimPrefix(name, rowPrefix))
	}
	slices.Sort(ids)
	list := make([]Account, 0, len(ids))
	for _, id := range ids {
		a, err := s.Account(ctx, id)
		if errors.Is(err, ErrNotFound) {
			continue // deleted in between
		}
		if err != nil {
			return nil, err
		}
		list = append(list, a)
	}
	return list, nil
}

// Change is what an operator changes of an account; nil leaves it.
type Change struct {
	Name     *string `json:"name,omitzero"`
	Email    *string `json:"email,omitzero"`
	Disabled *bool   `json:"disabled,omitzero"`
}

// Update changes an account, which is a use of it.
func (s *Store) Update(ctx context.Context, id string, c Change) (Account, error) {
	return s.change(ctx, id, func(r *row, p *private) error {
		if (c.Name != nil || c.Email != nil) && r.State == Expired {
			return fmt.Errorf("%w: the registration data has ended; register the account again", ErrInvalid)
		}
		set(&p.Name, c.Name)
		set(&p.Email, c.Email)
		set(&r.Disabled, c.Disabled)
		return check(Account{ID: id, Name: p.Name, Email: p.Email})
	})
}

func set[T any](to, from *T) {
	if from != nil {
		*to = *from
	}
}

// Grant lets an account of Mainland China use a region beside cn, or takes that
// back. Apps that are there stay: nothing moves between regions.
func (s *Store) Grant(ctx context.Context, id, region string, granted bool) (Account, error) {
	return s.change(ctx, id, func(r *row, _ *private) error {
		r.Regions = slices.DeleteFunc(r.Regions, func(have string) bool { return have == region })
		if granted {
			r.Regions = append(r.Regions, region)
			slices.Sort(r.Regions)
		}
		return check(Account{ID: id, Regions: r.Regions})
	})
}

// change edits an account by compare-and-set, and writes the use down.
func (s *Store) change(ctx context.Context, id string, edit func(*row, *private) error) (Account, error) {
	for {
		r, revision, err := s.load(ctx, id)
		if err != nil {
			return Account{}, err
		}
		if r.State == Deleting || r.State == Deleted {
			return Account{}, fmt.Errorf("%w: %s", ErrDeleted, id)
		}
		p, err := s.open(ctx, id, &r)
		if err != nil {
			return Account{}, err
		}
		if err := edit(&r, &p); err != nil {
			return Account{}, err
		}
		r.Used = s.moment()
		value, err := s.encode(ctx, id, r, p)
		if err != nil {
			return Account{}, err
		}
		_, err = s.rows.Update(ctx, rowPrefix+id, value, revision)
		switch {
		case errors.Is(err, kms.ErrRowConflict):
			continue // another was faster: decide again
		case err != nil:
			return Account{}, fmt.Errorf("storing account %s: %w", id, err)
		}
		s.learn(id, r)
		return s.account(id, r, p), nil
	}
}

func (s *Store) load(ctx context.Context, id string) (row, uint64, error) {
	if err := checkID(id); err != nil {
		return row{}, 0, err
	}
	stored, err := s.rows.Load(ctx, rowPrefix+id)
	if errors.Is(err, kms.ErrRowNotFound) {
		return row{}, 0, fmt.Errorf("%w: %s", ErrNotFound, id)
	}
	if err != nil {
		return row{}, 0, fmt.Errorf("reading account %s: %w", id, err)
	}
	r, err := parse(stored.Value)
	if err != nil {
		return row{}, 0, fmt.Errorf("account %s: %w", id, err)
	}
	return r, stored.Revision, nil
}

func parse(value []byte) (row, error) {
	var r row
	if err := json.Unmarshal(value, &r, json.RejectUnknownMembers(true)); err != nil || r.Version < 1 || r.Version > rowVersion {
		return row{}, fmt.Errorf("%w: unreadable row", kms.ErrKeyringCorrupt)
	}
	if r.Version == 1 {
		r.Used = r.Created
	}
	return r, nil
}

// open opens a row's registration data. Where that has ended, the row becomes
// what it would be after a sweep.
func (s *Store) open(ctx context.Context, id string, r *row) (private, error) {
	var p private
	if r.State != "" && r.State != Active {
		return p, nil
	}
	if s.life.Ended(r.Used, s.now()) {
		*r = ended(*r)
		return p, nil
	}
	if r.Version == 1 {
		name, err := s.keys.Keyring.OpenBlob(ctx, keyringApp, "account name "+id, r.Name)
		if err != nil {
			return p, fmt.Errorf("opening the name of account %s: %w", id, err)
		}
		r.Version, r.Name = rowVersion, nil
		return private{Name: string(name)}, nil
	}
	subject, err := s.subject(ctx, id)
	if err != nil {
		return p, err
	}
	plain, err := s.keys.Open(ctx, keyringApp, subject, r.Private, id)
	if err != nil {
		return p, fmt.Errorf("opening account %s: %w", id, err)
	}
	defer clear(plain)
	if err := json.Unmarshal(plain, &p); err != nil {
		return p, fmt.Errorf("account %s: %w: unreadable registration data", id, kms.ErrKeyringCorrupt)
	}
	return p, nil
}

// ended is a row without its registration data.
func ended(r row) row {
	r.Version, r.State, r.Private, r.Name = rowVersion, Expired, nil, nil
	return r
}

func (s *Store) subject(ctx context.Context, id string) (kms.Tag, error) {
	tagger, err := s.keys.Keyring.Tagger(ctx, keyringApp)
	if err != nil {
		return kms.Tag{}, fmt.Errorf("account %s: %w", id, err)
	}
	return tagger.Tag(kms.KindSubject, id), nil
}

func (s *Store) encode(ctx context.Context, id string, r row, p private) ([]byte, error) {
	if r.State == "" || r.State == Active {
		subject, err := s.subject(ctx, id)
		if err != nil {
			return nil, err
		}
		plain, err := json.Marshal(p)
		if err != nil {
			return nil, fmt.Errorf("encoding account %s: %w", id, err)
		}
		defer clear(plain)
		if r.Private, err = s.keys.Seal(ctx, s.life, keyringApp, subject, r.Used, plain, id); err != nil {
			return nil, fmt.Errorf("sealing account %s: %w", id, err)
		}
	}
	value, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("encoding account %s: %w", id, err)
	}
	return value, nil
}

func (s *Store) account(id string, r row, p private) Account {
	a := Account{
		ID: id, Name: p.Name, Email: p.Email, Home: r.Home, Regions: r.Regions, Disabled: r.Disabled, State: r.State,
		Created: r.Created, Used: r.Used,
	}
	if a.State == "" {
		a.State = Active
	}
	if a.State == Active {
		a.Ends = s.life.Ends(r.Used)
		a.Expiring = s.life.Warned(r.Used, s.now())
	}
	return a
}

func (s *Store) moment() time.Time { return s.now().UTC().Truncate(time.Millisecond) }
