package kms

import (
	"crypto/cipher"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// dataID names a data key of an app.
type dataID struct {
	epoch   uint32
	subject Tag
}

// epochRef is what an epoch of a caller leads to.
type epochRef struct {
	class string
	from  int64
	id    uint32
}

// ciphers are made from the unwrapped keys of an app.
type ciphers struct {
	app     map[uint32]cipher.AEAD // app keys by generation
	current uint32                 // generation that wraps what is new
	blob    cipher.AEAD
}

func (c *ciphers) wipe() {
	for _, aead := range c.app {
		wipe(aead)
	}
	wipe(c.blob)
}

// appKeys is one app in memory. It is made by a load, and ends with evict; a
// later load makes another.
type appKeys struct {
	ring   *Keyring
	name   string
	tagger *Tagger
	used   atomic.Bool              // since it was loaded or revalidated
	recent atomic.Pointer[epochRef] // the epoch sealed with last

	creator creator

	mu       sync.RWMutex // guards what follows; never held during a call
	keys     *ciphers     // nil once evicted
	row      *appRow
	revision uint64                   // of row
	version  uint64                   // grows with everything that may make a derived key wrong
	young    map[dataID]*DataKey      // data keys made or used since the last turn
	old      map[dataID]*DataKey      // those of before
	leaves   map[string]*page         // pages by path
	ahead    map[epochRef]*time.Timer // that make next epochs, by the epoch before, without id

	timer    *time.Timer // of the next revalidation
	hardAt   time.Time
	attempts int       // failed revalidations since the last good one
	since    time.Time // of the first of them
	failedAt time.Time // of the latest of them
	err      error     // of the latest of them
}

// touch notes that the app is in use, so that it is worth revalidating.
func (a *appKeys) touch() {
	if !a.used.Load() {
		a.used.Store(true)
	}
}

// sealer returns the data key if it is in memory and not used up.
func (a *appKeys) sealer(class string, from int64, subject Tag) *DataKey {
	var id uint32
	if ref := a.recent.Load(); ref != nil && ref.from == from && ref.class == class {
		id = ref.id
	} else {
		a.mu.RLock()
		e, ok := a.row.epoch(class, from)
		a.mu.RUnlock()
		if !ok {
			return nil
		}
		id = e.ID
	}
	key := a.dataKey(dataID{id, subject})
	if key != nil && key.sealed.Load() >= a.ring.cfg.MaxSeals {
		return nil
	}
	return key
}

// dataKey returns the data key if it is in memory.
func (a *appKeys) dataKey(id dataID) *DataKey {
	a.touch()
	a.mu.RLock()
	key := a.young[id]
	if key != nil {
		a.mu.RUnlock()
		return key
	}
	key = a.old[id]
	a.mu.RUnlock()
	if key == nil {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.old[id] != key {
		return a.young[id] // it was turned, or forgotten, in between
	}
	delete(a.old, id)
	a.young[id] = key
	return key
}

// keep puts a data key into memory, unless something has changed since the
// version it was derived at; it returns the one in memory then.
func (a *appKeys) keep(id dataID, key *DataKey, version uint64) (*DataKey, bool) {
	a.mu.Lock()
	if a.keys == nil || a.version != version {
		a.mu.Unlock()
		return nil, false
	}
	if first := a.young[id]; first != nil {
		a.mu.Unlock()
		return first, true // so that all count their seals together
	}
	a.young[id] = key
	n := a.ring.dataKeys.Add(1)
	a.mu.Unlock()
	if int(n) > a.ring.cfg.MaxDataKeys {
		a.ring.shrink()
	}
	return key, true
}

// turn drops what was not used since the last turn.
func (a *appKeys) turn() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ring.dataKeys.Add(-int64(len(a.old)))
	a.old, a.young = a.young, map[dataID]*DataKey{}
}

// thin drops data keys not used since the last turn, until there is enough room.
func (a *appKeys) thin(enough func() bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for id := range a.old { // in random order
		if enough() {
			return
		}
		delete(a.old, id)
		a.ring.dataKeys.Add(-1)
	}
}

// forgetLocked drops the data keys that match. The caller holds mu.
func (a *appKeys) forgetLocked(match func(dataID) bool) {
	a.version++
	for _, m := range []map[dataID]*DataKey{a.young, a.old} {
		for id := range m {
			if match(id) {
				delete(m, id)
				a.ring.dataKeys.Add(-1)
			}
		}
	}
}

// reset drops everything that the rows could contradict.
func (a *appKeys) reset() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.forgetLocked(func(dataID) bool { return true })
	a.ring.pages.Add(-int64(len(a.leaves)))
	a.leaves = map[string]*page{}
}

