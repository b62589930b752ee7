//go:build !linux

package embedded

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
)

func datasync(f *os.File) error { return f.Sync() }

func openIn(folder *os.File, name string) (*os.File, error) {
	return os.Open(filepath.Join(folder.Name(), name))
}

// Without syncs of our own, which checkFileSystem refuses, files are not told
// apart.

func stateOf(f *os.File) (state, error) { return stateFrom(f.Stat()) }

func stateIn(folder *os.File, name string) (state, error) {
	return stateFrom(os.Stat(filepath.Join(folder.Name(), name)))
}

func stateFrom(info os.FileInfo, err error) (state, error) {
	if err != nil {
		return state{}, err
	}
	return state{mark: mark{size: info.Size(), mtime: info.ModTime()}, links: 1}, nil
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
