package auth

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"strings"
)

const (
	operatorPrefix    = "cop_"
	minOperatorLength = 32
	maxSecretFile     = 64 << 10
)

var (
	// ErrSecretFile means that a file that should hold a secret is missing,
	// not a regular file, empty or too large: name the right file.
	ErrSecretFile = errors.New("unusable secret file")
	// ErrSecretExposed means that others than the owner may read a secret
	// file: run chmod 600 on it, and replace the secret if others had access.
	ErrSecretExposed = errors.New("secret file is readable by others")
)

// Operator is an operator's bearer token. Only its hash is kept, so printing
// or dumping one gives nothing away. The zero value matches no token.
type Operator struct {
	sum [sha256.Size]byte
	set bool
}

// NewOperatorToken makes a random operator token of 256 bits.
func NewOperatorToken() string {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // never fails, says crypto/rand
	return operatorPrefix + base64.RawURLEncoding.EncodeToString(b)
}

// NewOperator keeps what is needed to recognise the token.
func NewOperator(token string) (Operator, error) {
	if len(token) < minOperatorLength {
		return Operator{}, fmt.Errorf("%w: an operator token has at least %d characters", ErrSecretFile, minOperatorLength)
	}
	return Operator{sum: sha256.Sum256([]byte(token)), set: true}, nil
}

// LoadOperator reads the operator token from a file; see [ReadSecret].
func LoadOperator(path string) (Operator, error) {
	token, err := ReadSecret(path)
	if err != nil {
		return Operator{}, err
	}
	return NewOperator(token)
}

// Matches reports whether the token is the operator's, in a time that does not
// depend on where they differ.
func (o Operator) Matches(token string) bool {
	sum := sha256.Sum256([]byte(token))
	return subtle.ConstantTimeCompare(sum[:], o.sum[:]) == 1 && o.set
}

// LogValue keeps even the hash out of logs.
func (o Operator) LogValue() slog.Value { return slog.StringValue("[redacted]") }

// String keeps even the hash out of formatted text.
func (o Operator) String() string { return "[redacted]" }

// ReadSecret reads a secret of one line from a file and trims the line's end.
// It returns ErrSecretExposed when the file's mode lets group or others read
// it, and ErrSecretFile when it is not a small regular file with something in.
func ReadSecret(path string) (string, error) {
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
	secret := strings.TrimRight(string(b), "\r\n")
	if secret == "" || strings.ContainsAny(secret, "\r\n\x00") {
		return "", fmt.Errorf("%w: %s must hold one line", ErrSecretFile, path)
	}
	return secret, nil
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
