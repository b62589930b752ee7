package journal

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/cofferdb/coffer/kms"
)

// OpenRecord appends the plaintext of an app's record, the event's canonical
// JSON, to dst. With the keys in memory and room in dst it allocates nothing.
//
// [ErrCorrupt] means that the record was changed, or is another app's; errors
// of package kms say why there is no key.
func (j *Journal) OpenRecord(ctx context.Context, dst []byte, app AppID, record []byte) ([]byte, error) {
	_, envelope, err := ParseRecord(record)
	if err != nil {
		return nil, err
	}
	r, err := j.route(ctx, app)
	if err != nil {
		return nil, fmt.Errorf("open a record: %w", err)
	}
	h, err := kms.ParseHeader(envelope)
	if err != nil {
		return nil, fmt.Errorf("open a record: %w: %w", ErrCorrupt, err)
	}
	key, err := j.keyring.Opener(ctx, r.text, h.Epoch, h.Subject)
	if err != nil {
		return nil, fmt.Errorf("open a record: epoch %s: %w", strconv.FormatUint(uint64(h.Epoch), 10), err)
	}
	s := scratchPool.Get().(*scratch) //nolint:errcheck,forcetypeassert // nothing else is put
	s.aad = append(append(s.aad[:0], r.aad...), record[:HeaderSize]...)
	dst, err = key.Open(dst, s.aad, envelope)
	scratchPool.Put(s)
	if err != nil {
		if errors.Is(err, kms.ErrAuthentication) || errors.Is(err, kms.ErrKeyMismatch) || errors.Is(err, kms.ErrEnvelope) {
			return nil, fmt.Errorf("open a record: %w: %w", ErrCorrupt, err)
		}
		return nil, fmt.Errorf("open a record: %w", err)
	}
	return dst, nil
}
