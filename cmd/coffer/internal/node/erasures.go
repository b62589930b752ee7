package node

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/cmd/coffer/internal/erasures"
	"github.com/cofferdb/coffer/cmd/coffer/internal/profiles"
	"github.com/cofferdb/coffer/cmd/coffer/internal/signing"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

// raftLogs is how long the Raft log of a NATS server that runs keeps the bytes of
// a replaced row: it is compacted every two to three minutes, if anything was
// written (nats-server 2.15, monitorStream; TestRaftLogsForget of package journal).
const raftLogs = 10 * time.Minute

// openErasures makes what erases users and, before the region listens, erases
// again those that a restored backup has brought back.
func (r *region) openErasures(ctx context.Context, js jetstream.JetStream) error {
	r.signing = signing.New(r.rows, r.journal.Keyring())
	r.erasures = erasures.New(erasures.Options{
		Region: r.config.Journal(), Journal: r.journal, Rows: r.rows, Signing: r.signing,
		KeyringAt: func(ctx context.Context) (uint64, error) {
			stream, err := js.Stream(ctx, "KV_"+journal.KeyringBucket(r.config.ID))
			if err != nil {
				return 0, fmt.Errorf("looking at the keyring: %w: %w", journal.ErrUnavailable, err)
			}
			return stream.CachedInfo().State.LastSeq, nil
		},
		Copies: func(ctx context.Context) ([]erasures.Remains, error) {
			copies, err := r.keys.Backups(ctx)
			left := make([]erasures.Remains, 0, len(copies))
			for _, c := range copies {
				left = append(left, erasures.Remains{What: "the user's wrapped key", Where: "copy " + c.ID + " of the keyring", Until: c.Until})
			}
			if r.config.NATS.Replicas > 1 {
				left = append(left, erasures.Remains{
					What: "the user's wrapped key", Where: "Raft logs of the NATS servers that run", Until: r.options.now().Add(raftLogs).UTC().Truncate(time.Second),
				})
			}
			return left, err
		},
		Also: []func(context.Context, journal.AppID, string) (erasures.Destroyed, error){r.eraseProfile},
		Log:  r.log, Now: r.options.now,
	})
	again, err := r.erasures.Settle(ctx)
	if err != nil {
		return fmt.Errorf("erasing again what a restored keyring holds: %w", err)
	}
	if again > 0 {
		r.log.Warn("a restored keyring held keys of erased users; they were destroyed again", "users", again)
	}
	return r.applyReceipts(ctx, r.options.config.Erasures)
}

// eraseProfile removes the row of a user's profile, which nothing opens any more.
func (r *region) eraseProfile(ctx context.Context, app journal.AppID, user string) (erasures.Destroyed, error) {
	subject, err := r.journal.Tag(ctx, app, kms.KindSubject, user)
	if err != nil {
		return erasures.Destroyed{}, err
	}
	err = r.profiles.Delete(ctx, app, subject)
	if errors.Is(err, profiles.ErrNotFound) {
		return erasures.Destroyed{}, nil
	}
	return erasures.Destroyed{What: "the profile's row", Where: "profiles"}, err
}

// maxReceipt is the longest line of a file of receipts.
const maxReceipt = 1 << 20

// applyReceipts erases those whose receipts are in a file: lines of JSON, as
// `coffer erasures receipts` writes them, of any regions.
func (r *region) applyReceipts(ctx context.Context, path string) error {
	if path == "" {
		return nil
	}
	file, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("reading receipts of erasures: %w", err)
	}
	defer func() { _ = file.Close() }()
	applied := 0
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, maxReceipt)
	for n := 1; lines.Scan(); n++ {
		text, region, err := erasures.ParseLine(lines.Bytes())
		if err != nil {
			return fmt.Errorf("%s, line %d: %w", path, n, err)
		}
		if region != r.config.ID {
			continue
		}
		if _, err := r.erasures.Apply(ctx, text); err != nil {
			return fmt.Errorf("%s, line %d: %w", path, n, err)
		}
		applied++
	}
	r.log.Info("receipts of erasures were applied", "receipts", applied)
	return errors.Join(lines.Err())
}
