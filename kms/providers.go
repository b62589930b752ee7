package kms

import (
	"context"
	"fmt"
	"slices"
	"sync"
)

// knownProvider is a provider and, once it was asked, what it is called in
// wraps.
type knownProvider struct {
	Provider

	mu    sync.Mutex // guards id and known
	id    Identity
	known bool
}

func (p *knownProvider) identity() (Identity, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.id, p.known
}

// ask finds out the identity, which does not change.
func (p *knownProvider) ask(ctx context.Context, k *Keyring) (Identity, error) {
	if id, known := p.identity(); known {
		return id, nil
	}
	var d Description
	err := k.call(ctx, func() (err error) {
		d, err = p.Describe(ctx)
		return err
	})
	if err != nil {
		return Identity{}, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.id, p.known = d.Identity(), true
	return p.id, nil
}

// provider returns the one that makes and opens wraps of an identity.
func (k *Keyring) provider(ctx context.Context, id Identity) (Provider, error) {
	k.mu.RLock()
	providers := slices.Clone(k.providers)
	k.mu.RUnlock()
	for _, p := range providers {
		if got, known := p.identity(); known && got == id {
			return p.Provider, nil
		}
	}
	var failed error
	for _, p := range providers {
		if got, known := p.identity(); known {
			if got == id { // another caller has asked it since
				return p.Provider, nil
			}
			continue
		}
		got, err := share(ctx, k, fmt.Sprintf("provider:%p", p), func(ctx context.Context) (Identity, error) { return p.ask(ctx, k) })
		switch {
		case err != nil:
			failed = err
		case got == id:
			return p.Provider, nil
		}
	}
	if failed != nil {
		return nil, failed
	}
	return nil, &Error{Op: "unwrap", Provider: id.Provider, Key: id.Key, Class: ErrNotFound, Detail: "no such provider is configured"}
}

// AddProvider lets the keyring use one more provider, and returns its identity.
func (k *Keyring) AddProvider(ctx context.Context, p Provider) (Identity, error) {
	known := &knownProvider{Provider: p}
	id, err := known.ask(ctx, k)
	if err != nil {
		return Identity{}, fmt.Errorf("add provider: %w", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, other := range k.providers {
		if got, ok := other.identity(); ok && got == id {
			return id, nil
		}
	}
	k.providers = append(k.providers, known)
	return id, nil
}

// AddProviderLater lets the keyring use one more provider without asking it what
// it is called, which it may be unable to answer now. That is asked when a wrap
// is met that no other provider has made.
func (k *Keyring) AddProviderLater(p Provider) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.providers = append(k.providers, &knownProvider{Provider: p})
}

// SetPrimary makes the provider of an identity the one that wraps the keys of
// apps created from now on, in this process. It is not kept: whoever moves a
// region tells every process, and again after a start.
func (k *Keyring) SetPrimary(ctx context.Context, id Identity) error {
	p, err := k.provider(ctx, id)
	if err != nil {
		return fmt.Errorf("set primary provider: %w", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.primary = p
	return nil
}
