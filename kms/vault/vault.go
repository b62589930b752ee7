// Package vault wraps keys with a key of HashiCorp Vault's (or OpenBao's)
// transit secrets engine. The key encryption key never leaves Vault.
//
// # The key
//
// It must be of type aes256-gcm96 and derived: Vault then derives the key that
// wraps from the key and a context, for which this package gives the encoding
// of the binding context. With a key that is not derived Vault ignores the
// context, so such a key is refused. Associated data is not used, because
// Vault's datakey and rewrap do not take it.
//
// # Promises
//
// Requests end with the caller's context. Vault's own client retries nothing;
// this package repeats what was throttled or unavailable, a few times and within
// the deadline. When Vault answers 403 it logs in again, once for all requests
// that were refused together, and only a second 403 is an error. Tokens are
// renewed while they can be and replaced by a new login before they end.
//
// Errors carry a class of the closed set of package kms. Their text holds
// nothing that Vault wrote. Neither a token nor a key appears in any error or
// log line; keys in requests and answers are kept in byte slices and zeroed,
// though not in the buffers of net/http and crypto/tls.
//
// # Limits
//
// One answer may have 4 MiB. Redirects are not followed: they would carry the
// token to another address. Plain HTTP is only for loopback addresses.
//
// # Sources
//
// https://developer.hashicorp.com/vault/api-docs/secret/transit, and the code of
// Vault 1.14.2 (MPL-2.0), against which the tests run.
package vault

import (
	"context"
	"log/slog"
	"math"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/internal/bounded"
	"github.com/cofferdb/coffer/kms/internal/retry"
)

// Name is the name of this provider in kms.Wrap.
const Name = "vault"

// Options are what a Provider needs to know. Address, Mount, Key and Auth are
// required. Secrets are not among them, only the files they are in.
type Options struct {
	// Address is https://HOST[:PORT]; http is allowed for loopback addresses.
	Address   string
	Namespace string // of Vault Enterprise or OpenBao; empty for the root
	Mount     string // path of the transit engine, such as "transit"
	Key       string // name of the key in it
	Auth      Auth
	TLS       TLS
	// Host is the host in the identity of the key, HOST/[NAMESPACE/]MOUNT/KEY, if
	// not that of Address. Set it when Vault's address changes: wrapped keys name
	// the identity, and a provider unwraps only its own.
	Host string
	// Trim makes Retire delete the retired versions from Vault, for ever, after
	// it has raised the minimum version.
	Trim bool
	// Timeout and Attempts bound the requests of one call; zero is five seconds
	// for one request, and four requests.
	Timeout  time.Duration
	Attempts int
	Log      *slog.Logger // nil logs nothing
	// Observe is called after every request, also of logins and renewals.
	Observe func(context.Context, kms.Call)
}

// Provider implements kms.Provider, kms.Rotator and kms.Retirer.
type Provider struct {
	identity string
	mount    string
	key      string
	trim     bool
	retry    retry.Policy
	observe  func(context.Context, kms.Call)
	http     *bounded.Transport
	session  *session
	suitable atomic.Bool // the key was seen to be derived and of the right type
}

var (
	_ kms.Provider = (*Provider)(nil)
	_ kms.Rotator  = (*Provider)(nil)
	_ kms.Retirer  = (*Provider)(nil)
)

// New returns a provider. It reads the certificates that o names and sends
// nothing: Describe tells whether Vault and the key are there.
func New(o Options) (*Provider, error) {
	address, err := o.check()
	if err != nil {
		return nil, invalid(err)
	}
	transport, err := newTransport(o.TLS)
	if err != nil {
		return nil, invalid(err)
	}
	life, end := context.WithCancel(context.Background())
	p := &Provider{
		identity: identity(o, address),
		mount:    strings.Trim(o.Mount, "/"),
		key:      o.Key,
		trim:     o.Trim,
		retry:    retry.Policy{Attempts: o.Attempts, Timeout: o.Timeout},
		observe:  o.Observe,
		http:     transport,
	}
	if p.observe == nil {
		p.observe = func(context.Context, kms.Call) {}
	}
	log := o.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	p.session = &session{
		provider: p,
		auth:     o.Auth,
		log:      log.With("kms_provider", Name, "kms_key", p.identity),
		connect:  connector(address.String(), o.Namespace, transport),
		life:     life,
		end:      end,
		quiet:    quietAfterLogin,
	}
	// A wrong address or environment shows here, not at the first message.
	if _, err := p.session.connect(""); err != nil {
		end()
		return nil, invalid(err)
	}
	return p, nil
}

func identity(o Options, address *url.URL) string {
	host := o.Host
	if host == "" {
		host = address.Host
	}
	parts := []string{host}
	if ns := strings.Trim(o.Namespace, "/"); ns != "" {
		parts = append(parts, ns)
	}
	return strings.Join(append(parts, strings.Trim(o.Mount, "/"), o.Key), "/")
}

