package deliver

import (
	"container/heap"
	"context"
	"errors"
	"slices"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections/callbacks"
	"github.com/cofferdb/coffer/projections/history"
)

// loadView takes over what the view has of the endpoint.
func (w *worker) loadView(ctx context.Context) error {
	p, err := w.View.Progress(ctx, w.ref.App, w.ref.ID)
	if err != nil {
		return err
	}
	w.number, w.scanned = p.Number, max(p.Through, w.ep.After)
	w.failing = p.Failing
	w.ledger.number, w.ledger.through, w.ledger.noted = w.number, p.Through, p.Through
	w.known = make(map[journal.Position]uint64)
	err = w.View.Deliveries(ctx, w.ref.App, w.ref.ID, callbacks.Query{After: p.Number}, func(d callbacks.Delivery) error {
		w.known[d.Position] = d.Number
		return nil
	})
	if err != nil {
		return err
	}
	if err := w.View.Due(ctx, w.ref.App, w.ref.ID, 0, w.restore); err != nil {
		return err
	}
	return w.View.Deliveries(ctx, w.ref.App, w.ref.ID, callbacks.Query{State: journal.DeliveryHeld}, w.restore)
}

// restore queues a delivery that waits or is held; those that wait come first.
func (w *worker) restore(v callbacks.Delivery) error {
	d := &delivery{
		number: v.Number, position: v.Position, arrived: v.Arrived, attempts: int(v.Attempts),
		due: time.UnixMilli(v.Due),
	}
	if w.ep.Ordered {
		d.conversation = v.Conversation
	}
	if d.conversation != (kms.Tag{}) {
		if l := w.busy[d.conversation]; l != nil {
			l.behind = append(l.behind, d)
			w.held++
			return nil
		}
		w.busy[d.conversation] = &lane{first: d, waits: true}
	}
	if v.State == journal.DeliveryHeld {
		d.due = w.now()
	}
	heap.Push(&w.waiting, d)
	return nil
}

// selects narrows a query to what may be for an endpoint. What it yields has still to
// match.
func selects(ep *endpoints.Endpoint, q *history.Query) {
	q.Types = ep.Types
	if len(ep.ConversationTags) == 1 {
		q.Conversation = &ep.ConversationTags[0]
	}
	if len(ep.UserTags) == 1 {
		q.User = &ep.UserTags[0]
	}
}

// matches reports whether an event that a query of selects has yielded is for an
// endpoint.
func matches(ep *endpoints.Endpoint, i *history.Item) bool {
	if len(ep.Types) > 0 && !slices.Contains(ep.Types, i.Type) {
		return false
	}
	h, err := journal.ParseHeader(i.Record)
	if err != nil {
		return false // the view has checked it
	}
	if len(ep.ConversationTags) > 0 && !slices.Contains(ep.ConversationTags, h.Conversation) {
		return false
	}
	if len(ep.UserTags) == 0 || slices.Contains(ep.UserTags, h.Peer) {
		return true
	}
	if len(i.Record) == journal.HeaderSize {
		return len(ep.UserTags) == 1 // what is left has no sender; the query has selected it
	}
	envelope, err := kms.ParseHeader(i.Record[journal.HeaderSize:])
	return err == nil && slices.Contains(ep.UserTags, envelope.Subject)
}

// trimmedBy returns where to go on when events have left the view by age.
func trimmedBy(err error) (journal.Position, bool) {
	if t, ok := errors.AsType[*history.TrimmedError](err); ok {
		return t.Oldest, true
	}
	return 0, false
}
