package exportdir

import (
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/cofferdb/coffer/journal/client"
)

const maxManifest = 64 << 20

// Verify reads the manifest of a directory and compares every file with it.
func Verify(dir string) (client.ExportManifest, error) {
	m, err := Manifest(dir)
	if err != nil {
		return m, err
	}
	for _, f := range m.Files {
		err := check(filepath.Join(dir, f.Name), m.Format, f)
		if errors.Is(err, os.ErrNotExist) {
			err = fmt.Errorf("%w: %s is missing", ErrDigest, f.Name)
		}
		if err != nil {
			return m, err
		}
	}
	return m, nil
}

// Manifest reads the manifest of a directory.
func Manifest(dir string) (client.ExportManifest, error) {
	f, err := os.Open(filepath.Join(dir, manifestName))
	if errors.Is(err, os.ErrNotExist) {
		return client.ExportManifest{}, ErrUnfinished
	}
	if err != nil {
		return client.ExportManifest{}, err
	}
	defer func() { _ = f.Close() }()
	text, err := io.ReadAll(io.LimitReader(f, maxManifest))
	if err != nil {
		return client.ExportManifest{}, err
	}
	return client.ParseExportManifest(text)
}

// Files returns the paths of a directory's files in the order in which they are to
// be read, after comparing every one with the manifest.
func Files(dir string) (paths []string, format string, err error) {
	m, err := Verify(dir)
	if err != nil {
		return nil, "", fmt.Errorf("%s: %w", dir, err)
	}
	for _, f := range m.Files {
		paths = append(paths, filepath.Join(dir, f.Name))
	}
	return paths, m.Format, nil
}

// check compares a file with its entry. No more is read than the entry says, so a
// compressed bomb ends there.
func check(path, format string, entry client.ExportFile) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	var in io.Reader = f
	wrong := fmt.Errorf("%w: %s", ErrDigest, entry.Name)
	if format == client.ExportAgora {
		packed, err := gzip.NewReader(f)
		if err != nil {
			return wrong
		}
		in = packed
	}
	sum := sha256.New()
	n, err := io.Copy(sum, io.LimitReader(in, entry.Bytes+1))
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, gzip.ErrChecksum), errors.Is(err, gzip.ErrHeader):
		return wrong
	case err != nil && format != client.ExportAgora:
		return err
	case err != nil, n != entry.Bytes, hex.EncodeToString(sum.Sum(nil)) != entry.SHA256:
		return wrong
	}
	return nil
}
