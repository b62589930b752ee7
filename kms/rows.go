package kms

import (
	"context"
	"errors"
	"iter"
)

// Failures of [Rows].
var (
	// ErrRowNotFound: there is no row of that name. Create it, or report what is
	// missing.
	ErrRowNotFound = errors.New("kms: row not found")
	// ErrRowConflict: the row exists already, or has another revision. Load it
	// and decide again.
	ErrRowConflict = errors.New("kms: row was changed by another")
)

// Row is a value and the revision it has. Revisions of one name only grow,
// also when the row is deleted and created again; none is 0.
type Row struct {
	Value    []byte
	Revision uint64
}

// Rows keeps the keyring's rows, durably and by compare-and-set. Names consist
// of A-Z, a-z, 0-9, "_", "-" and "." and have at most 128 bytes; values have at
// most 1 MiB. kmstest.RunRows is the suite an implementation passes.
//
// A write whose error is neither ErrRowConflict nor ErrRowNotFound may or may
// not have happened.
type Rows interface {
	// Load returns the present row, or ErrRowNotFound. It sees every write that
	// had returned, of any process, before it was called.
	Load(ctx context.Context, name string) (Row, error)
	// Create makes a row, or returns ErrRowConflict when it exists. It returns
	// once the row is durable.
	Create(ctx context.Context, name string, value []byte) (revision uint64, err error)
	// Update replaces the row of the given revision, or returns ErrRowConflict.
	// It returns once the new row is durable and the bytes of the old one are
	// gone from the disk: erasing keys relies on it.
	Update(ctx context.Context, name string, value []byte, revision uint64) (newRevision uint64, err error)
	// Delete removes the row of the given revision and its bytes, or returns
	// ErrRowConflict. A row that does not exist is ErrRowNotFound.
	Delete(ctx context.Context, name string, revision uint64) error
	// List yields the names with the prefix, in any order.
	List(ctx context.Context, prefix string) iter.Seq2[string, error]
	// Watch sends the name of each row with the prefix that anybody creates,
	// updates or deletes after Watch has returned. Names may repeat. The channel
	// is closed when ctx ends, and when a name may have been missed.
	Watch(ctx context.Context, prefix string) (<-chan string, error)
}

// RowUpdate is one row of a group.
type RowUpdate struct {
	Name     string
	Value    []byte
	Revision uint64 // of the row that is replaced
}

// RowsGroup is what Rows may offer beside: many rows at the price of few.
// RewrapApps uses it.
type RowsGroup interface {
	// LoadGroup returns each row, with an error as Load has it.
	LoadGroup(ctx context.Context, names []string) ([]Row, []error)
	// UpdateGroup replaces each row of the given revision, and returns an error
	// for each, ErrRowConflict as Update does. It returns once the new rows are
	// durable and have been read again. The bytes of the old ones are gone after
	// EraseReplaced, after the next Update of the row, and otherwise soon.
	UpdateGroup(ctx context.Context, updates []RowUpdate) []error
	// EraseReplaced returns once the bytes of every row that UpdateGroup had
	// replaced before the call are gone from the disk. It may give rows that stay
	// another revision.
	EraseReplaced(ctx context.Context) error
}
