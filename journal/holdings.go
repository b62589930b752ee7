package journal

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// A Holding is a stream that holds data of a region, as its server has it.
type Holding struct {
	Name        string
	Subjects    []string
	Kinds       []Kind // by the retention table; none for a stream that it does not name
	Plan        string // of messages
	Incarnation string
	Storage     string // "file" or "memory"
	Replicas    int
	Servers     []string // that hold a copy, in order; empty for a single server
	Cluster     string   // which the stream asks for
	Tags        []string // which the stream asks its servers to have
	MaxAge      time.Duration
	// Copies say what takes messages of the stream elsewhere, or brings them
	// here: "mirror NAME", "source NAME", "republish SUBJECT".
	Copies []string
}

// Holdings returns every stream of the region's retention table that is there,
// in the order of their names, as the server has them now.
func (j *Journal) Holdings(ctx context.Context) ([]Holding, error) {
	found, err := j.presentStreams(ctx)
	if err != nil {
		return nil, err
	}
	table := j.RetentionTable()
	out := make([]Holding, 0, len(found))
	for _, name := range slices.Sorted(maps.Keys(found)) {
		out = append(out, holding(table, found[name]))
	}
	return out, nil
}

// ServerHoldings returns every stream that a NATS server shows to a connection,
// whoever made it, in the order of their names.
func ServerHoldings(ctx context.Context, js jetstream.JetStream, table []Rule) ([]Holding, error) {
	list := js.ListStreams(ctx)
	var out []Holding
	for info := range list.Info() {
		out = append(out, holding(table, info))
	}
	if err := list.Err(); err != nil {
		return nil, fmt.Errorf("list the streams: %w", unavailable(err))
	}
	slices.SortFunc(out, func(x, y Holding) int { return strings.Compare(x.Name, y.Name) })
	return out, nil
}

func holding(table []Rule, info *jetstream.StreamInfo) Holding {
	c := info.Config
	h := Holding{
		Name: c.Name, Subjects: c.Subjects, Incarnation: c.Metadata[IncarnationKey], Storage: strings.ToLower(c.Storage.String()),
		Replicas: c.Replicas, MaxAge: c.MaxAge,
	}
	for _, rule := range table {
		if rule.has(c.Name) {
			h.Kinds, h.Plan = append(h.Kinds, rule.Kind), rule.Plan
		}
	}
	if info.Cluster != nil {
		for _, peer := range info.Cluster.Replicas {
			h.Servers = append(h.Servers, peer.Name)
		}
		if info.Cluster.Leader != "" && info.Cluster.Name != "" {
			h.Servers = append(h.Servers, info.Cluster.Leader)
		}
		slices.Sort(h.Servers)
	}
	if c.Placement != nil {
		h.Cluster, h.Tags = c.Placement.Cluster, c.Placement.Tags
	}
	if c.Mirror != nil {
		h.Copies = append(h.Copies, "mirror "+c.Mirror.Name)
	}
	for _, source := range c.Sources {
		h.Copies = append(h.Copies, "source "+source.Name)
	}
	if c.RePublish != nil {
		h.Copies = append(h.Copies, "republish "+c.RePublish.Destination)
	}
	return h
}
