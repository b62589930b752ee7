package kmstest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cofferdb/coffer/kms"
)

// Harness is what RunProvider needs of a provider. New is required. Every other
// hook may be nil if Cannot says, under the hook's name, why the provider cannot
// do it; a hook that is neither given nor declined fails the suite.
type Harness struct {
	// New returns a provider with a KEK of its own, and ends it with the test.
	New func(tb testing.TB) kms.Provider
	// Again returns another client of the same KEK.
	Again func(tb testing.TB, p kms.Provider) kms.Provider
	// Rotate makes a new version of the KEK. Default: the provider's Rotator.
	Rotate func(tb testing.TB, p kms.Provider)
	// Retire ends the versions before one. Default: the provider's Retirer.
	Retire func(tb testing.TB, p kms.Provider, before string)
	// Fail lets the provider's calls fail in the way of a class, by whatever the
	// service really does then, and returns what undoes it. The keys are classes
	// of kms.Classes; ErrMismatch and ErrVersionRetired are made by the suite.
	Fail map[error]func(tb testing.TB, p kms.Provider) (undo func())
	// Hang lets calls hang in the service, and returns what lets them go on.
	Hang func(tb testing.TB, p kms.Provider) (release func())
	// ExpireCredentials ends the credentials the provider works with, in a way
	// from which it recovers by itself.
	ExpireCredentials func(tb testing.TB, p kms.Provider)
	// WrongRegion tries to open the KEK of New as one of another region, and
	// returns the error.
	WrongRegion func(tb testing.TB, p kms.Provider) error
	// Calls returns what was observed of p so far, oldest first.
	Calls func(p kms.Provider) []kms.Call
	// Cannot maps the name of a hook ("Rotate", "Hang", …), or "Fail: " and the
	// text of a class, to the reason why there is none.
	Cannot map[string]string
	// Secrets are texts that must not appear in any error, for instance a token.
	Secrets []string
}

// RunProvider is the suite that every provider passes.
func RunProvider(t *testing.T, h Harness) {
	t.Run("RoundTrip", h.roundTrip)
	t.Run("Describe", h.describe)
	t.Run("WrongContext", h.wrongContext)
	t.Run("WrongKey", h.wrongKey)
	t.Run("MalformedBlob", h.malformed)
	t.Run("Input", h.input)
	t.Run("Rewrap", h.rewrap)
	t.Run("Rotation", h.rotation)
	t.Run("Retirement", h.retirement)
	t.Run("Again", h.again)
	t.Run("Cancelled", h.cancelled)
	t.Run("CancelledInMidCall", h.midCall)
	t.Run("Concurrency", h.concurrency)
	t.Run("ExpiredCredentials", h.expired)
	t.Run("WrongRegion", h.wrongRegion)
	t.Run("Observed", h.observed)
	for _, class := range kms.Classes() {
		if errors.Is(class, kms.ErrMismatch) || errors.Is(class, kms.ErrVersionRetired) {
			continue // WrongContext and Retirement
		}
		t.Run("Class/"+strings.ReplaceAll(strings.TrimPrefix(class.Error(), "kms: "), " ", "_"), func(t *testing.T) { h.class(t, class) })
	}
}

func (h Harness) cannot(t *testing.T, hook string) {
	t.Helper()
	if reason := h.Cannot[hook]; reason != "" {
		t.Skipf("skipped: this provider has no %s: %s", hook, reason)
	}
	t.Fatalf("the harness neither offers %q nor says why it cannot", hook)
}

func binding(app string) kms.Context {
	return kms.Context{Region: "eu", App: app, Purpose: kms.PurposeApp}
}

func (h Harness) generate(t *testing.T, p kms.Provider, c kms.Context) ([]byte, kms.Wrap) {
	t.Helper()
	key, w, err := p.Generate(t.Context(), c)
	if err != nil {
		t.Fatalf("Generate: %v", err)
	}
	return key, w
}

