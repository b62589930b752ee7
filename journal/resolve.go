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
	if first := info.State.FirstSeq; first > 0 {
		s.last = max(s.last, first-1) // expired
	}
	found := newSearch(s, handle, open)
	if last-s.last > searchOneByOne {
		if err := found.ahead(ctx, last); err != nil {
			return err
		}
	}
	if err := found.rest(ctx, last); err != nil {
		return err
	}
	for _, e := range open {
		e.doubtful = false
	}
	return nil
}

// searchOneByOne is how many messages are got from the leader one by one, rather
// than through a consumer.
const searchOneByOne = 16

// search looks for entries in a stream. What has been looked at stays looked at,
// also when the search ends early: others may append faster than a search lasts,
// and one that began anew would never end.
type search struct {
	s      *stream
	handle jetstream.Stream
	wanted map[string][]*entry
}

func newSearch(s *stream, handle jetstream.Stream, open []*entry) search {
	wanted := make(map[string][]*entry, len(open))
	for _, e := range open {
		wanted[string(head(e.record))] = append(wanted[string(head(e.record))], e)
	}
	return search{s, handle, wanted}
}

// look takes one message.
func (f search) look(subject string, data []byte, seq uint64) {
	for _, e := range f.wanted[string(head(data))] {
		// The first copy counts, as it does in the views.
		if e.doubtful && subject == e.subject && bytes.Equal(e.record, data) {
			e.seq, e.err, e.doubtful = seq, nil, false
		}
	}
	f.s.last = seq
}

// ahead goes through the stream up to last as far as a consumer brings it. That
// is as far as the copy of whichever server has the consumer; the leader knows
// whether there is more, and whether what did not come is not there.
func (f search) ahead(ctx context.Context, last uint64) error {
	request, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	consumer, err := f.handle.CreateConsumer(request, jetstream.ConsumerConfig{
		DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: f.s.last + 1,
		AckPolicy: jetstream.AckNonePolicy, MemoryStorage: true, Replicas: 1, InactiveThreshold: time.Minute, MaxDeliver: 1,
	})
	if err != nil {
		return nil //nolint:nilerr // the leader has it all
	}
	defer func() {
		// Best effort: the server drops it after a minute.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
		defer cancel()
		_ = f.handle.DeleteConsumer(ctx, consumer.CachedInfo().Name)
	}()
	for before := f.s.last; f.s.last < last; before = f.s.last {
		batch, err := consumer.FetchNoWait(readBatch)
		if err != nil {
			return nil //nolint:nilerr // as above
		}
		for m := range batch.Messages() {
			seq, _, ok := parseAckSubject(m.Reply())
			if !ok || seq <= f.s.last {
				return nil
			}
			if err := f.rest(ctx, seq-1); err != nil {
				return err
			}
			f.look(m.Subject(), m.Data(), seq)
		}
		if f.s.last == before || ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}

// rest goes through the stream up to last by the leader's copy.
func (f search) rest(ctx context.Context, last uint64) error {
	for seq := f.s.last + 1; seq <= last; seq++ {
		request, cancel := context.WithTimeout(ctx, requestTimeout)
		msg, err := f.handle.GetMsg(request, seq)
		cancel()
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound):
			f.s.last = seq
		case err != nil:
			return streamError(err)
		default:
			f.look(msg.Subject, msg.Data, seq)
		}
	}
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
			return fmt.Errorf("sync: %w", err) // what was found stays found, and is synced the next time
		}
		s.durable.store(s.last)
	}
	s.recent.settle(s.doubt, 0, s.j.cfg.Index != nil)
	clear(s.doubt)
	s.doubt = s.doubt[:0]
	return nil
}
