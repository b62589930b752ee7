package kms_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/kmstest"
	"github.com/cofferdb/coffer/kms/local"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const app = "03aa5a5a5a5a5a5a5a5a5a5a5a5a5a5a"

// world is what several processes share: a provider and rows.
type world struct {
	provider *kmstest.Faults
	rows     *kmstest.Rows
}

func newWorld(tb testing.TB) *world {
	tb.Helper()
	p, err := local.Open(tb.Context(), local.Options{Path: filepath.Join(tb.TempDir(), "key.json"), Create: true})
	if err != nil {
		tb.Fatal(err)
	}
	return &world{provider: kmstest.NewFaults(p), rows: kmstest.NewRows()}
}

// process returns a keyring of its own. edit may change its configuration.
func (w *world) process(tb testing.TB, edit ...func(*kms.Config)) *kms.Keyring {
	tb.Helper()
	cfg := kms.Config{Region: "eu", Provider: w.provider, Rows: w.rows}
	for _, f := range edit {
		f(&cfg)
	}
	k, err := kms.NewKeyring(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := k.Close(); err != nil {
			tb.Error(err)
		}
	})
	return k
}

func (w *world) create(tb testing.TB, k *kms.Keyring) {
	tb.Helper()
	if err := k.CreateApp(tb.Context(), app); err != nil {
		tb.Fatal(err)
	}
}

// day returns the epoch of the n-th day of 2040, kept for ten days.
func day(n int) kms.Epoch {
	from := time.Date(2040, 1, 1+n, 0, 0, 0, 0, time.UTC)
	return kms.Epoch{Class: "pro/0", From: from, Until: from.AddDate(0, 0, 1), Expires: from.AddDate(0, 0, 11)}
}

func subject(n int) kms.Tag {
	// Spread like the tags they stand for.
	x := uint64(n+1) * 0x9e3779b97f4a7c15
	var t kms.Tag
	for i := range t {
		t[i] = byte(x >> (8 * (i % 8)))
		x = x*6364136223846793005 + 1442695040888963407
	}
	return t
}

func seal(tb testing.TB, k *kms.Keyring, e kms.Epoch, s kms.Tag, text string) []byte {
	tb.Helper()
	key, err := k.Sealer(tb.Context(), app, e, s)
	if err != nil {
		tb.Fatalf("Sealer: %v", err)
	}
	return key.Seal(nil, []byte("aad"), []byte(text))
}

func open(ctx context.Context, k *kms.Keyring, env []byte) (string, error) {
	h, err := kms.ParseHeader(env)
	if err != nil {
		return "", err
	}
	key, err := k.Opener(ctx, app, h.Epoch, h.Subject)
	if err != nil {
		return "", err
	}
	text, err := key.Open(nil, []byte("aad"), env)
	return string(text), err
}

func wantOpen(tb testing.TB, k *kms.Keyring, env []byte, want string) {
	tb.Helper()
	if got, err := open(tb.Context(), k, env); err != nil || got != want {
		tb.Fatalf("opened %q, %v, want %q", got, err, want)
	}
}

