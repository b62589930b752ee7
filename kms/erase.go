package kms

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"
)

// EraseSubject destroys the key of a subject, for ever: it returns once no row
// holds it any more. Repeat it after an error; erasing twice is no error. It
// calls no provider, so it works while the provider is away.
func (k *Keyring) EraseSubject(ctx context.Context, app string, subject Tag) error {
	if err := checkApp(app); err != nil {
		return err
	}
	if _, _, err := k.loadRow(ctx, app); err != nil {
		return fmt.Errorf("erase subject: %w", err)
	}
	digits := subject.String()
	conflicts := 0
	for depth := 0; depth <= maxDepth; {
		path := digits[:depth]
		p, err := k.loadPage(ctx, app, path)
		if err != nil {
			return fmt.Errorf("erase subject: %w", err)
		}
		if p.Split {
			depth++
			continue
		}
		err = k.eraseIn(ctx, app, path, p, subject)
		if errors.Is(err, ErrRowConflict) && conflicts < maxAttempts {
			if err := pause(ctx, conflicts); err != nil {
				return err
			}
			conflicts++
			continue
		}
		if err != nil {
			return fmt.Errorf("erase subject: %w", err)
		}
		return nil
	}
	return fmt.Errorf("erase subject: %w: a page of one subject is split", ErrKeyringCorrupt)
}

// RegisterSubject gives a subject that was erased a new key, and reports whether
// it has: a subject that was not erased is left as it is. What was sealed before
// the erasure stays erased, and says so when it is opened.
func (k *Keyring) RegisterSubject(ctx context.Context, app string, subject Tag) (bool, error) {
	registered := false
	err := k.withApp(ctx, app, func(a *appKeys) error {
		for attempt := range maxAttempts {
			var err error
			if registered, err = a.register(ctx, subject); !errors.Is(err, ErrRowConflict) {
				return err
			}
			if err := pause(ctx, attempt); err != nil {
				return err
			}
		}
		return ErrRowConflict
	})
	if err != nil {
		return false, fmt.Errorf("register subject: %w", err)
	}
	return registered, nil
}

func (a *appKeys) register(ctx context.Context, subject Tag) (bool, error) {
	digits := subject.String()
	for depth := range maxDepth + 1 {
		path := digits[:depth]
		p, err := a.page(ctx, path, true)
		if err != nil {
			return false, err
		}
		if p.Split {
			continue
		}
		row, ok := p.find(subject)
		if !ok || len(row.Key) > 0 {
			return false, nil
		}
		next := *p
		err = a.withKeys(func(keys *ciphers) error {
			if p.Generation > keys.current {
				return errStale
			}
			next.Generation = keys.current
			row.Key = keys.newSubject(a, subject)
			return nil
		})
		if err != nil {
			return false, err
		}
		grown := next.with(row)
		value, err := encodePage(grown)
		if err != nil {
			return false, err
		}
		return true, a.writePage(ctx, path, p, grown, value)
	}
	return false, fmt.Errorf("%w: a page of one subject is split", ErrKeyringCorrupt)
}

// newSubject makes the key of a subject, wrapped.
func (c *ciphers) newSubject(a *appKeys, subject Tag) []byte {
	var raw [KeySize]byte
	_, _ = rand.Read(raw[:]) // never fails: crypto/rand ends the program instead
	defer clear(raw[:])
	return c.seal(a.ring.cfg.Region, a.name, kindSubjectKey, subject[:], raw[:])
}

// eraseIn puts a tombstone into the page. Then it sees to the page below, into
// which a split that began before may have put, or may yet put, the key: an
// empty page that claims to be split from the revision before the tombstone
// keeps that split from writing, and a later one replaces it.
func (k *Keyring) eraseIn(ctx context.Context, app, path string, p *page, subject Tag) error {
	before := p.revision
	if s, ok := p.find(subject); !ok || len(s.Key) > 0 {
		if !ok {
			before = 0 // no revision ever held the key
		}
		erased := p.with(subjectRow{Tag: subject, Erased: k.cfg.Now().UTC().Truncate(time.Second)})
		value, err := encodePage(erased)
		if err != nil {
			return err
		}
		if erased.revision, err = k.storePage(ctx, app, path, p.revision, value); err != nil {
			return err
		}
		p = erased
	} else if before > 0 {
		before-- // the tombstone is there: every split that could hold the key began at an earlier revision
	}
	if a := k.cached(app); a != nil {
		if _, err := a.keepPage(path, p); err != nil && !errors.Is(err, errStale) {
			return err
		}
	}
	if len(path) == maxDepth || before == 0 {
		return nil
	}
	return k.fence(ctx, app, path+string(nibble(subject, len(path))), before)
}

// fence empties a page that counts for nothing, if it was split from a revision
// up to the given one, and makes it if there is none.
func (k *Keyring) fence(ctx context.Context, app, path string, before uint64) error {
	value, err := encodePage(&page{Format: rowFormat, From: before})
	if err != nil {
		return err
	}
	there, err := k.loadPage(ctx, app, path)
	if err != nil {
		return err
	}
	if there.revision != 0 && (there.From > before || there.From == before && len(there.Subjects) == 0) {
		return nil
	}
	_, err = k.storePage(ctx, app, path, there.revision, value)
	return err
}

// SubjectState is how a subject stands in the keyring.
type SubjectState struct {
	// Key tells that the subject has a key.
	Key bool
	// Erased is when a key of it was last destroyed; zero if none was.
	Erased time.Time
}

// SubjectState reads how a subject stands, from its row. It calls no provider.
func (k *Keyring) SubjectState(ctx context.Context, app string, subject Tag) (SubjectState, error) {
	if err := checkApp(app); err != nil {
		return SubjectState{}, err
	}
	digits := subject.String()
	for depth := range maxDepth + 1 {
		p, err := k.loadPage(ctx, app, digits[:depth])
		if err != nil {
			return SubjectState{}, fmt.Errorf("look at a subject: %w", err)
		}
		if p.Split {
			continue
		}
		row, _ := p.find(subject)
		return SubjectState{Key: len(row.Key) > 0, Erased: row.Erased}, nil
	}
	return SubjectState{}, fmt.Errorf("look at a subject: %w: a page of one subject is split", ErrKeyringCorrupt)
}
