package client

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/journal"
)

// Endpoint is a webhook endpoint of the app.
type Endpoint struct {
	ID            string    `json:"id"`
	URL           string    `json:"url"`
	Description   string    `json:"description,omitempty"`
	State         string    `json:"state"`
	Reason        string    `json:"reason,omitempty"`
	Since         time.Time `json:"since"`
	Created       time.Time `json:"created"`
	Mode          string    `json:"mode"`
	Types         []string  `json:"types,omitempty"`
	Conversations []string  `json:"conversations,omitempty"`
	Users         []string  `json:"users,omitempty"`
	Ordered       bool      `json:"ordered"`
	Rate          int       `json:"rate"`
	Concurrency   int       `json:"concurrency"`
	Batch         int       `json:"batch"`
	// Secret is told once, when the endpoint is made or its secret rotated.
	Secret string `json:"secret,omitempty"`
	// AgoraSecret is told once too, when it is given or made.
	AgoraSecret string `json:"agora_secret,omitempty"`
	// Progress is how far it has come; nil in answers that do not say.
	Progress *EndpointProgress `json:"progress,omitempty"`
	// Verification is what became of the verification request; nil in answers to
	// requests that do not make one.
	Verification *EndpointAnswer `json:"verification,omitempty"`
}

// EndpointAnswer is what an endpoint said to a request.
type EndpointAnswer struct {
	Delivered bool   `json:"delivered"`
	Status    int    `json:"status,omitzero"`
	Cause     string `json:"cause,omitempty"`
	Error     string `json:"error,omitempty"`
}

// EndpointProgress is how far an endpoint has come.
type EndpointProgress struct {
	Number    uint64           `json:"number,string"`
	Position  journal.Position `json:"position"`
	Delivered uint64           `json:"delivered"`
	Waiting   uint64           `json:"waiting"`
	Held      uint64           `json:"held"`
	Parked    uint64           `json:"parked"`
	Last      time.Time        `json:"last_delivered,omitzero"`
	Failing   time.Time        `json:"failing_since,omitzero"`
	Paused    string           `json:"paused,omitempty"`
}

// EndpointSpec is what an endpoint is made of.
type EndpointSpec struct {
	URL           string   `json:"url"`
	Description   string   `json:"description,omitempty"`
	Mode          string   `json:"mode,omitempty"`
	Types         []string `json:"types,omitempty"`
	Conversations []string `json:"conversations,omitempty"`
	Users         []string `json:"users,omitempty"`
	Ordered       bool     `json:"ordered,omitempty"`
	Rate          int      `json:"rate,omitzero"`
	// Signature is hmac, which is meant when it is empty, or ed25519.
	Signature string `json:"signature,omitempty"`
	// Secret is one of the caller's own instead of a new one.
	Secret string `json:"secret,omitempty"`
	// Encryption is the public key of sealed bodies, a JWK.
	Encryption string `json:"encryption,omitempty"`
	// AgoraAppKey and AgoraSecret are of the mode agora; the server makes what is
	// empty.
	AgoraAppKey string `json:"agora_appkey,omitempty"`
	AgoraSecret string `json:"agora_secret,omitempty"`
}

// Delivery is an event for an endpoint, and what became of its last attempt.
type Delivery struct {
	MessageID string           `json:"webhook_id"`
	Number    uint64           `json:"number,string"`
	Position  journal.Position `json:"position"`
	Status    string           `json:"status"`
	Attempts  int              `json:"attempts"`
	Cause     string           `json:"cause,omitempty"`
	HTTP      int              `json:"http_status,omitzero"`
	Duration  int              `json:"duration_ms"`
	Error     string           `json:"error,omitempty"`
	Answer    string           `json:"answer,omitempty"`
	Arrived   time.Time        `json:"arrived"`
	Recorded  time.Time        `json:"recorded"`
	Due       time.Time        `json:"due,omitzero"`
	Until     time.Time        `json:"until,omitzero"`
}

// DeliveryQuery selects deliveries of an endpoint, the newest first.
type DeliveryQuery struct {
	Status string // delivered, waiting, held, parked; empty is all
	Before uint64 // older than this number; 0 is the newest
	Limit  int    // 0 is the server's
}

// CallbackReplaySpec says what is sent to an endpoint again.
type CallbackReplaySpec struct {
	Status string    `json:"status,omitempty"` // "parked" instead of a range
	From   time.Time `json:"from,omitzero"`
	Until  time.Time `json:"until,omitzero"`
	Rate   int       `json:"rate,omitzero"`
}

