// Package journal is the ordered record of an app's message events, sealed
// before they leave the process and kept in the JetStream streams of the app's
// region for as long as the app's plan says.
//
// An [Event] is a CloudEvent. The journal checks it, writes its canonical JSON,
// seals that under keys of package kms and stores a record: a clear header of
// keyed tags, and the envelope. What is stored names no user, no conversation
// and no content to whoever lacks the app's keys.
//
// Promises:
//
//   - An event that was acknowledged is on disk, on a quorum where there are
//     replicas, and can be read until its retention ends.
//   - Events of one conversation are kept in the order in which they were
//     acknowledged. A [Position] names a place in an app's order; a change of
//     plan does not alter it.
//   - Appending an event again, with the same id and content, stores nothing
//     and answers with the first position; with other content it is
//     [ErrConflict].
//   - A reader that meets a gap or another incarnation of a stream stops with
//     [ErrGap] or [ErrIncarnation]; a stream that has vanished is never
//     re-created by itself.
//   - Without a usable key nothing is stored and nothing is skipped.
//
// Limits: 64 KiB and 32 levels of nesting per event, 5 KiB of text per text
// body, ids of 128 bytes; see [Limits]. Event times lie between the year
// 2000 and five minutes from now.
//
// The formats are normative in docs/format: record.md (events and records) and
// subjects.md (streams, subjects, buckets, incarnations). Sources: CloudEvents
// 1.0 JSON event format, RFC 8259 and 7493 (I-JSON), RFC 6901 (JSON pointer),
// RFC 9562 (UUID version 7); ADR 37 of NATS for the streams.
package journal
