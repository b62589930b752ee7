package client

import (
	"context"
	"fmt"
	"net/http"

	"github.com/go-json-experiment/json/jsontext"
)

// Residency returns the region's residency manifest, signed, as JSON. It is asked
// as the app, or as the operator when there is no app's token. What the region
// signs with is [Client.RegionKeys].
func (c *Client) Residency(ctx context.Context) (jsontext.Value, error) {
	var v jsontext.Value
	r := request{method: http.MethodGet, path: "/v1/region", accept: "application/json", operator: c.token == nil}
	err := c.getJSON(ctx, r, &v)
	return v, err
}

// RegionKeys returns the keys that the region signs with, a JSON Web Key Set (RFC
// 7517). Anyone may ask.
func (c *Client) RegionKeys(ctx context.Context) (jsontext.Value, error) {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+"/v1/region/keys", nil)
	if err != nil {
		return nil, fmt.Errorf("building the request: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, &connectionError{err: err}
	}
	defer drain(resp)
	if resp.StatusCode != http.StatusOK {
		return nil, readProblem(resp)
	}
	var v jsontext.Value
	err = decode(resp, &v)
	return v, err
}
