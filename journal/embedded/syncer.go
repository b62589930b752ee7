package embedded

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	// probeAhead is how many block indexes are tried when the folder has
	// changed. The server counts on by one, but a block that was emptied may be
	// gone again before it is looked for.
	probeAhead = 16
	// tailBlocks is how many last blocks are synced when a stream is first
	// looked at: a process that was killed may have left written and unsynced
	// bytes behind, at most as much as one commit, and a commit is smaller than
	// two blocks.
	tailBlocks = 4
	// freshFolder is the age under which a folder's modification time proves
	// nothing: file systems stamp with the kernel's tick.
	freshFolder = 100 * time.Millisecond
)

// A Syncer makes what the server has acknowledged survive a power cut. Its
// methods may be called concurrently. A nil Syncer is that of a server that
// syncs always: it has nothing left to do.
type Syncer struct {
	dir string

	mu      sync.Mutex // guards streams
	streams map[string]*blocks
}

// blocks follows the block files of one stream. The server appends to the one
// with the highest index; when that is full it goes on in the next one, without
// syncing. A block that is rewritten (secure deletion, compaction) is replaced
// by renaming a new file over it.
type blocks struct {
	mu      sync.Mutex // one sync at a time; guards everything below
	dir     string
	folder  *os.File
	last    *os.File
	index   int
	looked  time.Time // the folder's change time when it was last looked through
	settled bool      // it was old enough then to change with whatever comes next
	synced  mark      // of the last block, when settle last looked at it
	failed  error
}

// mark tells whether a file was written since.
type mark struct {
	size  int64
	mtime time.Time
}

func newSyncer(dir string) *Syncer {
	return &Syncer{dir: dir, streams: make(map[string]*blocks)}
}

func (s *Syncer) of(stream string) *blocks {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.streams[stream]
	if b == nil {
		b = &blocks{dir: filepath.Join(s.dir, stream, "msgs")}
		s.streams[stream] = b
	}
	return b
}

// Sync returns once every message of the stream that the server had
// acknowledged before the call is on disk: fdatasync of the block files written
// since the last Sync, and fsync of their folder when a block was added or
// replaced.
//
// After an error it fails for the stream until the server restarts: the kernel
// reports a lost write once and then forgets it, so a second try would succeed
// without the bytes being there.
func (s *Syncer) Sync(stream string) error {
	if s == nil {
		return nil
	}
	b := s.of(stream)
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.sync()
}

func (b *blocks) sync() error {
	if b.failed != nil {
		return b.failed
	}
	if err := b.advance(); err != nil {
		b.failed = fmt.Errorf("sync %s: %w", b.dir, err)
		return b.failed
	}
	return nil
}

// advance looks at nothing but the folder as long as that has not changed, for it
// is paid by every commit: a block that is added, removed or replaced changes the
// time of its folder, and so does a purge, which moves the folder away.
func (b *blocks) advance() error {
	changed := b.folder == nil
	if changed {
		if err := b.scan(); err != nil {
			return err
		}
	}
	at, err := changeTime(b.folder)
	if err != nil {
		return err
	}
	if !b.settled || !at.Equal(b.looked) {
		more, err := b.follow(at)
		if err != nil {
			return err
		}
		changed = changed || more
	}
	if err := datasync(b.last); err != nil {
		return err
	}
	if changed {
		return b.folder.Sync()
	}
	return nil
}

// follow goes to where the server writes now, and reports whether that is
// elsewhere. The folder changed at the given time.
func (b *blocks) follow(at time.Time) (bool, error) {
	gone, err := b.gone()
	if err != nil {
		return false, err
	}
	if gone {
		if err := b.scan(); err != nil {
			return false, err
		}
		if at, err = changeTime(b.folder); err != nil {
			return false, err
		}
	}
	b.looked, b.settled = at, time.Since(at) >= freshFolder
	found, err := b.probe()
	return gone || found, err
}

// gone reports whether the last block is no longer the one at its path. A purge
// removes the folder that it has moved away later, so that until then neither
// the block nor its folder looks removed.
func (b *blocks) gone() (bool, error) {
	if gone, err := unlinked(b.last); err != nil || gone {
		return gone, err
	}
	open, err := b.folder.Stat()
	if err != nil {
		return false, err
	}
	now, err := os.Stat(b.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil // between the two steps of a purge; scanning waits for it
	}
	if err != nil {
		return false, err
	}
	return !os.SameFile(open, now), nil
}

func markOf(f *os.File) (mark, error) {
	info, err := f.Stat()
	if err != nil {
		return mark{}, err
	}
	return mark{info.Size(), info.ModTime()}, nil
}

// probe goes on to the blocks that were added, and reports whether there are any.
func (b *blocks) probe() (bool, error) {
	found := false
	for i := b.index + 1; i <= b.index+probeAhead; i++ {
		next, err := openIn(b.folder, strconv.Itoa(i)+".blk")
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return found, err
		}
		// The block before may have been written since the last sync, and may
		// have been removed, which does not matter then.
		if err := datasync(b.last); err != nil {
			_ = next.Close()
			return found, err
		}
		_ = b.last.Close()
		b.last, b.index, found = next, i, true
	}
	return found, nil
}

