package projections

import (
	"context"

	"github.com/cofferdb/coffer/journal"
)

// A Projection folds records into a view.
type Projection interface {
	// Name names the projection: lower-case letters, digits and hyphens.
	Name() string

	// Format is the version of what the projection writes. When it differs
	// from the one that the store was written with, the runner drops the view
	// and rebuilds it.
	Format() uint32

	// Tables lists the first bytes of the projection's keys. No other
	// projection in the same store may have one of them, and 0x00 is the
	// runner's. They are what a rebuild drops.
	Tables() []byte

	// Apply writes what the records change. They follow one another in the
	// stream; a batch may end anywhere, so the result must not depend on how
	// the records are split into batches. Records that the view has already
	// (the same event twice in the journal) change nothing.
	//
	// A record that cannot be applied is a [RecordError]. After an error, or a
	// panic, nothing of the batch is committed. The records are valid until
	// Apply returns.
	Apply(ctx context.Context, txn Txn, stream string, batch []journal.Sealed) error
}

// A Gated projection is told when its view must not be read. The runner calls
// Gate with an error (it wraps [ErrRebuilding]) when a rebuild begins, and with
// nil when the view has caught up. Readers of the view return that error.
type Gated interface {
	Projection
	Gate(err error)
}

// A Follower is a projection that wants to know, outside any transaction, how
// far the view has come. The runner calls Advanced at its start with what the
// store has, after each commit, and with 0 when the view has been dropped.
type Follower interface {
	Projection
	Advanced(stream string, sequence uint64)
}

// A Source is where the runner reads records: a region's journal.
type Source interface {
	// Streams returns the message streams of the region.
	Streams() []journal.StreamInfo

	// Read calls fn with the records after the given sequence, in order and in
	// batches, and follows the stream until ctx ends or fn fails. It fails with
	// [journal.ErrGap] if records are missing that no retention explains, and
	// with [journal.ErrIncarnation] if the stream is not the one with the given
	// incarnation; an empty incarnation stands for the registered one. The
	// batch is valid until fn returns.
	Read(ctx context.Context, stream string, after uint64, incarnation string, fn func([]journal.Sealed) error) error

	// Last returns the sequence of the stream's last record at this moment, 0
	// if there was none.
	Last(ctx context.Context, stream string) (uint64, error)

	// Locate returns the stream, and the sequence in it, that a view must have
	// reached to show the app's events up to the position. The sequence is 0
	// for a position of an earlier route.
	Locate(ctx context.Context, app journal.AppID, position journal.Position) (stream string, sequence uint64, err error)
}
