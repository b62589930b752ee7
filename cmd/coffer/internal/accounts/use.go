package accounts

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/cmd/coffer/internal/shelf"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

const (
	// knownFresh is how long an account is taken from memory: how fast another
	// process notices that it was disabled.
	knownFresh = 5 * time.Second
	// maxKnown bounds the accounts in memory.
	maxKnown = 10_000
	// refreshRetry is when a use that could not be written down is tried again.
	refreshRetry = time.Minute
)

// known is what is in memory of an account. The store's lock guards it.
type known struct {
	row
	loaded     time.Time // by the machine's clock, which does not jump
	refreshing bool
	notBefore  time.Time // of the next try to write a use down
}

// Use is called for each request that is made with an app of the account. It
// returns ErrDisabled for a disabled one and ErrDeleted for a deleted one, and
// writes the use down when that is due; write, which must not block, runs it in
// the background. An app without an account, or with one that the region does
// not know, is nobody's: nil.
func (s *Store) Use(ctx context.Context, id string, write func(func(context.Context))) error {
	if id == "" {
		return nil
	}
	k, err := s.look(ctx, id)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case k.State == Deleting || k.State == Deleted:
		return fmt.Errorf("%w: %s", ErrDeleted, id)
	case k.Disabled:
		return fmt.Errorf("%w: %s", ErrDisabled, id)
	case k.Version == 0 || k.State == Expired:
		return nil
	}
	now := s.now()
	if k.refreshing || !s.life.Due(k.Used, now) || now.Before(k.notBefore) {
		return nil
	}
	k.refreshing = true
	write(func(ctx context.Context) {
		err := s.refresh(ctx, id)
		s.mu.Lock()
		defer s.mu.Unlock()
		k.refreshing = false
		if err != nil {
			k.notBefore = s.now().Add(refreshRetry)
		}
	})
	return nil
}

// look returns what is known of an account, from memory if that is fresh. An
// account that the region does not have is one of version 0.
func (s *Store) look(ctx context.Context, id string) (*known, error) {
	s.mu.Lock()
	k := s.known[id]
	fresh := k != nil && time.Since(k.loaded) < knownFresh
	s.mu.Unlock()
	if fresh {
		return k, nil
	}
	r, _, err := s.load(ctx, id)
	if err != nil && !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrInvalid) {
		return nil, err
	}
	return s.learn(id, r), nil
}

// learn puts a row into memory.
func (s *Store) learn(id string, r row) *known {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.known[id]
	if k == nil {
		for other := range s.known {
			if len(s.known) < maxKnown {
				break
			}
			delete(s.known, other)
		}
		k = &known{}
		s.known[id] = k
	}
	r.Private, r.Name = nil, nil
	k.row, k.loaded = r, time.Now()
	return k
}

// refresh writes a use down, unless another process has.
func (s *Store) refresh(ctx context.Context, id string) error {
	r, revision, err := s.load(ctx, id)
	if err != nil {
		return err
	}
	if !s.life.Due(r.Used, s.now()) {
		s.learn(id, r)
		return nil
	}
	p, err := s.open(ctx, id, &r)
	if err != nil || r.State != "" && r.State != Active {
		return err
	}
	r.Used = s.moment()
	value, err := s.encode(ctx, id, r, p)
	if err != nil {
		return err
	}
	_, err = s.rows.Update(ctx, rowPrefix+id, value, revision)
	if errors.Is(err, kms.ErrRowConflict) {
		return nil // it was another use, or an end
	}
	if err != nil {
		return fmt.Errorf("storing account %s: %w", id, err)
	}
	s.learn(id, r)
	return nil
}

// A Warning is that an account's registration data ends soon.
type Warning struct {
	ID string
	// Used is the last use that was written down, Ends when it ends without
	// another.
	Used, Ends time.Time
}

// Sweep returns the sweep that ends registration data that has not been used and
// warns of what soon will have: see [shelf.Sweep]. The rows are those that the store
// works on.
func (s *Store) Sweep(rows shelf.Rows, warn, tell func(ctx context.Context, w Warning) error) shelf.Sweep {
	present := func(do func(context.Context, Warning) error) func(context.Context, journal.WrittenRow) error {
		return func(ctx context.Context, w journal.WrittenRow) error {
			id := strings.TrimPrefix(w.Name, rowPrefix)
			r, revision, err := s.load(ctx, id)
			if err != nil || revision != w.Revision {
				return errors.Join(err, shelf.Unchanged(revision, w.Revision))
			}
			return do(ctx, Warning{ID: id, Used: r.Used, Ends: s.life.Ends(r.Used)})
		}
	}
	return shelf.Sweep{
		Name: "accounts", Places: s.rows, Rows: rows, Prefix: rowPrefix, Life: s.life,
		Warn: present(warn), Tell: present(tell),
		Used: func(w journal.WrittenRow) (time.Time, bool, error) {
			r, err := parse(w.Value)
			return r.Used, r.State == "" || r.State == Active, err
		},
		End: func(ctx context.Context, w journal.WrittenRow) error {
			r, err := parse(w.Value)
			if err != nil {
				return err
			}
			value, err := json.Marshal(ended(r))
			if err != nil {
				return fmt.Errorf("encoding an account: %w", err)
			}
			if _, err := s.rows.Update(ctx, w.Name, value, w.Revision); err != nil {
				return fmt.Errorf("ending an account: %w", err)
			}
			return nil
		},
	}
}

// DestroyEpochs destroys the keys of registration data that has ended.
func (s *Store) DestroyEpochs(ctx context.Context) (int, error) {
	n, err := s.keys.Keyring.DestroyEpochs(ctx, keyringApp, s.now())
	if errors.Is(err, kms.ErrAppUnknown) {
		return 0, nil // no account was ever made
	}
	return n, err
}
