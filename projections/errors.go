package projections

import (
	"errors"
	"fmt"

	"github.com/cofferdb/coffer/journal"
)

// The sentinels below are what callers branch on, with [errors.Is].
var (
	// ErrCorrupt means that the store on disk is damaged: a checksum does not
	// match, a file is missing, or it cannot be opened. Stop serving from it,
	// delete the store's folder and start again: the views are rebuilt from the
	// journal.
	ErrCorrupt = errors.New("the view store is corrupt")

	// ErrLocked means that another process has the store open. Two processes
	// must not share a folder: stop the other one, or use another folder.
	ErrLocked = errors.New("the view store is in use by another process")

	// ErrUnavailable means that the store could not be read or written for a
	// reason that is not its content: no room, too many open files, no
	// permission, an I/O error. Remove the cause and start again; nothing is
	// lost.
	ErrUnavailable = errors.New("the view store is unavailable")

	// ErrRebuilding means that the view is being rebuilt, or filled for the
	// first time, and must not be read yet. Try again later; [Runner.Status]
	// says how far it is.
	ErrRebuilding = errors.New("the view is being rebuilt")

	// ErrStopped means that a projection has stopped on a stream, for a reason
	// that this error wraps: what was appended since is not in the view. An
	// operator has to look at the reason; it does not go away by itself.
	ErrStopped = errors.New("the projection has stopped")

	// ErrUnknown means that the runner has no such projection or stream.
	ErrUnknown = errors.New("no such projection or stream")
)

// A RecordError says which record could not be applied, and why.
type RecordError struct {
	Projection string
	Stream     string
	// Sequence is the record's place in the stream, Position in its app.
	Sequence uint64
	App      journal.AppID
	Position journal.Position
	// Err is the reason.
	Err error
}

// Error names the record; it has nothing of its content.
func (e *RecordError) Error() string {
	return fmt.Sprintf("projection %s: stream %s sequence %d (app %s position %s): %v",
		e.Projection, e.Stream, e.Sequence, e.App, e.Position, e.Err)
}

// Unwrap returns the reason.
func (e *RecordError) Unwrap() error { return e.Err }

// A PanicError is the reason of a [RecordError] when a projection panicked.
type PanicError struct {
	// Value is what was passed to panic, as text.
	Value string
	// Stack is where it happened.
	Stack string
}

// Error has the value and not the stack.
func (e *PanicError) Error() string { return "panic: " + e.Value }
