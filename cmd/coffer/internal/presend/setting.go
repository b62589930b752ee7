package presend

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

const (
	rowPrefix  = "presend."
	rowVersion = 1

	// MaxTimeout is the longest time that a question may take, unless the operator
	// has set another, and the usual one.
	MaxTimeout = 200 * time.Millisecond
)

// ErrNotSet means that the app has no endpoint that is asked.
var ErrNotSet = errors.New("no endpoint is asked before messages are stored")

// Fallback is what counts without an answer.
type Fallback string

// The fallbacks.
const (
	Allow Fallback = "allow"
	Deny  Fallback = "deny"
)

// A Setting says whom an app asks, and about what.
type Setting struct {
	Endpoint journal.EndpointID
	// Types are those of the events that are asked about: message.sent, the
	// default, and message.edited.
	Types    []journal.Type
	Timeout  time.Duration // 0: MaxTimeout, or less where the operator says so
	Fallback Fallback      // "": Allow
	// Rewrite lets answers change the text.
	Rewrite bool
}

// row is a setting as it is stored, in JSON.
type row struct {
	Version  int      `json:"version"`
	Endpoint string   `json:"endpoint"`
	Types    []string `json:"types"`
	Timeout  int64    `json:"timeout"` // ms
	Fallback Fallback `json:"fallback"`
	Rewrite  bool     `json:"rewrite,omitzero"`
}

// complete fills in what is left out and refuses what cannot be.
func (s *Setting) complete(most time.Duration) error {
	if len(s.Types) == 0 {
		s.Types = []journal.Type{journal.MessageSent}
	}
	if s.Timeout == 0 {
		s.Timeout = min(MaxTimeout, most)
	}
	if s.Fallback == "" {
		s.Fallback = Allow
	}
	for _, t := range s.Types {
		if t != journal.MessageSent && t != journal.MessageEdited {
			return &endpoints.SettingError{Pointer: "/types", Detail: "they are message.sent and message.edited"}
		}
	}
	switch {
	case s.Timeout < time.Millisecond || s.Timeout > most:
		return &endpoints.SettingError{Pointer: "/timeout", Detail: "it is 1ms to " + most.String()}
	case s.Fallback != Allow && s.Fallback != Deny:
		return &endpoints.SettingError{Pointer: "/fallback", Detail: "it is allow or deny"}
	}
	return nil
}

// Set stores an app's setting. From when it returns, messages of this process are
// asked about by it.
func (a *Asker) Set(ctx context.Context, app journal.AppID, s Setting) (Setting, error) {
	if err := s.complete(a.MaxTimeout); err != nil {
		return s, err
	}
	if _, err := a.Endpoints.Endpoint(ctx, app, s.Endpoint); errors.Is(err, endpoints.ErrNotFound) {
		return s, &endpoints.SettingError{Pointer: "/endpoint", Detail: "the app has no such endpoint"}
	} else if err != nil {
		return s, err
	}
	r := row{Version: rowVersion, Endpoint: endpoints.FormatID(s.Endpoint), Timeout: s.Timeout.Milliseconds(), Fallback: s.Fallback, Rewrite: s.Rewrite}
	for _, t := range s.Types {
		r.Types = append(r.Types, t.String())
	}
	value, err := json.Marshal(r)
	if err != nil {
		return s, fmt.Errorf("encoding a setting: %w", err)
	}
	for {
		old, err := a.Rows.Load(ctx, rowPrefix+app.String())
		switch {
		case errors.Is(err, kms.ErrRowNotFound):
			_, err = a.Rows.Create(ctx, rowPrefix+app.String(), value)
		case err == nil:
			_, err = a.Rows.Update(ctx, rowPrefix+app.String(), value, old.Revision)
		}
		if errors.Is(err, kms.ErrRowConflict) {
			continue
		}
		if err != nil {
			return s, fmt.Errorf("storing whom app %s asks: %w", app, err)
		}
		return s, a.load(ctx, app)
	}
}

// Remove ends the questions of an app.
func (a *Asker) Remove(ctx context.Context, app journal.AppID) error {
	for {
		old, err := a.Rows.Load(ctx, rowPrefix+app.String())
		if err == nil {
			err = a.Rows.Delete(ctx, rowPrefix+app.String(), old.Revision)
		}
		switch {
		case errors.Is(err, kms.ErrRowConflict):
			continue
		case errors.Is(err, kms.ErrRowNotFound):
			return ErrNotSet
		case err != nil:
			return fmt.Errorf("removing whom app %s asks: %w", app, err)
		}
		return a.load(ctx, app)
	}
}

// Setting returns an app's setting, and what has become of its questions in this
// process.
func (a *Asker) Setting(ctx context.Context, app journal.AppID) (Setting, map[Outcome]uint64, error) {
	s, err := a.stored(ctx, app)
	if err != nil {
		return s, nil, err
	}
	return s, a.Counts(app), nil
}

func (a *Asker) stored(ctx context.Context, app journal.AppID) (Setting, error) {
	stored, err := a.Rows.Load(ctx, rowPrefix+app.String())
	if errors.Is(err, kms.ErrRowNotFound) {
		return Setting{}, ErrNotSet
	}
	if err != nil {
		return Setting{}, fmt.Errorf("reading whom app %s asks: %w", app, err)
	}
	unreadable := fmt.Errorf("whom app %s asks: %w: unreadable row", app, kms.ErrKeyringCorrupt)
	var r row
	if err := json.Unmarshal(stored.Value, &r, json.RejectUnknownMembers(true)); err != nil || r.Version != rowVersion {
		return Setting{}, unreadable
	}
	s := Setting{Timeout: time.Duration(r.Timeout) * time.Millisecond, Fallback: r.Fallback, Rewrite: r.Rewrite}
	if s.Endpoint, err = endpoints.ParseID(r.Endpoint); err != nil {
		return Setting{}, unreadable
	}
	for _, name := range r.Types {
		t, err := journal.ParseType(name)
		if err != nil {
			return Setting{}, unreadable
		}
		s.Types = append(s.Types, t)
	}
	s.Timeout = min(s.Timeout, a.MaxTimeout) // the operator may have lowered it
	if s.complete(a.MaxTimeout) != nil {
		return Setting{}, unreadable
	}
	return s, nil
}

func (s *Setting) asks(t journal.Type) bool { return slices.Contains(s.Types, t) }