// refused checks class and text of an error.
func (h Harness) refused(t *testing.T, what string, err, class error) {
	t.Helper()
	var e *kms.Error
	switch {
	case err == nil:
		t.Errorf("%s: no error, want %v", what, class)
		return
	case !errors.Is(err, class):
		t.Errorf("%s: %v, want %v", what, err, class)
	case !errors.As(err, &e):
		t.Errorf("%s: %T, want *kms.Error", what, err)
	case e.Provider == "" || e.Op == "":
		t.Errorf("%s: the error names no provider or operation: %#v", what, e)
	}
	for _, s := range h.Secrets {
		if s != "" && strings.Contains(fmt.Sprintf("%v %+v %#v", err, err, err), s) {
			t.Errorf("%s: the error shows a secret", what)
		}
	}
}

func (h Harness) roundTrip(t *testing.T) {
	p, c := h.New(t), binding("a")
	d, err := p.Describe(t.Context())
	if err != nil {
		t.Fatalf("Describe: %v", err)
	}
	key, w := h.generate(t, p, c)
	if len(key) != kms.KeySize {
		t.Fatalf("a key of %d bytes", len(key))
	}
	if w.Identity() != d.Identity() || w.Version != d.Version || len(w.Blob) == 0 || len(w.Blob) > kms.MaxBlob {
		t.Errorf("wrap %v of %d bytes, described as %+v", w, len(w.Blob), d)
	}
	if age := time.Since(w.WrappedAt); age < -time.Hour || age > time.Hour {
		t.Errorf("wrapped at %v", w.WrappedAt)
	}
	if bytes.Contains(w.Blob, key) || strings.Contains(fmt.Sprintf("%v %+v %#v", w, w, w), fmt.Sprint(w.Blob)) {
		t.Error("the wrap shows the key, or prints its blob")
	}
	got, err := p.Unwrap(t.Context(), c, w)
	if err != nil || !bytes.Equal(got, key) {
		t.Fatalf("Unwrap: another key, or %v", err)
	}
	w2, err := p.Wrap(t.Context(), c, key)
	if err != nil {
		t.Fatalf("Wrap: %v", err)
	}
	if bytes.Equal(w.Blob, w2.Blob) {
		t.Error("two wraps of one key are the same bytes")
	}
	if got, err := p.Unwrap(t.Context(), c, w2); err != nil || !bytes.Equal(got, key) {
		t.Errorf("Unwrap what Wrap made: another key, or %v", err)
	}
	if other, _ := h.generate(t, p, c); bytes.Equal(other, key) {
		t.Error("Generate returned one key twice")
	}
}

func (h Harness) describe(t *testing.T) {
	d, err := h.New(t).Describe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if d.Provider == "" || d.Key == "" || d.Version == "" || d.State != kms.StateEnabled {
		t.Errorf("%+v", d)
	}
}

func (h Harness) wrongContext(t *testing.T) {
	p, c := h.New(t), binding("a")
	_, w := h.generate(t, p, c)
	for name, bad := range map[string]kms.Context{
		"region":  {Region: "sg", App: c.App, Purpose: c.Purpose},
		"app":     {Region: c.Region, App: "b", Purpose: c.Purpose},
		"purpose": {Region: c.Region, App: c.App, Purpose: "other"},
		"split":   {Region: c.Region + c.App, App: "a", Purpose: c.Purpose},
		"swapped": {Region: c.App, App: c.Region, Purpose: c.Purpose},
	} {
		_, err := p.Unwrap(t.Context(), bad, w)
		h.refused(t, "another "+name, err, kms.ErrMismatch)
		results, err := p.Rewrap(t.Context(), []kms.RewrapItem{{Context: bad, Wrap: w}})
		if err != nil || len(results) != 1 {
			t.Fatalf("Rewrap: %d results, %v", len(results), err)
		}
		h.refused(t, "Rewrap with another "+name, results[0].Err, kms.ErrMismatch)
	}
}

func (h Harness) wrongKey(t *testing.T) {
	p, other, c := h.New(t), h.New(t), binding("a")
	_, w := h.generate(t, other, c)
	_, err := p.Unwrap(t.Context(), c, w)
	h.refused(t, "the wrap of another KEK", err, kms.ErrMismatch)
	d, err := p.Describe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	w.Provider, w.Key = d.Provider, d.Key // as a mixed up row would have it
	_, err = p.Unwrap(t.Context(), c, w)
	h.refused(t, "the blob of another KEK", err, kms.ErrMismatch)
}

