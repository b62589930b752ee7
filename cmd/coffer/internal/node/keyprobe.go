package node

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/kms"
)

const (
	// probesOfALife is how often a permission is tried in the time after which
	// keys in memory are asked for again: once a minute by default.
	probesOfALife = 15
	// probeAgain is when one that failed is tried again, at the latest.
	probeAgain = 5 * time.Second
)

// keyProbe tells whether the provider still unwraps for this region: a
// description says nothing of that permission. It unwraps one key, of its own,
// which it had wrapped at its first call; nothing of it is stored. Calls are one
// at a time.
type keyProbe struct {
	wrap *kms.Wrap
	next time.Time // until then the last answer counts
	err  error
}

func probeEvery(k config.Keys) time.Duration {
	return orDefault(time.Duration(k.Revalidate), kms.DefaultSoft) / probesOfALife
}

func (p *keyProbe) check(ctx context.Context, provider kms.Provider, region string, every time.Duration) error {
	now := time.Now()
	if now.Before(p.next) {
		return p.err
	}
	p.err = p.unwrap(context.WithValue(ctx, probing{}, true), provider, region)
	wait := every
	if p.err != nil {
		wait = min(wait, probeAgain)
	}
	// Give or take a fifth: processes that were started together do not ask
	// together.
	p.next = now.Add(wait*4/5 + rand.N(wait*2/5+1)) //nolint:gosec // no secret
	return p.err
}

// unwrap makes what it needs, where it can: a provider that will not wrap is told
// by those who make keys.
func (p *keyProbe) unwrap(ctx context.Context, provider kms.Provider, region string) error {
	binding := kms.Context{Region: region, App: "readiness", Purpose: "probe"}
	if p.wrap == nil {
		key, wrap, err := provider.Generate(ctx, binding)
		clear(key)
		if err != nil {
			return nil //nolint:nilerr // see above
		}
		p.wrap = &wrap
	}
	key, err := provider.Unwrap(ctx, binding, *p.wrap)
	clear(key)
	if errors.Is(err, kms.ErrVersionRetired) || errors.Is(err, kms.ErrMismatch) {
		p.wrap = nil // its version has ended: the next one is of the latest
		return nil
	}
	return err
}

// probing marks the context of a probe's calls.
type probing struct{}
