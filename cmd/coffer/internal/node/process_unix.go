//go:build unix

package node

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
)

const (
	defaultConnections = 4096
	minFiles           = 1024
	// filesForStores is what NATS and Pebble keep open in one region.
	filesForStores = 512
)

// ErrFiles means that the process may open too few files: raise the limit
// (ulimit -n, LimitNOFILE=) to 65,536.
var ErrFiles = errors.New("the limit of open files is too low")

// hardenProcess turns core dumps off: one would hold keys and messages.
func hardenProcess() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("turning core dumps off: %w", err)
	}
	return nil
}

// lockDir takes the directory for this process until the file is closed. The
// kernel lets go of it whatever way the process ends.
func lockDir(dir string) (*os.File, error) {
	path := filepath.Join(dir, lockName)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600) //nolint:gosec // the path is the operator's own setting
	if err != nil {
		return nil, fmt.Errorf("locking the data directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		holder := make([]byte, 20)
		n, _ := f.ReadAt(holder, 0) // for the message only
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: %s (process %s)", ErrInUse, dir, strings.TrimSpace(string(holder[:n])))
		}
		return nil, fmt.Errorf("locking the data directory: %w", err)
	}
	if err := f.Truncate(0); err == nil {
		_, _ = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0) // for the message only
	}
	return f, nil
}

// connectionLimit returns how many connections each listener may have. The
// runtime has raised the soft limit of open files to the hard one already.
func connectionLimit(cfg config.Config, log *slog.Logger) (int, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, fmt.Errorf("reading the limit of open files: %w", err)
	}
	served := 0
	for _, r := range cfg.Regions {
		if r.Listen != "" {
			served++
		}
	}
	want := cfg.Limits.Connections
	if want == 0 {
		want = defaultConnections
	}
	return share(min(limit.Cur, 1<<30), served, want, log)
}

func share(files uint64, regions, want int, log *slog.Logger) (int, error) {
	if files < minFiles {
		return 0, fmt.Errorf("%w: %d, at least %d are needed", ErrFiles, files, minFiles)
	}
	regions = max(regions, 1)
	room := max(int(files)/regions-filesForStores, minFiles/8)
	if room < want {
		log.Warn("fewer connections are possible than configured, because of the limit of open files",
			"open_files", files, "connections", room, "configured", want)
		return room, nil
	}
	return want, nil
}