func (h Harness) malformed(t *testing.T) {
	p, c := h.New(t), binding("a")
	_, w := h.generate(t, p, c)
	for name, edit := range map[string]func([]byte) []byte{
		"empty":       func([]byte) []byte { return nil },
		"one byte":    func(b []byte) []byte { return b[:1] },
		"cut short":   func(b []byte) []byte { return b[:len(b)-1] },
		"last byte":   func(b []byte) []byte { b[len(b)-1] ^= 1; return b },
		"middle byte": func(b []byte) []byte { b[len(b)/2] ^= 1; return b },
		"garbage":     func([]byte) []byte { return []byte("not a wrapped key") },
		"oversize":    func([]byte) []byte { return bytes.Repeat([]byte{'A'}, 1<<20) },
	} {
		bad := w
		bad.Blob = edit(bytes.Clone(w.Blob))
		key, err := p.Unwrap(t.Context(), c, bad)
		h.refused(t, name, err, kms.ErrMismatch)
		if key != nil {
			t.Errorf("%s: a key came with the error", name)
		}
	}
}

func (h Harness) input(t *testing.T) {
	p := h.New(t)
	for _, size := range []int{0, 1, kms.KeySize - 1, kms.KeySize + 1, 1 << 20} {
		if _, err := p.Wrap(t.Context(), binding("a"), make([]byte, size)); !errors.Is(err, kms.ErrInput) {
			t.Errorf("Wrap of %d bytes: %v, want ErrInput", size, err)
		}
	}
	for name, c := range map[string]kms.Context{
		"empty":         {},
		"empty app":     {Region: "eu", Purpose: "p"},
		"oversize":      {Region: "eu", App: strings.Repeat("a", 10_000), Purpose: "p"},
		"control bytes": {Region: "eu", App: "a\n", Purpose: "p"},
	} {
		if _, _, err := p.Generate(t.Context(), c); !errors.Is(err, kms.ErrInput) {
			t.Errorf("Generate with %s context: %v, want ErrInput", name, err)
		}
	}
}

func (h Harness) rewrap(t *testing.T) {
	p := h.New(t)
	if results, err := p.Rewrap(t.Context(), nil); err != nil || len(results) != 0 {
		t.Errorf("nothing: %d results, %v", len(results), err)
	}
	var items []kms.RewrapItem
	var keys [][]byte
	for i := range 20 {
		c := binding(fmt.Sprintf("a%d", i))
		key, w := h.generate(t, p, c)
		keys, items = append(keys, key), append(items, kms.RewrapItem{Context: c, Wrap: w})
	}
	items[7].Wrap.Blob = []byte("damaged")
	items[13].Context.App = "other"
	results, err := p.Rewrap(t.Context(), items)
	if err != nil || len(results) != len(items) {
		t.Fatalf("%d results, %v", len(results), err)
	}
	for i, r := range results {
		if i == 7 || i == 13 {
			h.refused(t, fmt.Sprintf("item %d", i), r.Err, kms.ErrMismatch)
			continue
		}
		if r.Err != nil {
			t.Errorf("item %d: %v", i, r.Err)
			continue
		}
		if got, err := p.Unwrap(t.Context(), items[i].Context, r.Wrap); err != nil || !bytes.Equal(got, keys[i]) {
			t.Errorf("item %d: another key, or %v", i, err)
		}
	}
}

// rotate makes a new version, and returns it.
func (h Harness) rotate(t *testing.T, p kms.Provider) string {
	t.Helper()
	if h.Rotate != nil {
		h.Rotate(t, p)
	} else if r, ok := p.(kms.Rotator); ok {
		if _, err := r.Rotate(t.Context()); err != nil {
			t.Fatalf("Rotate: %v", err)
		}
	} else {
		h.cannot(t, "Rotate")
	}
	d, err := p.Describe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return d.Version
}

