package node

import (
	"context"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/cmd/coffer/internal/keys"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

// openKeys makes the administration of the region's keys. A key provider that is
// away does not keep the region from starting.
func (r *region) openKeys(ctx context.Context, js jetstream.JetStream, syncer journal.Syncer) error {
	var err error
	r.keys, err = keys.New(ctx, keys.Options{
		Keyring: r.journal.Keyring(), Rows: journal.NewRows(js, journal.KeyringBucket(r.config.ID), syncer), Audit: r.journal,
		Primary: r.provider, Setting: r.config.KMS, Others: r.config.KMSOthers,
		Open: func(ctx context.Context, setting string) (kms.Provider, error) {
			other := r.config
			other.KMS = setting
			return openProvider(ctx, other, false, r.audit, r.log)
		},
		Log: r.log, Now: r.options.now,
	})
	return err
}
