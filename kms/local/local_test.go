package local_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/kmstest"
	"github.com/cofferdb/coffer/kms/local"
)

type bench struct {
	mu    sync.Mutex // guards paths and calls
	paths map[kms.Provider]string
	calls map[kms.Provider]*[]kms.Call
}

func (b *bench) open(tb testing.TB, path string) kms.Provider {
	tb.Helper()
	calls := new([]kms.Call)
	p, err := local.Open(tb.Context(), local.Options{Path: path, Create: true, Region: "eu", Observe: func(_ context.Context, c kms.Call) {
		b.mu.Lock()
		defer b.mu.Unlock()
		*calls = append(*calls, c)
	}})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = p.Close() })
	b.mu.Lock()
	defer b.mu.Unlock()
	b.paths[p], b.calls[p] = path, calls
	return p
}

func TestProvider(t *testing.T) {
	b := &bench{paths: map[kms.Provider]string{}, calls: map[kms.Provider]*[]kms.Call{}}
	state := func(s kms.State) func(testing.TB, kms.Provider) func() {
		return func(tb testing.TB, p kms.Provider) func() {
			set := func(s kms.State) {
				if err := p.(*local.Provider).SetState(tb.Context(), s); err != nil {
					tb.Fatal(err)
				}
			}
			set(s)
			return func() { set(kms.StateEnabled) }
		}
	}
	kmstest.RunProvider(t, kmstest.Harness{
		New:   func(tb testing.TB) kms.Provider { return b.open(tb, filepath.Join(tb.TempDir(), "key.json")) },
		Again: func(tb testing.TB, p kms.Provider) kms.Provider { return b.open(tb, b.paths[p]) },
		Fail: map[error]func(testing.TB, kms.Provider) func(){
			kms.ErrDisabled:        state(kms.StateDisabled),
			kms.ErrPendingDeletion: state(kms.StatePendingDeletion),
			kms.ErrNotFound: func(tb testing.TB, p kms.Provider) func() {
				path := b.paths[p]
				if err := os.Rename(path, path+".away"); err != nil {
					tb.Fatal(err)
				}
				return func() { _ = os.Rename(path+".away", path) }
			},
			kms.ErrAccessDenied: func(tb testing.TB, p kms.Provider) func() {
				path := b.paths[p]
				if err := os.Chmod(path, 0o644); err != nil {
					tb.Fatal(err)
				}
				return func() { _ = os.Chmod(path, 0o600) }
			},
			kms.ErrUnavailable: func(tb testing.TB, p kms.Provider) func() {
				path := b.paths[p]
				if err := errors.Join(os.Rename(path, path+".away"), os.Symlink(filepath.Base(path), path)); err != nil {
					tb.Fatal(err)
				}
				return func() { _ = os.Rename(path+".away", path) }
			},
		},
		WrongRegion: func(tb testing.TB, p kms.Provider) error {
			_, err := local.Open(tb.Context(), local.Options{Path: b.paths[p], Region: "sg"})
			return err
		},
		Calls: func(p kms.Provider) []kms.Call {
			b.mu.Lock()
			defer b.mu.Unlock()
			return slices.Clone(*b.calls[p])
		},
		Cannot: map[string]string{
			"Hang":              "a file does not hang",
			"ExpireCredentials": "a file needs none",
			"Fail: " + kms.ErrUnauthenticated.Error(): "a file needs no credentials",
			"Fail: " + kms.ErrThrottled.Error():       "a file limits nobody",
			"Fail: " + kms.ErrQuota.Error():           "a file limits nobody",
		},
	})
}

func TestCreatePermissions(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key.json")
	if _, err := local.Open(t.Context(), local.Options{Path: path}); !errors.Is(err, kms.ErrNotFound) {
		t.Fatalf("no file: %v", err)
	}
	p, err := local.Open(t.Context(), local.Options{Path: path, Create: true})
	if err != nil {
		t.Fatal(err)
	}
	check := func() {
		t.Helper()
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Fatalf("%v, %v", info.Mode(), err)
		}
	}
	check()
	if _, err := p.Rotate(t.Context()); err != nil {
		t.Fatal(err)
	}
	check()
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 2 { // the file and its lock
		t.Fatalf("left behind: %v, %v", entries, err)
	}
	for _, mode := range []os.FileMode{0o640, 0o604, 0o644, 0o620, 0o610} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		_, err := local.Open(t.Context(), local.Options{Path: path, Create: true})
		var e *kms.Error
		if !errors.Is(err, local.ErrPermissions) || !errors.Is(err, kms.ErrAccessDenied) || !errors.As(err, &e) {
			t.Errorf("mode %04o: %v", mode, err)
		}
	}
}

func TestMalformedFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "key.json")
	if _, err := local.Open(t.Context(), local.Options{Path: path, Create: true}); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string]string{
		"empty":          "",
		"text":           "canary-secret",
		"cut":            string(good[:len(good)/2]),
		"unknown member": strings.Replace(string(good), `"format"`, `"extra": "canary-secret", "format"`, 1),
		"twice":          strings.Replace(string(good), `"format": 1`, `"format": 1, "format": 1`, 1),
		"format":         strings.Replace(string(good), `"format": 1`, `"format": 2`, 1),
		"state":          strings.Replace(string(good), `"enabled"`, `"canary-secret"`, 1),
		"no versions":    `{"format":1,"key":"00000000000000000000000000000000","state":"enabled","min_version":1,"versions":[]}`,
		"short secret":   `{"format":1,"key":"00000000000000000000000000000000","state":"enabled","min_version":1,"versions":[{"version":1,"created":"2026-01-01T00:00:00Z","secret":"AAAA"}]}`,
	} {
		if err := os.WriteFile(path, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := local.Open(t.Context(), local.Options{Path: path, Create: true})
		if !errors.Is(err, local.ErrKeyFile) || !errors.Is(err, kms.ErrMismatch) {
			t.Errorf("%s: %v", name, err)
		}
		if err != nil && strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: the error quotes the file: %v", name, err)
		}
	}
}

func TestCreatedOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key.json")
	var wg sync.WaitGroup
	keys := make([]string, 16)
	for i := range keys {
		wg.Go(func() {
			p, err := local.Open(t.Context(), local.Options{Path: path, Create: true})
			if err != nil {
				t.Error(err)
				return
			}
			d, err := p.Describe(t.Context())
			if err != nil {
				t.Error(err)
			}
			keys[i] = d.Key
		})
	}
	wg.Wait()
	if n := len(slices.Compact(slices.Sorted(slices.Values(keys)))); n != 1 {
		t.Fatalf("%d keys", n)
	}
}

// Two processes that rotate at the same time make two versions.
func TestRotatedTogether(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key.json")
	const clients, rounds = 4, 10
	var wg sync.WaitGroup
	for range clients {
		p, err := local.Open(t.Context(), local.Options{Path: path, Create: true})
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			for range rounds {
				if _, err := p.Rotate(t.Context()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	p, err := local.Open(t.Context(), local.Options{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	d, err := p.Describe(t.Context())
	if err != nil || d.Version != fmt.Sprint(1+clients*rounds) {
		t.Fatalf("version %s, %v", d.Version, err)
	}
}

func TestRetireRemovesSecret(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key.json")
	p, err := local.Open(t.Context(), local.Options{Path: path, Create: true})
	if err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	i := bytes.Index(before, []byte(`"secret": "`)) + len(`"secret": "`)
	secret := before[i : i+base64.StdEncoding.EncodedLen(kms.KeySize)]
	version, err := p.Rotate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if after, _ := os.ReadFile(path); !bytes.Contains(after, secret) {
		t.Fatal("rotation dropped the old version")
	}
	if err := p.Retire(t.Context(), "99"); !errors.Is(err, kms.ErrNotFound) {
		t.Fatalf("a version that is not there: %v", err)
	}
	if err := p.Retire(t.Context(), version); err != nil {
		t.Fatal(err)
	}
	if after, err := os.ReadFile(path); err != nil || bytes.Contains(after, secret) {
		t.Fatalf("the retired version is still in the file, or %v", err)
	}
}

func Example() {
	dir, err := os.MkdirTemp("", "coffer")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	ctx := context.Background()
	p, err := local.Open(ctx, local.Options{Path: filepath.Join(dir, "key.json"), Create: true})
	if err != nil {
		panic(err)
	}
	defer p.Close()
	binding := kms.Context{Region: "eu", App: "app", Purpose: kms.PurposeApp}
	key, wrap, err := p.Generate(ctx, binding)
	if err != nil {
		panic(err)
	}
	again, err := p.Unwrap(ctx, binding, wrap)
	fmt.Println(bytes.Equal(key, again), err)
	// Output: true <nil>
}
