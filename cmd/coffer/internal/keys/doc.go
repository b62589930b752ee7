// Package keys administers the keys of a region: it inventories, rotates,
// rewraps, migrates, retires, shreds and verifies them, as ADR 7 decides.
//
// What touches every app's row is a [Job]: a row of the keyring's bucket that
// says how far it has come. The process that works on it holds a lease in that
// row, and another one, or a second start, goes on from the cursor when the
// lease has run out. Every operation is recorded in the region's audit log
// before it begins and when it has ended; one that cannot be recorded is not
// done.
//
// Rewrapping and migrating change who can unwrap app keys. They do not change
// the keys, and no event is read or written by anything here. After a leak of a
// key itself, rewrapping does not help.
//
// Limits: one job at a time in a region. The names of all apps are held in
// memory while a job runs, 33 bytes each.
package keys
