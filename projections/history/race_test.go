//go:build race

package history

// underRace says that the race detector is on, under which a sync.Pool drops
// things at random.
const underRace = true
