package embedded

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// datasync flushes a file's bytes and what is needed to read them back, its
// size included, and not its times.
func datasync(f *os.File) error {
	for {
		err := unix.Fdatasync(int(f.Fd()))
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINTR) {
			return &fs.PathError{Op: "fdatasync", Path: f.Name(), Err: err}
		}
	}
}

// openIn opens a file of an open folder for syncing. It is called for files
// that mostly do not exist, so it makes no error value of its own.
func openIn(folder *os.File, name string) (*os.File, error) {
	for {
		fd, err := unix.Openat(int(folder.Fd()), name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			return os.NewFile(uintptr(fd), filepath.Join(folder.Name(), name)), nil
		}
		if !errors.Is(err, unix.EINTR) {
			return nil, err
		}
	}
}

// changeTime is when a folder, or what is in it, was last changed, or moved.
func changeTime(folder *os.File) (time.Time, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(folder.Fd()), &st); err != nil {
		return time.Time{}, &fs.PathError{Op: "fstat", Path: folder.Name(), Err: err}
	}
	return time.Unix(st.Ctim.Unix()), nil
}

// unlinked reports whether the file has been removed or another one put in its
// place.
func unlinked(f *os.File) (bool, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return false, &fs.PathError{Op: "fstat", Path: f.Name(), Err: err}
	}
	return st.Nlink == 0, nil
}

func freeBytes(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, &fs.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return int64(st.Bavail) * st.Bsize, nil //nolint:unconvert // Bsize differs between architectures.
}

// checkFileSystem reports why syncs of our own are not safe on the file system
// of dir. The server's compaction renames a new block file over the old one and
// syncs it afterwards. ext4 writes the new file's bytes before it commits the
// rename (auto_da_alloc with data=ordered), btrfs does the same; XFS may leave
// an empty file, and with it lose messages that had been synced long before.
func checkFileSystem(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return &fs.PathError{Op: "statfs", Path: dir, Err: err}
	}
	switch st.Type {
	case unix.TMPFS_MAGIC, unix.BTRFS_SUPER_MAGIC:
		return nil
	case unix.EXT4_SUPER_MAGIC:
		return checkMount(dir)
	}
	return fmt.Errorf("the file system (type %#x) is none on which a block replaced before its sync is known to survive a power cut: ext4, btrfs", st.Type)
}

func checkMount(dir string) error {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: dir, Err: err}
	}
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("the mount options are not known: %w", err)
	}
	device := strconv.Itoa(int(unix.Major(st.Dev))) + ":" + strconv.Itoa(int(unix.Minor(st.Dev)))
	options, ok := mountOptions(info, device)
	if !ok {
		return fmt.Errorf("the mount options of device %s are not known", device)
	}
	for _, o := range options {
		switch o {
		case "noauto_da_alloc", "data=writeback", "barrier=0", "nobarrier":
			return fmt.Errorf("ext4 is mounted with %s, which loses synced bytes when a block is replaced, or at a power cut", o)
		}
	}
	return nil
}

// mountOptions finds the options of a device in /proc/self/mountinfo, see
// proc_pid_mountinfo(5): those of the mount, and behind " - " those of the file
// system.
func mountOptions(info []byte, device string) ([]string, bool) {
	scan := bufio.NewScanner(bytes.NewReader(info))
	for scan.Scan() {
		left, right, ok := strings.Cut(scan.Text(), " - ")
		fields := strings.Fields(left)
		if !ok || len(fields) < 6 || fields[2] != device {
			continue
		}
		super := strings.Fields(right)
		return append(strings.Split(fields[5], ","), strings.Split(super[len(super)-1], ",")...), true
	}
	return nil, false
}
