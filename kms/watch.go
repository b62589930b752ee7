package kms

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"time"
)

// nameSet holds names until they are taken, each once.
type nameSet struct {
	mu    sync.Mutex // guards names
	names map[string]struct{}
	ready chan struct{} // holds one token while there are names
}

func newNameSet() *nameSet {
	return &nameSet{names: map[string]struct{}{}, ready: make(chan struct{}, 1)}
}

func (s *nameSet) add(name string) {
	s.mu.Lock()
	s.names[name] = struct{}{}
	s.mu.Unlock()
	select {
	case s.ready <- struct{}{}:
	default:
	}
}

func (s *nameSet) take() map[string]struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	names := s.names
	s.names = map[string]struct{}{}
	return names
}

const (
	firstRewatch = 100 * time.Millisecond
	lastRewatch  = 10 * time.Second
)

// watch notes which rows change, and starts again when a watch ends.
func (k *Keyring) watch() {
	wait := firstRewatch
	for {
		names, err := k.cfg.Rows.Watch(k.ctx, "")
		if err == nil {
			wait = firstRewatch
			k.missed()
			for name := range names {
				k.changed(name)
			}
		}
		if k.ctx.Err() != nil {
			return
		}
		k.cfg.Log.Warn("changes of keyring rows are not seen, watching again", slog.Any("error", err))
		t := time.NewTimer(jitter(wait, 0.5))
		select {
		case <-t.C:
		case <-k.ctx.Done():
			t.Stop()
			return
		}
		wait = min(2*wait, lastRewatch)
	}
}

// missed supposes that every row has changed. It drops data keys and pages but
// not app keys: what was lost is a view of the rows, not the provider.
func (k *Keyring) missed() {
	k.mu.Lock()
	clear(k.negative)
	apps := make([]*appKeys, 0, len(k.apps))
	for _, a := range k.apps {
		apps = append(apps, a)
	}
	k.mu.Unlock()
	for _, a := range apps {
		a.reset()
		k.dirty.add(appRowName(a.name))
	}
}

// changed notes one row.
func (k *Keyring) changed(name string) {
	if app, ok := strings.CutPrefix(name, "app."); ok {
		k.forgive(app)
		if k.cached(app) != nil {
			k.dirty.add(name)
		}
	} else if app, _, ok := splitPageName(name); ok && k.cached(app) != nil {
		k.dirty.add(name)
	}
}

// follow reads the rows that have changed, so that what was erased, destroyed or
// replaced is forgotten here too.
func (k *Keyring) follow() {
	for {
		select {
		case <-k.dirty.ready:
		case <-k.ctx.Done():
			return
		}
		for name := range k.dirty.take() {
			k.reread(name)
		}
	}
}

func (k *Keyring) reread(name string) {
	app, isApp := strings.CutPrefix(name, "app.")
	path := ""
	if !isApp {
		app, path, _ = splitPageName(name)
	}
	a := k.cached(app)
	if a == nil {
		return
	}
	ctx, cancel := context.WithTimeout(k.ctx, k.cfg.CallTimeout)
	defer cancel()
	var err error
	if isApp {
		err = a.reread(ctx)
	} else {
		var p *page
		if p, err = k.loadPage(ctx, app, path); err == nil {
			_, err = a.keepPage(path, p)
		}
	}
	switch {
	case err == nil || k.ctx.Err() != nil:
	case errors.Is(err, errStale):
		k.evict(a)
	case errors.Is(err, ErrAppUnknown), errors.Is(err, ErrAppDestroyed), errors.Is(err, ErrKeyringCorrupt):
		k.cfg.Log.Warn("app keys dropped", slog.String("app", app), slog.Any("error", err))
		k.evict(a)
	default:
		// What changed is not known, so nothing derived from it may stay.
		k.cfg.Log.Warn("changed row not read", slog.String("row", name), slog.Any("error", err))
		a.reset()
		time.AfterFunc(jitter(time.Second, 0.5), func() { k.dirty.add(name) })
	}
}

func (a *appKeys) reread(ctx context.Context) error {
	row, revision, err := a.ring.loadRow(ctx, a.name)
	if err != nil {
		return err
	}
	return a.install(row, revision)
}

// DestroyApp destroys every key of an app, for ever. Repeat it after an error.
// It calls no provider.
func (k *Keyring) DestroyApp(ctx context.Context, app string) error {
	if err := checkApp(app); err != nil {
		return err
	}
	_, _, err := k.changeRow(ctx, app, func(row *appRow) (bool, error) {
		*row = appRow{Format: rowFormat, App: app, Region: k.cfg.Region, Destroyed: k.cfg.Now().UTC().Truncate(time.Second)}
		return true, nil
	})
	k.Evict(app)
	if err != nil && !errors.Is(err, ErrAppDestroyed) {
		return err
	}
	// The pages are of no use without the app key. They go as well, twice over:
	// a process that had not noticed may have written one more.
	for range 2 {
		for name, err := range k.cfg.Rows.List(ctx, "sub."+app+".") {
			if err == nil {
				err = k.deleteRow(ctx, name)
			}
			if err != nil {
				return err
			}
		}
	}
	k.forgive(app)
	return nil
}

func (k *Keyring) deleteRow(ctx context.Context, name string) error {
	for range maxAttempts {
		row, err := k.cfg.Rows.Load(ctx, name)
		if err == nil {
			err = k.cfg.Rows.Delete(ctx, name, row.Revision)
		}
		if err == nil || errors.Is(err, ErrRowNotFound) {
			return nil
		}
		if !errors.Is(err, ErrRowConflict) {
			return err
		}
	}
	return ErrRowConflict
}
