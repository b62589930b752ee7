// Package kmstest tests what package kms is built on: RunProvider is the suite
// that every key provider passes, RunRows the one for stores of the keyring's
// rows. Faults makes a provider fail on demand and counts its calls; Rows keeps
// rows in memory.
//
// It imports testing, so only tests import it.
package kmstest
