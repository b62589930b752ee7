package server

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/cmd/coffer/internal/accounts"
	"github.com/cofferdb/coffer/journal"
)

// appView is an app as operators see it. Certificates are told once, to who
// creates the app.
type appView struct {
	ID           string   `json:"id"`
	Name         string   `json:"name"`
	Account      string   `json:"account,omitempty"`
	Region       string   `json:"region"`
	Plan         string   `json:"plan"`
	Created      string   `json:"created"`
	Disabled     bool     `json:"disabled"`
	OnRecall     string   `json:"on_recall" doc:"hide, or erase: whether a recall also erases the sealed bytes"`
	Rotating     bool     `json:"rotating" doc:"the certificate before is still accepted"`
	Certificates []string `json:"certificates,omitempty"`
}

func viewApp(a journal.App) appView {
	return appView{
		ID: a.ID.String(), Name: a.Name, Account: a.Account, Region: a.Region, Plan: a.Plan,
		Created: a.Created.UTC().Format(timeLayout), Disabled: a.Disabled,
		OnRecall: string(cmp.Or(a.OnRecall, journal.RecallHides)),
		Rotating: len(a.Certificates) > 1,
	}
}

type list[T any] struct {
	Data []T     `json:"data"`
	Next *string `json:"next"`
}

func (s *Server) listApps(c *call) error {
	answer := list[appView]{Data: []appView{}}
	for app, err := range s.journal.Apps(c.r.Context()) {
		if err != nil {
			return err
		}
		if account := c.query.Get("account"); account != "" && account != app.Account {
			continue
		}
		answer.Data = append(answer.Data, viewApp(app))
	}
	slices.SortFunc(answer.Data, func(a, b appView) int { return bytes.Compare([]byte(a.ID), []byte(b.ID)) })
	return s.writeJSON(c, http.StatusOK, answer)
}

func (s *Server) showApp(c *call) error {
	id, err := s.appOfPath(c.vars["app"])
	if err != nil {
		return err
	}
	app, err := s.journal.App(c.r.Context(), id)
	if err != nil {
		return err
	}
	return s.writeJSON(c, http.StatusOK, viewApp(app))
}

type createAppBody struct {
	Name    string `json:"name" required:""`
	Account string `json:"account"`
	Plan    string `json:"plan" required:""`
}

// createApp makes an app of an account of this region.
func (s *Server) createApp(c *call) error {
	var in createAppBody
	if err := s.decode(c, &in); err != nil {
		return err
	}
	if in.Account != "" {
		account, err := s.accounts.Account(c.r.Context(), in.Account)
		if errors.Is(err, accounts.ErrNotFound) {
			return s.invalidBody("/account", "the region has no such account")
		}
		if err != nil {
			return err
		}
		if err := usable(account, s.region.ID); err != nil {
			return err
		}
	}
	// After a migration of the region's keys no app may go under the KEK that was
	// left, so which one it is must be known.
	if err := s.keys.Settle(c.r.Context()); err != nil {
		return err
	}
	app, err := s.journal.CreateApp(c.r.Context(), journal.AppSpec{Name: in.Name, Account: in.Account, Plan: in.Plan})
	if err != nil {
		return err
	}
	view := viewApp(app)
	for _, certificate := range app.Certificates {
		view.Certificates = append(view.Certificates, certificate.Reveal())
	}
	s.audit(c, "app.created", "app:"+view.ID, map[string]string{"plan": view.Plan, "account": view.Account})
	c.w.Header().Set("Location", "/v1/admin/apps/"+view.ID)
	return s.writeJSON(c, http.StatusCreated, view)
}

// audit records what an operator did. It is there already, so a record that
// fails cannot undo it; the log then says so.
func (s *Server) audit(c *call, action, target string, detail map[string]string) {
	maps.DeleteFunc(detail, func(_, v string) bool { return v == "" })
	err := s.journal.Audit(c.r.Context(), journal.AuditEntry{
		Actor: c.caller.actor(), Action: action, Target: target, Outcome: "ok", Detail: detail,
	})
	if err != nil {
		s.log.Error("audit record failed", "request_id", c.id, "action", action, "target", target, "err", err)
	}
}

