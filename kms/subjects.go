package kms

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
)

// creator groups subjects that are created at the same time, so that those of
// one page are one write: whatever arrives while a write is under way goes into
// the next.
type creator struct {
	mu      sync.Mutex // guards what follows
	waiting []*creation
	running bool
}

type creation struct {
	subjects []Tag
	done     chan struct{}
	err      error // once done is closed
}

// subjectKey returns the row of a subject with its wrapped key, made if there is
// none and create is set.
func (a *appKeys) subjectKey(ctx context.Context, subject Tag, create bool) (subjectRow, error) {
	s, ok, err := a.findSubject(ctx, subject, false)
	if err == nil && !ok && create {
		if err := a.ensureSubjects(ctx, []Tag{subject}); err != nil {
			return subjectRow{}, err
		}
		s, ok, err = a.findSubject(ctx, subject, false)
	}
	// Another process may have made it: read the page, at least once by a load
	// that began after this call.
	for range 2 {
		if err == nil && !ok {
			s, ok, err = a.findSubject(ctx, subject, true)
		}
	}
	switch {
	case err != nil:
		return subjectRow{}, err
	case !ok:
		return subjectRow{}, fmt.Errorf("%w: subject %s of app %s", ErrKeyUnknown, subject, a.name)
	case len(s.Key) == 0:
		return subjectRow{}, fmt.Errorf("%w: subject %s of app %s", ErrSubjectErased, subject, a.name)
	}
	return s, nil
}

// findSubject looks a subject up in its page, read anew if fresh is set.
func (a *appKeys) findSubject(ctx context.Context, subject Tag, fresh bool) (subjectRow, bool, error) {
	digits := subject.String()
	for depth := range maxDepth + 1 {
		p, err := a.page(ctx, digits[:depth], fresh)
		if err != nil {
			return subjectRow{}, false, err
		}
		if !p.Split {
			s, ok := p.find(subject)
			return s, ok, nil
		}
	}
	return subjectRow{}, false, fmt.Errorf("%w: a page of one subject is split", ErrKeyringCorrupt)
}

// page returns the page of a path, from memory unless fresh is set. A page that
// is split stays so, and is not read anew. A page that does not exist is empty.
func (a *appKeys) page(ctx context.Context, path string, fresh bool) (*page, error) {
	a.mu.RLock()
	p := a.leaves[path]
	a.mu.RUnlock()
	if p != nil && (!fresh || p.Split) {
		return p, nil
	}
	return share(ctx, a.ring, "page:"+a.name+"."+path, func(ctx context.Context) (*page, error) {
		p, err := a.ring.loadPage(ctx, a.name, path)
		if err != nil {
			return nil, err
		}
		return a.keepPage(path, p)
	})
}

func (k *Keyring) loadPage(ctx context.Context, app, path string) (*page, error) {
	row, err := k.cfg.Rows.Load(ctx, pageRowName(app, path))
	switch {
	case errors.Is(err, ErrRowNotFound):
		return &page{Format: rowFormat}, nil
	case err != nil:
		return nil, fmt.Errorf("load page of subject keys: %w", err)
	}
	return decodePage(path, row)
}

// keepPage puts a page into memory, unless a newer one is there, and forgets
// the data keys of subjects erased in it. It returns the page in memory.
func (a *appKeys) keepPage(path string, p *page) (*page, error) {
	a.mu.Lock()
	if a.keys == nil {
		a.mu.Unlock()
		return nil, errStale
	}
	before := a.leaves[path]
	if before != nil && before.revision >= p.revision && p.revision != 0 {
		a.mu.Unlock()
		return before, nil
	}
	if before == nil {
		a.ring.pages.Add(1)
	}
	a.leaves[path] = p
	var erased []Tag
	for _, s := range p.Subjects {
		if s.Erased.IsZero() {
			continue
		}
		if before != nil {
			// One that was erased again, or registered since, has another key.
			if was, ok := before.find(s.Tag); ok && was.Erased.Equal(s.Erased) && bytes.Equal(was.Key, s.Key) {
				continue
			}
		}
		erased = append(erased, s.Tag)
	}
	a.forgetSubjects(erased)
	full := int(a.ring.pages.Load()) > a.ring.cfg.MaxPages
	a.mu.Unlock()
	if full {
		a.ring.shrinkPages(a, path)
	}
	return p, nil
}

