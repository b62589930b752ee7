package kms

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
)

// rowFormat is the format of app rows and pages that this package writes, and
// the only one it reads.
const rowFormat = 1

// appRow is the row app.<app>: docs/format/keyring.md. Once it was decoded or
// written it is not changed; clone makes what can be.
type appRow struct {
	Format    int         `json:"format"`
	App       string      `json:"app"`
	Region    string      `json:"region"`
	Keys      []appKeyRow `json:"keys,omitempty"` // ascending; the last one wraps what is new
	TagKey    []byte      `json:"tag_key,omitempty"`
	BlobKey   []byte      `json:"blob_key,omitempty"`
	NextEpoch uint32      `json:"next_epoch,omitzero"`
	Epochs    []epochRow  `json:"epochs,omitempty"` // ascending
	Destroyed time.Time   `json:"destroyed_at,omitzero"`
}

// appKeyRow is one app key: one but while it is being replaced.
type appKeyRow struct {
	Generation uint32 `json:"generation"`
	Check      []byte `json:"check"` // commitment to the key
	Wraps      []Wrap `json:"wraps"` // tried in this order
}

type epochRow struct {
	ID        uint32    `json:"id"`
	Class     string    `json:"class"`
	From      time.Time `json:"from"`
	Until     time.Time `json:"until"`
	Expires   time.Time `json:"expires,omitzero"`
	Key       []byte    `json:"key,omitempty"`
	Destroyed time.Time `json:"destroyed_at,omitzero"`
}

func appRowName(app string) string { return "app." + app }

func encodeAppRow(r *appRow) ([]byte, error) {
	b, err := json.Marshal(r, json.Deterministic(true))
	if err != nil {
		return nil, fmt.Errorf("encode app row: %w", err)
	}
	return b, nil
}

func decodeAppRow(region, app string, b []byte) (*appRow, error) {
	var r appRow
	if err := json.Unmarshal(b, &r, json.RejectUnknownMembers(true)); err != nil {
		return nil, fmt.Errorf("%w: app row of %s", ErrKeyringCorrupt, app)
	}
	corrupt := func(what string) (*appRow, error) {
		return nil, fmt.Errorf("%w: app row of %s: %s", ErrKeyringCorrupt, app, what)
	}
	switch {
	case r.Format != rowFormat:
		return corrupt("unknown format")
	case r.App != app || r.Region != region:
		return corrupt("it belongs to another app or region")
	case !r.Destroyed.IsZero():
		return &r, nil
	case len(r.Keys) == 0 || r.NextEpoch == 0:
		return corrupt("it has no key")
	}
	for i, k := range r.Keys {
		if len(k.Wraps) == 0 || len(k.Check) != KeySize || k.Generation == 0 || i > 0 && k.Generation <= r.Keys[i-1].Generation {
			return corrupt("malformed app key")
		}
	}
	for i, e := range r.Epochs {
		if e.ID == 0 || e.ID >= r.NextEpoch || i > 0 && e.ID <= r.Epochs[i-1].ID || (len(e.Key) == 0) == e.Destroyed.IsZero() {
			return corrupt("malformed epoch")
		}
	}
	return &r, nil
}

// clone copies what is changed in place: the lists, not the bytes in them.
func (r *appRow) clone() *appRow {
	c := *r
	c.Keys = slices.Clone(r.Keys)
	for i := range c.Keys {
		c.Keys[i].Wraps = slices.Clone(c.Keys[i].Wraps)
	}
	c.Epochs = slices.Clone(r.Epochs)
	return &c
}

// generation is of the app key that wraps what is new.
func (r *appRow) generation() uint32 { return r.Keys[len(r.Keys)-1].Generation }

// epoch returns the latest epoch of a class and time.
func (r *appRow) epoch(class string, from int64) (epochRow, bool) {
	for _, e := range slices.Backward(r.Epochs) {
		if e.Class == class && e.From.Unix() == from {
			return e, true
		}
	}
	return epochRow{}, false
}

func (r *appRow) epochByID(id uint32) (epochRow, bool) {
	i, ok := slices.BinarySearchFunc(r.Epochs, id, func(e epochRow, id uint32) int { return int(int64(e.ID) - int64(id)) })
	if !ok {
		return epochRow{}, false
	}
	return r.Epochs[i], true
}

func checkApp(app string) error {
	if app == "" || len(app) > 64 || strings.ContainsFunc(app, func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '_' && c != '-'
	}) {
		return fmt.Errorf("%w: app name %q", ErrInput, app)
	}
	return nil
}

func (e Epoch) check() error {
	switch {
	case e.Class == "" || len(e.Class) > maxContextPart:
		return fmt.Errorf("%w: an epoch's class has %d bytes", ErrInput, len(e.Class))
	case e.From.Nanosecond() != 0 || !e.From.Before(e.Until):
		return fmt.Errorf("%w: an epoch from %v until %v", ErrInput, e.From, e.Until)
	case !e.Expires.IsZero() && e.Expires.Before(e.Until):
		return fmt.Errorf("%w: an epoch that expires before it ends", ErrInput)
	}
	return nil
}
