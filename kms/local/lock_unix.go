//go:build unix

package local

import (
	"fmt"
	"os"
	"syscall"
)

// lock takes the lock file, and waits for it. The kernel gives it back when the
// process ends.
func lock(path string) (unlock func(), err error) {
	h, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600) //nolint:gosec // beside the operator's own path
	if err != nil {
		return nil, fmt.Errorf("lock key file: %w", err)
	}
	if err := syscall.Flock(int(h.Fd()), syscall.LOCK_EX); err != nil { //nolint:gosec // descriptors fit
		_ = h.Close() // the first error counts
		return nil, fmt.Errorf("lock key file: %w", err)
	}
	return func() { _ = h.Close() }, nil // closing unlocks
}

func inode(info os.FileInfo) uint64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Ino
	}
	return 0
}
