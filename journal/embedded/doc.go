// Package embedded runs a NATS server with JetStream inside the process, for
// one region, and syncs what it wrote.
//
// A stock server acknowledges a publish either before its bytes are synced, or,
// with sync_interval: always, after a sync of its own for every message or
// atomic batch. [Server.Syncer] offers a third way, which is 3 to 4 times as
// fast at 64 writers (docs/adr/0001-group-commit.md): the server acknowledges
// when the bytes have reached the block file, and [Syncer.Sync] then syncs the
// stream's last block files, once for everything that was acknowledged.
//
// That relies on how the server lays out its files, so:
//
//   - the server is the one this package is compiled with, never an external
//     one, and versions before 2.15.1 are refused ([ErrVersion]);
//   - [Start] tests what is relied on (where the blocks are, that an
//     acknowledged message is in its file, that a new block appears before its
//     first acknowledgement, that a rewritten block replaces the file) on a
//     scratch stream, every time;
//   - it looks at the file system: the server's compaction replaces a block
//     file before the new one is synced, which ext4 with data=ordered and
//     auto_da_alloc, btrfs and memory file systems survive, and XFS is not
//     known to;
//   - where any of this fails, the server runs with sync always instead, says
//     why in the log and in [Server.Fallback], and [Server.Syncer] is nil.
//
// Limits: nothing but the process itself writes to the server, unless
// [Options].Listen opens a port (for tests). One Server owns its folder; a second
// one on the same folder is refused ([ErrLocked]).
//
// Sources: server/filestore.go, server/stream.go and
// server/jetstream_batching.go of nats-server 2.15.2.
package embedded
