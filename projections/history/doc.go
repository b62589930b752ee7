// Package history is the view that histories, replays and look-ups are read
// from: an app's sealed records in the app's order, and its conversations with
// edits and recalls folded in.
//
// It stores records as they are (docs/format/record.md) and never opens one;
// who reads it opens what it is given. Its keys and values are specified in
// docs/format/views.md.
//
// # Promises
//
//   - A recalled message is gone from replays, pages and look-ups as soon as
//     the recall has been applied, and so are its edits. What remains is the
//     clear header of each, as a tombstone, so that positions stay explainable,
//     and the recall event itself.
//   - The first of several events with the same id stands, the others are
//     dropped, for as long as the view keeps the first.
//   - A page costs the same in a short and in a long conversation, and expiry
//     costs what expires, whatever else is stored.
//   - A reader whose position lies before what is still kept gets a
//     [TrimmedError], not a silent jump.
//
// # Limits
//
// Only edits and recalls whose conversation is that of their target count.
// Whether a user may edit or recall what another has sent is not decided here.
// Receipts are kept and replayed; they are not counted.
package history
