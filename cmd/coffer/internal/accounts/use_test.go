package accounts_test

import (
	"context"
	"encoding/json"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/accounts"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/kmstest"
	"github.com/cofferdb/coffer/kms/local"
)

// counted notes the last uses that are written down.
type counted struct {
	kms.Rows

	mu   sync.Mutex // guards used
	used []time.Time
}

func (c *counted) Update(ctx context.Context, name string, value []byte, revision uint64) (uint64, error) {
	again, err := c.Rows.Update(ctx, name, value, revision)
	var row struct{ Used time.Time }
	if err == nil && name == "account.acme" && json.Unmarshal(value, &row) == nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.used = append(c.used, row.Used)
	}
	return again, err
}

// TestOneWriteADay: 10,000 uses of an account on each of a few days, spread over the
// day and over two processes, are at most one write a day.
func TestOneWriteADay(t *testing.T) {
	const (
		uses    = 10_000
		days    = 3
		workers = 8
	)
	day := 20 * time.Second // scaled; the clock is the test's
	var clock atomic.Int64
	clock.Store(past().UnixNano())
	now := func() time.Time { return time.Unix(0, clock.Load()) }
	provider, err := local.Open(t.Context(), local.Options{Path: filepath.Join(t.TempDir(), "key"), Create: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = provider.Close() }()
	rows := &counted{Rows: kmstest.NewRows()}
	keyring, err := kms.NewKeyring(kms.Config{Region: "eu", Provider: provider, Rows: rows, Now: now})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = keyring.Close() }()
	retention := journal.Retention{Accounts: 180 * day, Warning: 30 * day, Refresh: day}
	var processes [2]*accounts.Store
	for i := range processes {
		processes[i] = accounts.New(rows, keyring, retention, now)
	}
	made, err := processes[0].Create(t.Context(), accounts.Account{ID: "acme", Name: "Acme"})
	if err != nil {
		t.Fatal(err)
	}
	var background sync.WaitGroup
	write := func(f func(context.Context)) { background.Go(func() { f(context.WithoutCancel(t.Context())) }) }
	for n := range days {
		var work sync.WaitGroup
		for w := range workers {
			work.Go(func() {
				for range uses / workers {
					clock.Add(int64(day / uses))
					if err := processes[w%len(processes)].Use(t.Context(), "acme", write); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		work.Wait()
		background.Wait()
		if wrote := len(rows.used); wrote > n+1 || wrote < n {
			t.Errorf("after %d uses in %d days it was written %d times", (n+1)*uses, n+1, wrote)
		}
	}
	last := made.Used
	for _, used := range rows.used {
		if used.Sub(last) < day {
			t.Errorf("written down at %v, and %v later", last, used.Sub(last))
		}
		last = used
	}
	if a, err := processes[0].Account(t.Context(), "acme"); err != nil || !a.Used.Equal(last) || now().Sub(last) > day+day/10 {
		t.Errorf("used at %v, written %v, now %v, %v", a.Used, last, now(), err)
	}
}
