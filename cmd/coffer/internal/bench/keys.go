package bench

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/awskms"
	"github.com/cofferdb/coffer/kms/local"
	"github.com/cofferdb/coffer/kms/vault"
)

const keysCompared = "ours, raw and ratio of the whole are those of the rewrap. " +
	"rewrap: %d app keys, each a row of its own in a JetStream KV bucket on disk, under the latest version of the key encryption key: kms.Keyring.RewrapApps of %d rows at a time, " +
	"each new wrap unwrapped and compared, its row replaced by compare-and-set, synced, and read back. The erasure of the old bytes is not in that figure; it is beside it, and so is the rate with it. " +
	"Both sides take turns, %d rows at a time, so that what else the machine does falls on both; paired_ratio is the median of the rounds' ratios. " +
	"raw: the same calls of the same provider (%s) with nothing around them: a rewrap of %d keys, then an unwrap of each, %d at a time, for %d such batches at once. " +
	"calls: a keyring seals %d events of one app during a day of its cache's life; raw is the most that is allowed and ratio how far below it ours is. " +
	"The day is a real clock's, shortened to %v, with the revalidation every 15 min shortened alike: a late timer makes calls fewer, never more. " +
	"unwraps: %d readers ask a keyring that holds nothing for keys of %d apps at once; raw is the most that is allowed per app key. " +
	"seal: kms.Keyring.Sealer of a cached key and DataKey.Seal of %d bytes; raw is the same cipher alone, its key at hand, with additional data of the same length."

const (
	callsAtMost = 100
	readers     = 1000
	readerApps  = 20
	day         = 24 * time.Hour
)

// Keys measures what the keyring asks of a key provider, and what it adds to
// the provider's time.
func Keys(ctx context.Context, o Options) (r Report, err error) {
	o = o.withDefaults()
	dir, remove, err := tempDir(o)
	if err != nil {
		return r, err
	}
	defer remove()
	k, err := openKeysRig(ctx, dir, o)
	if err != nil {
		return r, fmt.Errorf("measure keys: %w", err)
	}
	defer func() { err = joinClose(err, k.close) }()
	var cases []Case
	for _, measure := range []func(context.Context, Options) (Case, error){k.rewrap, k.callsOfADay, k.coldReaders, k.seal} {
		c, err := measure(ctx, o)
		if err != nil {
			return r, fmt.Errorf("measure keys: %w", err)
		}
		cases = append(cases, c)
	}
	compared := fmt.Sprintf(keysCompared, o.Rows, rewrapChunk, rewrapTurn(o.Rows), k.name, rawBatch, rewrapCalls, rawBatches, o.Messages, o.Day, readers, readerApps, o.Size)
	r = report("keys", "rows/s", compared, o.Rounds, cases)
	r.Ours, r.Raw, r.Ratio = cases[0].Ours, cases[0].Raw, cases[0].Ratio
	return r, nil
}

// keysRig is a region and the provider that is measured, which may be a real
// service.
type keysRig struct {
	*rig

	rows     kms.Rows
	keyring  *kms.Keyring // of the region, which rewraps
	provider kms.Provider
	id       kms.Identity
	name     string
	counter  *counter
	run      string // distinguishes the apps of this run
}

// counter counts calls at the provider by their operation.
type counter struct {
	mu sync.Mutex
	n  map[string]int // guarded by mu
}

func (c *counter) observe(_ context.Context, call kms.Call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n[call.Operation]++
}

// take returns the counts since the last take.
func (c *counter) take() map[string]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.n
	c.n = map[string]int{}
	return n
}

func openKeysRig(ctx context.Context, dir string, o Options) (*keysRig, error) {
	r, err := openRig(ctx, filepath.Join(dir, "region"), false, o.Log)
	if err != nil {
		return nil, err
	}
	k := &keysRig{rig: r, keyring: r.journal.Keyring(), counter: &counter{n: map[string]int{}}, run: time.Now().UTC().Format("150405")}
	if err := k.open(ctx, filepath.Join(dir, "measured.json"), o); err != nil {
		return nil, errors.Join(err, k.close())
	}
	return k, nil
}

