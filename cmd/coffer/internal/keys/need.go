package keys

import (
	"context"
	"slices"

	"github.com/cofferdb/coffer/kms"
)

// need is whether an app lacks what a job is for.
type need struct {
	needed     bool
	generation uint32 // of the app key; the older one while two are there
	err        error
}

// look reads the rows of apps. It calls no provider.
func (w *worker) look(ctx context.Context, apps []string, versions map[kms.Identity]string) []need {
	needs := make([]need, len(apps))
	keys, errs := w.keyring.AppsKeys(ctx, apps)
	for i, app := range apps {
		if needs[i].err = errs[i]; errs[i] == nil {
			needs[i] = w.needs(app, keys[i], versions)
		}
	}
	return needs
}

// versions asks the KEKs for their latest versions, where the job is about them.
func (w *worker) versions(ctx context.Context) (map[kms.Identity]string, error) {
	versions := map[kms.Identity]string{}
	if w.job.Kind != Rewrap {
		return versions, nil
	}
	for _, id := range w.identities() {
		if p, ok := w.provider(id); ok {
			d, err := p.Describe(ctx)
			if err != nil {
				return nil, err
			}
			versions[id] = d.Version
		}
	}
	return versions, nil
}

func (w *worker) needs(app string, keys []kms.AppKey, versions map[kms.Identity]string) need {
	n := need{generation: keys[0].Generation}
	switch w.job.Kind {
	case Rewrap:
		for _, key := range keys {
			for _, wrap := range key.Wraps {
				now, ok := versions[wrap.Identity()]
				if !ok {
					return need{err: &kms.Error{Op: "rewrap", Provider: wrap.Provider, Key: wrap.Key, Class: kms.ErrNotFound, Detail: "no such provider is configured"}}
				}
				n.needed = n.needed || now == "" || now != wrap.Version
			}
		}
	case Migrate:
		n.needed = w.needsMove(keys)
	case Replace:
		i := w.pending(app)
		n.needed = i < 0 || len(keys) > 1 || n.generation <= w.job.Pending[i].Generation
	case Verify:
		n.needed = true
	}
	return n
}

// needsMove reports whether an app lacks what the phase of a migration is for. A
// migration of the region is not for apps that have a KEK of their own.
func (w *worker) needsMove(keys []kms.AppKey) bool {
	if len(w.leaving(keys)) == 0 {
		return false
	}
	for _, key := range keys {
		there := slices.ContainsFunc(key.Wraps, func(wrap kms.Wrap) bool { return wrap.Identity() == *w.job.Target })
		if !there || w.job.DryRun || w.job.Phase == phaseDrop || (w.job.Phase == phasePrefer && key.Wraps[0].Identity() != *w.job.Target) {
			return true
		}
	}
	return false
}

// leaving returns the KEKs whose wraps a migration drops.
func (w *worker) leaving(keys []kms.AppKey) []kms.Identity {
	var ids []kms.Identity
	for _, key := range keys {
		for _, wrap := range key.Wraps {
			id := wrap.Identity()
			if id == *w.job.Target || slices.Contains(ids, id) || (w.job.App == "" && slices.Contains(w.kept, id)) {
				continue
			}
			ids = append(ids, id)
		}
	}
	return ids
}
