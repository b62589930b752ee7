package node

import (
	"github.com/nats-io/nats.go"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections/history"
)

// Parts are what a region is made of, for what measures the region from inside
// its process. They belong to the region, which closes them.
type Parts struct {
	Journal *journal.Journal
	History *history.View
	Conn    *nats.Conn
}

// Parts returns the parts of a region that the process serves.
func (p *Process) Parts(id string) (Parts, bool) {
	for _, r := range p.regions {
		if r.config.ID == id {
			return Parts{Journal: r.journal, History: r.view, Conn: r.conn}, true
		}
	}
	return Parts{}, false
}