func (h Harness) rotation(t *testing.T) {
	p, c := h.New(t), binding("a")
	key, old := h.generate(t, p, c)
	version := h.rotate(t, p)
	if version == old.Version {
		t.Errorf("the version is still %s", version)
	}
	if got, err := p.Unwrap(t.Context(), c, old); err != nil || !bytes.Equal(got, key) {
		t.Errorf("the old version no longer unwraps: %v", err)
	}
	if _, w := h.generate(t, p, c); w.Version != version {
		t.Errorf("a new wrap has version %s, not %s", w.Version, version)
	}
	results, err := p.Rewrap(t.Context(), []kms.RewrapItem{{Context: c, Wrap: old}})
	if err != nil || len(results) != 1 || results[0].Err != nil {
		t.Fatalf("Rewrap: %v, %v", results, err)
	}
	w := results[0].Wrap
	if w.Version != version || w.Identity() != old.Identity() {
		t.Errorf("rewrapped as %v, want version %s", w, version)
	}
	if got, err := p.Unwrap(t.Context(), c, w); err != nil || !bytes.Equal(got, key) {
		t.Errorf("rewrapped: another key, or %v", err)
	}
}

func (h Harness) retirement(t *testing.T) {
	p, c := h.New(t), binding("a")
	_, old := h.generate(t, p, c)
	version := h.rotate(t, p)
	key, w := h.generate(t, p, c)
	if h.Retire != nil {
		h.Retire(t, p, version)
	} else if r, ok := p.(kms.Retirer); ok {
		if err := r.Retire(t.Context(), version); err != nil {
			t.Fatalf("Retire: %v", err)
		}
	} else {
		h.cannot(t, "Retire")
	}
	_, err := p.Unwrap(t.Context(), c, old)
	h.refused(t, "a retired version", err, kms.ErrVersionRetired)
	results, err := p.Rewrap(t.Context(), []kms.RewrapItem{{Context: c, Wrap: old}, {Context: c, Wrap: w}})
	if err != nil || len(results) != 2 {
		t.Fatalf("Rewrap: %v, %v", results, err)
	}
	h.refused(t, "rewrap of a retired version", results[0].Err, kms.ErrVersionRetired)
	if results[1].Err != nil {
		t.Errorf("rewrap beside a retired version: %v", results[1].Err)
	}
	if got, err := p.Unwrap(t.Context(), c, w); err != nil || !bytes.Equal(got, key) {
		t.Errorf("the version kept: %v", err)
	}
	d, err := p.Describe(t.Context())
	if err != nil || d.MinVersion != version {
		t.Errorf("described with minimum %q, want %q; %v", d.MinVersion, version, err)
	}
}

func (h Harness) again(t *testing.T) {
	if h.Again == nil {
		h.cannot(t, "Again")
	}
	p, c := h.New(t), binding("a")
	key, w := h.generate(t, p, c)
	q := h.Again(t, p)
	if got, err := q.Unwrap(t.Context(), c, w); err != nil || !bytes.Equal(got, key) {
		t.Errorf("another client: another key, or %v", err)
	}
	if _, ok := p.(kms.Rotator); !ok && h.Rotate == nil {
		return
	}
	version := h.rotate(t, p)
	key, w = h.generate(t, p, c)
	if got, err := q.Unwrap(t.Context(), c, w); err != nil || !bytes.Equal(got, key) {
		t.Errorf("another client after rotation to %s: another key, or %v", version, err)
	}
}

// operations calls each method once.
func operations(ctx context.Context, p kms.Provider, w kms.Wrap) map[string]func() error {
	c := binding("a")
	return map[string]func() error{
		"describe": func() error { _, err := p.Describe(ctx); return err },
		"generate": func() error { _, _, err := p.Generate(ctx, c); return err },
		"wrap":     func() error { _, err := p.Wrap(ctx, c, make([]byte, kms.KeySize)); return err },
		"unwrap":   func() error { _, err := p.Unwrap(ctx, c, w); return err },
		"rewrap": func() error {
			results, err := p.Rewrap(ctx, []kms.RewrapItem{{Context: c, Wrap: w}})
			if err == nil && len(results) == 1 {
				return results[0].Err
			}
			return err
		},
	}
}

