// Package shelf keeps records that end when nobody has used them for a time:
// accounts and profiles.
//
// A record is a row whose value holds its last use in the clear and its content
// in an envelope, sealed under the epoch of that use and the record's own
// subject. Writing the last use down seals the content anew, so the key of an
// old epoch opens only what has not been used since, and destroying it with the
// last record's end makes copies elsewhere unreadable too.
//
// A use is written down at most once in [Life].Refresh. Every write moves a row
// to the end of its bucket, so the bucket's own order is that of the last uses,
// and a sweep looks at what has come to its end and at one row more.
package shelf

import (
	"context"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/cofferdb/coffer/kms"
)

// Life says how long unused records of a kind are kept. All are required; they
// are those of journal.Retention.
type Life struct {
	// Class is the class of the key epochs.
	Class string
	// Lifetime counts from the last use that was written down; Warning is how
	// long before the end its owner is warned.
	Lifetime, Warning time.Duration
	// Refresh is the time in which a use is written down at most once.
	Refresh time.Duration
}

// Due reports whether a use at now is to be written down.
func (l Life) Due(used, now time.Time) bool { return !now.Before(used.Add(l.Refresh)) }

// Ends is when a record ends that is not used again.
func (l Life) Ends(used time.Time) time.Time { return used.Add(l.Lifetime) }

// Ended reports whether a record must not be served any more.
func (l Life) Ended(used, now time.Time) bool { return !now.Before(l.Ends(used)) }

// Warned reports whether the time to warn of the end has come.
func (l Life) Warned(used, now time.Time) bool {
	return !now.Before(l.Ends(used).Add(-l.Warning))
}

// epochParts is how many key epochs a lifetime has: a key outlives its last
// record by at most a tenth of the lifetime.
const epochParts = 10

// Epoch is the key epoch of a use.
func (l Life) Epoch(used time.Time) kms.Epoch {
	length := max(l.Lifetime/epochParts, time.Second).Truncate(time.Second)
	seconds := int64(length / time.Second)
	from := time.Unix(used.Unix()/seconds*seconds, 0).UTC()
	until := from.Add(length)
	return kms.Epoch{Class: l.Class, From: from, Until: until, Expires: until.Add(l.Lifetime)}
}

// Keys are the keys that records are sealed with.
type Keys struct {
	Keyring *kms.Keyring
	// Domain begins the additional data: the kind of record and its version.
	Domain string
}

// Seal seals the content of a record of an app's subject, used at the time. The
// parts say which record it is: it opens as no other.
func (k Keys) Seal(ctx context.Context, life Life, app string, subject kms.Tag, used time.Time, content []byte, parts ...string) ([]byte, error) {
	key, err := k.Keyring.Sealer(ctx, app, life.Epoch(used), subject)
	if err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	header := key.Header()
	return key.Seal(nil, k.additional(header, app, parts), content), nil
}

// Open opens what Seal sealed.
func (k Keys) Open(ctx context.Context, app string, subject kms.Tag, envelope []byte, parts ...string) ([]byte, error) {
	header, err := kms.ParseHeader(envelope)
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	if header.Subject != subject {
		return nil, fmt.Errorf("open: %w: it is another subject's", kms.ErrAuthentication)
	}
	key, err := k.Keyring.Opener(ctx, app, header.Epoch, header.Subject)
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	content, err := key.Open(nil, k.additional(header, app, parts), envelope)
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	return content, nil
}

// additional is the header, then the domain, the app and the parts, each after
// its length in four bytes. The region is in the key.
func (k Keys) additional(header kms.Header, app string, parts []string) []byte {
	data := header.Append(nil)
	for _, part := range append([]string{k.Domain, app}, parts...) {
		data = binary.BigEndian.AppendUint32(data, uint32(len(part))) //nolint:gosec // names are short
		data = append(data, part...)
	}
	return data
}
