// Package callbacks folds what became of webhook deliveries into a view: for
// each endpoint how far it has come, what waits and until when, what is parked,
// and the outcomes of the last days (docs/format/callbacks.md).
//
// The view is what a deliverer starts from, and what callers are shown. It does
// not deliver: that takes keys and connections, which projections never have.
//
// # Promises
//
//   - Everything is in the callback stream. A view that was thrown away and
//     rebuilt equals the old one, so a deliverer that starts from it sends
//     nothing that it knows to have been sent.
//   - What another process recorded after its lease was taken changes nothing.
//
// # Limits
//
// A view holds endpoint ids, positions, tags and times; what endpoints answered
// stays sealed in the stream.
package callbacks