// forgetSubjects drops the data keys of subjects. The caller holds mu.
func (a *appKeys) forgetSubjects(subjects []Tag) {
	if len(subjects) == 0 {
		return
	}
	if len(subjects)*len(a.row.Epochs) > len(a.young)+len(a.old) {
		gone := make(map[Tag]bool, len(subjects))
		for _, s := range subjects {
			gone[s] = true
		}
		a.forgetLocked(func(id dataID) bool { return gone[id.subject] })
		return
	}
	a.version++
	for _, s := range subjects {
		for _, e := range a.row.Epochs {
			id := dataID{e.ID, s}
			if a.young[id] != nil || a.old[id] != nil {
				delete(a.young, id)
				delete(a.old, id)
				a.ring.dataKeys.Add(-1)
			}
		}
	}
}

// shrinkPages drops pages until a tenth is free, but not the one named.
func (k *Keyring) shrinkPages(of *appKeys, but string) {
	k.mu.RLock()
	apps := make([]*appKeys, 0, len(k.apps)+1)
	for _, a := range k.apps { // in random order
		apps = append(apps, a)
	}
	k.mu.RUnlock()
	for _, a := range apps {
		a.mu.Lock()
		for path := range a.leaves {
			if int(k.pages.Load()) <= k.cfg.MaxPages*9/10 {
				break
			}
			if a != of || path != but {
				delete(a.leaves, path)
				k.pages.Add(-1)
			}
		}
		a.mu.Unlock()
	}
}

