package kms_test

import (
	"fmt"
	"path/filepath"
	"sync"
	"testing"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/kmstest"
	"github.com/cofferdb/coffer/kms/local"
)

// TestProviderAskedByMany: a provider that nobody has asked for its name yet is
// found by all who need it at the same moment.
func TestProviderAskedByMany(t *testing.T) {
	ctx, rows := t.Context(), kmstest.NewRows()
	open := func(name string) *local.Provider {
		p, err := local.Open(ctx, local.Options{Path: filepath.Join(t.TempDir(), name), Create: true})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = p.Close() })
		return p
	}
	a, b := open("a"), open("b")
	keyring := func(p kms.Provider) *kms.Keyring {
		k, err := kms.NewKeyring(kms.Config{Region: "eu", Provider: p, Rows: rows})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = k.Close() })
		return k
	}
	const apps = 16
	makes := keyring(b)
	for i := range apps {
		if err := makes.CreateApp(ctx, fmt.Sprint("app", i)); err != nil {
			t.Fatal(err)
		}
	}
	for range 200 {
		k := keyring(a)
		k.AddProviderLater(b)
		var wg sync.WaitGroup
		for i := range apps {
			wg.Go(func() {
				if _, err := k.Tagger(ctx, fmt.Sprint("app", i)); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if t.Failed() {
			return
		}
	}
}
