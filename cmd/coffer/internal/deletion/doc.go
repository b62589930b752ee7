// Package deletion deletes apps and accounts with everything that they own, keys
// first.
//
// A deletion is a row of the registry that names the step which comes next. Each
// step can be done again, so a process that is killed at any moment leaves a
// deletion that goes on: in another process when the lease of the first has run
// out, or after a restart. It goes on until it is done; what keeps it is in the
// row and in the log.
//
// Promise: from the moment at which [Deletions.Start] returns, the app answers
// nobody, and there is no way back. When the deletion is done, no key of the app
// is left in the keyring, and of its messages nothing but what docs/format names:
// bytes that servers have on disk still, and backups, sealed under those keys.
package deletion
