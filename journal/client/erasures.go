package client

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/go-json-experiment/json"
)

// An Erasure is the erasure of a user.
type Erasure struct {
	ID string `json:"id"`
	// Subject is the user's tag.
	Subject   string    `json:"subject"`
	State     string    `json:"state"` // pending or done
	Requested time.Time `json:"requested"`
	Completed time.Time `json:"completed,omitzero"`
	// Receipt is a compact JWS by the region's key; keep it.
	Receipt string `json:"receipt,omitempty"`
}

// EraseUser erases a user of the app. Asking again changes nothing.
func (c *Client) EraseUser(ctx context.Context, user string) (Erasure, error) {
	var e Erasure
	body, err := json.Marshal(map[string]string{"user": user})
	if err != nil {
		return e, fmt.Errorf("encoding a user: %w", err)
	}
	return e, c.getJSON(ctx, request{
		method: http.MethodPost, path: c.appPath("erasures"), body: body, mime: "application/json", accept: "application/json",
	}, &e)
}

// Erasure returns an erasure of the app, with its receipt once it is done.
func (c *Client) Erasure(ctx context.Context, id string) (Erasure, error) {
	var e Erasure
	return e, c.getJSON(ctx, request{method: http.MethodGet, path: c.appPath("erasures", id), accept: "application/json"}, &e)
}

// RegisterUser gives an erased user a new key, and reports whether it had been
// erased.
func (c *Client) RegisterUser(ctx context.Context, user string) (bool, error) {
	var answer struct {
		Registered bool `json:"registered"`
	}
	err := c.getJSON(ctx, request{method: http.MethodPost, path: c.appPath("users", user, "registrations"), accept: "application/json"}, &answer)
	return answer.Registered, err
}

// Receipts calls fn with each line of the receipts of the region's erasures, for
// an operator to keep apart from backups.
func (c *Client) Receipts(ctx context.Context, fn func(line []byte) error) error {
	r := request{method: http.MethodGet, path: "/v1/admin/erasures", accept: "application/x-ndjson", operator: true}
	return c.attempt(ctx, r, func(resp *http.Response) error {
		lines := bufio.NewScanner(resp.Body)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			if err := fn(bytes.TrimSpace(lines.Bytes())); err != nil {
				return err
			}
		}
		if err := lines.Err(); err != nil {
			return fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		return nil
	})
}

// ApplyReceipts does the erasures of receipts again, after a restore, and returns
// how many there were.
func (c *Client) ApplyReceipts(ctx context.Context, receipts []string) (int, error) {
	body, err := json.Marshal(map[string][]string{"receipts": receipts})
	if err != nil {
		return 0, fmt.Errorf("encoding receipts: %w", err)
	}
	var answer struct {
		Data []any `json:"data"`
	}
	err = c.getJSON(ctx, request{
		method: http.MethodPost, path: "/v1/admin/erasures", body: body, mime: "application/json", accept: "application/json", operator: true,
	}, &answer)
	return len(answer.Data), err
}
