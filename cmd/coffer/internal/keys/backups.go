package keys

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cofferdb/coffer/kms"
)

// Backup is a kept copy of the keyring's rows. While it is kept, what wraps the
// keys in it must stay able to unwrap, or restoring it gives nothing.
type Backup struct {
	ID    string    `json:"id"`
	Made  time.Time `json:"made"`
	Until time.Time `json:"until"` // when the copy is destroyed
	Wraps []WrapRef `json:"wraps"` // the distinct wrappers, without times
}

const (
	backupPrefix   = "backup."
	maxBackupLife  = 400 * 24 * time.Hour
	maxBackupIDLen = 64
)

// AddBackup registers a copy of the keyring that is about to be made.
func (a *Admin) AddBackup(ctx context.Context, actor, id string, until time.Time) (Backup, error) {
	now := a.now().UTC()
	b := Backup{ID: id, Made: now, Until: until.UTC(), Wraps: []WrapRef{}}
	valid := len(id) > 0 && len(id) <= maxBackupIDLen && !strings.ContainsFunc(id, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-'
	})
	switch {
	case !valid:
		return b, fmt.Errorf("%w: a backup's id is 1 to %d of a-z, 0-9 and -", ErrSpec, maxBackupIDLen)
	case !until.After(now) || until.After(now.Add(maxBackupLife)):
		return b, fmt.Errorf("%w: a backup is kept until a time within %d days", ErrSpec, maxBackupLife/(24*time.Hour))
	}
	err := a.Inventory(ctx, func(app AppInventory) error {
		for _, key := range app.Keys {
			for _, w := range key.Wraps {
				w.WrappedAt = time.Time{}
				if !slices.Contains(b.Wraps, w) {
					b.Wraps = append(b.Wraps, w)
				}
			}
		}
		return nil
	})
	if err != nil {
		return b, err
	}
	return b, a.recorded(ctx, actor, "keys.backup_registered", "backup:"+id, nil, func() error {
		_, err := storeJSON(ctx, a.rows, backupPrefix+id, b, 0)
		if errors.Is(err, kms.ErrRowConflict) {
			return fmt.Errorf("%w: there is a backup %s", ErrSpec, id)
		}
		return err
	})
}

// EndBackup takes a copy of the keyring from the list: it was destroyed early.
func (a *Admin) EndBackup(ctx context.Context, actor, id string) error {
	row, err := a.rows.Load(ctx, backupPrefix+id)
	if errors.Is(err, kms.ErrRowNotFound) {
		return fmt.Errorf("%w: there is no backup %s", ErrSpec, id)
	}
	if err != nil {
		return err
	}
	return a.recorded(ctx, actor, "keys.backup_ended", "backup:"+id, nil, func() error {
		return a.rows.Delete(ctx, backupPrefix+id, row.Revision)
	})
}

// Backups returns the registered copies that are still kept.
func (a *Admin) Backups(ctx context.Context) ([]Backup, error) {
	backups := []Backup{}
	for name, err := range a.rows.List(ctx, backupPrefix) {
		if err != nil {
			return nil, fmt.Errorf("list backups: %w", err)
		}
		var b Backup
		if _, err := loadJSON(ctx, a.rows, name, &b); err != nil {
			if errors.Is(err, kms.ErrRowNotFound) {
				continue
			}
			return nil, err
		}
		if b.Until.After(a.now()) {
			backups = append(backups, b)
		}
	}
	slices.SortFunc(backups, func(x, y Backup) int { return strings.Compare(x.ID, y.ID) })
	return backups, nil
}
