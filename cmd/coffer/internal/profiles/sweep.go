package profiles

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/shelf"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

// A Warning is that a profile ends soon.
type Warning struct {
	App     journal.AppID
	Subject kms.Tag
	// Used is the last use that was written down, Ends when it ends without
	// another.
	Used, Ends time.Time

	open func(ctx context.Context) (string, error)
}

// User opens the profile for the user's id. kms.ErrSubjectErased means that the
// user has been erased.
func (w *Warning) User(ctx context.Context) (string, error) { return w.open(ctx) }

// Sweep returns the sweep that ends profiles that nobody has used, and warns of
// those that soon will have: see [shelf.Sweep]. The rows are those that the store
// works on, and places those of the registry.
func (s *Store) Sweep(rows *journal.Rows, places kms.Rows, warn, tell func(ctx context.Context, w Warning) error) shelf.Sweep {
	present := func(do func(context.Context, Warning) error) func(context.Context, journal.WrittenRow) error {
		return func(ctx context.Context, w journal.WrittenRow) error {
			warning, err := s.warning(ctx, rows, w)
			if err != nil {
				return err
			}
			return do(ctx, warning)
		}
	}
	return shelf.Sweep{
		Name: "profiles", Places: places, Rows: rows, Life: s.life, Forget: rows.Forget,
		Warn: present(warn), Tell: present(tell),
		Used: func(w journal.WrittenRow) (time.Time, bool, error) {
			r, err := parse(w.Value)
			return r.Used, err == nil, err
		},
		End: func(ctx context.Context, w journal.WrittenRow) error { return rows.Delete(ctx, w.Name, w.Revision) },
	}
}

// warning reads a row that must be the present one.
func (s *Store) warning(ctx context.Context, rows *journal.Rows, w journal.WrittenRow) (Warning, error) {
	present, err := rows.Load(ctx, w.Name)
	if err != nil || present.Revision != w.Revision {
		return Warning{}, errors.Join(err, shelf.Unchanged(present.Revision, w.Revision))
	}
	r, err := parse(w.Value)
	if err != nil {
		return Warning{}, err
	}
	first, second, _ := strings.Cut(w.Name, ".")
	app, err := journal.ParseAppID(first)
	if err != nil {
		return Warning{}, fmt.Errorf("profile %s: %w", w.Name, journal.ErrCorrupt)
	}
	subject, err := kms.ParseTag(second)
	if err != nil {
		return Warning{}, fmt.Errorf("profile %s: %w", w.Name, journal.ErrCorrupt)
	}
	return Warning{
		App: app, Subject: subject, Used: r.Used, Ends: s.life.Ends(r.Used),
		open: func(ctx context.Context) (string, error) {
			p, err := s.open(ctx, app, subject, r)
			return p.User, err
		},
	}, nil
}
