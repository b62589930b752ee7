package local

import (
	"crypto/cipher"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/kms"
)

// keyFile is what the file holds. It is not changed once a Provider has it.
type keyFile struct {
	Format     int          `json:"format"` // 1
	Key        string       `json:"key"`    // 32 hex digits, names the key
	Region     string       `json:"region,omitzero"`
	State      kms.State    `json:"state"`
	MinVersion uint32       `json:"min_version"`
	Versions   []keyVersion `json:"versions"` // by number, ascending, at least one

	aeads []cipher.AEAD // of Versions
}

type keyVersion struct {
	Version uint32    `json:"version"`
	Created time.Time `json:"created"`
	Secret  []byte    `json:"secret"` // 32 bytes
}

// stamp tells one content of the file from another.
type stamp struct {
	modified time.Time
	size     int64
	inode    uint64
	mode     os.FileMode
}

const maxFile = 1 << 20

func (f *keyFile) latest() uint32 { return f.Versions[len(f.Versions)-1].Version }

func (f *keyFile) aead(version uint32) (cipher.AEAD, error) {
	i := slices.IndexFunc(f.Versions, func(v keyVersion) bool { return v.Version == version })
	if i < 0 {
		return nil, fmt.Errorf("%w: no version %d", ErrKeyFile, version)
	}
	return f.aeads[i], nil
}

func (f *keyFile) add() error {
	secret := make([]byte, kms.KeySize)
	if _, err := rand.Read(secret); err != nil {
		return fmt.Errorf("make key version: %w", err)
	}
	next := uint32(1)
	if len(f.Versions) > 0 {
		next = f.latest() + 1
	}
	f.Versions = append(f.Versions, keyVersion{Version: next, Created: time.Now().UTC().Truncate(time.Second), Secret: secret})
	return nil
}

func (f *keyFile) retire(before uint32) {
	f.MinVersion = max(f.MinVersion, before)
	f.Versions = slices.DeleteFunc(f.Versions, func(v keyVersion) bool { return v.Version < before })
}

func (f *keyFile) clone() *keyFile {
	c := *f
	c.Versions = slices.Clone(f.Versions)
	c.aeads = nil
	return &c
}

func (f *keyFile) clear() {
	for _, v := range f.Versions {
		clear(v.Secret)
	}
}

func (f *keyFile) check() error {
	switch {
	case f.Format != 1:
		return fmt.Errorf("%w: format %d", ErrKeyFile, f.Format)
	case len(f.Key) != 32:
		return fmt.Errorf("%w: the key has no name", ErrKeyFile)
	case f.State != kms.StateEnabled && f.State != kms.StateDisabled && f.State != kms.StatePendingDeletion:
		return fmt.Errorf("%w: unknown state", ErrKeyFile)
	case len(f.Versions) == 0:
		return fmt.Errorf("%w: no version", ErrKeyFile)
	}
	f.aeads = make([]cipher.AEAD, len(f.Versions))
	for i, v := range f.Versions {
		if v.Version == 0 || len(v.Secret) != kms.KeySize || i > 0 && v.Version <= f.Versions[i-1].Version {
			return fmt.Errorf("%w: version %d", ErrKeyFile, v.Version)
		}
		aead, err := newCipher(v.Secret)
		if err != nil {
			return err
		}
		f.aeads[i] = aead
	}
	return nil
}

// read reads the file, unless others may read it too.
func read(path string) (*keyFile, stamp, error) {
	h, err := os.Open(path) //nolint:gosec // the operator's own path
	if err != nil {
		return nil, stamp{}, err //nolint:wrapcheck // reload classifies it
	}
	defer h.Close() //nolint:errcheck // read only
	info, err := h.Stat()
	if err != nil {
		return nil, stamp{}, err //nolint:wrapcheck // as above
	}
	switch {
	case !info.Mode().IsRegular():
		return nil, stamp{}, fmt.Errorf("%w: not a regular file", ErrKeyFile)
	case info.Mode().Perm()&0o077 != 0:
		return nil, stamp{}, fmt.Errorf("%w: mode %04o", ErrPermissions, info.Mode().Perm())
	}
	b, err := io.ReadAll(io.LimitReader(h, maxFile))
	if err != nil {
		return nil, stamp{}, err //nolint:wrapcheck // as above
	}
	defer clear(b)
	var f keyFile
	if err := json.Unmarshal(b, &f, json.RejectUnknownMembers(true)); err != nil {
		// The decoder's own words could quote the file.
		return nil, stamp{}, fmt.Errorf("%w: not the JSON of a key file", ErrKeyFile)
	}
	if err := f.check(); err != nil {
		return nil, stamp{}, err
	}
	return &f, stampFrom(info), nil
}

func stampOf(path string) (stamp, error) {
	info, err := os.Stat(path)
	if err != nil {
		return stamp{}, err //nolint:wrapcheck // the caller reads the file then
	}
	return stampFrom(info), nil
}

func stampFrom(info os.FileInfo) stamp {
	return stamp{modified: info.ModTime(), size: info.Size(), inode: inode(info), mode: info.Mode()}
}

// create makes a new file with one version, and fails with os.ErrExist when
// there is one: it links a finished file into place, so nobody sees half of it.
func create(path, region string) error {
	if _, err := os.Lstat(path); err == nil {
		return os.ErrExist
	}
	name := make([]byte, 16)
	if _, err := rand.Read(name); err != nil {
		return fmt.Errorf("name the key: %w", err)
	}
	f := &keyFile{Format: 1, Key: hex.EncodeToString(name), Region: region, State: kms.StateEnabled, MinVersion: 1}
	if err := f.add(); err != nil {
		return err
	}
	defer f.clear()
	tmp, err := writeBeside(path, f)
	if err != nil {
		return err
	}
	defer os.Remove(tmp) //nolint:errcheck // gone or harmless
	if err := os.Link(tmp, path); err != nil {
		return fmt.Errorf("put key file in place: %w", err)
	}
	return syncFolder(path)
}

// replace puts f in the place of the file.
func replace(path string, f *keyFile) error {
	tmp, err := writeBeside(path, f)
	if err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		_ = os.Remove(tmp) // the first error counts
		return fmt.Errorf("put key file in place: %w", err)
	}
	return syncFolder(path)
}

// writeBeside writes f to a new file in the same folder, synced.
func writeBeside(path string, f *keyFile) (name string, err error) {
	b, err := json.Marshal(f, jsontext.WithIndent("  "))
	if err != nil {
		return "", fmt.Errorf("encode key file: %w", err)
	}
	b = append(b, '\n')
	defer clear(b)
	h, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return "", fmt.Errorf("write key file: %w", err)
	}
	defer func() {
		if err != nil {
			_ = os.Remove(h.Name()) // the first error counts
		}
	}()
	if _, err := h.Write(b); err != nil {
		_ = h.Close() // the first error counts
		return "", fmt.Errorf("write key file: %w", err)
	}
	if err := h.Sync(); err != nil {
		_ = h.Close() // the first error counts
		return "", fmt.Errorf("sync key file: %w", err)
	}
	if err := h.Close(); err != nil {
		return "", fmt.Errorf("close key file: %w", err)
	}
	return h.Name(), nil
}

// syncFolder makes the new name durable (fsync(2): syncing a file does not sync
// the folder's entry).
func syncFolder(path string) error {
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("sync folder of key file: %w", err)
	}
	defer d.Close() //nolint:errcheck // read only
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync folder of key file: %w", err)
	}
	return nil
}
