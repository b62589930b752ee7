package journal

import "errors"

// The sentinels below are what callers branch on, with [errors.Is]. Errors of
// the key provider are passed on wrapped, see package kms.
var (
	// ErrInvalid is the class of every [*InputError]: the event, id or
	// parameter breaks a rule of the format. Correct it; sending it again as it
	// is cannot succeed. Nothing was stored.
	ErrInvalid = errors.New("invalid input")

	// ErrTooLarge means that an event, a field of it or a batch is over its
	// limit. Send less; nothing was stored.
	ErrTooLarge = errors.New("over the size limit")

	// ErrTimeRange means that an event's time lies before the year 2000 or more
	// than five minutes in the future. Correct the caller's clock.
	ErrTimeRange = errors.New("time out of range")

	// ErrExpired means that an event is older than the app's plan keeps events:
	// it would be hidden at once, so it is not stored. Skip it, or move the app
	// to a plan that keeps events longer.
	ErrExpired = errors.New("older than the plan keeps events")

	// ErrConflict means that an event with the same id and another content is
	// already stored. Give the new event an id of its own; the stored one is
	// unchanged.
	ErrConflict = errors.New("the event id is taken by another content")

	// ErrUnknownApp means that no app of this region has this id. Check the id;
	// do not create the app by guess.
	ErrUnknownApp = errors.New("unknown app")

	// ErrAppDeleted means that the app is deleted or being deleted. It is an
	// [ErrUnknownApp] too, and who asks for the app may be told only that: nothing
	// of it can be had, and its id is not given again.
	ErrAppDeleted = errors.New("the app has been deleted")

	// ErrAppExists means that an app with this id is there already. Read it.
	ErrAppExists = errors.New("the app exists already")

	// ErrWrongRegion means that the app's id names another region. Send the
	// request to that region; this one has nothing of the app.
	ErrWrongRegion = errors.New("the app belongs to another region")

	// ErrDisabled means that an operator has disabled the app. Nothing is
	// accepted or served for it until it is enabled again.
	ErrDisabled = errors.New("the app is disabled")

	// ErrRotating means that an app has two certificates already. Withdraw the
	// older one first: a third would end it without a word.
	ErrRotating = errors.New("the certificate is being rotated already")

	// ErrUnknownPlan means that the plan is not in the region's plan table.
	ErrUnknownPlan = errors.New("unknown plan")

	// ErrMoving means that the app's plan is being changed. Wait for the end of
	// that change; it can be looked at.
	ErrMoving = errors.New("the app's plan is being changed")

	// ErrUnknownMove means that the app has not changed its plan.
	ErrUnknownMove = errors.New("no such plan change")

	// ErrGap means that a stream lacks sequences that a reader has not seen and
	// that no retention rule explains. Stop and run the verification: data is
	// missing. Reading on would hide the loss.
	ErrGap = errors.New("the stream has a gap")

	// ErrIncarnation means that a stream is missing, or is not the one that was
	// registered or that the reader's checkpoint belongs to: it was deleted,
	// re-created or restored from an older copy. Stop; an operator has to decide
	// what is true. A stream is never re-created by itself.
	ErrIncarnation = errors.New("the stream is not the registered one")

	// ErrCorrupt means that stored bytes do not parse or do not authenticate.
	// Stop at the position that the error names; do not skip it.
	ErrCorrupt = errors.New("the stored record is corrupt")

	// ErrUnavailable means that the stream store did not answer in time, or
	// that the journal is closed. The append may or may not have taken place:
	// send the same events, with the same ids, again.
	ErrUnavailable = errors.New("the journal is unavailable")

	// ErrFull means that the store has no room left. Nothing more is accepted
	// until an operator makes room; what was acknowledged is kept.
	ErrFull = errors.New("the journal is full")
)

// InputError tells what is wrong with an input and where. Its text carries no
// payload. [errors.Is] finds [ErrInvalid] in it, or the narrower class
// [ErrTooLarge] or [ErrTimeRange] where one applies.
type InputError struct {
	// Pointer is the JSON pointer (RFC 6901) of the offending value, relative
	// to the event; empty for the event as a whole.
	Pointer string
	// Detail says what is wrong, in a sentence without a full stop.
	Detail string

	class error
}

// Error returns the pointer and the detail.
func (e *InputError) Error() string {
	if e.Pointer == "" {
		return e.Detail
	}
	return e.Pointer + ": " + e.Detail
}

// Unwrap returns the class of the error.
func (e *InputError) Unwrap() error {
	if e.class == nil {
		return ErrInvalid
	}
	return e.class
}

func invalid(pointer, detail string) *InputError {
	return &InputError{Pointer: pointer, Detail: detail}
}

func tooLarge(pointer, detail string) *InputError {
	return &InputError{Pointer: pointer, Detail: detail, class: ErrTooLarge}
}
