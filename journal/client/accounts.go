package client

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/journal"
)

// Account is what an operator sees of an account.
type Account struct {
	ID      string   `json:"id"`
	Name    string   `json:"name"`
	Email   string   `json:"email,omitzero"`
	Home    string   `json:"home,omitzero"`
	Regions []string `json:"regions,omitempty"`
	// Disabled is set by an operator: the account's apps answer nobody.
	Disabled bool `json:"disabled,omitzero"`
	// State is active, expired, deleting or deleted.
	State   string    `json:"state"`
	Created time.Time `json:"created"`
	// Used is the last use that was written down. Without another the
	// registration data ends at Ends.
	Used time.Time `json:"used,omitzero"`
	Ends time.Time `json:"ends,omitzero"`
}

// AccountSpec is what an account is made from.
type AccountSpec struct {
	ID      string   `json:"id"`
	Name    string   `json:"name,omitzero"`
	Email   string   `json:"email,omitzero"`
	Home    string   `json:"home,omitzero"`
	Regions []string `json:"regions,omitempty"`
}

// AccountChange is what an operator changes of an account; nil leaves it.
type AccountChange struct {
	Name     *string `json:"name,omitzero"`
	Email    *string `json:"email,omitzero"`
	Disabled *bool   `json:"disabled,omitzero"`
}

// CreateAccount makes an account in the region of the server. It is sent once.
func (c *Client) CreateAccount(ctx context.Context, spec AccountSpec) (Account, error) {
	return administer[Account](ctx, c, http.MethodPost, "/v1/admin/accounts", spec)
}

// Accounts lists the accounts of the region.
func (c *Client) Accounts(ctx context.Context) ([]Account, error) {
	var list struct {
		Data []Account `json:"data"`
	}
	err := c.getJSON(ctx, request{method: http.MethodGet, path: "/v1/admin/accounts", accept: "application/json", operator: true}, &list)
	return list.Data, err
}

// Account returns one account of the region.
func (c *Client) Account(ctx context.Context, id string) (Account, error) {
	var account Account
	err := c.getJSON(ctx, request{method: http.MethodGet, path: accountPath(id), accept: "application/json", operator: true}, &account)
	return account, err
}

// ChangeAccount changes an account. It can be repeated.
func (c *Client) ChangeAccount(ctx context.Context, id string, change AccountChange) (Account, error) {
	return administer[Account](ctx, c, http.MethodPatch, accountPath(id), change)
}

// GrantRegion lets an account of Mainland China use the server's region, or takes
// that back. It can be repeated.
func (c *Client) GrantRegion(ctx context.Context, id, region string, granted bool) (Account, error) {
	method := http.MethodPut
	if !granted {
		method = http.MethodDelete
	}
	return administer[Account](ctx, c, method, accountPath(id)+"/regions/"+url.PathEscape(region), nil)
}

func accountPath(id string) string { return "/v1/admin/accounts/" + url.PathEscape(id) }

// DisableApp disables or enables an app. It can be repeated.
func (c *Client) DisableApp(ctx context.Context, id journal.AppID, disabled bool) (App, error) {
	return administer[App](ctx, c, http.MethodPatch, appPath(id), struct {
		Disabled bool `json:"disabled"`
	}{disabled})
}

// SetOnRecall says what recalls in an app do from now on: "hide" the message, or
// also "erase" its sealed bytes. It can be repeated.
func (c *Client) SetOnRecall(ctx context.Context, id journal.AppID, on journal.OnRecall) (App, error) {
	return administer[App](ctx, c, http.MethodPatch, appPath(id), struct {
		OnRecall journal.OnRecall `json:"on_recall"`
	}{on})
}

// RotateCertificate gives an app a new certificate, which the answer tells. It is
// sent once.
func (c *Client) RotateCertificate(ctx context.Context, id journal.AppID) (App, error) {
	return administer[App](ctx, c, http.MethodPost, appPath(id)+"/certificates", nil)
}

// WithdrawCertificate ends the certificate before the newest. It can be
// repeated.
func (c *Client) WithdrawCertificate(ctx context.Context, id journal.AppID) (App, error) {
	return administer[App](ctx, c, http.MethodDelete, appPath(id)+"/certificates/previous", nil)
}

func appPath(id journal.AppID) string { return "/v1/admin/apps/" + id.String() }

// administer sends a change once, as an operator, and reads the answer.
func administer[T any](ctx context.Context, c *Client, method, path string, body any) (T, error) {
	var answer T
	r := request{method: method, path: path, accept: "application/json", operator: true}
	if body != nil {
		encoded, err := json.Marshal(body)
		if err != nil {
			return answer, fmt.Errorf("encoding the request: %w", err)
		}
		r.body, r.mime = encoded, "application/json"
	}
	err := c.attempt(ctx, r, func(resp *http.Response) error { return decode(resp, &answer) })
	return answer, err
}