func (h Harness) cancelled(t *testing.T) {
	p := h.New(t)
	_, w := h.generate(t, p, binding("a"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for name, op := range operations(ctx, p, w) {
		err := op()
		if !errors.Is(err, context.Canceled) || kms.Retryable(err) {
			t.Errorf("%s: %v (retryable %v), want context.Canceled", name, err, kms.Retryable(err))
		}
	}
	if _, err := p.Unwrap(t.Context(), binding("a"), w); err != nil {
		t.Errorf("after it: %v", err)
	}
}

func (h Harness) midCall(t *testing.T) {
	if h.Hang == nil {
		h.cannot(t, "Hang")
	}
	p := h.New(t)
	_, w := h.generate(t, p, binding("a"))
	release := h.Hang(t, p)
	for name := range operations(t.Context(), p, w) {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- operations(ctx, p, w)[name]() }()
		select {
		case err := <-done:
			t.Errorf("%s: it did not hang: %v", name, err)
		case <-time.After(50 * time.Millisecond):
		}
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v, want context.Canceled", name, err)
		}
		ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
		err := operations(ctx, p, w)[name]()
		cancel()
		h.refused(t, name+" at its deadline", err, kms.ErrUnavailable)
	}
	release()
	if _, err := p.Unwrap(t.Context(), binding("a"), w); err != nil {
		t.Errorf("after it: %v", err)
	}
}

func (h Harness) concurrency(t *testing.T) {
	p := h.New(t)
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			c := binding(fmt.Sprintf("a%d", i))
			for range 5 {
				key, w, err := p.Generate(t.Context(), c)
				if err != nil {
					t.Errorf("Generate: %v", err)
					return
				}
				if got, err := p.Unwrap(t.Context(), c, w); err != nil || !bytes.Equal(got, key) {
					t.Errorf("Unwrap: another key, or %v", err)
				}
			}
		})
	}
	wg.Wait()
}

func (h Harness) expired(t *testing.T) {
	if h.ExpireCredentials == nil {
		h.cannot(t, "ExpireCredentials")
	}
	p, c := h.New(t), binding("a")
	key, w := h.generate(t, p, c)
	h.ExpireCredentials(t, p)
	if got, err := p.Unwrap(t.Context(), c, w); err != nil || !bytes.Equal(got, key) {
		t.Errorf("it does not get new credentials: %v", err)
	}
}

func (h Harness) wrongRegion(t *testing.T) {
	if h.WrongRegion == nil {
		h.cannot(t, "WrongRegion")
	}
	h.refused(t, "another region", h.WrongRegion(t, h.New(t)), kms.ErrMismatch)
}

func (h Harness) observed(t *testing.T) {
	if h.Calls == nil {
		h.cannot(t, "Calls")
	}
	p, c := h.New(t), binding("a")
	_, w := h.generate(t, p, c)
	before := len(h.Calls(p))
	if _, err := p.Unwrap(t.Context(), c, w); err != nil {
		t.Fatal(err)
	}
	_, _ = p.Unwrap(t.Context(), binding("other"), w) // fails, which is observed too
	// A session may have been renewed meanwhile.
	calls := slices.DeleteFunc(slices.Clone(h.Calls(p)[before:]), func(c kms.Call) bool { return c.Operation == "renew" || c.Operation == "login" })
	if len(calls) != 2 {
		t.Fatalf("%d calls observed, want 2", len(calls))
	}
	for _, call := range calls {
		if call.Operation != "unwrap" || call.Items != 1 || call.Provider != w.Provider || call.Key == "" {
			t.Errorf("observed %+v", call)
		}
	}
	if calls[0].Err != nil || !errors.Is(calls[1].Err, kms.ErrMismatch) {
		t.Errorf("observed errors %v and %v", calls[0].Err, calls[1].Err)
	}
}

func (h Harness) class(t *testing.T, class error) {
	fail := h.Fail[class]
	if fail == nil {
		h.cannot(t, "Fail: "+class.Error())
	}
	p, c := h.New(t), binding("a")
	key, w := h.generate(t, p, c)
	undo := fail(t, p)
	got, err := p.Unwrap(t.Context(), c, w)
	h.refused(t, "unwrap", err, class)
	if got != nil {
		t.Error("a key came with the error")
	}
	_, _, err = p.Generate(t.Context(), c)
	h.refused(t, "generate", err, class)
	if kms.Class(err) != class { //nolint:errorlint // the sentinel itself
		t.Errorf("Class is %v", kms.Class(err))
	}
	if undo == nil {
		return
	}
	undo()
	if got, err := p.Unwrap(t.Context(), c, w); err != nil || !bytes.Equal(got, key) {
		t.Errorf("it does not recover: %v", err)
	}
}
