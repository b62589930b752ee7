package server

import (
	"bytes"
	"context"
	"net/http"
	"strconv"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections/history"
)

type planBody struct {
	Plan   string `json:"plan" required:""`
	DryRun bool   `json:"dry_run"`
}

// planPreview is what a plan change would do.
type planPreview struct {
	App    string `json:"app"`
	DryRun bool   `json:"dry_run"`
	From   string `json:"from"`
	To     string `json:"to"`
	Events uint64 `json:"events" doc:"that the app has and that have not expired"`
	Bytes  uint64 `json:"bytes"  doc:"of them, as they are stored"`
	Hidden uint64 `json:"hidden" doc:"of them would be hidden at once, and their keys destroyed"`
	Oldest string `json:"oldest,omitempty" doc:"the time of the first that would be hidden"`
	Before string `json:"before" doc:"events before this time would be hidden"`
}

// moveView is a plan change.
type moveView struct {
	App      string `json:"app"`
	Move     string `json:"move"     doc:"the number of the plan change among those of the app"`
	From     string `json:"from"`
	To       string `json:"to"`
	State    string `json:"state"    doc:"running, or done"`
	Step     string `json:"step"     doc:"what has been done last: planned, switched, copied, verified, closed, destroyed, done"`
	Total    uint64 `json:"total"    doc:"about how many events there are to go through"`
	Copied   uint64 `json:"copied"`
	Skipped  uint64 `json:"skipped"  doc:"too old for the new plan, expired, or of an erased user"`
	Verified uint64 `json:"verified" doc:"copies that were opened and compared"`
	Keys     int    `json:"keys_destroyed"`
	Error    string `json:"error,omitempty" doc:"why it does not go on; it is tried again"`
	Started  string `json:"started"`
	Updated  string `json:"updated"`
	Finished string `json:"finished,omitempty"`
}

func viewMove(app journal.AppID, m journal.Move) moveView {
	v := moveView{
		App: app.String(), Move: strconv.Itoa(int(m.Generation)), From: m.From, To: m.To, State: "running", Step: string(m.Step),
		Total: m.Total, Copied: m.Copied, Skipped: m.Skipped, Verified: m.Verified, Keys: m.Keys, Error: m.Error,
		Started: m.Started.UTC().Format(timeLayout), Updated: m.Updated.UTC().Format(timeLayout),
	}
	if m.Step == journal.MoveDone {
		v.State, v.Finished = "done", m.Finished.UTC().Format(timeLayout)
	}
	return v
}

// changePlan answers when the plan change is durable; the region works on it.
func (s *Server) changePlan(c *call) error {
	var in planBody
	if err := s.decode(c, &in); err != nil {
		return err
	}
	id, err := s.appOfPath(c.vars["app"])
	if err != nil {
		return err
	}
	if in.DryRun {
		p, err := s.mover.Preview(c.r.Context(), id, in.Plan)
		if err != nil {
			return err
		}
		return s.writeJSON(c, http.StatusOK, viewPreview(id, p))
	}
	move, err := s.mover.ChangePlan(c.r.Context(), id, in.Plan, c.caller.actor())
	if err != nil {
		return err
	}
	view := viewMove(id, move)
	c.w.Header().Set("Location", "/v1/admin/apps/"+view.App+"/moves/"+view.Move)
	return s.writeJSON(c, http.StatusAccepted, view)
}

func viewPreview(id journal.AppID, p journal.Preview) planPreview {
	v := planPreview{
		App: id.String(), DryRun: true, From: p.From, To: p.To, Events: p.Events, Bytes: p.Bytes, Hidden: p.Hidden,
		Before: p.Before.UTC().Format(timeLayout),
	}
	if !p.Oldest.IsZero() {
		v.Oldest = p.Oldest.UTC().Format(timeLayout)
	}
	return v
}

func (s *Server) showMove(c *call) error {
	id, err := s.appOfPath(c.vars["app"])
	if err != nil {
		return err
	}
	move, err := s.mover.Move(c.r.Context(), id)
	if err != nil {
		return err
	}
	if c.vars["move"] != strconv.Itoa(int(move.Generation)) {
		return journal.ErrUnknownMove
	}
	return s.writeJSON(c, http.StatusOK, viewMove(id, move))
}

// copyOf returns the copy of a record whose key was destroyed, if a plan change has
// made one since the record was read: the view may not have come to it yet. It
// returns nil for what is meant to be gone.
func (s *Server) copyOf(ctx context.Context, id journal.AppID, record []byte, position journal.Position) []byte {
	app, err := s.journal.App(ctx, id)
	if err != nil || app.Closed == 0 || position.Generation() >= app.Generation {
		return nil
	}
	closed, err := journal.NewPosition(app.Generation, app.Closed)
	if err != nil {
		return nil
	}
	wait, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := s.runner.Wait(wait, id, closed, s.history.Name()); err != nil {
		return nil
	}
	var again []byte
	_, err = s.history.Replay(ctx, id, history.Query{After: position - 1, Before: position + 1}, func(item history.Item) error {
		if !item.Recalled {
			again = bytes.Clone(item.Record)
		}
		return nil
	})
	if err != nil || bytes.Equal(again, record) {
		return nil
	}
	return again
}
