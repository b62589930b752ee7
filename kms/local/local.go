// Package local is a key provider for development and tests: its key encryption
// key lies in a file, so whoever reads the file reads everything. It is no
// substitute for a key management service.
//
// The file is JSON, holds every version of the key that has not been retired,
// and is replaced as a whole: written to a file beside it, synced, renamed, the
// folder synced. It is created with mode 0600 and refused when its group or
// others may read it. Several processes may use one file; each notices what
// another has changed at its next call, and changes are made one at a time
// under a lock file.
//
// Limits: bytes of a retired version may stay in unused blocks of the file
// system after the file was replaced.
package local

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/cofferdb/coffer/kms"
)

// Name is the provider's name in wraps.
const Name = "local"

// ErrPermissions: the group or others may read the key file. Restrict it with
// chmod 600, and consider its keys known to them.
var ErrPermissions = errors.New("local: key file is readable by others")

// ErrKeyFile: the key file does not decode. Restore it from a backup; without
// it nothing that it wrapped can be read.
var ErrKeyFile = errors.New("local: malformed key file")

// Options configures a [Provider].
type Options struct {
	// Path of the key file. Required.
	Path string
	// Create makes the file, with a new key, when there is none. Without it a
	// missing file is kms.ErrNotFound.
	Create bool
	// Region is written into a file that is created. A file of another region is
	// refused with kms.ErrMismatch. Empty: not checked.
	Region string
	// Observe is told of every call, when it has ended. Default: nobody.
	Observe func(context.Context, kms.Call)
}

// Provider wraps keys with the key in a file. It is safe for concurrent use.
type Provider struct {
	path    string
	observe func(context.Context, kms.Call)

	key string // name of the key, fixed by Open

	mu    sync.RWMutex // guards file and stamp
	file  *keyFile
	stamp stamp
}

// Provider offers everything there is.
var (
	_ kms.Provider = (*Provider)(nil)
	_ kms.Rotator  = (*Provider)(nil)
	_ kms.Retirer  = (*Provider)(nil)
)

