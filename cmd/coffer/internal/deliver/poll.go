package deliver

import (
	"context"
	"net/http"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections/history"
)

// A Polled is an event as an endpoint would get it.
type Polled struct {
	MessageID   string
	Position    journal.Position
	ContentType string
	Body        []byte
}

// Poll returns the events for an endpoint behind a position, at most limit that
// are not hidden by age, and where to go on. They are those that it is sent, with
// the same ids and without numbers; polling changes nothing.
func (e *Engine) Poll(ctx context.Context, ep *endpoints.Endpoint, after journal.Position, limit int, oldest time.Time) ([]Polled, journal.Position, error) {
	var items []*history.Item
	q := history.Query{After: after, Limit: limit, Oldest: oldest}
	selects(ep, &q)
	next, err := e.Events.Replay(ctx, ep.App, q, func(i history.Item) error {
		if matches(ep, &i) {
			items = append(items, keep(i))
		}
		return nil
	})
	if err != nil {
		return nil, after, err
	}
	single := *ep
	single.Batch = 1
	out := make([]Polled, 0, len(items))
	for _, item := range items {
		m, err := e.message(ctx, ep, &delivery{position: item.Position, arrived: item.Stored.UnixMilli(), item: item})
		if err != nil {
			return nil, after, err
		}
		h := make(http.Header, 2)
		body, err := e.Encoder.Encode(ctx, nil, h, &single, []Message{m})
		if err != nil {
			return nil, after, err
		}
		out = append(out, Polled{m.ID, m.Position, h.Get("Content-Type"), body})
	}
	return out, max(next, after), nil
}
