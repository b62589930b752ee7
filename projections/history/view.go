package history

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections"
)

// ErrTrimmed means that events after the reader's position have left the view
// because their retention is over. The reader has missed something: it should
// say so and start again from [TrimmedError.Oldest].
var ErrTrimmed = errors.New("events after the position have expired")

// A TrimmedError tells where reading can begin again.
type TrimmedError struct {
	// Oldest is the position after which to read to get the oldest event that
	// is still there.
	Oldest journal.Position
}

// Error names the position.
func (e *TrimmedError) Error() string {
	return fmt.Sprintf("%v; the oldest that is kept follows position %s", ErrTrimmed, e.Oldest)
}

// Unwrap returns [ErrTrimmed].
func (e *TrimmedError) Unwrap() error { return ErrTrimmed }

// Config is what a view needs.
type Config struct {
	// Store is where the view is; required.
	Store projections.Store
	// Plans says how long the events of each plan are kept: when they leave the
	// view. Nil stands for [journal.DefaultPlans]. Events of a plan that is not
	// in the table stop the projection.
	Plans []journal.Plan
	// Hour is the precision with which expired events are found and removed, in
	// whole seconds; 0 means an hour. A view that was written with another one is
	// rebuilt. It is shorter than an hour only where time is scaled.
	Hour time.Duration
}

// A View reads the history view, and is the projection that writes it. Its
// methods can be called from any goroutine.
type View struct {
	store     projections.Store
	hours     hours
	retention map[string]time.Duration
	gate      atomic.Pointer[gateError]
	chunks    sync.Pool // of *portion

	mu      sync.Mutex // guards applied
	applied map[string]uint64
}

type gateError struct{ err error }

// An Item is one event of a replay. Record is borrowed: it is valid until the
// function that was given the item returns.
type Item struct {
	Position journal.Position
	// Stored is when the event arrived in the journal, to the millisecond.
	Stored time.Time
	// Type is the event's type.
	Type journal.Type
	// Recalled is set for a message that was recalled, and for an edit of it.
	// Record is then no more than the clear header.
	Recalled bool
	// Record is the header and the envelope.
	Record []byte
}

// A Query selects the events of a replay. The zero Query selects all of an app.
type Query struct {
	// After and Before bound the positions, both exclusive; a zero Before is
	// the end.
	After, Before journal.Position
	// From (inclusive) and Until (exclusive) bound the events' own times; zero
	// is no bound.
	From, Until time.Time
	// Conversation and User select by conversation tag, and by the subject tag
	// of sender or recipient.
	Conversation, User *kms.Tag
	// Types selects by type; empty is all.
	Types []journal.Type
	// Reverse replays from the newest to the oldest.
	Reverse bool
	// Limit is the number of events, at most; 0 is no limit.
	Limit int
	// Oldest hides events whose retention clock (the earlier of the event's
	// time and its arrival) lies before it: see [journal.Plan.Oldest].
	Oldest time.Time
}

// A PageQuery selects messages of a conversation.
type PageQuery struct {
	// Before asks for the newest messages before a position, After for the
	// oldest ones after it; with neither, the newest of all. With both, Before
	// decides from which end the page is taken.
	Before, After journal.Position
	// Limit is the number of messages, at most; 0 means 50. The most is 1000.
	Limit int
	// Oldest hides expired messages, as in [Query].
	Oldest time.Time
	// Buffer is where the page's records are put while there is room, so that
	// a caller who reads page after page need not have memory made for each. The
	// records are then valid until the buffer is used again.
	Buffer []byte
}

// A Page is a run of a conversation's messages, the newest first.
type Page struct {
	Messages []Message
	// Older and Newer tell whether the conversation goes on, beyond the page,
	// in the two directions.
	Older, Newer bool
}

// A Message is a message with what became of it.
type Message struct {
	// Position is that of the message itself.
	Position journal.Position
	// Stored is when it arrived in the journal, to the millisecond.
	Stored time.Time
	// Recalled is set when the message was recalled.
	Recalled bool
	// Record is the message as it was sent. Of a recalled message only the
	// clear header is left.
	Record []byte
	// Edit is the record of the newest edit, nil if there is none. Its content
	// replaces the message's.
	Edit []byte
	// Recall is the record of the recall, nil if the message stands or the
	// recall itself has expired.
	Recall []byte
	// Changed is the position of Edit or Recall, 0 if there is neither.
	Changed journal.Position
}

// AppTables is part of [projections.PerApp].
func (v *View) AppTables() []byte {
	return []byte{
		tableEvents, tableConversations, tableByConv, tableIDs, tableUsers, tableTargets, tableTimes, tableTrimmed,
	}
}
