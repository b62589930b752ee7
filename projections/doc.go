// Package projections folds a region's journal into views.
//
// A [Projection] is given the journal's records in order and writes what it
// keeps of them into a [Store], a set of ordered keys. A [Runner] reads each
// stream and commits, in one transaction, what a batch of records changed and
// the [Checkpoint] that says how far the stream has been read. So a record is
// applied exactly once as far as the view is concerned, whenever the process
// dies, and nothing about progress is kept anywhere else: no durable consumer,
// no acknowledgement (docs/adr/0004-view-checkpoints.md).
//
// # Promises
//
//   - A view can be thrown away and rebuilt from the journal, and the rebuilt
//     view equals the old one ([Runner.Rebuild]).
//   - A reader that is told "not here" by a view that is being rebuilt is told
//     so by an error ([ErrRebuilding]), never by an empty answer.
//   - A damaged store gives [ErrCorrupt], never a shorter or another answer.
//   - A record that cannot be applied stops its projection on its stream, with
//     the record's position in the error ([RecordError]). Nothing is skipped.
//
// # Limits
//
// Views hold sealed records and tags: this package and those below it see no
// plaintext and know no key provider. Records that have left the journal by age
// are not in a rebuilt view.
//
// The stores are below this package (package pebble), each passing the suite of
// package storetest; so are the views (package history).
package projections
