package journal

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/kms"
)

// A WrittenRow is a row as one write left it.
type WrittenRow struct {
	Name string
	kms.Row
	// Deleted is set for the marker that a deleted row leaves.
	Deleted bool
	// Written is when, by the server's clock.
	Written time.Time
}

// InOrder yields the rows with the prefix, which ends in a dot or is empty, in
// the order in which they were last written, beginning behind a revision. A row
// that was written again since is yielded at its later place; one whose old
// revision is not erased yet is yielded twice. Each step is one request, so
// looking at the oldest rows costs the same however many there are.
func (r *Rows) InOrder(ctx context.Context, prefix string, after uint64) iter.Seq2[WrittenRow, error] {
	return func(yield func(WrittenRow, error) bool) {
		if prefix != "" && !strings.HasSuffix(prefix, ".") {
			yield(WrittenRow{}, fmt.Errorf("rows in order: %w: prefix %q", ErrInvalid, prefix))
			return
		}
		for {
			var msg *jetstream.RawStreamMsg
			err := retry(ctx, func(ctx context.Context) error {
				s, err := r.handle(ctx)
				if err != nil {
					return err
				}
				msg, err = s.GetMsg(ctx, after+1, jetstream.WithGetMsgSubject(r.prefix+prefix+">"))
				if errors.Is(err, jetstream.ErrMsgNotFound) {
					msg = nil
					return nil
				}
				return streamError(err)
			})
			if err != nil {
				yield(WrittenRow{}, fmt.Errorf("rows %s in order: %w", prefix, err))
				return
			}
			if msg == nil {
				return
			}
			after = msg.Sequence
			row := WrittenRow{
				Name: strings.TrimPrefix(msg.Subject, r.prefix), Row: kms.Row{Value: msg.Data, Revision: msg.Sequence},
				Deleted: deleted(msg.Header), Written: msg.Time,
			}
			if !yield(row, nil) {
				return
			}
		}
	}
}

// Forget removes the marker that a deleted row left. Whoever watches should have
// learned of the deletion before.
func (r *Rows) Forget(ctx context.Context, name string, revision uint64) error {
	if err := checkRowName(name); err != nil {
		return err
	}
	msg, err := r.last(ctx, name)
	switch {
	case err != nil:
		return fmt.Errorf("forget row %s: %w", name, err)
	case msg == nil:
		return nil
	case msg.Sequence != revision || !deleted(msg.Header):
		return fmt.Errorf("forget row %s: %w", name, kms.ErrRowConflict)
	}
	if err := r.erase(ctx, name, revision); err != nil {
		return fmt.Errorf("forget row %s: %w", name, err)
	}
	return nil
}