// ensureSubjects makes the keys of those subjects that have none.
func (a *appKeys) ensureSubjects(ctx context.Context, subjects []Tag) error {
	var missing []Tag
	for _, subject := range subjects {
		_, ok, err := a.findSubject(ctx, subject, false)
		if err != nil {
			return err
		}
		if !ok {
			missing = append(missing, subject)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	c := &creation{subjects: missing, done: make(chan struct{})}
	a.creator.mu.Lock()
	if !a.creator.running {
		if !a.ring.begin() {
			a.creator.mu.Unlock()
			return ErrClosed
		}
		a.creator.running = true
		go a.create() //nolint:contextcheck // shared with callers whose contexts end later
	}
	a.creator.waiting = append(a.creator.waiting, c)
	a.creator.mu.Unlock()
	select {
	case <-c.done:
		return c.err
	case <-ctx.Done():
		return fmt.Errorf("wait for subject keys: %w", ctx.Err())
	}
}

// create makes what is waiting until nothing is.
func (a *appKeys) create() {
	defer a.ring.wg.Done()
	for {
		a.creator.mu.Lock()
		batch := a.creator.waiting
		a.creator.waiting = nil
		if len(batch) == 0 {
			a.creator.running = false
			a.creator.mu.Unlock()
			return
		}
		a.creator.mu.Unlock()
		var subjects []Tag
		seen := map[Tag]bool{}
		for _, c := range batch {
			for _, s := range c.subjects {
				if !seen[s] {
					seen[s] = true
					subjects = append(subjects, s)
				}
			}
		}
		err := a.createIn("", subjects)
		for _, c := range batch {
			c.err = err
			close(c.done)
		}
	}
}

// createIn makes the keys of the subjects that have none in the page of a path
// or below it.
func (a *appKeys) createIn(path string, subjects []Tag) error {
	for attempt := range maxAttempts {
		p, err := a.createOnce(path, subjects, attempt > 0)
		switch {
		case errors.Is(err, ErrRowConflict):
			if err := pause(a.ring.ctx, attempt); err != nil {
				return err
			}
		case err != nil:
			return fmt.Errorf("make subject keys of app %s: %w", a.name, err)
		case p == nil:
			return nil
		default: // p is split
			below := map[byte][]Tag{}
			for _, s := range subjects {
				d := nibble(s, len(path))
				below[d] = append(below[d], s)
			}
			for d, part := range below {
				if err := a.createIn(path+string(d), part); err != nil {
					return err
				}
			}
			return nil
		}
	}
	return fmt.Errorf("make subject keys of app %s: %w", a.name, ErrRowConflict)
}

// createOnce adds subjects to a page, splitting it if they do not fit. It
// returns the page if it is split, and ErrRowConflict when the page was changed
// meanwhile.
func (a *appKeys) createOnce(path string, subjects []Tag, fresh bool) (*page, error) {
	k := a.ring
	ctx, cancel := context.WithTimeout(k.ctx, k.cfg.CallTimeout)
	defer cancel()
	p, err := a.page(ctx, path, fresh)
	if err != nil {
		return nil, err
	}
	if p.Split {
		return p, nil
	}
	var rows []subjectRow
	next := *p
	err = a.withKeys(func(keys *ciphers) error {
		if p.Generation > keys.current {
			return errStale
		}
		next.Generation = keys.current
		for _, s := range subjects {
			if _, ok := p.find(s); ok {
				continue
			}
			rows = append(rows, subjectRow{Tag: s, Key: keys.newSubject(a, s)})
		}
		return nil
	})
	if err != nil || len(rows) == 0 {
		return nil, err
	}
	grown := next.with(rows...)
	value, err := encodePage(grown)
	if err != nil {
		return nil, err
	}
	if len(value) > k.pageLimit && len(path) < maxDepth {
		return a.split(ctx, path, &next)
	}
	return nil, a.writePage(ctx, path, p, grown, value)
}

// writePage replaces a page by compare-and-set, in memory too.
func (a *appKeys) writePage(ctx context.Context, path string, old, p *page, value []byte) error {
	revision, err := a.ring.storePage(ctx, a.name, path, old.revision, value)
	if err != nil {
		return err
	}
	p.revision = revision
	_, err = a.keepPage(path, p)
	return err
}

func (k *Keyring) storePage(ctx context.Context, app, path string, old uint64, value []byte) (revision uint64, err error) {
	if old == 0 {
		revision, err = k.cfg.Rows.Create(ctx, pageRowName(app, path), value)
	} else {
		revision, err = k.cfg.Rows.Update(ctx, pageRowName(app, path), value, old)
	}
	if err != nil {
		return 0, fmt.Errorf("write page of subject keys: %w", err)
	}
	return revision, nil
}

// split moves the subjects of a page to pages one digit longer, and then marks
// it as split. Until it is marked the new pages count for nothing, so a crash
// in between costs nothing. Two processes may split one page at once, also from
// different revisions: a page below is replaced only by one split from a later
// revision, and only one of them can mark the page.
func (a *appKeys) split(ctx context.Context, path string, p *page) (*page, error) {
	for i := range len(hexDigits) {
		digit := hexDigits[i]
		child := p.child(path, digit)
		if len(child.Subjects) == 0 {
			continue // then it is empty in every earlier revision too: subjects never leave a page
		}
		value, err := encodePage(child)
		if err != nil {
			return nil, err
		}
		if err := a.ring.storeChild(ctx, a.name, path+string(digit), p.revision, value); err != nil {
			return nil, err
		}
	}
	marked := &page{Format: rowFormat, Generation: p.Generation, Split: true, From: p.From}
	value, err := encodePage(marked)
	if err != nil {
		return nil, err
	}
	return marked, a.writePage(ctx, path, p, marked, value)
}

// storeChild writes a page that was split from a revision, unless one from the
// same revision is there. One from a later revision is ErrRowConflict.
func (k *Keyring) storeChild(ctx context.Context, app, path string, from uint64, value []byte) error {
	for range maxAttempts {
		there, err := k.loadPage(ctx, app, path)
		if err != nil {
			return err
		}
		switch {
		case there.revision != 0 && there.From == from:
			return nil
		case there.revision != 0 && there.From > from:
			return fmt.Errorf("split page of subject keys: %w", ErrRowConflict)
		}
		if _, err := k.storePage(ctx, app, path, there.revision, value); !errors.Is(err, ErrRowConflict) {
			return err
		}
	}
	return fmt.Errorf("split page of subject keys: %w", ErrRowConflict)
}
