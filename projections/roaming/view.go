package roaming

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections"
)

const name = "roaming"

// Config is what a view needs.
type Config struct {
	// Store is where the view is; required.
	Store projections.Store
	// Plans says how long the events of each plan are kept. Nil stands for
	// [journal.DefaultPlans]. Events of a plan that is not in the table stop the
	// projection.
	Plans []journal.Plan
}

// A View reads the roaming view, and is the projection that writes it. Its
// methods can be called from any goroutine.
type View struct {
	store     projections.Store
	retention map[string]time.Duration
	gate      atomic.Pointer[gateError]
}

type gateError struct{ err error }

// New returns the view in a store.
func New(cfg Config) (*View, error) {
	if cfg.Store == nil {
		return nil, errors.New("roaming: a view needs a store")
	}
	plans := cfg.Plans
	if plans == nil {
		plans = journal.DefaultPlans()
	}
	v := &View{store: cfg.Store, retention: make(map[string]time.Duration)}
	for _, p := range plans {
		if err := p.Validate(); err != nil {
			return nil, fmt.Errorf("roaming: %w", err)
		}
		v.retention[p.ID] = p.Retention
	}
	return v, nil
}

// Name is part of [projections.Projection].
func (v *View) Name() string { return name }

// Format is part of [projections.Projection].
func (v *View) Format() uint32 { return format }

// Tables is part of [projections.Projection].
func (v *View) Tables() []byte {
	return []byte{
		tableMembers, tableOfUser, tableAwaited, tableIndex, tableIDs, tableReceipts, tableAcks, tableExpiry,
	}
}

// Gate is part of [projections.Gated].
func (v *View) Gate(err error) {
	if err == nil {
		v.gate.Store(nil)
		return
	}
	v.gate.Store(&gateError{err})
}

// view calls fn with a snapshot, unless readers are kept out.
func (v *View) view(what string, fn func(projections.Reader) error) error {
	if g := v.gate.Load(); g != nil {
		return fmt.Errorf("roaming: %w", g.err)
	}
	if err := v.store.View(fn); err != nil {
		return fmt.Errorf("roaming: %s: %w", what, err)
	}
	return nil
}

// AppTables is part of [projections.PerApp].
func (v *View) AppTables() []byte {
	return []byte{tableMembers, tableOfUser, tableAwaited, tableIndex, tableIDs, tableReceipts, tableAcks}
}
