package endpoints

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

const (
	rowPrefix  = "endpoint."
	rowVersion = 1
)

// Journal is what the store needs of a region's journal.
type Journal interface {
	Tag(ctx context.Context, app journal.AppID, kind, id string) (kms.Tag, error)
	Keyring() *kms.Keyring
}

// Store reads and writes the endpoints of a region.
type Store struct {
	rows    kms.Rows
	journal Journal
	now     func() time.Time
}

// New returns the store over the registry's rows. It calls nothing.
func New(rows kms.Rows, j Journal, now func() time.Time) *Store {
	if now == nil {
		now = time.Now
	}
	return &Store{rows: rows, journal: j, now: now}
}

// row is an endpoint as it is stored, in JSON.
type row struct {
	Version       int              `json:"version"`
	State         State            `json:"state"`
	Reason        Reason           `json:"reason,omitzero"`
	Since         time.Time        `json:"since"`
	Created       time.Time        `json:"created"`
	Mode          Mode             `json:"mode"`
	Ordered       bool             `json:"ordered,omitzero"`
	Rate          int              `json:"rate,omitzero"`
	Concurrency   int              `json:"concurrency,omitzero"`
	Batch         int              `json:"batch,omitzero"`
	AskedOnly     bool             `json:"asked_only,omitzero"`
	Types         []string         `json:"types,omitempty"`
	Conversations []string         `json:"conversations,omitempty"`
	Users         []string         `json:"users,omitempty"`
	After         journal.Position `json:"after"`
	Untold        *Notice          `json:"untold,omitempty"`
	Private       []byte           `json:"private"`
}

func rowName(app journal.AppID, id journal.EndpointID) string {
	return rowPrefix + app.String() + "." + FormatID(id)
}

// parseRowName is the inverse of rowName.
func parseRowName(name string) (app journal.AppID, id journal.EndpointID, err error) {
	first, second, _ := strings.Cut(strings.TrimPrefix(name, rowPrefix), ".")
	if app, err = journal.ParseAppID(first); err == nil {
		id, err = ParseID(second)
	}
	return app, id, err
}

// Create checks and stores a new endpoint, and returns it as it is stored.
func (s *Store) Create(ctx context.Context, e Endpoint) (Endpoint, error) {
	ids, err := s.ids(ctx, e.App)
	if err != nil {
		return Endpoint{}, err
	}
	if len(ids) >= MaxPerApp {
		return Endpoint{}, fmt.Errorf("%w: %d", ErrTooMany, len(ids))
	}
	e.Created = s.now().UTC().Truncate(time.Millisecond)
	e.Since = e.Created
	value, err := s.encode(ctx, &e)
	if err != nil {
		return Endpoint{}, err
	}
	if e.revision, err = s.rows.Create(ctx, rowName(e.App, e.ID), value); err != nil {
		return Endpoint{}, fmt.Errorf("storing endpoint %s: %w", e.IDText(), err)
	}
	return e, nil
}

// Update stores a changed endpoint. [ErrChanged] means that it is not the one
// that was read.
func (s *Store) Update(ctx context.Context, e Endpoint) (Endpoint, error) {
	value, err := s.encode(ctx, &e)
	if err != nil {
		return Endpoint{}, err
	}
	e.revision, err = s.rows.Update(ctx, rowName(e.App, e.ID), value, e.revision)
	switch {
	case errors.Is(err, kms.ErrRowConflict):
		return Endpoint{}, ErrChanged
	case err != nil:
		return Endpoint{}, fmt.Errorf("storing endpoint %s: %w", e.IDText(), err)
	}
	return e, nil
}

// Change loads an endpoint, has edit change it, and stores it, again when
// somebody else was faster. When edit fails nothing is stored.
func (s *Store) Change(ctx context.Context, app journal.AppID, id journal.EndpointID, edit func(*Endpoint) error) (Endpoint, error) {
	for {
		e, err := s.Endpoint(ctx, app, id)
		if err != nil {
			return Endpoint{}, err
		}
		before := e.State
		if err := edit(&e); err != nil {
			return e, err
		}
		if e.State != before {
			e.Since = s.now().UTC().Truncate(time.Millisecond)
		}
		e, err = s.Update(ctx, e)
		if errors.Is(err, ErrChanged) {
			continue
		}
		return e, err
	}
}

