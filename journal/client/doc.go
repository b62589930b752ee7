// Package client speaks to a Coffer server over HTTP: it appends events, replays
// them, reads conversations and, with an operator's credential, makes apps.
//
//	c, err := client.New(client.Config{URL: "https://eu.example.com", App: app, Token: client.StaticToken(token)})
//	results, err := c.Append(ctx, events...)
//	for e, err := range c.Replay(ctx, client.Query{}).Events() { … }
//
// Promises:
//
//   - A call that may be repeated is repeated while the server is away, busy or
//     asks to wait, for as long as [Config.RetryFor] says. An append is safe to
//     repeat because every event carries an id; one without an id is given one
//     before the first attempt.
//   - A replay that is cut is taken up again after the last event that arrived,
//     so the caller sees each event once and in order. It ends without an error
//     only when the server's trailer has arrived and its count agrees.
//   - A tail ([Client.Tail]) is taken up again in the same way, by the cursors of
//     server-sent events, for as long as its context lasts.
//   - What the server refuses is a [*Problem] (RFC 9457), and [errors.Is] finds
//     the class in it: [ErrNotFound], [ErrUnauthorized], …
//   - No error's text contains a token or the content of an event.
//
// Limits: one request carries at most 1,000 events and 16 MiB; [Client.Append]
// sends what it is given in one request. A line of a replay may be 1 MiB.
package client
