// Package pebble keeps views in a Pebble database, a log-structured merge tree
// in a folder of the local disk.
//
// # No write-ahead log
//
// The store has no log of its own, and commits are not synced: the journal is
// the log. A commit goes to the memory table; a full table, or one that is a
// minute old ([Options.FlushEvery]), is written out and synced. After a crash
// the store is as it was at some earlier commit, checkpoint included, and the
// runner reads the journal again from there: at most a memory table's worth,
// well under a second.
//
// That is not only faster than a log without syncs, it is safer. Pebble
// takes the first unreadable record of its manifest for the manifest's end
// (as every such store must, for a torn write looks the same), so a flipped
// byte there makes it open an older version of the tree. With a log it would
// then apply the log's newer records on top, checkpoint and all, and what had
// been in between would be missing without a sign. Without a log the older
// version is simply older, or names a file that is gone, which is an error.
//
// # Damage
//
// Every block has a checksum that is checked when the block is read, and a
// cursor that meets a bad one ends with an error, not early. What is found
// damaged, by a reader or by a compaction, makes the store answer everything
// with [projections.ErrCorrupt] from then on. The remedy is to delete the folder
// and start again.
//
// Sources: github.com/cockroachdb/pebble/v2 v2.1.7 (version_set.go, load;
// open.go, checkConsistency; file_cache.go, UseL6Filters).
package pebble

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	crdb "github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/cofferdb/coffer/projections"
)

// Options say where a store is and what it may use.
type Options struct {
	// Dir is the folder; it is made if it is missing. Required.
	Dir string
	// Cache is the size of the block cache in bytes; 0 means 64 MiB.
	Cache int64
	// MemTable is the size of the memory table in bytes; 0 means 32 MiB. It
	// bounds what is read again from the journal after a crash. Two are usual,
	// and up to four exist while they are written out.
	MemTable int
	// FlushEvery is how long a commit stays in memory only, at most; 0 means a
	// minute.
	FlushEvery time.Duration
	// Log receives errors; nil discards them.
	Log *slog.Logger

	fs    vfs.FS // nil: the operating system's
	table int64  // size of the tables that are flushed; 0 means 16 MiB
}

// A Store is an open Pebble database. It implements [projections.Store].
type Store struct {
	db  *crdb.DB
	dir string
	fs  vfs.FS
	log *slog.Logger

	// write serialises transactions and guards scratch.
	write   sync.Mutex
	scratch txn

	dirty   atomic.Bool           // something was committed since the last flush
	damaged atomic.Pointer[error] // the first damage that was found

	stop chan struct{}
	done sync.WaitGroup
}

// Open opens the store in a folder, and makes it if the folder is empty. It
// fails with [projections.ErrLocked] if a process has it open, with
// [projections.ErrCorrupt] if what is there cannot be opened, and with
// [projections.ErrUnavailable] if the system refuses.
func Open(o Options) (*Store, error) {
	s := &Store{log: o.Log, stop: make(chan struct{})}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if o.Dir == "" {
		return nil, errors.New("view store: no folder is given")
	}
	if o.fs == nil {
		o.fs = vfs.Default
	}
	s.dir, s.fs = o.Dir, o.fs
	if err := s.open(o); err != nil {
		return nil, fmt.Errorf("open view store %s: %w", o.Dir, err)
	}
	every := o.FlushEvery
	if every <= 0 {
		every = time.Minute
	}
	s.done.Go(func() { s.flushEvery(every) })
	return s, nil
}

func (s *Store) open(o Options) error {
	if err := o.fs.MkdirAll(o.Dir, 0o700); err != nil {
		return fmt.Errorf("%w: %w", projections.ErrUnavailable, err)
	}
	lock, err := crdb.LockDirectory(o.Dir, o.fs)
	if err != nil {
		var path *fs.PathError
		if errors.As(err, &path) && !errors.Is(err, syscall.EAGAIN) {
			return fmt.Errorf("%w: %w", projections.ErrUnavailable, err)
		}
		return fmt.Errorf("%w: %w", projections.ErrLocked, err)
	}
	opts := s.options(o)
	opts.Lock = lock
	defer opts.Cache.Unref() // the database holds its own reference
	if err := refuseHeadless(o); err != nil {
		return errors.Join(err, lock.Close())
	}
	s.db, err = openDB(o.Dir, opts)
	if err != nil {
		err = classify(err)
		if !errors.Is(err, projections.ErrUnavailable) && !errors.Is(err, projections.ErrCorrupt) {
			// Whatever Pebble does not like about the folder is damage: this
			// program and no other wrote it.
			err = fmt.Errorf("%w: %w", projections.ErrCorrupt, err)
		}
		return errors.Join(err, lock.Close())
	}
	// From here on the database holds the lock.
	return lock.Close()
}