// Open reads the key file, or creates it. Its errors are *kms.Error; one of them
// also is ErrPermissions or ErrKeyFile.
func Open(ctx context.Context, opts Options) (*Provider, error) {
	if opts.Path == "" {
		return nil, fmt.Errorf("open key file: %w: no path", kms.ErrInput)
	}
	p := &Provider{path: opts.Path, observe: opts.Observe}
	if err := ctx.Err(); err != nil {
		return nil, p.fail("open", kms.ErrUnavailable, "", err)
	}
	if opts.Create {
		if err := create(opts.Path, opts.Region); err != nil && !errors.Is(err, os.ErrExist) {
			class := kms.ErrUnavailable
			if errors.Is(err, os.ErrPermission) {
				class = kms.ErrAccessDenied
			}
			return nil, p.fail("open", class, "the key file cannot be created", nil)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.reload("open"); err != nil {
		return nil, err
	}
	p.key = p.file.Key
	if opts.Region != "" && p.file.Region != "" && opts.Region != p.file.Region {
		return nil, p.fail("open", kms.ErrMismatch, "the key file belongs to another region", nil)
	}
	return p, nil
}

// Describe returns the state of the key as the file has it.
func (p *Provider) Describe(ctx context.Context) (d kms.Description, err error) {
	defer p.seen(ctx, "describe", 1, time.Now(), &err)
	f, err := p.current(ctx, "describe", false)
	if err != nil {
		return kms.Description{}, err
	}
	return kms.Description{
		Provider: Name, Key: f.Key, Version: strconv.FormatUint(uint64(f.latest()), 10),
		MinVersion: strconv.FormatUint(uint64(f.MinVersion), 10), State: f.State, Region: f.Region,
	}, nil
}

// Generate makes a random key and wraps it.
func (p *Provider) Generate(ctx context.Context, binding kms.Context) (key []byte, w kms.Wrap, err error) {
	defer p.seen(ctx, "generate", 1, time.Now(), &err)
	f, err := p.current(ctx, "generate", true)
	if err != nil {
		return nil, kms.Wrap{}, err
	}
	key = make([]byte, kms.KeySize)
	if _, err := rand.Read(key); err != nil {
		return nil, kms.Wrap{}, p.fail("generate", kms.ErrUnavailable, "no randomness", nil)
	}
	w, err = p.wrap("generate", f, binding, key)
	if err != nil {
		clear(key)
		return nil, kms.Wrap{}, err
	}
	return key, w, nil
}

// Wrap wraps a key under the latest version.
func (p *Provider) Wrap(ctx context.Context, binding kms.Context, key []byte) (w kms.Wrap, err error) {
	defer p.seen(ctx, "wrap", 1, time.Now(), &err)
	f, err := p.current(ctx, "wrap", true)
	if err != nil {
		return kms.Wrap{}, err
	}
	return p.wrap("wrap", f, binding, key)
}

// Unwrap returns the key in w.
func (p *Provider) Unwrap(ctx context.Context, binding kms.Context, w kms.Wrap) (key []byte, err error) {
	defer p.seen(ctx, "unwrap", 1, time.Now(), &err)
	f, err := p.current(ctx, "unwrap", true)
	if err != nil {
		return nil, err
	}
	return p.unwrap("unwrap", f, binding, w)
}

// Rewrap unwraps and wraps each key, in this process.
func (p *Provider) Rewrap(ctx context.Context, items []kms.RewrapItem) (results []kms.RewrapResult, err error) {
	defer p.seen(ctx, "rewrap", len(items), time.Now(), &err)
	f, err := p.current(ctx, "rewrap", true)
	if err != nil {
		return nil, err
	}
	results = make([]kms.RewrapResult, len(items))
	for i, item := range items {
		if err := ctx.Err(); err != nil {
			return nil, p.fail("rewrap", kms.ErrUnavailable, "", err)
		}
		key, err := p.unwrap("rewrap", f, item.Context, item.Wrap)
		if err != nil {
			results[i].Err = err
			continue
		}
		results[i].Wrap, results[i].Err = p.wrap("rewrap", f, item.Context, key)
		clear(key)
	}
	return results, nil
}

// Rotate adds a version to the file.
func (p *Provider) Rotate(ctx context.Context) (version string, err error) {
	defer p.seen(ctx, "rotate", 1, time.Now(), &err)
	err = p.change(ctx, "rotate", func(f *keyFile) error {
		if err := p.usable("rotate", f); err != nil {
			return err
		}
		return f.add()
	})
	if err != nil {
		return "", err
	}
	p.mu.RLock()
	defer p.mu.RUnlock()
	return strconv.FormatUint(uint64(p.file.latest()), 10), nil
}

// Retire removes the versions before the given one from the file.
func (p *Provider) Retire(ctx context.Context, beforeVersion string) (err error) {
	defer p.seen(ctx, "retire", 1, time.Now(), &err)
	before, err := strconv.ParseUint(beforeVersion, 10, 32)
	if err != nil {
		return fmt.Errorf("retire: %w: version %q is no number", kms.ErrInput, beforeVersion)
	}
	return p.change(ctx, "retire", func(f *keyFile) error {
		if uint32(before) > f.latest() {
			return p.fail("retire", kms.ErrNotFound, "no such version", nil)
		}
		f.retire(uint32(before))
		return nil
	})
}

// SetState enables the key, disables it, or marks it as to be deleted. It is
// there for tests and drills.
func (p *Provider) SetState(ctx context.Context, s kms.State) (err error) {
	defer p.seen(ctx, "set_state", 1, time.Now(), &err)
	if s != kms.StateEnabled && s != kms.StateDisabled && s != kms.StatePendingDeletion {
		return fmt.Errorf("set state: %w: state %q", kms.ErrInput, s)
	}
	return p.change(ctx, "set_state", func(f *keyFile) error { f.State = s; return nil })
}

// Close zeroes the versions in memory. No call may follow.
func (p *Provider) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.file != nil {
		p.file.clear()
	}
	p.file, p.stamp = nil, stamp{}
	return nil
}

const (
	blobVersion = 1
	blobHeader  = 5 // format version, key version
	blobSize    = blobHeader + 12 + kms.KeySize + 16
)

func (p *Provider) wrap(op string, f *keyFile, binding kms.Context, key []byte) (kms.Wrap, error) {
	if err := binding.Validate(); err != nil {
		return kms.Wrap{}, fmt.Errorf("%s: %w", op, err)
	}
	if len(key) != kms.KeySize {
		return kms.Wrap{}, fmt.Errorf("%s: %w: a key of %d bytes", op, kms.ErrInput, len(key))
	}
	version := f.latest()
	aead, err := f.aead(version)
	if err != nil {
		return kms.Wrap{}, p.fail(op, kms.ErrNotFound, "the file has no version", nil)
	}
	blob := make([]byte, blobHeader, blobSize)
	blob[0] = blobVersion
	binary.BigEndian.PutUint32(blob[1:], version)
	blob = aead.Seal(blob, nil, key, additional(f.Key, blob[:blobHeader], binding))
	return kms.Wrap{
		Provider: Name, Key: f.Key, Version: strconv.FormatUint(uint64(version), 10), Blob: blob,
		WrappedAt: time.Now().UTC().Truncate(time.Second),
	}, nil
}

func (p *Provider) unwrap(op string, f *keyFile, binding kms.Context, w kms.Wrap) ([]byte, error) {
	if err := binding.Validate(); err != nil {
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	switch {
	case w.Provider != Name || w.Key != f.Key:
		return nil, p.fail(op, kms.ErrMismatch, "the wrap is of another key", nil)
	case len(w.Blob) != blobSize || w.Blob[0] != blobVersion:
		return nil, p.fail(op, kms.ErrMismatch, "malformed wrap", nil)
	}
	version := binary.BigEndian.Uint32(w.Blob[1:])
	switch {
	case w.Version != strconv.FormatUint(uint64(version), 10):
		return nil, p.fail(op, kms.ErrMismatch, "the wrap's version is not that of its bytes", nil)
	case version < f.MinVersion:
		return nil, p.fail(op, kms.ErrVersionRetired, "", nil)
	}
	aead, err := f.aead(version)
	if err != nil {
		return nil, p.fail(op, kms.ErrMismatch, "no such version", nil)
	}
	key, err := aead.Open(nil, nil, w.Blob[blobHeader:], additional(f.Key, w.Blob[:blobHeader], binding))
	if err != nil {
		return nil, p.fail(op, kms.ErrMismatch, "", nil)
	}
	return key, nil
}

func additional(key string, header []byte, binding kms.Context) []byte {
	b := make([]byte, 0, 256)
	b = append(b, header...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(key))) //nolint:gosec // 32 hex digits
	b = append(b, key...)
	return append(b, binding.Encode()...)
}

// current returns the file as it is now. Its contents are never changed, only
// replaced, so they may be used without the lock.
func (p *Provider) current(ctx context.Context, op string, use bool) (*keyFile, error) {
	if err := ctx.Err(); err != nil {
		return nil, p.fail(op, kms.ErrUnavailable, "", err)
	}
	st, err := stampOf(p.path)
	p.mu.RLock()
	f, same := p.file, err == nil && st == p.stamp
	p.mu.RUnlock()
	if !same {
		p.mu.Lock()
		if err := p.reload(op); err != nil {
			p.mu.Unlock()
			return nil, err
		}
		f = p.file
		p.mu.Unlock()
	}
	if f == nil {
		return nil, p.fail(op, kms.ErrUnavailable, "closed", nil)
	}
	if use {
		if err := p.usable(op, f); err != nil {
			return nil, err
		}
	}
	return f, nil
}

func (p *Provider) usable(op string, f *keyFile) error {
	switch f.State {
	case kms.StateEnabled:
		return nil
	case kms.StatePendingDeletion:
		return p.fail(op, kms.ErrPendingDeletion, "", nil)
	case kms.StateDisabled:
	}
	return p.fail(op, kms.ErrDisabled, "", nil)
}

// reload reads the file. The caller holds mu.
func (p *Provider) reload(op string) error {
	f, st, err := read(p.path)
	switch {
	case err == nil && p.key != "" && f.Key != p.key:
		return p.fail(op, kms.ErrNotFound, "the file now holds another key", nil)
	case err == nil:
		p.file, p.stamp = f, st
		return nil
	case errors.Is(err, os.ErrNotExist):
		return p.fail(op, kms.ErrNotFound, "no key file", nil)
	case errors.Is(err, os.ErrPermission):
		return p.fail(op, kms.ErrAccessDenied, "the key file may not be read", nil)
	case errors.Is(err, ErrPermissions):
		return errors.Join(p.fail(op, kms.ErrAccessDenied, "the key file is readable by others", nil), ErrPermissions)
	case errors.Is(err, ErrKeyFile):
		return errors.Join(p.fail(op, kms.ErrMismatch, "the key file is malformed", nil), err)
	default:
		return p.fail(op, kms.ErrUnavailable, "the key file cannot be read", nil)
	}
}

// change applies edit to the file as it is now, one process at a time.
func (p *Provider) change(ctx context.Context, op string, edit func(*keyFile) error) error {
	if err := ctx.Err(); err != nil {
		return p.fail(op, kms.ErrUnavailable, "", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	unlock, err := lock(p.path + ".lock")
	if err != nil {
		return p.fail(op, kms.ErrUnavailable, "the key file cannot be locked", nil)
	}
	defer unlock()
	if err := p.reload(op); err != nil {
		return err
	}
	f := p.file.clone()
	if err := edit(f); err != nil {
		return err
	}
	if err := replace(p.path, f); err != nil {
		return p.fail(op, kms.ErrUnavailable, "the key file cannot be written", nil)
	}
	return p.reload(op)
}

func (p *Provider) fail(op string, class error, detail string, cause error) error {
	return &kms.Error{Op: op, Provider: Name, Key: p.key, Class: class, Detail: detail, Cause: cause}
}

func (p *Provider) seen(ctx context.Context, op string, items int, start time.Time, err *error) {
	if p.observe == nil {
		return
	}
	p.observe(ctx, kms.Call{Provider: Name, Key: p.key, Operation: op, Items: items, Duration: time.Since(start), Err: *err})
}

// newCipher makes the cipher of one version.
func newCipher(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("make cipher: %w", err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, fmt.Errorf("make cipher: %w", err)
	}
	return aead, nil
}
