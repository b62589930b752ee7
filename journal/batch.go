package journal

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	headerBatchID     = "Nats-Batch-Id"
	headerBatchSeq    = "Nats-Batch-Sequence"
	headerBatchCommit = "Nats-Batch-Commit"

	// smallBatch is the number of events up to which plain publishes are
	// cheaper than a batch on one server, which stages each batch in files of
	// its own.
	smallBatch = 10
)

// batches hands a commit over as one atomic batch: the server stores all of its
// events or none, and syncs once. A batch that is refused is split, so that
// only the event that the server objects to fails.
type batches struct {
	plain *plain
	small int
	ids   atomic.Uint64
	base  string
}

func newBatches(p *plain, replicas int) *batches {
	b := &batches{plain: p, small: smallBatch, base: nats.NewInbox()[len(nats.InboxPrefix):][:8]}
	if replicas > 1 {
		b.small = 1 // staged in memory
	}
	return b
}

func (b *batches) limit() int { return maxBatch }
func (b *batches) close()     { b.plain.close() }

func (b *batches) publish(ctx context.Context, batch []*entry) error {
	if len(batch) <= b.small {
		return b.plain.publish(ctx, batch)
	}
	for {
		ack, err := b.commit(ctx, batch)
		switch {
		case err == nil:
			for i, e := range batch {
				e.seq, e.err, e.doubtful = ack.Seq-uint64(len(batch)-1-i), nil, false
			}
			return nil
		case errors.Is(err, errDoubtful):
			return err
		case errors.Is(err, errRetry):
			if pause(ctx, retryPause) {
				continue
			}
		case len(batch) > 1 && !errors.Is(err, ErrFull) && !errors.Is(err, ErrIncarnation):
			// Nothing was stored. Which one was it?
			half := len(batch) / 2
			if err := b.publish(ctx, batch[:half]); err != nil {
				for _, e := range batch[half:] {
					e.doubtful, e.err, e.seq = true, nil, 0 // looked for, not found, and published again
				}
				return err
			}
			return b.publish(ctx, batch[half:])
		}
		for _, e := range batch {
			e.err, e.doubtful = err, false
		}
		return nil
	}
}

// errDoubtful marks a batch of which it is not known whether it was stored.
var errDoubtful = errors.New("the server did not say whether the batch was stored") //nolint:gochecknoglobals // a sentinel

// commit publishes one batch. The ids are short because the three headers stay
// in each stored message.
func (b *batches) commit(ctx context.Context, batch []*entry) (pubAck, error) {
	p := b.plain
	id := b.base + strconv.FormatUint(b.ids.Add(1), 36)
	for _, e := range batch {
		e.doubtful, e.err = true, nil
	}
	answers := make(chan *nats.Msg, len(batch)+1)
	inbox := nats.NewInbox()
	sub, err := p.nc.Subscribe(inbox, func(m *nats.Msg) { answers <- m })
	if err != nil {
		return pubAck{}, fmt.Errorf("%w: %w", errDoubtful, err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	p.drain()
	fenced := make(map[string]bool)
	for i, e := range batch {
		msg := &nats.Msg{Subject: e.subject, Data: e.record, Header: nats.Header{
			headerBatchID:  {id},
			headerBatchSeq: {strconv.Itoa(i + 1)},
		}}
		e.describe(msg.Header)
		if !fenced[e.fence] { // the batch is stored as a whole: once for each app
			e.guard(msg.Header)
			fenced[e.fence] = true
		}
		if i == len(batch)-1 {
			msg.Header.Set(headerBatchCommit, "1")
		}
		// The first one is answered too, so that a refused batch is known
		// before its last event has been sent; the last one's answer counts.
		if i == 0 || i == len(batch)-1 {
			msg.Reply = inbox
		}
		if err := p.nc.PublishMsg(msg); err != nil {
			return pubAck{}, fmt.Errorf("%w: %w", errDoubtful, err)
		}
	}
	return b.await(ctx, answers, len(batch))
}

func (b *batches) await(ctx context.Context, answers <-chan *nats.Msg, size int) (pubAck, error) {
	p := b.plain
	ask := time.NewTimer(askHealth)
	defer ask.Stop()
	for began := time.Now(); ; {
		select {
		case m := <-answers:
			if len(m.Data) == 0 && m.Header.Get("Status") == "503" {
				return pubAck{}, fmt.Errorf("%w: %w: no server has the stream", ErrUnavailable, errRetry)
			}
			if len(m.Data) == 0 && size > 1 {
				continue // the first event has been staged
			}
			ack, err := p.ack.parse(m.Data)
			if err == nil && ack.Count != size {
				return ack, fmt.Errorf("%w: %d of %d events", errDoubtful, ack.Count, size)
			}
			return ack, err
		case <-p.lost:
			return pubAck{}, fmt.Errorf("%w: %w", errDoubtful, nats.ErrDisconnected)
		case <-ctx.Done():
			return pubAck{}, fmt.Errorf("%w: %w", errDoubtful, ctx.Err())
		case <-ask.C:
			if err := p.overdue(ctx, began); err != nil {
				return pubAck{}, fmt.Errorf("%w: %w", errDoubtful, err)
			}
			ask.Reset(askHealth)
		}
	}
}
