package auth

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
)

const maxSecretFile = 64 << 10

var (
	// ErrSecretFile means that a file that should hold a secret is missing,
	// not a regular file, empty or too large: name the right file.
	ErrSecretFile = errors.New("unusable secret file")
	// ErrSecretExposed means that others than the owner may read a secret
	// file: run chmod 600 on it, and replace the secret if others had access.
	ErrSecretExposed = errors.New("secret file is readable by others")
)

// ReadSecret reads a secret of one line from a file and trims the line's end.
// It returns ErrSecretExposed when the file's mode lets group or others read
// it, and ErrSecretFile when it is not a small regular file with something in.
func ReadSecret(path string) (string, error) {
	text, err := readSecretFile(path)
	if err != nil {
		return "", err
	}
	secret := strings.TrimRight(text, "\r\n")
	if secret == "" || strings.ContainsAny(secret, "\r\n\x00") {
		return "", fmt.Errorf("%w: %s must hold one line", ErrSecretFile, path)
	}
	return secret, nil
}

// ReadSecretText reads a secret of several lines, such as a key in PEM or JSON,
// as [ReadSecret] does.
func ReadSecretText(path string) (string, error) {
	text, err := readSecretFile(path)
	if err == nil && strings.TrimSpace(text) == "" {
		err = fmt.Errorf("%w: %s is empty", ErrSecretFile, path)
	}
	return text, err
}

func readSecretFile(path string) (string, error) {
	f, err := os.Open(path) //nolint:gosec // the path is the operator's own setting
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrSecretFile, err)
	}
	defer func() { _ = f.Close() }()
	// The open file is asked, not the path: the path could change in between.
	info, err := f.Stat()
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrSecretFile, err)
	}
	if err := checkSecretMode(path, info); err != nil {
		return "", err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxSecretFile+1))
	if err != nil {
		return "", fmt.Errorf("%w: reading %s: %w", ErrSecretFile, path, err)
	}
	if len(b) > maxSecretFile {
		return "", fmt.Errorf("%w: %s is larger than %d bytes", ErrSecretFile, path, maxSecretFile)
	}
	return string(b), nil
}

// CheckSecretFile reports whether a file is a regular file that only its owner
// may read, without reading it.
func CheckSecretFile(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrSecretFile, err)
	}
	return checkSecretMode(path, info)
}

func checkSecretMode(path string, info fs.FileInfo) error {
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%w: %s is not a regular file", ErrSecretFile, path)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return fmt.Errorf("%w: %s has mode %04o, want 0600", ErrSecretExposed, path, mode)
	}
	return nil
}