func TestKeyring(t *testing.T) {
	w := newWorld(t)
	a, b := w.process(t), w.process(t)
	if _, err := a.Sealer(t.Context(), app, day(0), subject(0)); !errors.Is(err, kms.ErrAppUnknown) {
		t.Fatalf("before CreateApp: %v", err)
	}
	w.create(t, a)
	w.create(t, b) // does nothing
	env := seal(t, a, day(0), subject(0), "hello")
	wantOpen(t, a, env, "hello")
	wantOpen(t, b, env, "hello")
	wantOpen(t, w.process(t), env, "hello")
	h, err := kms.ParseHeader(env)
	if err != nil || h.Epoch != 1 || h.Subject != subject(0) {
		t.Fatalf("%+v, %v", h, err)
	}
	// The same epoch and subject: the same key, whoever asks.
	if again, err := kms.ParseHeader(seal(t, b, day(0), subject(0), "more")); err != nil || again != h {
		t.Errorf("another process seals under %+v, %v", again, err)
	}
	if next, err := kms.ParseHeader(seal(t, b, day(1), subject(0), "later")); err != nil || next.Epoch != 2 {
		t.Errorf("the next epoch is %d, %v", next.Epoch, err)
	}
	ta, err := a.Tagger(t.Context(), app)
	if err != nil {
		t.Fatal(err)
	}
	tb, err := b.Tagger(t.Context(), app)
	if err != nil || ta.Tag(kms.KindSubject, "x") != tb.Tag(kms.KindSubject, "x") {
		t.Errorf("tags differ between processes, %v", err)
	}
	blob, err := a.SealBlob(t.Context(), app, "certificate", []byte("secret"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := b.OpenBlob(t.Context(), app, "certificate", blob); err != nil || string(got) != "secret" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := b.OpenBlob(t.Context(), app, "name", blob); !errors.Is(err, kms.ErrAuthentication) {
		t.Errorf("for another purpose: %v", err)
	}
	for i := range blob {
		bad := bytes.Clone(blob)
		bad[i] ^= 1
		if _, err := b.OpenBlob(t.Context(), app, "certificate", bad); err == nil {
			t.Fatalf("byte %d of a blob may be changed", i)
		}
	}
}

func TestOpenerUnknown(t *testing.T) {
	w := newWorld(t)
	k := w.process(t)
	w.create(t, k)
	seal(t, k, day(0), subject(0), "x")
	for name, id := range map[string]struct {
		epoch   uint32
		subject kms.Tag
	}{"epoch 0": {0, subject(0)}, "epoch": {9, subject(0)}, "subject": {1, subject(9)}} {
		if _, err := k.Opener(t.Context(), app, id.epoch, id.subject); !errors.Is(err, kms.ErrKeyUnknown) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestKeyringInput(t *testing.T) {
	w := newWorld(t)
	k := w.process(t)
	w.create(t, k)
	for _, bad := range []string{"", "a.b", "a*", "a>", "a b", "../x", "ä", string(bytes.Repeat([]byte("a"), 65))} {
		if err := k.CreateApp(t.Context(), bad); !errors.Is(err, kms.ErrInput) {
			t.Errorf("app %q: %v", bad, err)
		}
		if _, err := k.Opener(t.Context(), bad, 1, subject(0)); !errors.Is(err, kms.ErrInput) {
			t.Errorf("app %q: %v", bad, err)
		}
	}
	for name, edit := range map[string]func(*kms.Epoch){
		"no class":       func(e *kms.Epoch) { e.Class = "" },
		"ends at start":  func(e *kms.Epoch) { e.Until = e.From },
		"sub-second":     func(e *kms.Epoch) { e.From = e.From.Add(time.Millisecond) },
		"expires before": func(e *kms.Epoch) { e.Expires = e.From },
	} {
		e := day(0)
		edit(&e)
		if _, err := k.Sealer(t.Context(), app, e, subject(0)); !errors.Is(err, kms.ErrInput) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, edit := range map[string]func(*kms.Config){
		"no region":   func(c *kms.Config) { c.Region = "" },
		"no rows":     func(c *kms.Config) { c.Rows = nil },
		"no provider": func(c *kms.Config) { c.Provider = nil },
		"hard 25 h":   func(c *kms.Config) { c.Hard = 25 * time.Hour },
		"hard < soft": func(c *kms.Config) { c.Hard = time.Minute },
	} {
		cfg := kms.Config{Region: "eu", Provider: w.provider, Rows: w.rows}
		edit(&cfg)
		if _, err := kms.NewKeyring(cfg); !errors.Is(err, kms.ErrInput) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestClosed(t *testing.T) {
	w := newWorld(t)
	k := w.process(t)
	w.create(t, k)
	seal(t, k, day(0), subject(0), "x")
	if err := k.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Sealer(t.Context(), app, day(0), subject(0)); !errors.Is(err, kms.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	if s := k.Status(); s.Apps+s.DataKeys+s.Pages != 0 {
		t.Errorf("left in memory: %+v", s)
	}
}

func TestHotPathAllocations(t *testing.T) {
	if kms.RaceDetector {
		t.Skip("skipped: the race detector allocates; run the test without -race")
	}
	w := newWorld(t)
	k := w.process(t)
	w.create(t, k)
	ctx, e, s := t.Context(), day(0), subject(0)
	seal(t, k, e, s, "x")
	seal(t, k, day(1), s, "x") // two epochs in use at once, as around midnight
	if n := testing.AllocsPerRun(200, func() {
		for _, e := range [...]kms.Epoch{e, day(1)} {
			if _, err := k.Sealer(ctx, app, e, s); err != nil {
				t.Fatal(err)
			}
		}
	}); n != 0 {
		t.Errorf("Sealer allocates %v times", n)
	}
	if n := testing.AllocsPerRun(200, func() {
		if _, err := k.Opener(ctx, app, 1, s); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("Opener allocates %v times", n)
	}
}

// A thousand readers that find nothing in memory make one unwrap.
func TestSingleFlight(t *testing.T) {
	w := newWorld(t)
	first := w.process(t)
	w.create(t, first)
	env := seal(t, first, day(0), subject(0), "hello")
	k := w.process(t)
	w.provider.Delay(20 * time.Millisecond)
	before := w.provider.Calls("unwrap")
	var wg sync.WaitGroup
	for range 1000 {
		wg.Go(func() {
			if got, err := open(t.Context(), k, env); err != nil || got != "hello" {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
	wg.Wait()
	if n := w.provider.Calls("unwrap") - before; n != 1 {
		t.Errorf("%d unwraps", n)
	}
}

// The end of one caller's context ends its wait, and nobody else's.
func TestCancelledWait(t *testing.T) {
	w := newWorld(t)
	first := w.process(t)
	w.create(t, first)
	env := seal(t, first, day(0), subject(0), "hello")
	k := w.process(t)
	w.provider.Hang()
	ctx, cancel := context.WithCancel(t.Context())
	impatient, patient := make(chan error, 1), make(chan error, 1)
	go func() { _, err := open(ctx, k, env); impatient <- err }()
	go func() { _, err := open(t.Context(), k, env); patient <- err }()
	for w.provider.Calls("describe") < 2 {
		runtime.Gosched()
	}
	cancel()
	if err := <-impatient; !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want context.Canceled", err)
	}
	w.provider.Heal()
	if err := <-patient; err != nil {
		t.Errorf("the other caller: %v", err)
	}
}

// A service that answers with another key is found out, not believed.
func TestLyingProvider(t *testing.T) {
	w := newWorld(t)
	first := w.process(t)
	w.create(t, first)
	env := seal(t, first, day(0), subject(0), "hello")
	w.provider.Lie(bytes.Repeat([]byte{7}, kms.KeySize))
	if _, err := open(t.Context(), w.process(t), env); !errors.Is(err, kms.ErrMismatch) {
		t.Errorf("%v, want ErrMismatch", err)
	}
}

func TestMemoryLimits(t *testing.T) {
	w := newWorld(t)
	k := w.process(t, func(c *kms.Config) { c.MaxApps, c.MaxDataKeys, c.MaxPages = 4, 50, 5 })
	k.SetPageLimit(2000)
	apps := make([]string, 10)
	for i := range apps {
		apps[i] = fmt.Sprintf("app%d", i)
		if err := k.CreateApp(t.Context(), apps[i]); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 300 {
		if _, err := k.Sealer(t.Context(), apps[i%10], day(0), subject(i)); err != nil {
			t.Fatal(err)
		}
		if s := k.Status(); s.Apps > 4 || s.DataKeys > 50 || s.Pages > 5+1 {
			t.Fatalf("in memory: %+v", s)
		}
	}
	for i := range 300 {
		if _, err := k.Sealer(t.Context(), apps[0], day(0), subject(i)); err != nil {
			t.Fatal(err)
		}
	}
	if s := k.Status(); s.DataKeys == 0 || s.DataKeys > 50 {
		t.Fatalf("in memory: %+v", s)
	}
	for i := range apps {
		k.Evict(apps[i])
	}
	if s := k.Status(); s.Apps+s.DataKeys+s.Pages != 0 {
		t.Errorf("after Evict: %+v", s)
	}
}

// Evicted keys are overwritten: those of the app at once, data keys when nobody
// can use them any more.
func TestEvictedKeysAreZeroed(t *testing.T) {
	w := newWorld(t)
	k := w.process(t)
	w.create(t, k)
	key, err := k.Sealer(t.Context(), app, day(0), subject(0))
	if err != nil {
		t.Fatal(err)
	}
	env := key.Seal(nil, nil, []byte("x"))
	cipher := kms.CipherOf(key)
	opens := func() (ok bool) {
		defer func() { _ = recover() }()
		_, err := cipher.Open(nil, nil, env[kms.HeaderSize:], env[:kms.HeaderSize])
		return err == nil
	}
	appCipher := k.AppCipher(app)
	if !opens() || !appCipher() {
		t.Fatal("the ciphers do not work to begin with")
	}
	k.Evict(app)
	if appCipher() {
		t.Error("the app key still works after Evict")
	}
	if !opens() {
		t.Error("a data key that a caller still holds was wiped under it")
	}
	runtime.KeepAlive(key)
	key = nil
	for range 100 {
		runtime.GC()
		if !opens() {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Error("an unreachable data key still works")
}

// No key that wraps another one, or seals, is in the rows in the clear.
func TestRowsHoldNoKeys(t *testing.T) {
	w := newWorld(t)
	k := w.process(t)
	w.create(t, k)
	seal(t, k, day(0), subject(0), "x")
	for _, name := range w.rows.Names() {
		row, err := w.rows.Load(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(row.Value, []byte("secret")) {
			t.Errorf("%s: %s", name, row.Value)
		}
	}
	if len(w.rows.Names()) != 2 {
		t.Errorf("rows %v", w.rows.Names())
	}
}

func BenchmarkSealer(b *testing.B) {
	w := newWorld(b)
	k := w.process(b)
	w.create(b, k)
	ctx, e := b.Context(), day(0)
	const subjects = 1024
	tags := make([]kms.Tag, subjects)
	for i := range tags {
		tags[i] = subject(i)
	}
	if err := k.Prepare(ctx, app, e, tags); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		if _, err := k.Sealer(ctx, app, e, tags[i%subjects]); err != nil {
			b.Fatal(err)
		}
		i++
	}
}

func BenchmarkOpener(b *testing.B) {
	w := newWorld(b)
	k := w.process(b)
	w.create(b, k)
	ctx, e := b.Context(), day(0)
	const subjects = 1024
	tags := make([]kms.Tag, subjects)
	for i := range tags {
		tags[i] = subject(i)
	}
	seal(b, k, e, tags[0], "x")
	if err := k.Prepare(ctx, app, e, tags); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		if _, err := k.Opener(ctx, app, 1, tags[i%subjects]); err != nil {
			b.Fatal(err)
		}
		i++
	}
}

func BenchmarkOpenerParallel(b *testing.B) {
	w := newWorld(b)
	k := w.process(b)
	w.create(b, k)
	ctx, e := b.Context(), day(0)
	seal(b, k, e, subject(0), "x")
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := k.Opener(ctx, app, 1, subject(0)); err != nil {
				b.Error(err)
			}
		}
	})
}
