// Package server is the HTTP interface of one region (docs/api).
//
// One table, [routes], says for every method and path who may call it and what
// a request may contain; authorization happens there and nowhere else. One
// table, [errorTable], says which problem (RFC 9457) each error becomes.
// Handlers decode, call the journal or a view, and encode.
//
// Promises: a request that is refused has changed nothing; a log line holds no
// user id, conversation id, token or content, only opaque ids, sizes and
// durations; a stream needs the same memory whatever its length; a stream that
// did not end with its trailer line is not whole.
//
// Limits are in [Limits], with their defaults.
package server