type streamView struct {
	Name      string      `json:"name"`
	Plan      string      `json:"plan"`
	Shard     int         `json:"shard"`
	Retention int64       `json:"retention_seconds"` // of the plan table
	MaxAge    int64       `json:"max_age_seconds"`   // of the stream as it is
	Drift     []driftView `json:"drift,omitempty"`
}

// storedView is what is in a stream now.
type storedView struct {
	Stream   string  `json:"stream"`
	Kind     string  `json:"kind" doc:"of data, by the retention table"`
	Messages uint64  `json:"messages"`
	Bytes    uint64  `json:"bytes"`
	Overdue  float64 `json:"overdue_seconds" doc:"for how long the oldest message should have been gone"`
}

// driftView is a setting of a stream that differs from what it should be.
type driftView struct {
	Stream string `json:"stream"`
	Field  string `json:"field"`
	Want   string `json:"want"`
	Have   string `json:"have"`
}

// listStreams tells what the region's streams are, beside what the plan table
// and the registry say. Drift of streams without messages (buckets, audit) is
// told for the region.
func (s *Server) listStreams(c *call) error {
	drifts, err := s.journal.Check(c.r.Context())
	if err != nil {
		return err
	}
	answer := streamsAnswer{list[streamView]{Data: []streamView{}}, []driftView{}, []storedView{}}
	stored, err := s.journal.StoredStreams(c.r.Context())
	if err != nil {
		return err
	}
	for _, one := range stored {
		answer.Stored = append(answer.Stored, storedView{one.Stream, string(one.Kind), one.Messages, one.Bytes, one.Overdue.Seconds()})
	}
	for _, info := range s.journal.Streams() {
		view := streamView{Name: info.Name, Plan: info.Plan, Shard: info.Shard}
		if plan, ok := s.journal.Plan(info.Plan); ok {
			view.Retention = int64(plan.Retention / time.Second)
		}
		view.MaxAge = view.Retention
		answer.Data = append(answer.Data, view)
	}
	for _, d := range drifts {
		view := driftView{Stream: d.Stream, Field: d.Field, Want: d.Want, Have: d.Have}
		answer.Drift = append(answer.Drift, view)
		i := slices.IndexFunc(answer.Data, func(v streamView) bool { return v.Name == d.Stream })
		if i < 0 {
			continue
		}
		answer.Data[i].Drift = append(answer.Data[i].Drift, view)
		if age, err := time.ParseDuration(d.Have); err == nil && d.Field == "max_age" {
			answer.Data[i].MaxAge = int64(age / time.Second)
		}
	}
	return s.writeJSON(c, http.StatusOK, answer)
}

// decode reads a small JSON body strictly into a struct.
func (s *Server) decode(c *call, into any) error {
	if _, err := s.bodyForm(c.r, c.route.bodies); err != nil {
		return err
	}
	body, release, err := s.readBody(c.w, c.r, c.route.limit)
	if err != nil {
		return err
	}
	defer release()
	err = json.Unmarshal(body, into, json.RejectUnknownMembers(true))
	if err == nil {
		return nil
	}
	if semantic, ok := errors.AsType[*json.SemanticError](err); ok {
		detail := "the value has the wrong type"
		if errors.Is(err, json.ErrUnknownName) {
			detail = "the member is not known"
		}
		return s.invalidBody(string(semantic.JSONPointer), detail)
	}
	if syntactic, ok := errors.AsType[*jsontext.SyntacticError](err); ok {
		return s.invalidBody(string(syntactic.JSONPointer), fmt.Sprintf("not valid JSON at byte %d", syntactic.ByteOffset))
	}
	return s.invalidBody("", "the body is not valid JSON")
}
