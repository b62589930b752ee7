package accounts_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/accounts"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/kmstest"
	"github.com/cofferdb/coffer/kms/local"
)

func open(t testing.TB) (*accounts.Store, kms.Rows) {
	t.Helper()
	provider, err := local.Open(context.Background(), local.Options{Path: filepath.Join(t.TempDir(), "key"), Create: true})
	if err != nil {
		t.Fatal(err)
	}
	rows := kmstest.NewRows()
	keyring, err := kms.NewKeyring(kms.Config{Region: "eu", Provider: provider, Rows: rows, Now: past})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = keyring.Close() })
	return accounts.New(rows, keyring, journal.Retention{}, past), rows
}

func past() time.Time { return time.Unix(1_700_000_000, 0) }

func TestStore(t *testing.T) {
	ctx := t.Context()
	s, rows := open(t)
	if list, err := s.Accounts(ctx); err != nil || len(list) != 0 {
		t.Fatalf("at first: %v %v", list, err)
	}
	made, err := s.Create(ctx, accounts.Account{ID: "acme", Name: "Canary & Sons", Email: "canary@example.com", Home: "cn", Regions: []string{"sg"}})
	if err != nil {
		t.Fatal(err)
	}
	got, err := s.Account(ctx, "acme")
	if err != nil || fmt.Sprint(got) != fmt.Sprint(made) || got.Name != "Canary & Sons" || got.Email != "canary@example.com" {
		t.Errorf("read %+v, made %+v, %v", got, made, err)
	}
	if _, err := s.Create(ctx, accounts.Account{ID: "acme"}); !errors.Is(err, accounts.ErrExists) {
		t.Errorf("again: %v", err)
	}
	if _, err := s.Account(ctx, "none"); !errors.Is(err, accounts.ErrNotFound) {
		t.Errorf("unknown: %v", err)
	}
	for _, id := range []string{"b", "a"} {
		if _, err := s.Create(ctx, accounts.Account{ID: id, Name: id}); err != nil {
			t.Fatal(err)
		}
	}
	list, err := s.Accounts(ctx)
	if err != nil || len(list) != 3 || list[0].ID != "a" || list[2].ID != "b" {
		t.Errorf("list: %v %v", list, err)
	}
	// The name is sealed, and sealed for its own account only.
	row, err := rows.Load(ctx, "account.acme")
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(bytes.ToLower(row.Value), []byte("canary")) {
		t.Error("the name is in the row")
	}
	other, err := rows.Load(ctx, "account.a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := rows.Update(ctx, "account.a", row.Value, other.Revision); err != nil {
		t.Fatal(err)
	}
	if a, err := s.Account(ctx, "a"); err == nil {
		t.Errorf("a row of another account is accepted: %+v", a)
	}
	if _, err := rows.Create(ctx, "account.bad", []byte(`{"version":3}`)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Account(ctx, "bad"); !errors.Is(err, kms.ErrKeyringCorrupt) {
		t.Errorf("a row of another version: %v", err)
	}
}

func TestRefused(t *testing.T) {
	s, _ := open(t)
	for _, a := range []accounts.Account{
		{},
		{ID: "A"},
		{ID: "a.b"},
		{ID: "a b"},
		{ID: strings.Repeat("a", 65)},
		{ID: "ä"},
		{ID: "a", Name: strings.Repeat("n", 201)},
		{ID: "a", Name: "\xff"},
		{ID: "a", Name: "a\nb"},
		{ID: "a", Email: "nobody"},
		{ID: "a", Email: "a b@example.com"},
		{ID: "a", Email: "@example.com"},
		{ID: "a", Email: strings.Repeat("a", 250) + "@e.io"},
		{ID: "a", Home: "eu"},
		{ID: "a", Regions: []string{""}},
	} {
		if _, err := s.Create(t.Context(), a); !errors.Is(err, accounts.ErrInvalid) {
			t.Errorf("%+v: %v", a, err)
		}
	}
	if _, err := s.Account(t.Context(), "../x"); !errors.Is(err, accounts.ErrInvalid) {
		t.Errorf("reading: %v", err)
	}
}

func TestAllowed(t *testing.T) {
	for _, c := range []struct {
		account accounts.Account
		region  string
		ok      bool
	}{
		{accounts.Account{}, "eu", true},
		{accounts.Account{}, "cn", true},
		{accounts.Account{Home: "cn"}, "cn", true},
		{accounts.Account{Home: "cn"}, "eu", false},
		{accounts.Account{Home: "cn", Regions: []string{"eu"}}, "eu", true},
		{accounts.Account{Home: "cn", Regions: []string{"eu"}}, "us", false},
	} {
		if err := c.account.Allowed(c.region); (err == nil) != c.ok {
			t.Errorf("%+v in %s: %v", c.account, c.region, err)
		}
	}
}

// Example decides whether an account may have an app in a region.
func Example() {
	dir, err := os.MkdirTemp("", "coffer-*")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = os.RemoveAll(dir) }()
	ctx := context.Background()
	provider, err := local.Open(ctx, local.Options{Path: filepath.Join(dir, "key"), Create: true})
	if err != nil {
		fmt.Println(err)
		return
	}
	rows := kmstest.NewRows()
	keyring, err := kms.NewKeyring(kms.Config{Region: "eu", Provider: provider, Rows: rows})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = keyring.Close() }()
	store := accounts.New(rows, keyring, journal.Retention{}, nil)
	account, err := store.Create(ctx, accounts.Account{ID: "beijing", Name: "Beijing", Home: accounts.China})
	fmt.Println(err, account.Allowed("cn"), account.Allowed("eu"))
	// Output: <nil> <nil> region forbidden for the account
}
