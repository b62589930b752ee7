// Package accounts keeps the accounts of a region: who owns apps.
//
// An account is a row of the region's registry. Regions share nothing, so an
// account that has apps in two regions has a row in each. The row holds an
// opaque id and what is needed to decide; the name, which may be a person's, is
// sealed under keys of the registry's own.
package accounts

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/kms"
)

var (
	// ErrInvalid means that an account's id, name or home breaks a rule, which
	// the text names. Correct it.
	ErrInvalid = errors.New("invalid account")
	// ErrNotFound means that the region has no account with the id. Create it
	// in this region first.
	ErrNotFound = errors.New("account not found")
	// ErrExists means that the region has an account with the id. Read it.
	ErrExists = errors.New("account exists")
	// ErrRegionForbidden means that an account of Mainland China asked for
	// another region than cn without a grant. Use cn, or have an operator grant
	// the region.
	ErrRegionForbidden = errors.New("region forbidden for the account")
)

const (
	rowPrefix = "account."
	// keyringApp is the name under which the keyring keeps the registry's own
	// keys. No app has it: an app's is 32 hex digits.
	keyringApp = "accounts"

	maxName = 200
	maxID   = 64

	// China is the home of accounts that may use the region of that id only.
	China = "cn"
)

// Account owns apps.
type Account struct {
	ID      string    `json:"id"`
	Name    string    `json:"name"`
	Home    string    `json:"home,omitempty"`    // "cn" for an account of Mainland China
	Regions []string  `json:"regions,omitempty"` // granted beyond what Home allows
	Created time.Time `json:"created"`
}

// Allowed returns ErrRegionForbidden when the account may not have apps in the
// region.
func (a Account) Allowed(region string) error {
	if a.Home != China || region == China || slices.Contains(a.Regions, region) {
		return nil
	}
	return ErrRegionForbidden
}

// row is an account as it is stored, in JSON.
type row struct {
	Version int       `json:"version"`
	Name    []byte    `json:"name"` // sealed
	Home    string    `json:"home,omitempty"`
	Regions []string  `json:"regions,omitempty"`
	Created time.Time `json:"created"`
}

const rowVersion = 1

// Store reads and writes the accounts of one region.
type Store struct {
	rows    kms.Rows
	keyring *kms.Keyring
	now     func() time.Time
}

// New returns the store over the registry's rows. It calls nothing: a region
// whose key service is away must still start.
func New(rows kms.Rows, keyring *kms.Keyring, now func() time.Time) *Store {
	if now == nil {
		now = time.Now
	}
	return &Store{rows: rows, keyring: keyring, now: now}
}

// Create stores a new account and returns it as it is stored.
func (s *Store) Create(ctx context.Context, a Account) (Account, error) {
	if err := check(a); err != nil {
		return Account{}, err
	}
	if err := s.keyring.CreateApp(ctx, keyringApp); err != nil {
		return Account{}, fmt.Errorf("making the keys of the accounts: %w", err)
	}
	a.Created = s.now().UTC().Truncate(time.Millisecond)
	name, err := s.keyring.SealBlob(ctx, keyringApp, purpose(a.ID), []byte(a.Name))
	if err != nil {
		return Account{}, fmt.Errorf("sealing the name of account %s: %w", a.ID, err)
	}
	value, err := json.Marshal(row{Version: rowVersion, Name: name, Home: a.Home, Regions: a.Regions, Created: a.Created})
	if err != nil {
		return Account{}, fmt.Errorf("encoding account %s: %w", a.ID, err)
	}
	switch _, err := s.rows.Create(ctx, rowPrefix+a.ID, value); {
	case errors.Is(err, kms.ErrRowConflict):
		return Account{}, fmt.Errorf("%w: %s", ErrExists, a.ID)
	case err != nil:
		return Account{}, fmt.Errorf("storing account %s: %w", a.ID, err)
	}
	return a, nil
}

// Account returns the account with the id.
func (s *Store) Account(ctx context.Context, id string) (Account, error) {
	if err := checkID(id); err != nil {
		return Account{}, err
	}
	stored, err := s.rows.Load(ctx, rowPrefix+id)
	if errors.Is(err, kms.ErrRowNotFound) {
		return Account{}, fmt.Errorf("%w: %s", ErrNotFound, id)
	}
	if err != nil {
		return Account{}, fmt.Errorf("reading account %s: %w", id, err)
	}
	var r row
	if err := json.Unmarshal(stored.Value, &r, json.RejectUnknownMembers(true)); err != nil || r.Version != rowVersion {
		return Account{}, fmt.Errorf("account %s: %w: unreadable row", id, kms.ErrKeyringCorrupt)
	}
	name, err := s.keyring.OpenBlob(ctx, keyringApp, purpose(id), r.Name)
	if err != nil {
		return Account{}, fmt.Errorf("opening the name of account %s: %w", id, err)
	}
	return Account{ID: id, Name: string(name), Home: r.Home, Regions: r.Regions, Created: r.Created}, nil
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

// purpose binds a sealed name to its account, so that names cannot be swapped.
func purpose(id string) string { return "account name " + id }

func check(a Account) error {
	if err := checkID(a.ID); err != nil {
		return err
	}
	if len(a.Name) > maxName || !utf8.ValidString(a.Name) {
		return fmt.Errorf("%w: a name is UTF-8 of at most %d bytes", ErrInvalid, maxName)
	}
	if strings.ContainsFunc(a.Name, func(r rune) bool { return r < 0x20 || r == 0x7f }) {
		return fmt.Errorf("%w: a name has no control characters", ErrInvalid)
	}
	if a.Home != "" && a.Home != China {
		return fmt.Errorf("%w: home is cn, for an account of Mainland China, or empty", ErrInvalid)
	}
	for _, r := range a.Regions {
		if r == "" || len(r) > 8 {
			return fmt.Errorf("%w: regions holds ids of regions", ErrInvalid)
		}
	}
	return nil
}

func checkID(id string) error {
	ok := id != "" && len(id) <= maxID
	for i := 0; ok && i < len(id); i++ {
		c := id[i]
		ok = (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '_'
	}
	if !ok {
		return fmt.Errorf("%w: an id is 1 to %d lower-case letters, digits, - and _", ErrInvalid, maxID)
	}
	return nil
}
