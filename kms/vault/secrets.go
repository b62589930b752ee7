package vault

import (
	"io"
	"os"
	"strings"
)

const maxSecret = 16 << 10 // bytes in a file

// errSecretFile is what is wrong with a file, without its content.
type errSecretFile struct{ detail string }

func (e errSecretFile) Error() string { return e.detail }

// readSecret reads a secret from a file, without the line end that editors add.
func readSecret(setting, path string, private bool) (string, error) {
	wrong := func(detail string) error { return errSecretFile{setting + " " + path + ": " + detail} }
	f, err := os.Open(path) //nolint:gosec // the operator's own setting
	if err != nil {
		return "", wrong("cannot be opened")
	}
	defer f.Close() //nolint:errcheck // only read
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return "", wrong("not a file")
	}
	if private && info.Mode().Perm()&0o007 != 0 {
		return "", wrong("every user may read it: chmod o= it")
	}
	raw, err := io.ReadAll(io.LimitReader(f, maxSecret+1))
	if err != nil {
		return "", wrong("cannot be read")
	}
	text := strings.TrimRight(string(raw), "\r\n \t")
	switch {
	case text == "":
		return "", wrong("empty")
	case len(raw) > maxSecret:
		return "", wrong("larger than 16 KiB")
	case strings.ContainsFunc(text, func(r rune) bool { return r < 0x21 || r > 0x7e }):
		return "", wrong("not one word of printable ASCII")
	}
	return text, nil
}