// CallbackReplay is a range of events that is sent to an endpoint again. Of
// parked deliveries only Requeued is set.
type CallbackReplay struct {
	ID       string           `json:"id"`
	Endpoint string           `json:"endpoint"`
	State    string           `json:"state"`
	After    journal.Position `json:"after"`
	Before   journal.Position `json:"before"`
	Rate     int              `json:"rate"`
	At       journal.Position `json:"at"`
	Sent     uint64           `json:"sent"`
	Failed   int              `json:"failed"`
	Created  time.Time        `json:"created"`
	Finished time.Time        `json:"finished,omitzero"`
	Requeued int              `json:"requeued,omitzero"`
}

// Endpoints lists the app's webhook endpoints.
func (c *Client) Endpoints(ctx context.Context) ([]Endpoint, error) {
	var list struct {
		Data []Endpoint `json:"data"`
	}
	err := c.getJSON(ctx, request{method: http.MethodGet, path: c.appPath("endpoints"), accept: "application/json"}, &list)
	return list.Data, err
}

// CreateEndpoint makes a webhook endpoint. It is sent once: an answer that was
// lost leaves an endpoint that [Client.Endpoints] shows, whose secret is known
// after a rotation only.
func (c *Client) CreateEndpoint(ctx context.Context, spec EndpointSpec) (e Endpoint, err error) {
	return e, c.sendJSON(ctx, http.MethodPost, c.appPath("endpoints"), spec, &e)
}

// SetEndpointState enables or disables a webhook endpoint: "enabled" or "disabled".
// One whose URL has not been verified is verified first, and is enabled only if the
// answer's State says so; its Verification says why not.
func (c *Client) SetEndpointState(ctx context.Context, id, state string) (e Endpoint, err error) {
	in := struct {
		State string `json:"state"`
	}{state}
	return e, c.sendJSON(ctx, http.MethodPatch, c.appPath("endpoints", id), in, &e)
}

// DeleteEndpoint deletes a webhook endpoint.
func (c *Client) DeleteEndpoint(ctx context.Context, id string) error {
	return c.attempt(ctx, request{method: http.MethodDelete, path: c.appPath("endpoints", id), accept: "application/json"}, func(*http.Response) error { return nil })
}

// Deliveries lists deliveries of an endpoint.
func (c *Client) Deliveries(ctx context.Context, endpoint string, q DeliveryQuery) ([]Delivery, error) {
	v := url.Values{}
	if q.Status != "" {
		v.Set("status", q.Status)
	}
	if q.Before > 0 {
		v.Set("before", strconv.FormatUint(q.Before, 10))
	}
	if q.Limit > 0 {
		v.Set("limit", strconv.Itoa(q.Limit))
	}
	var list struct {
		Data []Delivery `json:"data"`
	}
	err := c.getJSON(ctx, request{method: http.MethodGet, path: c.appPath("endpoints", endpoint, "deliveries"), query: v, accept: "application/json"}, &list)
	return list.Data, err
}

// StartCallbackReplay sends events to an endpoint again.
func (c *Client) StartCallbackReplay(ctx context.Context, endpoint string, spec CallbackReplaySpec) (r CallbackReplay, err error) {
	return r, c.sendJSON(ctx, http.MethodPost, c.appPath("endpoints", endpoint, "replays"), spec, &r)
}

// CallbackReplay returns how far a replay has come.
func (c *Client) CallbackReplay(ctx context.Context, id string) (r CallbackReplay, err error) {
	return r, c.getJSON(ctx, request{method: http.MethodGet, path: c.appPath("replays", id), accept: "application/json"}, &r)
}

// CancelCallbackReplay ends a replay.
func (c *Client) CancelCallbackReplay(ctx context.Context, id string) (r CallbackReplay, err error) {
	return r, c.sendJSON(ctx, http.MethodDelete, c.appPath("replays", id), nil, &r)
}

// sendJSON sends a request that is not repeated.
func (c *Client) sendJSON(ctx context.Context, method, path string, in, out any) error {
	r := request{method: method, path: path, accept: "application/json"}
	if in != nil {
		body, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encoding a request: %w", err)
		}
		r.body, r.mime = body, "application/json"
	}
	return c.attempt(ctx, r, func(resp *http.Response) error { return decode(resp, out) })
}