// openDB opens the database and turns a panic into an error: some damage makes
// Pebble's decoders run out of their bounds.
func openDB(dir string, opts *crdb.Options) (db *crdb.DB, err error) {
	defer func() {
		if v := recover(); v != nil {
			db, err = nil, fmt.Errorf("%w: panic: %v", projections.ErrCorrupt, v)
		}
	}()
	return crdb.Open(dir, opts)
}

// refuseHeadless refuses a folder with tables but without the file that says
// which of them count. Pebble would start an empty database there.
func refuseHeadless(o Options) error {
	desc, err := crdb.Peek(o.Dir, o.fs)
	if err != nil {
		return fmt.Errorf("%w: %w", projections.ErrCorrupt, err)
	}
	if desc.Exists {
		return nil
	}
	names, err := o.fs.List(o.Dir)
	if err != nil {
		return fmt.Errorf("%w: %w", projections.ErrUnavailable, err)
	}
	for _, name := range names {
		if ext := filepath.Ext(name); ext == ".sst" || ext == ".blob" {
			return fmt.Errorf("%w: %s has no manifest", projections.ErrCorrupt, name)
		}
	}
	return nil
}

func (s *Store) options(o Options) *crdb.Options {
	size := o.Cache
	if size <= 0 {
		size = 64 << 20
	}
	mem := o.MemTable
	if mem <= 0 {
		mem = 32 << 20
	}
	opts := &crdb.Options{
		FS:                          gathering{o.fs},
		Cache:                       crdb.NewCache(size + 2*int64(mem)), // memory tables are taken out of it
		Comparer:                    crdb.DefaultComparer,               // bytes; a key is its own prefix
		FormatMajorVersion:          crdb.FormatNewest,
		DisableWAL:                  true,
		MemTableSize:                uint64(mem),
		MemTableStopWritesThreshold: 4,
		// A compaction out of L0 rewrites what the next level has of the same keys,
		// so it should have much to bring: it begins at a depth of four, half of the
		// threshold. A look-up pays for each: with more than ten memory tables, depths
		// and levels together, Pebble allocates what it looks with anew each time. A
		// high stop keeps an import from stalling on the compactions it is ahead of.
		L0CompactionThreshold: 8,
		L0StopWritesThreshold: 32,
		LBaseMaxBytes:         256 << 20,
		MaxOpenFiles:          1000,
		Logger:                logger{s.log},
		EventListener: &crdb.EventListener{
			BackgroundError: s.backgroundError,
			DataCorruption:  func(i crdb.DataCorruptionInfo) { s.damage(i.Details) },
		},
	}
	opts.Experimental.SpanPolicyFunc = apart
	for i := range opts.Levels {
		// The same size on every level. Left to grow with the level, a table of
		// index entries on the last one has millions of keys and a filter of
		// several MiB, more than a shard of the cache holds.
		opts.TargetFileSizes[i] = 16 << 20
		if o.table > 0 {
			opts.TargetFileSizes[i] = o.table
		}
		l := &opts.Levels[i]
		// Sealed bytes do not compress, and the keys are a tenth of the data.
		l.Compression = func() *sstable.CompressionProfile { return sstable.NoCompression }
		// "Is this event there already?" is asked for each append and is
		// nearly always answered with no. Ten bits a key answer it from memory
		// in 99 of 100 cases, on the last level too, see reader.get.
		l.FilterPolicy = bloom.FilterPolicy(10)
		l.FilterType = crdb.TableFilter
		// A page of 50 sealed messages is some 60 KiB in one run.
		l.BlockSize = 16 << 10
		l.IndexBlockSize = 64 << 10
	}
	return opts
}

// apart ends a file where a table of the views ends, a table being what a key's
// first byte says. In files of its own, a table whose keys only rise, the events of
// an app for one, is written twice and then moved: its new files overlap with no old
// ones. Beside another table it would be rewritten with it, on every level.
func apart(start []byte) (policy crdb.SpanPolicy, end []byte, err error) {
	if len(start) > 0 && start[0] < 0xff {
		end = []byte{start[0] + 1}
	}
	return crdb.SpanPolicy{}, end, nil
}

