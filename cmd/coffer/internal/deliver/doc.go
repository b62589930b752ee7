// Package deliver sends an app's events to its webhook endpoints.
//
// For each endpoint one worker reads the app's order from where the endpoint
// is, makes requests, and records what became of them in the callback stream,
// from which the callback view is folded (docs/format/callbacks.md). The worker
// keeps a bounded window in memory; everything else stays in the views, so an
// endpoint that is a million events behind costs what any other does.
//
// # Promises
//
//   - Each event is sent until the endpoint has acknowledged it with 2xx, or is
//     parked when the retention of callbacks is over. Parked ones are kept in
//     sight and can be sent again.
//   - An outcome is on disk before the event counts as sent. Only an answer that
//     was not recorded, because it was cut or the process ended, is followed by a
//     second request, with the same webhook-id.
//   - An endpoint that hangs or fails holds up no other.
//   - Without keys nothing is sent and nothing is skipped: the worker waits where
//     it is.
//
// The seams are [Transport], [Signer] and [Encoder].
package deliver
