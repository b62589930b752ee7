package client

import (
	"context"
	"net/http"
	"net/url"
	"time"

	"github.com/cofferdb/coffer/journal"
)

// Deletion is how the deletion of an app or an account stands.
type Deletion struct {
	ID     string `json:"id"`
	Kind   string `json:"kind"` // app, account
	Target string `json:"target"`
	Actor  string `json:"actor"`
	State  string `json:"state"` // running, done
	// Step is the one that comes next.
	Step    string `json:"step"`
	Removed int    `json:"removed"`
	// Error is what keeps it at present; it is tried again.
	Error string `json:"error,omitzero"`

	Owner    string    `json:"owner,omitzero"`
	Lease    time.Time `json:"lease,omitzero"`
	Started  time.Time `json:"started"`
	Updated  time.Time `json:"updated"`
	Finished time.Time `json:"finished,omitzero"`
}

// WouldDelete is how much a deletion would remove of each app, by kind.
type WouldDelete struct {
	Apps []struct {
		App    journal.AppID  `json:"app"`
		Counts map[string]int `json:"counts"`
	} `json:"apps"`
}

// DeleteApp begins to delete an app: when it returns the app answers nobody. It
// can be repeated.
func (c *Client) DeleteApp(ctx context.Context, id journal.AppID) (Deletion, error) {
	return administer[Deletion](ctx, c, http.MethodDelete, appPath(id), nil)
}

// DeleteAccount begins to delete an account with its apps. It can be repeated.
func (c *Client) DeleteAccount(ctx context.Context, id string) (Deletion, error) {
	return administer[Deletion](ctx, c, http.MethodDelete, accountPath(id), nil)
}

// WouldDeleteApp tells what DeleteApp would remove.
func (c *Client) WouldDeleteApp(ctx context.Context, id journal.AppID) (WouldDelete, error) {
	return c.wouldDelete(ctx, appPath(id))
}

// WouldDeleteAccount tells what DeleteAccount would remove.
func (c *Client) WouldDeleteAccount(ctx context.Context, id string) (WouldDelete, error) {
	return c.wouldDelete(ctx, accountPath(id))
}

func (c *Client) wouldDelete(ctx context.Context, path string) (WouldDelete, error) {
	var w WouldDelete
	err := c.getJSON(ctx, request{
		method: http.MethodDelete, path: path, query: url.Values{"dry_run": {"true"}}, accept: "application/json", operator: true,
	}, &w)
	return w, err
}

// Deletion returns how a deletion stands.
func (c *Client) Deletion(ctx context.Context, id string) (Deletion, error) {
	var d Deletion
	err := c.getJSON(ctx, request{
		method: http.MethodGet, path: "/v1/admin/deletions/" + url.PathEscape(id), accept: "application/json", operator: true,
	}, &d)
	return d, err
}
