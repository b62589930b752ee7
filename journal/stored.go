package journal

import (
	"context"
	"maps"
	"slices"
	"time"
)

// Stored is what the NATS server keeps of a kind of data.
type Stored struct {
	Kind            Kind
	Messages, Bytes uint64
	// Overdue is for how long the oldest message should have been gone by its
	// stream's MaxAge, by this process's real clock; 0 when none should.
	Overdue time.Duration
}

// Stored asks the server what it keeps of each kind of data, in the order of the
// kinds' names. Accounts and the registry share a bucket, which counts as the
// registry's.
func (j *Journal) Stored(ctx context.Context) ([]Stored, error) {
	streams, err := j.StoredStreams(ctx)
	if err != nil {
		return nil, err
	}
	kinds := make(map[Kind]*Stored)
	for _, one := range streams {
		s := kinds[one.Kind]
		if s == nil {
			s = &Stored{Kind: one.Kind}
			kinds[one.Kind] = s
		}
		s.Messages += one.Messages
		s.Bytes += one.Bytes
		s.Overdue = max(s.Overdue, one.Overdue)
	}
	var list []Stored
	for _, kind := range slices.Sorted(maps.Keys(kinds)) {
		list = append(list, *kinds[kind])
	}
	return list, nil
}

// StoredStream is what the NATS server keeps in a stream.
type StoredStream struct {
	Stream string
	Stored
}

// StoredStreams asks the server what it keeps in each stream, in the order of their
// names.
func (j *Journal) StoredStreams(ctx context.Context) ([]StoredStream, error) {
	found, err := j.presentStreams(ctx)
	if err != nil {
		return nil, err
	}
	table := j.RetentionTable()
	now := time.Now() // the server's expiry goes by no other clock
	var list []StoredStream
	for _, name := range slices.Sorted(maps.Keys(found)) {
		info := found[name]
		var kind Kind
		for _, rule := range table { // the last that names it: the registry is behind the accounts
			if rule.has(name) {
				kind = rule.Kind
			}
		}
		s := StoredStream{Stream: name, Stored: Stored{Kind: kind, Messages: info.State.Msgs, Bytes: info.State.Bytes}}
		if age := info.Config.MaxAge; age > 0 && info.State.Msgs > 0 {
			s.Overdue = max(0, now.Sub(info.State.FirstTime.Add(age)))
		}
		list = append(list, s)
	}
	return list, nil
}
