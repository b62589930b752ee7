// Package presend asks an app's endpoint whether a message may be stored, before
// it is sealed (docs/format/callbacks.md, docs/adr/0017-presend.md).
//
// # Promises
//
//   - A question costs an append no more than the setting's time, and one to an
//     endpoint that does not answer nothing, once its breaker is open.
//   - The same event, sent again, gets the same answer: from memory while it is
//     under way and for some minutes, from the stored event for as long as that
//     is kept. What was refused may be asked again after those minutes.
//   - Without an answer the setting's fallback counts, and nothing else.
package presend