func (s *Store) backgroundError(err error) {
	if crdb.IsCorruptionError(err) {
		s.damage(err)
		return
	}
	s.log.Error("view store background work failed", "error", err)
}

// damage notes the first damage. From then on nothing is answered: one bad block
// says that the disk, or somebody, changes what was written.
func (s *Store) damage(err error) {
	if s.damaged.CompareAndSwap(nil, &err) {
		s.log.Error("view store is corrupt", "error", err)
	}
}

// check returns the error of a store that was found damaged.
func (s *Store) check() error {
	if p := s.damaged.Load(); p != nil {
		return fmt.Errorf("%w: %w", projections.ErrCorrupt, *p)
	}
	return nil
}

// fail classifies an error of the database, and notes damage.
func (s *Store) fail(err error) error {
	if err == nil {
		return nil
	}
	err = classify(err)
	if errors.Is(err, projections.ErrCorrupt) {
		s.damage(err)
	}
	return err
}

// classify puts one of this module's sentinels on an error of the database.
func classify(err error) error {
	switch {
	case err == nil, errors.Is(err, projections.ErrCorrupt), errors.Is(err, projections.ErrUnavailable):
		return err
	case crdb.IsCorruptionError(err), errors.Is(err, os.ErrNotExist):
		// A file that the manifest names and the folder lacks.
		return fmt.Errorf("%w: %w", projections.ErrCorrupt, err)
	}
	if _, ok := errors.AsType[syscall.Errno](err); ok {
		return fmt.Errorf("%w: %w", projections.ErrUnavailable, err)
	}
	return err
}

// flushEvery writes the memory table out from time to time. Without it a quiet
// store would keep its last commits in memory for ever, and they could leave
// the journal by age before a crash made them necessary.
func (s *Store) flushEvery(every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-s.stop:
			return
		case <-tick.C:
		}
		if s.dirty.Swap(false) {
			if err := s.Flush(); err != nil {
				s.log.Error("view store flush failed", "error", err)
			}
		}
	}
}

// Flush makes what was committed durable.
func (s *Store) Flush() error {
	if err := s.check(); err != nil {
		return err
	}
	if err := s.db.Flush(); err != nil {
		return fmt.Errorf("flush view store: %w", s.fail(err))
	}
	return nil
}

// Close makes what was committed durable and closes the store.
func (s *Store) Close() error {
	close(s.stop)
	s.done.Wait()
	var flush error
	if s.damaged.Load() == nil {
		flush = s.Flush()
	}
	if err := s.db.Close(); err != nil && s.damaged.Load() == nil {
		return errors.Join(flush, fmt.Errorf("close view store: %w", classify(err)))
	}
	return flush
}

// Size returns the bytes that the store has on disk, 0 when it has failed.
func (s *Store) Size() uint64 {
	if s.check() != nil {
		return 0
	}
	return s.db.Metrics().DiskSpaceUsage()
}

// View calls fn with a snapshot.
func (s *Store) View(fn func(projections.Reader) error) error {
	if err := s.check(); err != nil {
		return err
	}
	r := reader{store: s}
	defer r.close()
	return fn(&r)
}

// Update calls fn with a transaction and commits it.
func (s *Store) Update(fn func(projections.Txn) error) error {
	s.write.Lock()
	defer s.write.Unlock()
	if err := s.check(); err != nil {
		return err
	}
	t := &s.scratch
	t.begin(s)
	defer t.end()
	if err := fn(t); err != nil {
		return err
	}
	if err := t.commit(); err != nil {
		return fmt.Errorf("commit: %w", s.fail(err))
	}
	s.dirty.Store(true)
	return nil
}

// logger passes Pebble's errors on. What it calls fatal leaves the database in
// memory and on disk apart, and Pebble relies on not returning; the process
// ends, and the next start finds the last consistent version.
type logger struct{ log *slog.Logger }

func (logger) Infof(string, ...any) {}

func (l logger) Errorf(format string, args ...any) {
	l.log.Error("pebble", "error", fmt.Sprintf(format, args...))
}

func (l logger) Fatalf(format string, args ...any) {
	l.log.Error("pebble cannot go on", "error", fmt.Sprintf(format, args...))
	panic("view store: " + fmt.Sprintf(format, args...))
}
