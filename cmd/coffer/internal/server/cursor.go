package server

import (
	"context"
	"crypto/hmac"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cofferdb/coffer/journal"
)

const (
	cursorPrefix  = "c1_"
	cursorMACSize = 16
	cursorSize    = 8 + cursorMACSize
	cursorPurpose = "cursor"
)

// binding is what a cursor belongs to besides its app: the list, its filters
// and its order. A cursor from one query used with another would skip or repeat
// events without anybody noticing, so it is refused.
type binding struct {
	list         string // "events", "messages", "conversations" or "inbox"
	conversation string
	user         string
	types        []journal.Type
	from, until  time.Time
	reverse      bool
	scope        string // the user whose token asked; empty for the app's
}

// bytes is the binding with each part's length in front, so that no two
// bindings have the same bytes.
func (b binding) bytes() []byte {
	out := appendPart(nil, []byte(b.list))
	out = appendPart(out, []byte(b.conversation))
	out = appendPart(out, []byte(b.user))
	types := slices.Clone(b.types)
	slices.Sort(types)
	out = binary.BigEndian.AppendUint32(out, uint32(len(types)))
	for _, t := range types {
		out = append(out, byte(t))
	}
	for _, t := range []time.Time{b.from, b.until} {
		text := ""
		if !t.IsZero() {
			text = t.UTC().Format(time.RFC3339Nano)
		}
		out = appendPart(out, []byte(text))
	}
	order := byte(0)
	if b.reverse {
		order = 1
	}
	out = append(out, order)
	if b.scope != "" {
		out = appendPart(out, []byte(b.scope))
	}
	return out
}

func appendPart(dst, part []byte) []byte {
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(part)))
	return append(dst, part...)
}

// macFunc authenticates a message under a key of the app: journal.MAC.
type macFunc func(ctx context.Context, app journal.AppID, purpose string, message []byte) ([32]byte, error)

// encodeCursor makes a cursor: prefix, then base64url of position and MAC.
func encodeCursor(ctx context.Context, mac macFunc, app journal.AppID, b binding, position journal.Position) (string, error) {
	place := binary.BigEndian.AppendUint64(nil, uint64(position))
	sum, err := mac(ctx, app, cursorPurpose, append(b.bytes(), place...))
	if err != nil {
		return "", fmt.Errorf("making a cursor: %w", err)
	}
	return cursorPrefix + base64.RawURLEncoding.EncodeToString(append(place, sum[:cursorMACSize]...)), nil
}

// decodeCursor returns the position of a cursor, and false for one that was not
// made for this app and binding. A cursor of another query and a forged one
// look the same, on purpose.
func decodeCursor(ctx context.Context, mac macFunc, app journal.AppID, b binding, text string) (journal.Position, bool, error) {
	body, ok := strings.CutPrefix(text, cursorPrefix)
	if !ok || len(body) != base64.RawURLEncoding.EncodedLen(cursorSize) || strings.ContainsAny(body, "\r\n") {
		return 0, false, nil
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(body)
	if err != nil {
		return 0, false, nil //nolint:nilerr // not a cursor, which is an answer and no failure
	}
	sum, err := mac(ctx, app, cursorPurpose, append(b.bytes(), raw[:8]...))
	if err != nil {
		return 0, false, fmt.Errorf("checking a cursor: %w", err)
	}
	if !hmac.Equal(sum[:cursorMACSize], raw[8:]) {
		return 0, false, nil
	}
	return journal.Position(binary.BigEndian.Uint64(raw)), true, nil
}
