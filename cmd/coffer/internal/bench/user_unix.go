//go:build unix

package bench

import (
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// asOrdinaryUser returns what makes a command run as a user that Postgres
// accepts, which root is not, and gives that user the folder. Where there is
// none it says so in skipped.
func asOrdinaryUser(dir string) (run func(*exec.Cmd), skipped string, err error) {
	if os.Geteuid() != 0 {
		return func(*exec.Cmd) {}, "", nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		return nil, "Postgres does not run as root, and there is no user postgres", nil //nolint:nilerr // it is the reason
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, "", fmt.Errorf("the user postgres: %w", err)
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, "", fmt.Errorf("the user postgres: %w", err)
	}
	if err := os.Chown(dir, int(uid), int(gid)); err != nil {
		return nil, "", fmt.Errorf("give the folder to the user postgres: %w", err)
	}
	return func(c *exec.Cmd) {
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	}, "", nil
}

// reachable reports whether the user that Postgres runs as can reach a folder.
func reachable(dir string) bool {
	if os.Geteuid() != 0 || dir == "" {
		return true
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return false
	}
	for ; ; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err != nil || info.Mode()&0o001 == 0 {
			return false
		}
		if dir == filepath.Dir(dir) {
			return true
		}
	}
}

// processTime returns the processor time that this process has used.
func processTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u) // cannot fail for oneself
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