// Close stops renewing the token and ends requests under way. It does not
// revoke the token, which other processes may share.
func (p *Provider) Close() error {
	p.http.Close()
	p.session.close()
	return nil
}

// Describe reads the key.
func (p *Provider) Describe(ctx context.Context) (kms.Description, error) {
	k, err := p.read(ctx, "describe")
	if err != nil {
		return kms.Description{}, err
	}
	return kms.Description{
		Provider:     Name,
		Key:          p.identity,
		Version:      strconv.Itoa(k.Latest),
		MinVersion:   strconv.Itoa(max(k.MinDecryption, k.MinAvailable, 1)),
		State:        kms.StateEnabled,
		NativeRewrap: true,
	}, nil
}

// read asks for the key and refuses one that would not bind the context.
func (p *Provider) read(ctx context.Context, op string) (keyData, error) {
	var k keyData
	err := p.call(ctx, request{op: op, path: "keys/" + p.key, into: &k})
	if err != nil {
		return keyData{}, err
	}
	switch {
	case k.Type == "":
		return keyData{}, p.fail(op, kms.ErrUnavailable, "the answer describes no key")
	case k.Type != "aes256-gcm96":
		return keyData{}, p.fail(op, kms.ErrNotFound, "the key is not of type aes256-gcm96")
	case !k.Derived:
		return keyData{}, p.fail(op, kms.ErrNotFound, "the key is not derived, so Vault would ignore the binding context")
	case k.Convergent:
		return keyData{}, p.fail(op, kms.ErrNotFound, "the key uses convergent encryption")
	case k.Latest < 1:
		return keyData{}, p.fail(op, kms.ErrUnavailable, "the answer names no version")
	}
	p.suitable.Store(true)
	return k, nil
}

// check asks for the key once in the life of the provider, before the first
// operation with it.
func (p *Provider) check(ctx context.Context) error {
	if p.suitable.Load() {
		return nil
	}
	_, err := p.read(ctx, "describe")
	return err
}

// Rotate makes a new version of the key. When its answer is lost the version
// may or may not have been made: Describe tells.
func (p *Provider) Rotate(ctx context.Context) (string, error) {
	before, err := p.read(ctx, "rotate")
	if err != nil {
		return "", err
	}
	// Once: a repeated rotation would make two versions.
	if err := p.call(ctx, request{op: "rotate", path: "keys/" + p.key + "/rotate", body: struct{}{}, once: true}); err != nil {
		return "", err
	}
	after, err := p.confirm(ctx, "rotate", func(k keyData) bool { return k.Latest > before.Latest })
	if err != nil {
		return "", err
	}
	return strconv.Itoa(after.Latest), nil
}

// Retire raises the minimum version that decrypts (and encrypts) to
// beforeVersion and, with Options.Trim, deletes the versions before. It never
// lowers a minimum, and returns nil only after reading it back from Vault.
func (p *Provider) Retire(ctx context.Context, beforeVersion string) error {
	const op = "retire"
	before, err := strconv.Atoi(beforeVersion)
	if err != nil || before < 1 || before > math.MaxInt32 {
		return inputError(op, "a version is a positive number")
	}
	k, err := p.read(ctx, op)
	if err != nil {
		return err
	}
	if before > k.Latest {
		return p.fail(op, kms.ErrNotFound, "there is no such version yet")
	}
	if k.MinDecryption < before || k.MinEncryption < before {
		body := map[string]int{
			"min_decryption_version": max(before, k.MinDecryption),
			"min_encryption_version": max(before, k.MinEncryption),
		}
		if err := p.call(ctx, request{op: op, path: "keys/" + p.key + "/config", body: body}); err != nil {
			return err
		}
	}
	if p.trim && k.MinAvailable < before {
		body := map[string]int{"min_available_version": before}
		if err := p.call(ctx, request{op: op, path: "keys/" + p.key + "/trim", body: body}); err != nil {
			return err
		}
	}
	_, err = p.confirm(ctx, op, func(k keyData) bool {
		return k.MinDecryption >= before && (!p.trim || k.MinAvailable >= before)
	})
	return err
}

// confirm reads the key until done: a standby node may answer with the state of
// a moment ago.
func (p *Provider) confirm(ctx context.Context, op string, done func(keyData) bool) (keyData, error) {
	var k keyData
	err := p.retry.Do(ctx, func(ctx context.Context) error {
		var err error
		if k, err = p.read(ctx, op); err != nil {
			return err
		}
		if !done(k) {
			return p.fail(op, kms.ErrUnavailable, "Vault does not confirm the change yet")
		}
		return nil
	})
	return k, err
}

func (p *Provider) fail(op string, class error, detail string) *kms.Error {
	return &kms.Error{Op: op, Provider: Name, Key: p.identity, Class: class, Detail: detail}
}

// loginTimeout bounds a login, which several callers may be waiting for.
func (p *Provider) loginTimeout() time.Duration {
	if p.retry.Timeout > 0 {
		return p.retry.Timeout
	}
	return retry.DefaultTimeout
}
