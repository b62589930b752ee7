// Package exports makes exports of an app's events: a fixed range of positions,
// cut into files, each with its counts and the digest of its lines.
//
// An export is a job: a row of the region's registry that says how far it has
// come, with a lease that a second process takes over when it has run out
// (docs/format/export.md). The files are not stored: [Exports.WriteFile] makes
// one when it is fetched, from the same range of the view.
//
// Promises: nothing is written to disk but rows without content or ids; an event
// that is recalled, erased or expired is in no file that is fetched afterwards;
// the same range gives the same digests.
//
// Limits: one worker in a process, which takes turns between jobs. The entries of
// all files of one export are in memory while its manifest is made, some 300
// bytes each, 16,384 at most.
package exports
