package journal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// requestTimeout is how long one answer is waited for: a request that went down
// with its connection is never answered, and there must be time for another.
const requestTimeout = time.Second

// resolve looks into the stream for entries of which it is not known whether
// they were stored, behind what is known of it. Each gets its sequence, or is
// known not to be there. An envelope has a random nonce, so no other event has
// the same bytes, and a marker's subject is its own.
//
// The server may still hold a publish of a broken connection in a queue and
// store it afterwards. An event can then be in the stream twice; views drop the
// second one.
func (s *stream) resolve(ctx context.Context, open []*entry) error {
	request, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	handle, err := s.j.js.Stream(request, s.info.Name)
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
		request, cancel := context.WithTimeout(ctx, requestTimeout)
		msg, err := handle.GetMsg(request, seq)
		cancel()
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue
		}
		if err != nil {
			return streamError(err)
		}
		for _, e := range wanted[string(head(msg.Data))] {
			// The first copy counts, as it does in the views.
			if e.doubtful && msg.Subject == e.subject && bytes.Equal(e.record, msg.Data) {
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

func (s *stream) retryDoubt() {
	ctx, cancel := context.WithTimeout(context.Background(), s.j.cfg.CommitTimeout)
	defer cancel()
	err := s.health(ctx)
	if err == nil {
		err = s.settleDoubt(ctx)
	}
	if err != nil { // tried again until it is known
		s.j.log.Warn("it is still not known whether events were stored", "stream", s.info.Name, "events", len(s.doubt), "error", err)
	}
}

// settleDoubt finds out about events whose callers have been told that they may
// or may not be stored, so that the same event can be appended again.
func (s *stream) settleDoubt(ctx context.Context) error {
	if err := s.resolve(ctx, s.doubt); err != nil {
		return err
	}
	if s.gated {
		if err := s.j.cfg.Sync.Sync(s.info.Name); err != nil {
			for _, e := range s.doubt {
				e.seq, e.doubtful = 0, true
			}
			return fmt.Errorf("sync: %w", err)
		}
		s.durable.store(s.last)
	}
	s.recent.settle(s.doubt, 0, s.j.cfg.Index != nil)
	clear(s.doubt)
	s.doubt = s.doubt[:0]
	return nil
}
