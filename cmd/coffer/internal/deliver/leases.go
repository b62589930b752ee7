package deliver

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

const (
	leaseRow     = "lease.callbacks"
	leaseVersion = 1
	leaseSlots   = 16
	leaseBeat    = 3 * time.Second
)

// LeaseOptions is what a [LeaseTable] needs.
type LeaseOptions struct {
	// Rows are those of the registry; required.
	Rows kms.Rows
	// Beat is how often a process says that it is there; 0 means 3 seconds. One
	// whose beat has stood still for ten thirds of it has ended, and one that
	// could not raise its own for seven thirds of it stops by itself.
	Beat time.Duration
	Log  *slog.Logger
}

// LeaseTable divides endpoints among the processes of a region by slots, in one
// row of the registry (docs/format/callbacks.md). No process reads another's
// clock: it watches whether the other's beat changes.
type LeaseTable struct {
	rows kms.Rows
	beat time.Duration
	log  *slog.Logger
	id   string

	// Of the goroutine of Run.
	seen   map[string]sighting
	giving map[int]time.Time // slots that are given back, and when

	mu      sync.Mutex // guards what follows
	held    map[int]uint64
	changed chan struct{} // closed when held changes
}

// sighting is when another process's beat was last seen to change.
type sighting struct {
	beat uint64
	at   time.Time
}

// leaseTable is the row.
type leaseTable struct {
	Version int               `json:"version"`
	Members map[string]uint64 `json:"members"`
	Slots   []leaseSlot       `json:"slots"`
}

type leaseSlot struct {
	Owner string `json:"owner"`
	Token uint64 `json:"token"`
}

// NewLeases returns a table of which nothing is held until [LeaseTable.Run].
func NewLeases(o LeaseOptions) *LeaseTable {
	if o.Beat <= 0 {
		o.Beat = leaseBeat
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	id := endpoints.NewID()
	return &LeaseTable{
		rows: o.Rows, beat: o.Beat, log: o.Log, id: hex.EncodeToString(id[:]),
		seen: make(map[string]sighting), giving: make(map[int]time.Time), held: make(map[int]uint64), changed: make(chan struct{}),
	}
}

// Holds is part of [Leases].
func (t *LeaseTable) Holds(id journal.EndpointID) (token uint64, ok bool, changed <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	token, ok = t.held[int(id[len(id)-1])%leaseSlots]
	return token, ok, t.changed
}

// Run keeps this process's leases until ctx ends, and then gives them back. Call
// it around the engine: it must end later.
func (t *LeaseTable) Run(ctx context.Context) {
	tick := time.NewTicker(t.beat)
	defer tick.Stop()
	renewed := time.Now()
	for {
		started := time.Now()
		// A write that takes longer than a beat is no renewal.
		attempt, cancel := context.WithTimeout(ctx, t.beat)
		err := t.renew(attempt)
		cancel()
		switch {
		case ctx.Err() != nil:
			t.leave(ctx)
			return
		case err == nil:
			renewed = started
		default:
			t.log.Warn("leases of endpoints are not renewed", "error", err)
			if time.Since(renewed) >= t.beat*7/3-t.beat {
				// The next attempt would come too late.
				t.hold(nil)
			}
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

// hold replaces what is held.
func (t *LeaseTable) hold(held map[int]uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if maps.Equal(held, t.held) {
		return
	}
	t.held = held
	close(t.changed)
	t.changed = make(chan struct{})
}

func (t *LeaseTable) load(ctx context.Context) (leaseTable, uint64, error) {
	table := leaseTable{Version: leaseVersion, Members: make(map[string]uint64), Slots: make([]leaseSlot, leaseSlots)}
	row, err := t.rows.Load(ctx, leaseRow)
	if errors.Is(err, kms.ErrRowNotFound) {
		return table, 0, nil
	}
	if err != nil {
		return table, 0, err
	}
	if err := json.Unmarshal(row.Value, &table, json.RejectUnknownMembers(true)); err != nil || table.Version != leaseVersion || len(table.Slots) != leaseSlots {
		return table, 0, fmt.Errorf("row %s: %w", leaseRow, kms.ErrKeyringCorrupt)
	}
	if table.Members == nil {
		table.Members = make(map[string]uint64)
	}
	return table, row.Revision, nil
}

func (t *LeaseTable) store(ctx context.Context, table leaseTable, revision uint64) error {
	value, err := json.Marshal(table, json.Deterministic(true))
	if err != nil {
		return err
	}
	if revision == 0 {
		_, err = t.rows.Create(ctx, leaseRow, value)
	} else {
		_, err = t.rows.Update(ctx, leaseRow, value, revision)
	}
	return err
}

// renew raises this process's beat, and takes and gives slots.
func (t *LeaseTable) renew(ctx context.Context) error {
	for {
		table, revision, err := t.load(ctx)
		if err != nil {
			return err
		}
		t.look(&table)
		table.Members[t.id]++
		held := t.share(&table)
		err = t.store(ctx, table, revision)
		if errors.Is(err, kms.ErrRowConflict) && ctx.Err() == nil {
			continue
		}
		if err != nil {
			return err
		}
		t.hold(held)
		return nil
	}
}

// look takes out the processes that have ended.
func (t *LeaseTable) look(table *leaseTable) {
	now := time.Now()
	for id, beat := range table.Members {
		if id == t.id {
			continue
		}
		if s, ok := t.seen[id]; !ok || s.beat != beat {
			t.seen[id] = sighting{beat, now}
		} else if now.Sub(s.at) >= t.beat*10/3 {
			delete(table.Members, id)
			delete(t.seen, id)
		}
	}
	for i := range table.Slots {
		if owner := table.Slots[i].Owner; owner != "" && owner != t.id {
			if _, there := table.Members[owner]; !there {
				table.Slots[i].Owner = ""
			}
		}
	}
}

// share takes free slots up to this process's share, and gives back what is
// beyond: first here, so that what is under way ends, and in the table two beats
// later.
func (t *LeaseTable) share(table *leaseTable) map[int]uint64 {
	now := time.Now()
	share := (leaseSlots + len(table.Members) - 1) / len(table.Members)
	mine := 0
	for i := range table.Slots {
		since, giving := t.giving[i]
		if table.Slots[i].Owner != t.id {
			delete(t.giving, i)
			continue
		}
		if giving && now.Sub(since) >= 2*t.beat {
			table.Slots[i].Owner = ""
			delete(t.giving, i)
		} else if !giving {
			mine++
		}
	}
	held := make(map[int]uint64)
	for i := range table.Slots {
		slot := &table.Slots[i]
		switch _, giving := t.giving[i]; {
		case slot.Owner == "" && mine < share:
			slot.Owner = t.id
			slot.Token++
			mine++
			held[i] = slot.Token
		case slot.Owner != t.id || giving:
		case mine > share:
			t.giving[i] = now
			mine--
		default:
			held[i] = slot.Token
		}
	}
	return held
}

// leave gives everything back at the end.
func (t *LeaseTable) leave(ctx context.Context) {
	t.hold(nil)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), t.beat)
	defer cancel()
	for {
		table, revision, err := t.load(ctx)
		if err != nil || revision == 0 {
			return
		}
		delete(table.Members, t.id)
		for i := range table.Slots {
			if table.Slots[i].Owner == t.id {
				table.Slots[i].Owner = ""
			}
		}
		if err := t.store(ctx, table, revision); !errors.Is(err, kms.ErrRowConflict) {
			return // others notice that this process is silent
		}
	}
}
