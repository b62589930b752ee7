package bench

import (
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// datasync flushes a file's bytes and its size.
func datasync(f *os.File) error { return unix.Fdatasync(int(f.Fd())) }

// loadAverage returns the system's load average over a minute, or 0.
func loadAverage() float64 {
	text, _ := os.ReadFile("/proc/loadavg") // without it there is no figure
	first, _, _ := strings.Cut(string(text), " ")
	load, _ := strconv.ParseFloat(first, 64)
	return load
}
