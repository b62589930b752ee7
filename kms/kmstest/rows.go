package kmstest

import (
	"bytes"
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cofferdb/coffer/kms"
)

// Rows keeps rows in memory, for tests. It is safe for concurrent use; NewRows
// makes it.
type Rows struct {
	mu       sync.Mutex // guards what follows
	rows     map[string]kms.Row
	revision uint64
	watchers map[chan string]string // channel to prefix
	writes   int
	loads    int
	failNext int
	failWith error
	lost     bool // a failed write happens nevertheless
	delay    time.Duration
	hook     func(op, name string)
}

// NewRows has no rows.
func NewRows() *Rows {
	return &Rows{rows: map[string]kms.Row{}, watchers: map[chan string]string{}}
}

// FailNext lets the next n calls fail. With lost, writes among them happen
// nevertheless, as when an answer is lost on the way.
func (r *Rows) FailNext(n int, err error, lost bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failNext, r.failWith, r.lost = n, err, lost
}

// Hook is called before each call, without a lock held.
func (r *Rows) Hook(f func(op, name string)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hook = f
}

// Delay lets every call take d.
func (r *Rows) Delay(d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.delay = d
}

// Writes returns how many writes were tried.
func (r *Rows) Writes() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.writes
}

// Loads returns how many rows were asked for.
func (r *Rows) Loads() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.loads
}

// Names returns the names of all rows, sorted.
func (r *Rows) Names() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Sorted(maps.Keys(r.rows))
}

// Contains reports whether a row holds the bytes.
func (r *Rows) Contains(needle []byte) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, row := range r.rows {
		if bytes.Contains(row.Value, needle) {
			return true
		}
	}
	return false
}

// Clone returns a copy of the rows, in which one has another value.
func (r *Rows) Clone(name string, value []byte) *Rows {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := NewRows()
	c.rows, c.revision = maps.Clone(r.rows), r.revision
	row := c.rows[name]
	row.Value = value
	c.rows[name] = row
	return c
}

// Disconnect closes every watch, as a lost connection does.
func (r *Rows) Disconnect() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := range r.watchers {
		close(c)
	}
	clear(r.watchers)
}

// Load returns the row.
func (r *Rows) Load(ctx context.Context, name string) (kms.Row, error) {
	if _, err := r.before(ctx, "load", name); err != nil {
		return kms.Row{}, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.loads++
	row, ok := r.rows[name]
	if !ok {
		return kms.Row{}, kms.ErrRowNotFound
	}
	return kms.Row{Value: bytes.Clone(row.Value), Revision: row.Revision}, nil
}

// Create makes a row.
func (r *Rows) Create(ctx context.Context, name string, value []byte) (uint64, error) {
	return r.write(ctx, "create", name, value, func(_ kms.Row, exists bool) error {
		if exists {
			return kms.ErrRowConflict
		}
		return nil
	})
}

// Update replaces a row.
func (r *Rows) Update(ctx context.Context, name string, value []byte, revision uint64) (uint64, error) {
	return r.write(ctx, "update", name, value, func(row kms.Row, exists bool) error {
		if !exists || row.Revision != revision {
			return kms.ErrRowConflict
		}
		return nil
	})
}

// Delete removes a row.
func (r *Rows) Delete(ctx context.Context, name string, revision uint64) error {
	_, err := r.write(ctx, "delete", name, nil, func(row kms.Row, exists bool) error {
		switch {
		case !exists:
			return kms.ErrRowNotFound
		case row.Revision != revision:
			return kms.ErrRowConflict
		}
		return nil
	})
	return err
}

// List yields names.
func (r *Rows) List(ctx context.Context, prefix string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		if _, err := r.before(ctx, "list", prefix); err != nil {
			yield("", err)
			return
		}
		for _, name := range r.Names() {
			if strings.HasPrefix(name, prefix) && !yield(name, nil) {
				return
			}
		}
	}
}

// Watch tells of writes.
func (r *Rows) Watch(ctx context.Context, prefix string) (<-chan string, error) {
	if _, err := r.before(ctx, "watch", prefix); err != nil {
		return nil, err
	}
	c := make(chan string, 1024)
	r.mu.Lock()
	r.watchers[c] = prefix
	r.mu.Unlock()
	context.AfterFunc(ctx, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if _, ok := r.watchers[c]; ok {
			delete(r.watchers, c)
			close(c)
		}
	})
	return c, nil
}

// before returns whether a write that fails happens nevertheless.
func (r *Rows) before(ctx context.Context, op, name string) (lost bool, err error) {
	r.mu.Lock()
	hook, delay := r.hook, r.delay
	r.mu.Unlock()
	if hook != nil {
		hook(op, name)
	}
	if delay > 0 {
		t := time.NewTimer(delay)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
		}
	}
	if err := ctx.Err(); err != nil {
		return false, fmt.Errorf("%s %s: %w", op, name, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.failNext > 0 {
		r.failNext--
		return r.lost, fmt.Errorf("%s %s: %w", op, name, r.failWith)
	}
	return false, nil
}

func (r *Rows) write(ctx context.Context, op, name string, value []byte, check func(kms.Row, bool) error) (uint64, error) {
	lost, failure := r.before(ctx, op, name)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.writes++
	if failure != nil && !lost {
		return 0, failure
	}
	row, exists := r.rows[name]
	if err := check(row, exists); err != nil {
		if failure != nil {
			return 0, failure
		}
		return 0, fmt.Errorf("%s %s: %w", op, name, err)
	}
	r.revision++
	if op == "delete" {
		delete(r.rows, name)
	} else {
		r.rows[name] = kms.Row{Value: bytes.Clone(value), Revision: r.revision}
	}
	for c, prefix := range r.watchers {
		if !strings.HasPrefix(name, prefix) {
			continue
		}
		select {
		case c <- name:
		default: // too slow: it may have missed a name, so it must start again
			delete(r.watchers, c)
			close(c)
		}
	}
	return r.revision, failure
}
