package auth

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"log/slog"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

const (
	operatorPrefix    = "cop_"
	minOperatorLength = 32
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

// Operators are those who may administer, each by a name and a token of its own.
// The zero value knows nobody.
type Operators struct {
	known []knownOperator
}

type knownOperator struct {
	name string
	Operator
}

// maxOperators bounds the work of a comparison.
const maxOperators = 1000

var operatorName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,31}$`)

// Add lets an operator in. A name that is no name, or taken, and a token that
// another one has, are ErrSecretFile.
func (o *Operators) Add(name string, operator Operator) error {
	switch {
	case !operatorName.MatchString(name):
		return fmt.Errorf("%w: an operator's name is 1 to 32 of a-z, 0-9, \".\", \"_\" and \"-\", the first a letter or digit", ErrSecretFile)
	case slices.ContainsFunc(o.known, func(k knownOperator) bool { return k.name == name }):
		return fmt.Errorf("%w: operator %s is there twice", ErrSecretFile, name)
	case slices.ContainsFunc(o.known, func(k knownOperator) bool { return k.sum == operator.sum }):
		return fmt.Errorf("%w: operator %s has the token of another one", ErrSecretFile, name)
	case len(o.known) == maxOperators:
		return fmt.Errorf("%w: more than %d operators", ErrSecretFile, maxOperators)
	}
	o.known = append(slices.Clip(o.known), knownOperator{name, operator})
	return nil
}

// Identify returns the name of the operator whose token it is. It compares with
// every one, in a time that does not depend on which it is or where they differ.
func (o Operators) Identify(token string) (name string, ok bool) {
	sum := sha256.Sum256([]byte(token))
	found := -1
	for i, k := range o.known {
		same := subtle.ConstantTimeCompare(sum[:], k.sum[:])
		found = subtle.ConstantTimeSelect(same, i, found)
	}
	if found < 0 || !o.known[found].set {
		return "", false
	}
	return o.known[found].name, true
}

// Load adds the operators of a file, one a line: "NAME: sha256:HEX", the hash of
// the token, or "NAME: file:PATH", a file that holds it and is looked for beside this
// one. Empty lines, and those that begin with "#", count for nothing. Only the
// owner may be able to read either file: see [ReadSecret].
func (o *Operators) Load(path string) error {
	text, err := readSecretFile(path)
	if err != nil {
		return err
	}
	n := 0
	for line := range strings.Lines(text) {
		n++
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		if err := o.load(filepath.Dir(path), line); err != nil {
			return fmt.Errorf("%s line %d: %w", path, n, err)
		}
	}
	return nil
}

func (o *Operators) load(dir, line string) error {
	name, value, _ := strings.Cut(line, ":")
	kind, value, _ := strings.Cut(strings.TrimSpace(value), ":")
	var operator Operator
	switch kind {
	case "sha256":
		sum, err := hex.DecodeString(value)
		if err != nil || len(sum) != sha256.Size {
			return fmt.Errorf("%w: sha256: is followed by 64 hex digits", ErrSecretFile)
		}
		operator = Operator{sum: [sha256.Size]byte(sum), set: true}
	case "file":
		if !filepath.IsAbs(value) {
			value = filepath.Join(dir, value)
		}
		var err error
		if operator, err = LoadOperator(value); err != nil {
			return err
		}
	default: // which may be a token: it is not repeated
		return fmt.Errorf("%w: a line is NAME: sha256:HEX, or NAME: file:PATH", ErrSecretFile)
	}
	return o.Add(strings.TrimSpace(name), operator)
}
