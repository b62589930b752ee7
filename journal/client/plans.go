package client

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/journal"
)

// A PlanChange is how a change of an app's plan goes.
type PlanChange struct {
	App  journal.AppID `json:"app"`
	Move string        `json:"move"` // its number among those of the app
	From string        `json:"from"`
	To   string        `json:"to"`
	// State is running or done; Step is what has been done last.
	State string `json:"state"`
	Step  string `json:"step"`
	// Total is about how many events there are to go through.
	Total    uint64    `json:"total"`
	Copied   uint64    `json:"copied"`
	Skipped  uint64    `json:"skipped"`
	Verified uint64    `json:"verified"`
	Keys     int       `json:"keys_destroyed"`
	Error    string    `json:"error,omitempty"` // why it does not go on; it is tried again
	Started  time.Time `json:"started"`
	Updated  time.Time `json:"updated"`
	Finished time.Time `json:"finished,omitzero"`
}

// Ended reports whether the change is done.
func (p PlanChange) Ended() bool { return p.State == "done" }

// A PlanPreview is what a change of an app's plan would do.
type PlanPreview struct {
	App    journal.AppID `json:"app"`
	DryRun bool          `json:"dry_run"`
	From   string        `json:"from"`
	To     string        `json:"to"`
	// Events and Bytes are what the app has and has not expired; Hidden of the
	// events would be hidden at once.
	Events uint64 `json:"events"`
	Bytes  uint64 `json:"bytes"`
	Hidden uint64 `json:"hidden"`
	// Oldest is the time of the first that would be hidden, Before the one from
	// which events stay.
	Oldest time.Time `json:"oldest,omitzero"`
	Before time.Time `json:"before"`
}

type planSpec struct {
	Plan   string `json:"plan"`
	DryRun bool   `json:"dry_run"`
}

func planRequest(app journal.AppID, spec planSpec) (request, error) {
	body, err := json.Marshal(spec)
	if err != nil {
		return request{}, fmt.Errorf("encoding the plan: %w", err)
	}
	return request{
		method: http.MethodPost, path: "/v1/admin/apps/" + app.String() + "/plan", body: body,
		mime: "application/json", accept: "application/json", operator: true,
	}, nil
}

// ChangePlan begins to change an app's plan; the region works on it. It is sent
// once: after an answer that was lost, the same call says that the change is under
// way, or that the app has the plan.
func (c *Client) ChangePlan(ctx context.Context, app journal.AppID, plan string) (PlanChange, error) {
	var change PlanChange
	r, err := planRequest(app, planSpec{Plan: plan})
	if err != nil {
		return change, err
	}
	return change, c.attempt(ctx, r, func(resp *http.Response) error { return decode(resp, &change) })
}

// PreviewPlan tells what changing an app's plan would do.
func (c *Client) PreviewPlan(ctx context.Context, app journal.AppID, plan string) (PlanPreview, error) {
	var preview PlanPreview
	r, err := planRequest(app, planSpec{Plan: plan, DryRun: true})
	if err != nil {
		return preview, err
	}
	return preview, c.getJSON(ctx, r, &preview)
}

// PlanChange returns a change of an app's plan; the last one can be seen.
func (c *Client) PlanChange(ctx context.Context, app journal.AppID, move string) (PlanChange, error) {
	var change PlanChange
	err := c.getJSON(ctx, request{
		method: http.MethodGet, path: "/v1/admin/apps/" + app.String() + "/moves/" + move, accept: "application/json", operator: true,
	}, &change)
	return change, err
}
