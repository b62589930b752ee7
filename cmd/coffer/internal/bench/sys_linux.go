package bench

import (
	"os"

	"golang.org/x/sys/unix"
)

// datasync flushes a file's bytes and its size.
func datasync(f *os.File) error { return unix.Fdatasync(int(f.Fd())) }
