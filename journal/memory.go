package journal

import (
	"context"
	"log/slog"
	"strings"
	"time"
)

// drop removes an app from memory. The lock is held.
func (r *Registry) drop(id AppID) {
	if _, there := r.apps.LoadAndDelete(id); there {
		r.size--
	}
}

func (r *Registry) evict(id AppID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.changes++
	r.drop(id)
	delete(r.unknown, id)
}

func (r *Registry) evictAll() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.changes++
	r.apps.Clear()
	r.size = 0
	clear(r.unknown)
}

// watch drops from memory what any process changes, until ctx ends. Before it
// watches, and again after a watch broke, everything is dropped.
func (r *Registry) watch(ctx context.Context, log *slog.Logger) {
	const shortest, longest = 100 * time.Millisecond, 10 * time.Second
	pause := shortest
	for ctx.Err() == nil {
		names, err := r.rows.Watch(ctx, appRow)
		r.evictAll()
		if err == nil {
			pause = shortest
			for name := range names {
				if id, err := ParseAppID(strings.TrimPrefix(name, appRow)); err == nil {
					r.evict(id)
				}
			}
		} else if ctx.Err() == nil {
			log.Warn("watch of the app registry failed, trying again", "region", r.region.ID, "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
			pause = min(2*pause, longest)
		}
	}
}