func (k *keysRig) open(ctx context.Context, file string, o Options) (err error) {
	if k.provider, k.name, err = openProvider(ctx, o.KMS, file, k.counter.observe); err != nil {
		return err
	}
	if k.id, err = k.keyring.AddProvider(ctx, k.provider); err != nil {
		return err
	}
	js, err := jetstream.New(k.conn)
	if err != nil {
		return err
	}
	var syncer journal.Syncer
	if s := k.server.Syncer(); s != nil { // a nil *Syncer in the interface would not be nil
		syncer = s
	}
	k.rows = journal.NewRows(js, journal.KeyringBucket(k.journal.Region().ID), syncer)
	return nil
}

func (k *keysRig) close() error {
	err := k.rig.close()
	if k.provider != nil {
		err = errors.Join(err, k.provider.Close())
	}
	return err
}

// openProvider opens the provider that a setting names, as a region's
// configuration does; without one a file in the folder of the run.
func openProvider(ctx context.Context, setting, file string, observe func(context.Context, kms.Call)) (kms.Provider, string, error) {
	switch {
	case setting == "":
		p, err := local.Open(ctx, local.Options{Path: file, Create: true, Observe: observe})
		return p, "the local one, which is a file and no service: AES-GCM in this process", err
	case strings.HasPrefix(setting, "vault+"):
		v, err := vault.ParseURL(setting)
		if err != nil {
			return nil, "", err
		}
		v.Observe = observe
		p, err := vault.New(v)
		return p, "Vault transit over HTTP", err
	case strings.HasPrefix(setting, "awskms:"):
		a, err := awskms.ParseURL(setting)
		if err != nil {
			return nil, "", err
		}
		a.Observe = observe
		p, err := awskms.New(ctx, a)
		return p, "AWS KMS over HTTP", err
	}
	return nil, "", fmt.Errorf("%w: a key provider is vault+https://… or awskms:///…", ErrUnknown)
}

// ring opens a keyring of its own on the region's rows: one that holds nothing.
func (k *keysRig) ring(soft time.Duration, now func() time.Time) (*kms.Keyring, error) {
	return kms.NewKeyring(kms.Config{
		Region: k.journal.Region().ID, Provider: k.provider, Rows: k.rows, Soft: soft, Hard: kms.DefaultHard, Now: now,
		Log: slog.New(slog.DiscardHandler),
	})
}

// create makes apps under the provider that is measured.
func (k *keysRig) create(ctx context.Context, kind string, n int) ([]string, error) {
	apps := make([]string, n)
	for i := range apps {
		apps[i] = fmt.Sprintf("%s-%s-%06d", kind, k.run, i)
	}
	err := inParallel(ctx, n, rewrapCalls, func(ctx context.Context, i int) error {
		return k.keyring.CreateAppUnder(ctx, apps[i], k.id)
	})
	return apps, err
}

