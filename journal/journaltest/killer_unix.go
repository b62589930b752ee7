//go:build unix

package journaltest

import (
	"os"
	"sync/atomic"
	"syscall"

	"github.com/cofferdb/coffer/journal/embedded"
)

// A Killer kills its own process at a step: before or after something is synced,
// or at one that the test counts besides.
type Killer struct {
	*embedded.Syncer

	left atomic.Int64 // below 0, and so never 0 again, when it is not armed
}

// Arm lets the n-th step from now be the last; with 0 none is.
func (k *Killer) Arm(n int) { k.left.Store(int64(n)) }

// Disarm lets the process live.
func (k *Killer) Disarm() { k.Arm(0) }

// Step counts a step, and does not return from the last one.
func (k *Killer) Step() {
	if k.left.Add(-1) == 0 {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
}

// Sync syncs between two steps.
func (k *Killer) Sync(stream string) error {
	k.Step()
	err := k.Syncer.Sync(stream)
	k.Step()
	return err
}

// SyncFolder syncs between two steps.
func (k *Killer) SyncFolder(stream string) error {
	k.Step()
	err := k.Syncer.SyncFolder(stream)
	k.Step()
	return err
}
