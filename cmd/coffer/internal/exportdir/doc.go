// Package exportdir keeps an export of an app in a directory: the files, and
// manifest.json (docs/format/export.md).
//
// A fetch that was interrupted, also by kill -9 or a power cut, is gone on with by
// the same call: the directory says which export it is of, before the export is
// asked for, and a file has its name only when it is whole, its digest is the
// manifest's, and it is on disk. manifest.json is written last.
//
// The files hold messages in plaintext: they are readable by their owner only, and
// what becomes of them is up to whoever has them.
package exportdir
