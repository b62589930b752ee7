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
	found, err := j.presentStreams(ctx)
	if err != nil {
		return nil, err
	}
	table := j.RetentionTable()
	now := time.Now() // the server's expiry goes by no other clock
	kinds := make(map[Kind]*Stored)
	for name, info := range found {
		var kind Kind
		for _, rule := range table { // the last that names it: the registry is behind the accounts
			if rule.has(name) {
				kind = rule.Kind
			}
		}
		s := kinds[kind]
		if s == nil {
			s = &Stored{Kind: kind}
			kinds[kind] = s
		}
		s.Messages += info.State.Msgs
		s.Bytes += info.State.Bytes
		if age := info.Config.MaxAge; age > 0 && info.State.Msgs > 0 {
			s.Overdue = max(s.Overdue, now.Sub(info.State.FirstTime.Add(age)))
		}
	}
	var list []Stored
	for _, kind := range slices.Sorted(maps.Keys(kinds)) {
		list = append(list, *kinds[kind])
	}
	return list, nil
}
