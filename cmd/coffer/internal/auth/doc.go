// Package auth checks who calls.
//
// Two credentials exist. An AccessToken2 (version "007" of the Agora token
// format) is signed with a certificate of one app and names the app's backend
// or one of its users; an operator token is a random secret kept in a file
// that only its owner may read.
//
// The package decides whether a credential is genuine and still valid. What
// its holder may then do is decided elsewhere, in the server's route table.
//
// Promises: a token is believed only after its signature has been checked
// against the certificates of the app it names; signatures and operator tokens
// are compared in constant time; no error text contains a token, a
// certificate or anything decoded from a token that failed its signature.
//
// Limits: a token is at most [MaxTokenLength] characters and inflates to at
// most [MaxTokenContent] bytes; it is valid for at most [MaxLifetime] and may
// be issued at most [MaxSkew] in the future.
//
// Source: Agora's public token libraries (AccessToken2), whose parsers check
// no expiry, ignore what follows an unknown service and accept trailing bytes.
// This one does none of that; see [Token.Verify].
package auth
