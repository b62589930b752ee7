// Package kms keeps the keys of a Coffer region and seals events with them.
//
// Four levels of keys lead to an event. A key encryption key never leaves its
// provider (Vault, AWS KMS, a local file). It wraps an app key, the app key
// wraps the keys of epochs and of data subjects, and a data key, derived from
// one epoch key and one subject key, seals events. Opening an event needs both,
// so destroying either makes it unreadable for ever, in backups too.
//
// The package has three parts:
//
//   - [Provider] is what a key management service must do; [Error] and the
//     sentinels beside it are the closed set of ways it may fail. The packages
//     below kms implement it, and kmstest holds the suite they all pass.
//   - [DataKey] seals and opens envelopes. Their bytes are fixed by
//     docs/format/envelope.md, with test vectors.
//   - [Keyring] finds, makes, caches, replaces and destroys the keys of apps.
//     It keeps them wrapped in [Rows], as docs/format/keyring.md fixes.
//
// # Promises
//
// An unwrapped key is never written to a row, a log, an error or a metric.
// Without a key there is an error which names the cause, never plaintext
// passed through. A key which the provider denies, has disabled or no longer
// has is dropped from memory at once; an outage of the provider is bridged from
// memory until the hard limit of [Config], which is therefore also the longest
// time a revocation may take to be noticed.
//
// # Limits
//
// App names are 1 to 64 characters of A-Z, a-z, 0-9, "_" and "-". Additional
// data of an envelope is limited by memory only, plaintext by AES-GCM to 64 GiB.
// Raw keys are zeroed as soon as the cipher made from them exists; the cipher's
// expanded key is zeroed when the garbage collector finds it unreachable, which
// Go cannot promise to happen at a given time.
//
// # Sources
//
// AES-GCM with random nonces: NIST SP 800-38D, section 8.2.2 and 8.3 (at most
// 2^32 invocations for a key). HKDF: RFC 5869. Key commitment: Albertini et al.,
// "How to Abuse and Fix Authenticated Encryption Without Key Commitment" (2020).
package kms
