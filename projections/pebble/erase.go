package pebble

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/cofferdb/coffer/projections"
)

var _ projections.Eraser = (*Store)(nil)

// obsoleteEvery is how often it is looked whether replaced files are gone.
const obsoleteEvery = 20 * time.Millisecond

// Erase is part of [projections.Eraser]. It compacts what is between each key and
// the next, and waits until the files that held it before are deleted: an iterator
// that was opened earlier holds them.
func (s *Store) Erase(ctx context.Context, keys ...[]byte) error {
	if err := s.check(); err != nil {
		return err
	}
	for _, key := range keys {
		// The memory table is flushed first. A compaction of a range goes through
		// all levels that have something of it.
		if err := s.db.Compact(ctx, key, append(append([]byte(nil), key...), 0), false); err != nil {
			return fmt.Errorf("erase: %w", s.fail(err))
		}
	}
	return s.awaitGone(ctx)
}

// awaitGone waits until the tables that are on disk and no longer belong to the
// tree are gone. Others may become such ones meanwhile; they do not matter.
func (s *Store) awaitGone(ctx context.Context) error {
	names, err := s.fs.List(s.dir)
	if err != nil {
		return fmt.Errorf("erase: %w: %w", projections.ErrUnavailable, err)
	}
	tick := time.NewTicker(obsoleteEvery)
	defer tick.Stop()
	for {
		if names, err = s.obsolete(names); err != nil {
			return fmt.Errorf("erase: %w", err)
		}
		if len(names) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("erase: %w: replaced files are still read: %w", projections.ErrUnavailable, ctx.Err())
		case <-tick.C:
		}
	}
}

// obsolete returns which of the files are tables that are there and do not belong
// to the tree.
func (s *Store) obsolete(names []string) ([]string, error) {
	levels, err := s.db.SSTables()
	if err != nil {
		return nil, s.fail(err)
	}
	live := map[string]bool{}
	for _, level := range levels {
		for _, table := range level {
			live[fmt.Sprintf("%06d.sst", uint64(table.BackingSSTNum))] = true
		}
	}
	var left []string
	for _, name := range names {
		if filepath.Ext(name) != ".sst" || live[name] {
			continue
		}
		switch _, err := s.fs.Stat(filepath.Join(s.dir, name)); {
		case err == nil:
			left = append(left, name)
		case !errors.Is(err, fs.ErrNotExist):
			return nil, fmt.Errorf("%w: %w", projections.ErrUnavailable, err)
		}
	}
	return left, nil
}