// withKeys lets f use the app's ciphers, which are not wiped meanwhile. f must
// not block.
func (a *appKeys) withKeys(f func(*ciphers) error) error {
	a.touch()
	a.mu.RLock()
	defer a.mu.RUnlock()
	if a.keys == nil {
		return errStale
	}
	return f(a.keys)
}

// derive makes the data key of an epoch and a subject from their wrapped keys.
func (a *appKeys) derive(id dataID, epochKey []byte, subject subjectRow) (key *DataKey, err error) {
	region := a.ring.cfg.Region
	err = a.withKeys(func(keys *ciphers) error {
		e, err := keys.open(region, a.name, kindEpochKey, epochID(id.epoch), epochKey)
		if err != nil {
			return err
		}
		defer clear(e)
		s, err := keys.open(region, a.name, kindSubjectKey, id.subject[:], subject.Key)
		if err != nil {
			return err
		}
		defer clear(s)
		if key, err = DeriveDataKey(region, a.name, id.epoch, id.subject, e, s); err == nil {
			key.successor = !subject.Erased.IsZero()
		}
		return err
	})
	return key, err
}

// open unwraps a key with the app key of its generation.
func (c *ciphers) open(region, app, kind string, id, blob []byte) ([]byte, error) {
	generation, err := wrappedGeneration(blob)
	if err != nil {
		return nil, err
	}
	aead := c.app[generation]
	if aead == nil {
		return nil, fmt.Errorf("the %s key needs app key %d: %w", kind, generation, errStale)
	}
	return openKey(aead, region, app, kind, id, blob)
}

// seal wraps a key with the current app key.
func (c *ciphers) seal(region, app, kind string, id, key []byte) []byte {
	return sealKey(c.app[c.current], region, app, c.current, kind, id, key)
}

// install takes over a row, unless it has a newer one. It returns errStale when
// the row needs app keys that are not in memory.
func (a *appKeys) install(row *appRow, revision uint64) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.keys == nil {
		return errStale
	}
	if revision <= a.revision {
		return nil
	}
	if len(row.Keys) == 0 || row.generation() != a.keys.current || len(row.Keys) != len(a.keys.app) {
		return errStale
	}
	gone := map[uint32]bool{}
	for _, e := range a.row.Epochs {
		if len(e.Key) == 0 {
			continue
		}
		if now, ok := row.epochByID(e.ID); !ok || len(now.Key) == 0 {
			gone[e.ID] = true
		}
	}
	a.row, a.revision = row, revision
	a.recent.Store(nil)
	if len(gone) > 0 {
		a.forgetLocked(func(id dataID) bool { return gone[id.epoch] })
	}
	return nil
}

// present returns the row, its revision and the version to derive at.
func (a *appKeys) present() (row *appRow, revision, version uint64) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.row, a.revision, a.version
}

func (a *appKeys) degradation() (since, at time.Time, err error) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.since, a.failedAt, a.err
}

// close wipes what it can at once. Data keys that callers still have are wiped
// when the garbage collector finds them unreachable.
func (a *appKeys) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.keys == nil {
		return
	}
	a.forgetLocked(func(dataID) bool { return true })
	a.ring.pages.Add(-int64(len(a.leaves)))
	a.leaves = nil
	a.keys.wipe()
	a.keys = nil
	if a.timer != nil {
		a.timer.Stop()
	}
	for _, t := range a.ahead {
		t.Stop()
	}
}
