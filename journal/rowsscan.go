package journal

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	scanBatch = 500
	// scanIdle is when the server drops the consumer of a scan that has died.
	scanIdle = time.Minute
)

// scanned is a message of the bucket.
type scanned struct {
	name      string
	sequence  uint64
	operation string // of a marker
}

// scan calls f for the messages of filter(prefix), without what is in them, in their
// order. An error of f ends it. It costs a tenth of asking for each.
func (r *Rows) scan(ctx context.Context, prefix string, f func(scanned) error) error {
	var consumer jetstream.Consumer
	err := retry(ctx, func(ctx context.Context) (err error) {
		consumer, err = r.js.CreateOrUpdateConsumer(ctx, r.stream, jetstream.ConsumerConfig{
			FilterSubject: r.filter(prefix), DeliverPolicy: jetstream.DeliverAllPolicy,
			AckPolicy: jetstream.AckNonePolicy, MemoryStorage: true, Replicas: 1, HeadersOnly: true, InactiveThreshold: scanIdle,
		})
		return streamError(err)
	})
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
		defer cancel()
		// One that stays is dropped by the server.
		_ = r.js.DeleteConsumer(ctx, r.stream, consumer.CachedInfo().Name)
	}()
	ready := time.Now().Add(defaultCommitTimeout)
	for expected := uint64(1); ; {
		if err := ctx.Err(); err != nil {
			return unavailable(err)
		}
		batch, err := consumer.FetchNoWait(scanBatch)
		if err != nil {
			return streamError(err)
		}
		before := expected
		for msg := range batch.Messages() {
			if err == nil {
				err = r.see(msg, &expected, f)
			}
		}
		switch {
		case err != nil:
			return err
		case errors.Is(batch.Error(), nats.ErrNoResponders) && time.Now().Before(ready) && pause(ctx, retryPause):
			// The consumer is new, and not known to every server of a cluster yet.
		case batch.Error() != nil:
			return streamError(batch.Error())
		case expected == before:
			return nil // there is no more
		}
	}
}

// see hands on one message, and refuses a gap in what the consumer delivered.
func (r *Rows) see(msg jetstream.Msg, expected *uint64, f func(scanned) error) error {
	meta, err := msg.Metadata()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	if meta.Sequence.Consumer != *expected {
		return fmt.Errorf("%w: message %d of the scan is missing", ErrUnavailable, *expected)
	}
	*expected++
	return f(scanned{
		name: strings.TrimPrefix(msg.Subject(), r.prefix), sequence: meta.Sequence.Stream,
		operation: msg.Headers().Get(kvOperation),
	})
}
