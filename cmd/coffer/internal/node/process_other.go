//go:build !unix

package node

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
)

const defaultConnections = 4096

// ErrFiles is not found out on this system.
var ErrFiles = errors.New("the limit of open files is too low")

func hardenProcess() error { return nil }

// lockDir relies on an open file not being removable, as Windows has it.
func lockDir(dir string) (*os.File, error) {
	path := filepath.Join(dir, lockName)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s", ErrInUse, dir)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("%w: %s", ErrInUse, dir)
	}
	return f, nil
}

func connectionLimit(cfg config.Config, _ *slog.Logger) (int, error) {
	if cfg.Limits.Connections > 0 {
		return cfg.Limits.Connections, nil
	}
	return defaultConnections, nil
}
