package journal

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go/jetstream"
)

// resolve looks into the stream for entries of which it is not known whether
// they were stored, behind what is known of it. Each gets its sequence, or is
// known not to be there. An envelope has a random nonce, so no other event has
// the same bytes.
//
// The server may still hold a publish of a broken connection in a queue and
// store it afterwards. An event can then be in the stream twice; views drop the
// second one.
func (s *stream) resolve(ctx context.Context, open []*entry) error {
	handle, err := s.j.js.Stream(ctx, s.info.Name)
	if err != nil {
		return streamError(err)
	}
	info := handle.CachedInfo()
	if got := info.Config.Metadata[IncarnationKey]; got != s.info.Incarnation {
		return fmt.Errorf("%w: stream %s has incarnation %q, registered is %q", ErrIncarnation, s.info.Name, got, s.info.Incarnation)
	}
	last := info.State.LastSeq
	if last < s.last {
		return fmt.Errorf("%w: stream %s ends at %d, it was at %d", ErrGap, s.info.Name, last, s.last)
	}
	wanted := make(map[string][]*entry, len(open))
	for _, e := range open {
		wanted[string(head(e.record))] = append(wanted[string(head(e.record))], e)
	}
	for seq := s.last + 1; seq <= last; seq++ {
		msg, err := handle.GetMsg(ctx, seq)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue
		}
		if err != nil {
			return streamError(err)
		}
		for _, e := range wanted[string(head(msg.Data))] {
			// The first copy counts, as it does in the views.
			if e.doubtful && bytes.Equal(e.record, msg.Data) {
				e.seq, e.err, e.doubtful = seq, nil, false
			}
		}
	}
	for _, e := range open {
		e.doubtful = false
	}
	s.last = last
	return nil
}

// head is enough of a record to tell events apart.
func head(record []byte) []byte { return record[:min(len(record), HeaderSize)] }
