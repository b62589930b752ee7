// Package importer puts message history into an app: that of another service
// (package agora), or what was exported ([ParseEvent]). It reads files line by
// line, parses each line and appends the events through the HTTP client, in
// batches, several at a time.
//
// Promises:
//
//   - Events of one conversation are appended in the order of the files.
//   - A line that is no event, or that the server refuses, is reported with file
//     and line, kept in the rejects file, and does not stop the rest.
//   - Running again stores nothing twice: the event's id is the message's, and a
//     shift of the times is found again from what is stored (see [Options.Rebase]).
//   - Nothing is dropped silently: at the end of a run, the lines read are the
//     sum of those imported, duplicate, skipped as expired or as written by
//     servers only, and rejected.
//
// Limits: memory is bounded by the batches under way, whatever the files hold.
// A message that two files contain with different content is a conflict, and the
// second is rejected.
package importer