// Delete removes an endpoint; what it has not got is not sent any more.
func (s *Store) Delete(ctx context.Context, app journal.AppID, id journal.EndpointID) error {
	for {
		stored, err := s.rows.Load(ctx, rowName(app, id))
		if err == nil {
			err = s.rows.Delete(ctx, rowName(app, id), stored.Revision)
		}
		switch {
		case errors.Is(err, kms.ErrRowConflict):
			continue
		case errors.Is(err, kms.ErrRowNotFound):
			return ErrNotFound
		case err != nil:
			return fmt.Errorf("deleting endpoint %s: %w", FormatID(id), err)
		}
		return nil
	}
}

// Endpoint returns one endpoint.
func (s *Store) Endpoint(ctx context.Context, app journal.AppID, id journal.EndpointID) (Endpoint, error) {
	stored, err := s.rows.Load(ctx, rowName(app, id))
	if errors.Is(err, kms.ErrRowNotFound) {
		return Endpoint{}, ErrNotFound
	}
	if err != nil {
		return Endpoint{}, fmt.Errorf("reading endpoint %s: %w", FormatID(id), err)
	}
	return s.decode(ctx, app, id, stored)
}

// Endpoints returns an app's endpoints, in the order of their creation.
func (s *Store) Endpoints(ctx context.Context, app journal.AppID) ([]Endpoint, error) {
	ids, err := s.ids(ctx, app)
	if err != nil {
		return nil, err
	}
	list := make([]Endpoint, 0, len(ids))
	for _, id := range ids {
		e, err := s.Endpoint(ctx, app, id)
		if errors.Is(err, ErrNotFound) {
			continue // deleted in between
		}
		if err != nil {
			return nil, err
		}
		list = append(list, e)
	}
	slices.SortFunc(list, func(a, b Endpoint) int { return a.Created.Compare(b.Created) })
	return list, nil
}

// Ref names an endpoint.
type Ref struct {
	App journal.AppID
	ID  journal.EndpointID
}

// All returns the names of all endpoints of the region.
func (s *Store) All(ctx context.Context) ([]Ref, error) {
	var refs []Ref
	for name, err := range s.rows.List(ctx, rowPrefix) {
		if err != nil {
			return nil, fmt.Errorf("listing endpoints: %w", err)
		}
		app, id, err := parseRowName(name)
		if err != nil {
			return nil, fmt.Errorf("row %s: %w", name, kms.ErrKeyringCorrupt)
		}
		refs = append(refs, Ref{app, id})
	}
	return refs, nil
}