func (b *blocks) path(index int) string {
	return filepath.Join(b.dir, strconv.Itoa(index)+".blk")
}

// scan looks through the folder and syncs the last blocks. The server may
// remove and replace blocks meanwhile; then it looks again.
func (b *blocks) scan() error {
	b.closeFiles()
	for try := 0; ; try++ {
		err := b.scanOnce()
		if err == nil || !errors.Is(err, fs.ErrNotExist) || try == 8 {
			return err
		}
	}
}

func (b *blocks) scanOnce() (err error) {
	defer func() {
		if err != nil {
			b.closeFiles()
		}
	}()
	if b.folder, err = os.Open(b.dir); err != nil {
		return err
	}
	names, err := b.folder.Readdirnames(-1)
	if err != nil {
		return err
	}
	last, from := 0, b.index
	for _, name := range names {
		if i, ok := blockIndex(name); ok {
			last = max(last, i)
		}
	}
	if from == 0 {
		from = last - tailBlocks + 1
	}
	for i := max(from, 1); i < last; i++ {
		if err := syncPath(b.path(i)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if b.last, err = os.Open(b.path(last)); err != nil {
		return err
	}
	b.index, b.settled = last, false
	return nil
}

func blockIndex(name string) (int, bool) {
	digits, ok := strings.CutSuffix(name, ".blk")
	if !ok {
		return 0, false
	}
	i, err := strconv.Atoi(digits)
	return i, err == nil && i > 0
}

func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		_ = f.Close()
		return err
	}
	return f.Close()
}

func (b *blocks) closeFiles() {
	for _, f := range []*os.File{b.folder, b.last} {
		if f != nil {
			_ = f.Close()
		}
	}
	b.folder, b.last = nil, nil
}

// SyncMeta makes a stream's existence survive a power cut: its description and
// every folder from the messages up to the store's. It also makes a secure
// deletion final, whose rewritten block must not be the old one again after a
// power cut. Call it when a stream was created, or messages erased.
func (s *Syncer) SyncMeta(stream string) error {
	if s == nil {
		return nil
	}
	dir := filepath.Join(s.dir, stream)
	for _, name := range []string{"meta.inf", "meta.sum", "msgs", "."} {
		if err := syncPath(filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("sync the description of stream %s: %w", stream, err)
		}
	}
	for up := s.dir; ; up = filepath.Dir(up) {
		if err := syncPath(up); err != nil {
			return fmt.Errorf("sync the folder of stream %s: %w", stream, err)
		}
		if filepath.Base(up) == "jetstream" {
			break
		}
	}
	return syncPath(filepath.Dir(filepath.Dir(filepath.Dir(s.dir))))
}

// SyncFolder makes the replacement of block files final, after a secure
// deletion.
func (s *Syncer) SyncFolder(stream string) error {
	if s == nil {
		return nil
	}
	if err := syncPath(filepath.Join(s.dir, stream, "msgs")); err != nil {
		return fmt.Errorf("sync the folder of stream %s: %w", stream, err)
	}
	return nil
}

// settle syncs the streams whose last block was written outside of a commit:
// the tombstone that keeps an emptied stream's last sequence must not get lost,
// or its sequences would be issued again.
func (s *Syncer) settle() {
	s.mu.Lock()
	all := make([]*blocks, 0, len(s.streams))
	for _, b := range s.streams {
		all = append(all, b)
	}
	s.mu.Unlock()
	for _, b := range all {
		b.mu.Lock()
		b.settle()
		b.mu.Unlock()
	}
}

// settle syncs once more after commits too, which costs little: nothing is
// written then.
func (b *blocks) settle() {
	if b.failed != nil || b.last == nil {
		return
	}
	at, err := changeTime(b.folder)
	// The mark is taken before, so that a write during the sync shows later.
	m, merr := markOf(b.last)
	if err == nil && merr == nil && b.settled && at.Equal(b.looked) && m == b.synced {
		return
	}
	if b.sync() == nil { // or it is remembered in b.failed, which Check reports
		b.synced = m
	}
}

func (s *Syncer) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range s.streams {
		b.mu.Lock()
		err := b.failed
		b.mu.Unlock()
		if err != nil {
			return fmt.Errorf("%w: %w", ErrFrozen, err)
		}
	}
	return nil
}

// reset forgets the files, after the server was restarted.
func (s *Syncer) reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range s.streams {
		b.mu.Lock()
		b.closeFiles()
		b.index, b.failed = 0, nil
		b.mu.Unlock()
	}
}

// forget drops a stream that was deleted.
func (s *Syncer) forget(stream string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.streams[stream]; b != nil {
		b.mu.Lock()
		b.closeFiles()
		b.mu.Unlock()
		delete(s.streams, stream)
	}
}

func (s *Syncer) close() {
	s.reset()
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.streams)
}
