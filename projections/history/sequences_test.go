package history

import (
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/storetest"
)

// sequences are run on a store in memory, beside the hundred that rapid runs on
// one on disk. With -rapid.checks 400 they are 10,000.
const sequences = 2_500

// TestManySequences is [TestModel] for many more, in memory.
func TestManySequences(t *testing.T) {
	const parts, checks = 4, 100 // rapid's default
	rounds := sequences / checks
	if testing.Short() { // the race detector makes each ten times as long
		rounds /= 20
	}
	for part := range parts {
		t.Run(fmt.Sprint(part), func(t *testing.T) {
			t.Parallel()
			maker := newMaker(t)
			for round := part; round < rounds && !t.Failed(); round += parts {
				rapid.Check(t, func(rt *rapid.T) {
					store := &storetest.Memory{}
					checkSequence(t, rt, maker, store, func() projections.Store { return store }, func() projections.Store { return &storetest.Memory{} })
				})
			}
		})
	}
}

func checkSequence(t *testing.T, rt *rapid.T, maker *maker, store projections.Store, restart, fresh func() projections.Store) {
	view := newView(t, store)
	g, m := &generator{maker: maker}, &model{}
	for range rapid.IntRange(1, 8).Draw(rt, "batches") {
		var batch []journal.Sealed
		for range rapid.IntRange(0, 25).Draw(rt, "batch") {
			s, sealed := g.draw(rt)
			m.apply(s, sealed)
			batch = append(batch, sealed)
		}
		apply(t, view, batch...)
		if pick(rt, "restart", false, false, false, true) {
			store = restart()
			view = newView(t, store)
		}
		for range 4 {
			checkReplay(rt, view, m, g)
		}
		checkPages(rt, view, m)
		checkLookup(rt, view, m, g)
	}
	checkRebuilt(t, rt, store, fresh(), g)
}