// Watch sends the names of endpoints that change from now on. The channel is
// closed when changes may have been missed: watch again, and read all.
func (s *Store) Watch(ctx context.Context) (<-chan Ref, error) {
	names, err := s.rows.Watch(ctx, rowPrefix)
	if err != nil {
		return nil, fmt.Errorf("watching endpoints: %w", err)
	}
	out := make(chan Ref)
	go func() {
		defer close(out)
		for name := range names {
			app, id, err := parseRowName(name)
			if err != nil {
				continue // All says so
			}
			select {
			case out <- Ref{app, id}:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out, nil
}

func (s *Store) ids(ctx context.Context, app journal.AppID) ([]journal.EndpointID, error) {
	var ids []journal.EndpointID
	for name, err := range s.rows.List(ctx, rowPrefix+app.String()+".") {
		if err != nil {
			return nil, fmt.Errorf("listing endpoints: %w", err)
		}
		_, id, err := parseRowName(name)
		if err != nil {
			return nil, fmt.Errorf("row %s: %w", name, kms.ErrKeyringCorrupt)
		}
		ids = append(ids, id)
	}
	return ids, nil
}

// purpose binds the sealed part to its endpoint.
func purpose(id journal.EndpointID) string { return "endpoint " + FormatID(id) }

func (s *Store) encode(ctx context.Context, e *Endpoint) ([]byte, error) {
	if err := e.check(); err != nil {
		return nil, err
	}
	var err error
	if e.ConversationTags, err = s.tags(ctx, e.App, kms.KindConversation, "/conversations", e.Conversations); err != nil {
		return nil, err
	}
	if e.UserTags, err = s.tags(ctx, e.App, kms.KindSubject, "/users", e.Users); err != nil {
		return nil, err
	}
	private, err := json.Marshal(e.Private)
	if err != nil {
		return nil, fmt.Errorf("encoding endpoint %s: %w", e.IDText(), err)
	}
	blob, err := s.journal.Keyring().SealBlob(ctx, e.App.String(), purpose(e.ID), private)
	clear(private)
	if err != nil {
		return nil, fmt.Errorf("sealing endpoint %s: %w", e.IDText(), err)
	}
	r := row{
		Version: rowVersion, State: e.State, Reason: e.Reason, Since: e.Since, Created: e.Created, Mode: e.Mode, Ordered: e.Ordered,
		Rate: e.Rate, Concurrency: e.Concurrency, Batch: e.Batch, AskedOnly: e.AskedOnly, After: e.After, Untold: e.Untold, Private: blob,
		Conversations: hexTags(e.ConversationTags), Users: hexTags(e.UserTags),
	}
	for _, t := range e.Types {
		r.Types = append(r.Types, t.String())
	}
	value, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("encoding endpoint %s: %w", e.IDText(), err)
	}
	return value, nil
}

func (s *Store) tags(ctx context.Context, app journal.AppID, kind, pointer string, ids []string) ([]kms.Tag, error) {
	var out []kms.Tag
	for _, id := range ids {
		check := journal.CheckUserID
		if kind == kms.KindConversation {
			check = journal.CheckConversationID
		}
		if err := check(id); err != nil {
			return nil, &SettingError{pointer, "it holds what is not an id"}
		}
		tag, err := s.journal.Tag(ctx, app, kind, id)
		if err != nil {
			return nil, err
		}
		out = append(out, tag)
	}
	return out, nil
}

func hexTags(tags []kms.Tag) []string {
	var out []string
	for _, t := range tags {
		out = append(out, hex.EncodeToString(t[:]))
	}
	return out
}

func (s *Store) decode(ctx context.Context, app journal.AppID, id journal.EndpointID, stored kms.Row) (Endpoint, error) {
	unreadable := fmt.Errorf("endpoint %s: %w: unreadable row", FormatID(id), kms.ErrKeyringCorrupt)
	var r row
	if err := json.Unmarshal(stored.Value, &r, json.RejectUnknownMembers(true)); err != nil || r.Version != rowVersion {
		return Endpoint{}, unreadable
	}
	e := Endpoint{
		App: app, ID: id, State: r.State, Reason: r.Reason, Since: r.Since, Created: r.Created, Mode: r.Mode, Ordered: r.Ordered,
		Rate: r.Rate, Concurrency: r.Concurrency, Batch: r.Batch, AskedOnly: r.AskedOnly, After: r.After, Untold: r.Untold, revision: stored.Revision,
	}
	for _, name := range r.Types {
		t, err := journal.ParseType(name)
		if err != nil {
			return Endpoint{}, unreadable
		}
		e.Types = append(e.Types, t)
	}
	var ok1, ok2 bool
	e.ConversationTags, ok1 = parseTags(r.Conversations)
	e.UserTags, ok2 = parseTags(r.Users)
	if !ok1 || !ok2 {
		return Endpoint{}, unreadable
	}
	private, err := s.journal.Keyring().OpenBlob(ctx, app.String(), purpose(id), r.Private)
	if err != nil {
		return Endpoint{}, fmt.Errorf("opening endpoint %s: %w", FormatID(id), err)
	}
	defer clear(private)
	if err := json.Unmarshal(private, &e.Private, json.RejectUnknownMembers(true)); err != nil {
		return Endpoint{}, unreadable
	}
	return e, nil
}

func parseTags(list []string) ([]kms.Tag, bool) {
	var out []kms.Tag
	for _, text := range list {
		var t kms.Tag
		if n, err := hex.Decode(t[:], []byte(text)); err != nil || n != len(t) {
			return nil, false
		}
		out = append(out, t)
	}
	return out, true
}
