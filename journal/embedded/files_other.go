//go:build !linux

package embedded

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

func datasync(f *os.File) error { return f.Sync() }

func openIn(folder *os.File, name string) (*os.File, error) {
	return os.Open(filepath.Join(folder.Name(), name))
}

// changeTime knows nothing of moves; checkFileSystem refuses syncs of our own.
func changeTime(folder *os.File) (time.Time, error) {
	info, err := folder.Stat()
	if err != nil {
		return time.Time{}, err
	}
	return info.ModTime(), nil
}

func unlinked(f *os.File) (bool, error) {
	open, err := f.Stat()
	if err != nil {
		return false, err
	}
	now, err := os.Stat(f.Name())
	if errors.Is(err, os.ErrNotExist) {
		return true, nil
	}
	return err == nil && !os.SameFile(open, now), err
}

func freeBytes(dir string) (int64, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return 0, err
	}
	return int64(st.Bavail) * int64(st.Bsize), nil
}

func checkFileSystem(string) error {
	return errors.New("syncs of our own have been through a power cut on Linux only")
}
