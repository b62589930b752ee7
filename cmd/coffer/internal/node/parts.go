package node

import (
	"context"
	"fmt"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/history"
)

// Parts are what a region is made of, for what measures the region from inside
// its process. They belong to the region, which closes them.
type Parts struct {
	Journal *journal.Journal
	History *history.View
	Conn    *nats.Conn
	Views   projections.Store
}

// Parts returns the parts of a region that the process serves.
func (p *Process) Parts(id string) (Parts, bool) {
	for _, r := range p.regions {
		if r.config.ID == id {
			return Parts{Journal: r.journal, History: r.view, Conn: r.conn, Views: r.store}, true
		}
	}
	return Parts{}, false
}

// Stored returns how many messages the NATS server keeps in a stream, and the
// sequence of the last that it ever had.
func (p Parts) Stored(ctx context.Context, stream string) (messages, last uint64, err error) {
	js, err := jetstream.New(p.Conn)
	if err != nil {
		return 0, 0, fmt.Errorf("stream %s: %w", stream, err)
	}
	s, err := js.Stream(ctx, stream)
	if err != nil {
		return 0, 0, fmt.Errorf("stream %s: %w", stream, err)
	}
	state := s.CachedInfo().State
	return state.Msgs, state.LastSeq, nil
}
