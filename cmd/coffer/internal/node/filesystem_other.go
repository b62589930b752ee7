//go:build !linux

package node

// fileSystem says whether a directory lies on a disk of this machine; here it
// cannot be told.
func fileSystem(string) string { return "unknown" }
