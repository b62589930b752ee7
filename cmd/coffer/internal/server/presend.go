package server

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/cmd/coffer/internal/presend"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

// presendView says whom an app asks before its messages are stored.
type presendView struct {
	Endpoint string                     `json:"endpoint" doc:"the id of one of the app's endpoints"`
	Types    []string                   `json:"types" doc:"message.sent, the default, and message.edited"`
	Timeout  string                     `json:"timeout" doc:"how long a question may take: 200ms, the default, or less"`
	Fallback presend.Fallback           `json:"fallback" doc:"allow, the default, or deny: what counts without an answer"`
	Rewrite  bool                       `json:"rewrite" doc:"whether answers may change the text"`
	Outcomes map[presend.Outcome]uint64 `json:"outcomes,omitempty" doc:"of questions, since this process has started"`
}

func viewPresend(s presend.Setting) presendView {
	v := presendView{Endpoint: endpoints.FormatID(s.Endpoint), Types: []string{}, Timeout: s.Timeout.String(), Fallback: s.Fallback, Rewrite: s.Rewrite}
	for _, t := range s.Types {
		v.Types = append(v.Types, t.String())
	}
	return v
}

type presendBody struct {
	Endpoint string           `json:"endpoint" doc:"the id of one of the app's endpoints"`
	Types    []string         `json:"types" doc:"message.sent, the default, and message.edited"`
	Timeout  string           `json:"timeout" doc:"how long a question may take: 200ms, the default, or less"`
	Fallback presend.Fallback `json:"fallback" doc:"allow, the default, or deny: what counts without an answer"`
	Rewrite  bool             `json:"rewrite" doc:"whether answers may change the text"`
}

func (b *presendBody) setting() (presend.Setting, error) {
	s := presend.Setting{Fallback: b.Fallback, Rewrite: b.Rewrite}
	var err error
	if s.Endpoint, err = endpoints.ParseID(b.Endpoint); err != nil {
		return s, &endpoints.SettingError{Pointer: "/endpoint", Detail: "it is an endpoint's id"}
	}
	if b.Timeout != "" {
		if s.Timeout, err = time.ParseDuration(b.Timeout); err != nil || s.Timeout == 0 {
			return s, &endpoints.SettingError{Pointer: "/timeout", Detail: "it is a time span, such as 200ms"}
		}
	}
	for _, name := range b.Types {
		t, err := journal.ParseType(name)
		if err != nil {
			return s, &endpoints.SettingError{Pointer: "/types", Detail: "it holds what is not a type of event"}
		}
		s.Types = append(s.Types, t)
	}
	return s, nil
}

func (s *Server) showPresend(c *call) error {
	setting, outcomes, err := s.presend.Setting(c.r.Context(), c.app.ID)
	if err != nil {
		return err
	}
	v := viewPresend(setting)
	v.Outcomes = outcomes
	return s.writeJSON(c, http.StatusOK, v)
}

func (s *Server) setPresend(c *call) error {
	var in presendBody
	if err := s.decode(c, &in); err != nil {
		return err
	}
	setting, err := in.setting()
	if err != nil {
		return err
	}
	if setting, err = s.presend.Set(c.r.Context(), c.app.ID, setting); err != nil {
		return err
	}
	s.auditPresend(c, "presend.set", map[string]string{"endpoint": in.Endpoint, "fallback": string(setting.Fallback)})
	return s.writeJSON(c, http.StatusOK, viewPresend(setting))
}

func (s *Server) removePresend(c *call) error {
	if err := s.presend.Remove(c.r.Context(), c.app.ID); err != nil {
		return err
	}
	s.auditPresend(c, "presend.removed", nil)
	c.w.WriteHeader(http.StatusNoContent)
	return nil
}

func (s *Server) auditPresend(c *call, action string, detail map[string]string) {
	app := c.app.ID.String()
	s.journal.AuditLater(journal.AuditEntry{Actor: "app:" + app, Action: action, Target: "app:" + app, Outcome: "ok", Detail: detail})
}

// askAbout asks the app's endpoint about events, and takes those that it refuses
// out of them; sent gets the others as they came, by place. An app's backend may
// leave it out, as an import does.
func (s *Server) askAbout(c *call, events []journal.Event, places []int, outcomes []outcome, sent map[int]journal.Event) ([]journal.Event, []int, error) {
	if c.query.Has("presend") {
		switch {
		case c.query.Get("presend") != "skip":
			return nil, nil, s.invalidParameter("presend", "it is skip, or not there")
		case c.caller.kind != appBackend:
			return nil, nil, s.kinds.privilegeMissing.problem("only the app's backend leaves the question out")
		}
		return events, places, nil
	}
	asked, refused, err := s.presend.Ask(c.r.Context(), c.app.ID, events, s.storedOf(c))
	if err != nil || asked == nil {
		return events, places, err
	}
	kept := 0
	for i, err := range refused {
		if err != nil {
			outcomes[places[i]] = s.refused(c, events[i].ID, err)
			continue
		}
		if events[i].ID != "" {
			sent[places[i]] = events[i]
		}
		asked[kept], places[kept] = asked[i], places[i]
		kept++
	}
	return asked[:kept], places[:kept], nil
}

// appendAgain appends events that another process has stored, after its own
// question, while this one asked about them: the answer that is stored counts.
func (s *Server) appendAgain(c *call, sent map[int]journal.Event, places []int, events []journal.Event, results []journal.Result) error {
	for i := range results {
		e, ok := sent[places[i]]
		if !ok || !errors.Is(results[i].Err, journal.ErrConflict) {
			continue
		}
		ok, err := s.presend.Again(c.r.Context(), c.app.ID, &e, s.storedOf(c))
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		again, err := s.journal.Append(c.r.Context(), c.app.ID, e)
		if err != nil {
			return err
		}
		events[i], results[i] = e, again[0]
	}
	return nil
}

func (s *Server) storedOf(c *call) presend.Stored {
	return func(ctx context.Context, id string) (jsontext.Value, bool, error) {
		return s.storedData(ctx, c.app, id)
	}
}

// storedData returns the data of an event that is stored; none when its content is
// gone.
func (s *Server) storedData(ctx context.Context, app journal.App, id string) (jsontext.Value, bool, error) {
	tag, err := s.journal.Tag(ctx, app.ID, kms.KindEvent, id)
	if err != nil {
		return nil, false, err
	}
	item, ok, err := s.history.Event(ctx, app.ID, tag, s.oldest(app))
	if err != nil || !ok || item.Recalled {
		return nil, ok, err
	}
	e, err := s.reopen(ctx, app.ID, item.Record, item.Position)
	if gone(err) {
		return nil, true, nil
	}
	return e.Data, err == nil, err
}
