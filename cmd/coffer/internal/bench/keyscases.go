package bench

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"runtime"
	"time"

	"github.com/cofferdb/coffer/kms"
)

// seal measures sealing with a key that is in memory beside the bare cipher.
func (k *keysRig) seal(ctx context.Context, o Options) (Case, error) {
	const seals = 200_000
	apps, err := k.create(ctx, "seal", 1)
	if err != nil {
		return Case{}, err
	}
	from := time.Now().UTC().Truncate(day)
	epoch := kms.Epoch{Class: "free/0", From: from, Until: from.Add(day), Expires: from.Add(4 * day)}
	var (
		subject   = kms.Tag{1}
		plaintext = make([]byte, o.Size)
		aad       = make([]byte, 120) // as long as the journal's
		dst       = make([]byte, 0, o.Size+kms.Overhead)
	)
	if _, err := k.keyring.Sealer(ctx, apps[0], epoch, subject); err != nil {
		return Case{}, err
	}
	var allocated []float64
	ours := &side{name: "seal", round: func(ctx context.Context) (sample, error) {
		before := mallocs()
		begin := time.Now()
		for range seals {
			key, err := k.keyring.Sealer(ctx, apps[0], epoch, subject)
			if err != nil {
				return sample{}, err
			}
			dst = key.Seal(dst[:0], aad, plaintext)
		}
		s := sample{count: seals, elapsed: time.Since(begin)}
		// What runs in the background allocates too, a little.
		allocated = append(allocated, float64((mallocs()-before)/seals))
		return s, nil
	}}
	block, err := aes.NewCipher(make([]byte, kms.KeySize))
	if err != nil {
		return Case{}, fmt.Errorf("make the bare cipher: %w", err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return Case{}, fmt.Errorf("make the bare cipher: %w", err)
	}
	bare := make([]byte, kms.HeaderSize+len(aad))
	raw := &side{name: "bare cipher", round: func(context.Context) (sample, error) {
		begin := time.Now()
		for range seals {
			dst = aead.Seal(dst[:0], nil, plaintext, bare)
		}
		return sample{count: seals, elapsed: time.Since(begin)}, nil
	}}
	if err := warmUp(ctx, o, ours, raw); err != nil {
		return Case{}, err
	}
	allocated = nil
	if err := alternate(ctx, o, 1, ours, raw); err != nil {
		return Case{}, err
	}
	c := compare("seal with a cached key", "seals/s", ours, raw)
	c.Beside = []Beside{
		{Name: "allocations beyond the output", Unit: "allocations per seal", Value: median(allocated), Rounds: allocated},
		{Name: "time of a seal", Unit: "ns", Value: rounded(1e9 / ours.median())},
		{Name: "time of the bare cipher", Unit: "ns", Value: rounded(1e9 / raw.median())},
	}
	return c, nil
}

func mallocs() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.Mallocs
}