// inParallel calls f for 0 to n-1 from some goroutines, and stops at an error.
func inParallel(ctx context.Context, n, at int, f func(context.Context, int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(n, at) {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n && ctx.Err() == nil; i = int(next.Add(1)) - 1 {
				if err := f(ctx, i); err != nil {
					cancel(err)
					return
				}
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

// limit is a case whose raw side is the most that is allowed.
func limit(name, unit string, atMost float64, counts []float64) Case {
	ours := median(counts)
	raws := make([]float64, len(counts))
	for i := range raws {
		raws[i] = atMost
	}
	return Case{
		Name: name, Unit: unit, Ours: rounded(ours), Raw: atMost, Ratio: ratio(atMost, ours),
		OursRounds: roundedAll(counts), RawRounds: raws,
	}
}

// callsOfADay counts the calls at the provider while one app is sealed for
// during a day, on a clock that runs faster.
func (k *keysRig) callsOfADay(ctx context.Context, o Options) (Case, error) {
	apps, err := k.create(ctx, "day", 1)
	if err != nil {
		return Case{}, err
	}
	faster := float64(day) / float64(o.Day)
	var perMillion, all []float64
	for range o.Rounds {
		k.counter.take()
		n, err := k.day(ctx, apps[0], o, faster)
		if err != nil {
			return Case{}, err
		}
		perMillion = append(perMillion, float64(n)*1e6/float64(o.Messages))
		all = append(all, float64(n))
		o.Log.InfoContext(ctx, "measured", "side", "calls of a day", "calls", n, "messages", o.Messages)
	}
	c := limit("calls of a day", "calls per million messages", callsAtMost, perMillion)
	c.Beside = []Beside{{Name: "calls of the day, however many messages", Unit: "calls", Value: rounded(median(all)), Ratio: ratio(median(perMillion), median(all)), Rounds: all}}
	return c, nil
}

// day seals the messages of a day, evenly over it, and returns the calls it took.
func (k *keysRig) day(ctx context.Context, app string, o Options, faster float64) (calls int, err error) {
	begin := time.Now()
	morning := begin.UTC().Truncate(day)
	now := func() time.Time { return morning.Add(time.Duration(float64(time.Since(begin)) * faster)) }
	ring, err := k.ring(time.Duration(float64(kms.DefaultSoft)/faster), now)
	if err != nil {
		return 0, err
	}
	defer func() { err = joinClose(err, ring.Close) }()
	plaintext := make([]byte, o.Size)
	dst := make([]byte, 0, o.Size+kms.Overhead)
	const ticks = 1000
	for t := range ticks {
		for i := t * o.Messages / ticks; i < (t+1)*o.Messages/ticks; i++ {
			from := now().Truncate(day / 4) // the epochs of the shortest plan
			key, err := ring.Sealer(ctx, app, kms.Epoch{Class: "free/0", From: from, Until: from.Add(day / 4), Expires: from.Add(4 * day)}, kms.Tag{1, byte(i % 16)})
			if err != nil {
				return 0, err
			}
			dst = key.Seal(dst[:0], nil, plaintext)
		}
		next := begin.Add(o.Day * (time.Duration(t) + 1) / ticks)
		if err := sleep(ctx, time.Until(next)); err != nil {
			return 0, err
		}
	}
	for _, n := range k.counter.take() {
		calls += n
	}
	return calls, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// coldReaders counts unwraps when many ask for keys that are not in memory.
func (k *keysRig) coldReaders(ctx context.Context, o Options) (Case, error) {
	apps, err := k.create(ctx, "cold", readerApps)
	if err != nil {
		return Case{}, err
	}
	subject := kms.Tag{1}
	from := time.Now().UTC().Truncate(day)
	epoch := kms.Epoch{Class: "free/0", From: from, Until: from.Add(day), Expires: from.Add(4 * day)}
	for _, app := range apps {
		if _, err := k.keyring.Sealer(ctx, app, epoch, subject); err != nil {
			return Case{}, err
		}
	}
	var counts []float64
	for range o.Rounds {
		ring, err := k.ring(kms.DefaultSoft, time.Now)
		if err != nil {
			return Case{}, err
		}
		k.counter.take()
		err = inParallel(ctx, readers, readers, func(ctx context.Context, i int) error {
			_, err := ring.Opener(ctx, apps[i%len(apps)], 1, subject)
			return err
		})
		n := k.counter.take()["unwrap"]
		if err := joinClose(err, ring.Close); err != nil {
			return Case{}, err
		}
		counts = append(counts, float64(n)/readerApps)
	}
	return limit("1,000 cold readers", "unwraps per app key", 1, counts), nil
}
