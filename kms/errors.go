package kms

import (
	"context"
	"errors"
	"strings"
)

// The classes of a provider's failures. Every error of a [Provider] is an
// *[Error] with one of them; no other class exists.
var (
	// ErrNotFound: the service has no such KEK, or no such mount. Correct the
	// configuration. The keyring drops what it has and fails closed.
	ErrNotFound = errors.New("kms: key not found")
	// ErrAccessDenied: the caller is known and may not do this. Correct the
	// policy, or accept the revocation.
	ErrAccessDenied = errors.New("kms: access denied")
	// ErrUnauthenticated: the service does not accept the credentials, and
	// getting new ones was refused. Replace the credentials.
	ErrUnauthenticated = errors.New("kms: not authenticated")
	// ErrDisabled: the KEK is disabled. Enable it if that was not meant.
	ErrDisabled = errors.New("kms: key disabled")
	// ErrPendingDeletion: the KEK is to be deleted. Cancel the deletion in time
	// if that was not meant.
	ErrPendingDeletion = errors.New("kms: key pending deletion")
	// ErrVersionRetired: the version of the KEK which made the wrap no longer
	// unwraps. Use another wrap of the same key, or restore the version.
	ErrVersionRetired = errors.New("kms: key version retired")
	// ErrMismatch: the wrap is corrupt, was made by another KEK, or is used with
	// another binding context. Do not retry; look for mixed up or damaged rows.
	ErrMismatch = errors.New("kms: wrapped key does not match its context")
	// ErrThrottled: too many requests at present. Try again later, with jitter.
	ErrThrottled = errors.New("kms: throttled")
	// ErrQuota: a limit of the account that waiting does not lift is used up.
	// Have it raised.
	ErrQuota = errors.New("kms: quota exceeded")
	// ErrUnavailable: no usable answer: refused, timed out, sealed, a fault of
	// the service. Try again later.
	ErrUnavailable = errors.New("kms: unavailable")
)

// ErrInput: a key is not of KeySize bytes, or a name is outside the limits in
// the documentation of this package. The call can never succeed: correct the
// caller.
var ErrInput = errors.New("kms: input outside limits")

// Failures of the envelope and of the keyring.
var (
	// ErrEnvelope: the bytes are no envelope of a known version, suite and
	// flags. Refuse them; a newer release may know them.
	ErrEnvelope = errors.New("kms: malformed envelope")
	// ErrKeyMismatch: the envelope was sealed with another key than the one its
	// epoch and subject lead to. Refuse it; it was moved or forged, or the
	// keyring is not the one it was sealed with.
	ErrKeyMismatch = errors.New("kms: envelope names another key")
	// ErrAuthentication: the envelope, or the additional data it is bound to, was
	// changed. Refuse it.
	ErrAuthentication = errors.New("kms: envelope fails authentication")
	// ErrSubjectErased: the subject's key was destroyed. Nothing of that subject
	// can be read or written again; answer as for data that is gone.
	ErrSubjectErased = errors.New("kms: subject erased")
	// ErrEpochDestroyed: the epoch's last event has expired and its key was
	// destroyed. Answer as for expired data.
	ErrEpochDestroyed = errors.New("kms: epoch destroyed")
	// ErrKeyUnknown: the keyring has never had this epoch or subject. The
	// envelope is forged, or the keyring is older than the data: restore a newer
	// one.
	ErrKeyUnknown = errors.New("kms: unknown epoch or subject")
	// ErrAppUnknown: the keyring has no such app. Create it first, or refuse the
	// request.
	ErrAppUnknown = errors.New("kms: unknown app")
	// ErrAppDestroyed: the app's keys were destroyed with DestroyApp. Nothing of
	// it can be read again, and its name cannot be used again.
	ErrAppDestroyed = errors.New("kms: app destroyed")
	// ErrKeyringCorrupt: a row of the keyring does not decode, or a key in it
	// fails authentication. Restore the row from a backup of the keyring.
	ErrKeyringCorrupt = errors.New("kms: keyring row corrupt")
	// ErrLastWrap: without this wrap the app key could not be unwrapped. Add
	// another and see it verified first.
	ErrLastWrap = errors.New("kms: the only working wrap of an app key")
	// ErrClosed: the keyring was closed. Do not use it any more.
	ErrClosed = errors.New("kms: keyring closed")
)

// Error is a failed call of a [Provider]. Its text holds no key, no blob and
// nothing that the service wrote.
type Error struct {
	Op        string // describe, generate, wrap, unwrap, rewrap, rotate, retire, login, open
	Provider  string
	Key       string
	RequestID string // the service's own, for its operators; empty where it has none
	Class     error  // one of the closed set
	Detail    string // in words of the provider package, never of the service
	// Cause is context.Canceled or context.DeadlineExceeded where the caller's
	// context ended the call, otherwise nil.
	Cause error
}

// Error names the operation, the key, the class and the request.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Provider)
	b.WriteByte(' ')
	b.WriteString(e.Op)
	if e.Key != "" {
		b.WriteByte(' ')
		b.WriteString(e.Key)
	}
	b.WriteString(": ")
	if e.Class != nil {
		b.WriteString(e.Class.Error())
	} else {
		b.WriteString("kms: unclassified")
	}
	if e.Detail != "" {
		b.WriteString(": ")
		b.WriteString(e.Detail)
	}
	if e.Cause != nil {
		b.WriteString(": ")
		b.WriteString(e.Cause.Error())
	}
	if e.RequestID != "" {
		b.WriteString(" (request ")
		b.WriteString(e.RequestID)
		b.WriteByte(')')
	}
	return b.String()
}

// Unwrap returns the class, and the end of the context where that was the cause.
func (e *Error) Unwrap() []error {
	if e.Cause != nil {
		return []error{e.Class, e.Cause}
	}
	return []error{e.Class}
}

// Class returns the class of a provider's failure, one of the closed set, which
// err is or wraps, and nil when there is none. A deadline that passed is
// ErrUnavailable.
func Class(err error) error {
	if err == nil {
		return nil
	}
	for _, c := range Classes() {
		if errors.Is(err, c) {
			return c
		}
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return ErrUnavailable
	}
	return nil
}

// Classes returns the closed set of classes of a provider's failures.
func Classes() []error {
	return []error{
		ErrNotFound, ErrAccessDenied, ErrUnauthenticated, ErrDisabled, ErrPendingDeletion,
		ErrVersionRetired, ErrMismatch, ErrThrottled, ErrQuota, ErrUnavailable,
	}
}

// Retryable reports whether the same call may succeed later without anybody
// changing anything: throttled or unavailable, unless the caller's own context
// was cancelled.
func Retryable(err error) bool {
	if errors.Is(err, context.Canceled) {
		return false
	}
	c := Class(err)
	return c == ErrThrottled || c == ErrUnavailable //nolint:errorlint // Class returns the sentinels themselves
}

// bridged reports whether a key already in memory may still be used after the
// provider has failed so: it has said nothing about the key.
func bridged(err error) bool {
	c := Class(err)
	return c == nil || c == ErrThrottled || c == ErrUnavailable || c == ErrQuota //nolint:errorlint // as above
}
