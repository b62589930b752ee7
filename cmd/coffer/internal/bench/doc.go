// Package bench measures Coffer beside what it is built on, in the same run and
// on the same disk, and says exactly what was compared.
//
//   - [Append]: events appended and synced before they are acknowledged, beside
//     bare publishes of payloads of the same size that are synced in the same
//     way, and beside Postgres.
//   - [Replay]: an app's past read from the history view and opened, beside a
//     bare ordered consumer on the same stream that opens nothing, and beside
//     Postgres; over HTTP beside that; and a hundredth of it beside all.
//   - [History]: a page of a long conversation beside one of a short one, and
//     beside Postgres.
//   - [Tail]: live tails with a connection each: how long an event takes to them,
//     beside how long its append takes, and what a tail that waits costs.
//   - [Keys]: app keys rewrapped beside the bare calls of the same key provider,
//     and what the keyring asks of a provider beside the most it may.
//
// Rounds of the two sides alternate, and the figures are medians of the rounds:
// a neighbour's load then falls on both. Ratios are what to compare between
// machines; the figures themselves are those of one disk and one processor.
//
// Postgres is measured when initdb and postgres are on the machine: a cluster of
// its own in a temporary folder, reached through a Unix socket, with fsync on.
// When the program runs as root, the cluster runs as the user postgres.
package bench
