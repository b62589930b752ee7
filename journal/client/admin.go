package client

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/journal"
)

// App is what an operator sees of an app.
type App struct {
	ID       journal.AppID `json:"id"`
	Name     string        `json:"name"`
	Account  string        `json:"account"`
	Region   string        `json:"region"`
	Plan     string        `json:"plan"`
	Created  time.Time     `json:"created"`
	Disabled bool          `json:"disabled"`
	// OnRecall is "hide" or "erase": whether a recall also erases the sealed bytes
	// of the message, in the journal and the views.
	OnRecall string `json:"on_recall"`
	// Rotating tells that the certificate before the newest is still accepted.
	Rotating bool `json:"rotating"`
	// Certificates are told once, when the app is made. They sign its tokens.
	Certificates []string `json:"certificates,omitempty"`
}

// AppSpec is what an app is made from.
type AppSpec struct {
	Name    string `json:"name,omitempty"`
	Account string `json:"account"`
	Plan    string `json:"plan"`
}

// CreateApp makes an app in the region of the server. It is sent once: an answer
// that was lost leaves an app that [Client.Apps] shows.
func (c *Client) CreateApp(ctx context.Context, spec AppSpec) (App, error) {
	body, err := json.Marshal(spec)
	if err != nil {
		return App{}, fmt.Errorf("encoding the app: %w", err)
	}
	var app App
	err = c.attempt(ctx, request{
		method: http.MethodPost, path: "/v1/admin/apps", body: body, mime: "application/json", accept: "application/json", operator: true,
	}, func(resp *http.Response) error { return decode(resp, &app) })
	return app, err
}

// Apps lists the apps of the region, or of one account in it.
func (c *Client) Apps(ctx context.Context, account string) ([]App, error) {
	v := url.Values{}
	if account != "" {
		v.Set("account", account)
	}
	var list struct {
		Data []App `json:"data"`
	}
	err := c.getJSON(ctx, request{method: http.MethodGet, path: "/v1/admin/apps", query: v, accept: "application/json", operator: true}, &list)
	return list.Data, err
}

// App returns one app of the region.
func (c *Client) App(ctx context.Context, id journal.AppID) (App, error) {
	var app App
	err := c.getJSON(ctx, request{method: http.MethodGet, path: "/v1/admin/apps/" + id.String(), accept: "application/json", operator: true}, &app)
	return app, err
}

// Readiness is what a server says of itself.
type Readiness struct {
	Ready   bool   `json:"ready"`
	Region  string `json:"region"`
	Reasons []struct {
		Part   string `json:"part"`
		Detail string `json:"detail"`
	} `json:"reasons"`
}

// Ready asks whether the region can take and serve events. It is asked once, and
// "no" is no error.
func (c *Client) Ready(ctx context.Context) (Readiness, error) {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+"/readyz", nil)
	if err != nil {
		return Readiness{}, fmt.Errorf("building the request: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return Readiness{}, &connectionError{err: err}
	}
	defer drain(resp)
	var r Readiness
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusServiceUnavailable {
		return Readiness{}, fmt.Errorf("%w: /readyz answered with status %d", ErrProtocol, resp.StatusCode)
	}
	err = decode(resp, &r)
	return r, err
}

// Streams returns what the region says of its streams beside the plan table, as
// JSON.
func (c *Client) Streams(ctx context.Context) (jsontext.Value, error) {
	var v jsontext.Value
	err := c.getJSON(ctx, request{method: http.MethodGet, path: "/v1/admin/streams", accept: "application/json", operator: true}, &v)
	return v, err
}
