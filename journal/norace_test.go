//go:build !race

package journal_test

const underRace = false
