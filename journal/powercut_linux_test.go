package journal_test

import (
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cofferdb/coffer/journal/journaltest"
)

// loopDisk is an ext4 file system in a file.
type loopDisk struct {
	dir, device string
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput() //nolint:gosec // fixed commands
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

func newLoopDisk(t *testing.T, mib int) *loopDisk {
	t.Helper()
	if os.Geteuid() != 0 {
		journaltest.Skip(t, "needs root, to mount a file system on a loop device")
	}
	for _, tool := range []string{"losetup", "mkfs.ext4", "mount", "umount"} {
		if _, err := exec.LookPath(tool); err != nil {
			journaltest.Skip(t, "needs "+tool+"; install util-linux and e2fsprogs")
		}
	}
	base := t.TempDir()
	image := filepath.Join(base, "disk")
	d := &loopDisk{dir: filepath.Join(base, "mnt")}
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, int64(mib)<<20); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(d.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "losetup", "-f", "--show", image).CombinedOutput() //nolint:gosec // a file of the test
	if err != nil {
		journaltest.Skip(t, "needs a loop device: "+string(out))
	}
	d.device = strings.TrimSpace(string(out))
	t.Cleanup(func() {
		_ = unix.Unmount(d.dir, unix.MNT_DETACH)
		_ = exec.Command("losetup", "-d", d.device).Run() //nolint:gosec,noctx // the test's context has ended
	})
	run(t, "mkfs.ext4", "-q", "-F", d.device)
	d.mount(t)
	return d
}

func (d *loopDisk) mount(t *testing.T) { t.Helper(); run(t, "mount", d.device, d.dir) }

func (d *loopDisk) unmount(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := unix.Unmount(d.dir, 0)
		if err == nil {
			return
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// cut shuts the file system down as a power cut would: nothing that is in
// memory reaches the device any more, the file system's own log included
// (EXT4_IOC_SHUTDOWN with EXT4_GOING_FLAGS_NOLOGFLUSH).
func (d *loopDisk) cut(t *testing.T) {
	t.Helper()
	const ioctl, noLogFlush = 0x8004587d, 2
	f, err := os.Open(d.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.IoctlSetPointerInt(int(f.Fd()), ioctl, noLogFlush); err != nil {
		t.Fatalf("shut the file system down: %v", err)
	}
}

// freeze stops every thread of a process where it is, as a power cut does. A
// process that ran on while its file system is shut down would acknowledge what
// no real one can: ext4 lets a sync that is under way at that moment return
// without an error though its extents were never converted. A thread that is in
// the kernel stops before it returns.
func freeze(t *testing.T, pid int) {
	t.Helper()
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); !frozen(t, pid); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the writer does not stop")
		}
	}
}

// frozen reports whether no thread can run code of its own any more: each is
// stopped, or waits for a disk. See proc_pid_stat(5).
func frozen(t *testing.T, pid int) bool {
	t.Helper()
	tasks, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*/stat")
	if err != nil || len(tasks) == 0 {
		t.Fatalf("the writer's threads: %d, %v", len(tasks), err)
	}
	for _, task := range tasks {
		stat, err := os.ReadFile(task)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // it has just ended
		}
		if err != nil {
			t.Fatal(err)
		}
		_, state, ok := strings.Cut(string(stat), ") ")
		if !ok || (state[0] != 'T' && state[0] != 'D') {
			return false
		}
	}
	return true
}

// TestPowerCut cuts the power while 64 writers append, or 1,024, several times on the
// same disk: every acknowledged event is there once. Without the syncs, events
// are lost, so the test can fail.
func TestPowerCut(t *testing.T) {
	rounds := 3
	if testing.Short() {
		rounds = 1
	}
	for _, mode := range []string{"own", "always", "none"} {
		t.Run(mode, func(t *testing.T) {
			d := newLoopDisk(t, 512)
			var acked []string
			n := 1 + rand.IntN(2000)
			for round := range rounds {
				if mode == "own" {
					n = 1 + rand.IntN(25000) // a block of the server holds 10,000
				}
				w := startWriter(t, d.dir, mode, round)
				acked = append(acked, w.take(t, n, func() {
					freeze(t, w.cmd.Process.Pid)
					d.cut(t)
					_ = w.cmd.Process.Kill()
				})...)
				d.unmount(t)
				d.mount(t)
				if mode == "none" {
					break // what is left may not even open
				}
			}
			if mode == "none" {
				there := countRecords(t, d.dir)
				t.Logf("without syncs: acknowledged %d, in the block files %d", len(acked), there)
				if there >= len(acked) {
					t.Error("nothing was lost without syncs: the test shows nothing")
				}
				return
			}
			there := count(t, d.dir)
			lost, doubled := lostAndDoubled(acked, there)
			t.Logf("%d cuts, acknowledged %d, there %d, acknowledged and lost %d", rounds, len(acked), len(there), lost)
			if lost != 0 || doubled != 0 {
				t.Errorf("acknowledged and lost %d, doubled %d", lost, doubled)
			}
		})
	}
}

// countRecords counts the messages in the block files of the enterprise stream,
// by their subjects.
func countRecords(t *testing.T, dir string) int {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "nats", "jetstream", "*", "streams", enterprise(), "msgs", "*.blk"))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range files {
		content, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		n += strings.Count(string(content), "msg.enterprise."+strconv.Itoa(0)+".")
	}
	return n
}
