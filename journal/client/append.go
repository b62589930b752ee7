package client

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/journal"
)

// MaxBatch is the largest number of events in one call of [Client.Append].
const MaxBatch = 1000

// ErrBatch means that a batch is empty or over [MaxBatch] events: divide it.
var ErrBatch = errors.New("a batch has 1 to 1,000 events")

// Append appends the events in one request and says of each what became of it,
// in their order. Events without an id or a time are given one, which the result
// tells.
//
// A result's Err is why that event was not stored: a [*journal.InputError] when
// it was not even sent, otherwise a [*Problem]. The error returned beside the
// results means that it is not known whether the events were stored; appending
// them again, with the ids of the results, is safe.
func (c *Client) Append(ctx context.Context, events ...journal.Event) ([]journal.Result, error) {
	if len(events) == 0 || len(events) > MaxBatch {
		return nil, ErrBatch
	}
	now := time.Now()
	results := make([]journal.Result, len(events))
	lines := make([][]byte, len(events))
	var waiting []int // indices of the events that are to be sent
	for i, e := range events {
		if err := e.Normalize(now, journal.Limits{}); err != nil {
			results[i] = journal.Result{ID: e.ID, Err: err}
			continue
		}
		results[i] = journal.Result{ID: e.ID, Time: e.Time}
		lines[i] = append(e.AppendJSON(nil, c.app), '\n')
		waiting = append(waiting, i)
	}
	p := patience{limit: c.retryFor}
	for len(waiting) > 0 {
		err := c.attemptAppend(ctx, lines, waiting, results)
		if err == nil {
			// Some may have been refused for a while only, when the keys were away.
			again := waiting[:0:0]
			for _, i := range waiting {
				if _, ok := transient(results[i].Err); ok {
					again = append(again, i)
					err = results[i].Err
				}
			}
			if len(again) == 0 {
				return results, nil
			}
			if len(again) < len(waiting) {
				p.reset()
			}
			waiting = again
		}
		if err := p.wait(ctx, c.log, err); err != nil {
			for _, i := range waiting {
				results[i].Err = err
			}
			return results, fmt.Errorf("appending %d events: %w", len(waiting), err)
		}
	}
	return results, nil
}

func (c *Client) attemptAppend(ctx context.Context, lines [][]byte, waiting []int, results []journal.Result) error {
	var body []byte
	for _, i := range waiting {
		body = append(body, lines[i]...)
	}
	var answer struct {
		Data []struct {
			ID       string           `json:"id"`
			Position journal.Position `json:"position"`
			Status   string           `json:"status"`
			Problem  *Problem         `json:"problem"`
		} `json:"data"`
	}
	r := request{method: http.MethodPost, path: c.appPath("events"), body: body, mime: "application/x-ndjson", accept: "application/json"}
	if c.unasked {
		r.query = url.Values{"presend": {"skip"}}
	}
	err := c.attempt(ctx, r, func(resp *http.Response) error {
		b, err := readBody(resp)
		if err != nil {
			return err
		}
		if err := json.Unmarshal(b, &answer); err != nil {
			return fmt.Errorf("%w: the answer to an append cannot be read: %w", ErrProtocol, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if len(answer.Data) != len(waiting) {
		return fmt.Errorf("%w: %d results for %d events", ErrProtocol, len(answer.Data), len(waiting))
	}
	for n, i := range waiting {
		a, r := answer.Data[n], &results[i]
		// One that could not be parsed has no id in the answer.
		if a.ID != r.ID && (a.ID != "" || a.Status != "refused") {
			return fmt.Errorf("%w: the results are not in the order of the events", ErrProtocol)
		}
		r.Position, r.Duplicate, r.Err = a.Position, a.Status == "duplicate", nil
		switch a.Status {
		case "created", "duplicate":
		case "refused":
			if r.Err = a.Problem; a.Problem == nil {
				r.Err = fmt.Errorf("%w: refused without a reason", ErrProtocol)
			}
		default:
			return fmt.Errorf("%w: an unknown status of an event", ErrProtocol)
		}
	}
	return nil
}

// Event returns the event with the given id. It is [ErrNotFound] when there is
// none, and [ErrExpired] when it is no longer kept.
func (c *Client) Event(ctx context.Context, id string) (journal.Replayed, error) {
	var e journal.Replayed
	r := request{method: http.MethodGet, path: c.appPath("events", id), accept: "application/json"}
	err := c.call(ctx, r, func(resp *http.Response) error {
		b, err := readBody(resp)
		if err != nil {
			return err
		}
		if e, err = journal.ParseReplayed(b); err != nil {
			return fmt.Errorf("%w: the event cannot be read: %w", ErrProtocol, err)
		}
		return nil
	})
	return e, err
}
