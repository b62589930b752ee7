package accounts

import (
	"context"
	"errors"
	"fmt"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/kms"
)

// Known returns ErrNotFound for an account that the region never had. It asks for
// no keys.
func (s *Store) Known(ctx context.Context, id string) error {
	_, _, err := s.load(ctx, id)
	return err
}

// BeginDelete marks an account: nothing can be done with it any more. It can be
// repeated. Delete its apps, then [Store.DestroyKeys], then [Store.EndDelete].
func (s *Store) BeginDelete(ctx context.Context, id string) error {
	return s.mark(ctx, id, func(r *row) error {
		if r.State != Deleted {
			r.State = Deleting
		}
		return nil
	})
}

// DestroyKeys destroys the key of an account's registration data, for ever. It
// can be repeated.
func (s *Store) DestroyKeys(ctx context.Context, id string) error {
	subject, err := s.subject(ctx, id)
	if err == nil {
		err = s.keys.Keyring.EraseSubject(ctx, keyringApp, subject)
	}
	if err != nil && !errors.Is(err, kms.ErrAppUnknown) {
		return fmt.Errorf("destroying the key of account %s: %w", id, err)
	}
	return nil
}

// EndDelete leaves of an account that is being deleted its id and state. It can
// be repeated.
func (s *Store) EndDelete(ctx context.Context, id string) error {
	return s.mark(ctx, id, func(r *row) error {
		if r.State != Deleting && r.State != Deleted {
			return fmt.Errorf("%w: %s is not being deleted", ErrInvalid, id)
		}
		*r = row{Version: rowVersion, State: Deleted, Created: r.Created}
		return nil
	})
}

// mark changes a row's open part. The registration data goes with the first
// change: a mark needs no key.
func (s *Store) mark(ctx context.Context, id string, edit func(*row) error) error {
	for {
		r, revision, err := s.load(ctx, id)
		if err != nil {
			return err
		}
		if err := edit(&r); err != nil {
			return err
		}
		r.Version, r.Private, r.Name = rowVersion, nil, nil
		value, err := json.Marshal(r)
		if err != nil {
			return fmt.Errorf("encoding account %s: %w", id, err)
		}
		_, err = s.rows.Update(ctx, rowPrefix+id, value, revision)
		if errors.Is(err, kms.ErrRowConflict) {
			continue
		}
		if err != nil {
			return fmt.Errorf("storing account %s: %w", id, err)
		}
		s.learn(id, r)
		return nil
	}
}
