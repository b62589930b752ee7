package deliver

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections/callbacks"
)

const (
	typeVerification = "endpoint.verification"
	typeTest         = "endpoint.test"
)

// ErrNoDelivery means that the endpoint has no delivery that could be sent again.
var ErrNoDelivery = errors.New("no such delivery")

// Verify asks an endpoint to give a challenge back, in an answer
// {"challenge": "…"} with a status of 2xx. It reports whether it did.
func (e *Engine) Verify(ctx context.Context, ep *endpoints.Endpoint) (Answer, bool, error) {
	challenge := randomText()
	answer, err := e.control(ctx, ep, typeVerification, map[string]string{"challenge": challenge})
	if err != nil || !answer.Delivered() {
		return answer, false, err
	}
	var given struct {
		Challenge string `json:"challenge"`
	}
	return answer, json.Unmarshal(answer.Body, &given) == nil && given.Challenge == challenge, nil
}

// Test sends an endpoint a request that carries no event.
func (e *Engine) Test(ctx context.Context, ep *endpoints.Endpoint) (Answer, error) {
	return e.control(ctx, ep, typeTest, map[string]string{"endpoint": ep.IDText()})
}

func (e *Engine) control(ctx context.Context, ep *endpoints.Endpoint, kind string, data any) (Answer, error) {
	id := "msg_" + randomText()
	body, err := control(ep, id, kind, e.now(), data)
	if err != nil {
		return Answer{}, fmt.Errorf("making a request: %w", err)
	}
	h := make(http.Header, 8)
	h.Set("Content-Type", typeEvent)
	return e.post(ctx, ep, id, h, body), nil
}

func randomText() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails; it ends the process instead
	return hex.EncodeToString(b[:])
}

// requeueBatch bounds the parked deliveries of one record.
const requeueBatch = journal.MaxAttempts

// Requeue sends parked deliveries again: those of events that have arrived at a
// time or later, and with the numbers, or all when there are none. Their clock
// begins anew. It returns how many there are.
func (e *Engine) Requeue(ctx context.Context, ep *endpoints.Endpoint, from time.Time, numbers ...uint64) (int, error) {
	wanted := make(map[uint64]bool, len(numbers))
	for _, n := range numbers {
		wanted[n] = true
	}
	return e.requeue(ctx, ep, []journal.DeliveryState{journal.DeliveryParked}, func(d *callbacks.Delivery) bool {
		return (len(numbers) == 0 || wanted[d.Number]) && !time.UnixMilli(d.Arrived).Before(from)
	})
}

// requeue has deliveries of some states sent at once: parked ones from the
// beginning, those that wait before they are due.
func (e *Engine) requeue(ctx context.Context, ep *endpoints.Endpoint, states []journal.DeliveryState, match func(*callbacks.Delivery) bool) (int, error) {
	p, err := e.View.Progress(ctx, ep.App, ep.ID)
	if err != nil {
		return 0, err
	}
	now := e.now().UnixMilli()
	var entries []journal.Attempt
	for _, state := range states {
		err = e.View.Deliveries(ctx, ep.App, ep.ID, callbacks.Query{State: state, Oldest: e.oldest()}, func(d callbacks.Delivery) error {
			if !match(&d) {
				return nil
			}
			entry := d.Attempt
			entry.State, entry.Due = journal.DeliveryWaiting, now
			if state == journal.DeliveryParked {
				entry.Cause, entry.Arrived, entry.Attempts = journal.CauseNone, now, 0
			}
			entries = append(entries, entry)
			return nil
		})
		if err != nil {
			return 0, err
		}
	}
	if len(entries) == 0 {
		return 0, ErrNoDelivery
	}
	stream, _, err := e.streams.Locate(ctx, ep.App, 0)
	if err != nil {
		return 0, err
	}
	var last uint64
	for at := 0; at < len(entries); at += requeueBatch {
		a := &journal.Attempts{
			Kind: journal.AttemptsOutcomes, Endpoint: ep.ID, Token: p.Token, Entries: entries[at:min(at+requeueBatch, len(entries))],
		}
		if last, err = e.streams.Append(ctx, ep.App, a, nil); err != nil {
			return at, err
		}
	}
	if err := e.View.Wait(ctx, stream, last); err != nil {
		return len(entries), err
	}
	return len(entries), e.nudge(ctx, endpoints.Ref{App: ep.App, ID: ep.ID})
}

// An Outcome is a delivery as callers see it.
type Outcome struct {
	callbacks.Delivery

	MessageID string
	// Error and Answer are from the sealed part of the last attempt's record;
	// empty when there is none, or when it cannot be opened.
	Error, Answer string
}

// oldest is the arrival of the oldest event whose deliveries are still shown.
func (e *Engine) oldest() time.Time { return e.now().Add(-e.streams.Retention()) }

// Outcomes returns deliveries of an endpoint with what was said of them. Those
// whose retention is over are not among them.
func (e *Engine) Outcomes(ctx context.Context, ep *endpoints.Endpoint, q callbacks.Query) ([]Outcome, error) {
	var list []Outcome
	q.Oldest = e.oldest()
	err := e.View.Deliveries(ctx, ep.App, ep.ID, q, func(d callbacks.Delivery) error {
		list = append(list, Outcome{Delivery: d})
		return nil
	})
	if err != nil {
		return nil, err
	}
	reading, cancel := context.WithTimeout(ctx, detailsTime)
	defer cancel()
	opened := make(map[uint64][]detail)
	for i := range list {
		o := &list[i]
		if o.MessageID, err = e.messageID(ctx, ep, o.Position); err != nil {
			return nil, err
		}
		if o.State == journal.DeliveryDone {
			continue
		}
		details, ok := opened[o.Sequence]
		if !ok {
			details = e.details(reading, ep, &o.Delivery)
			opened[o.Sequence] = details
		}
		for _, d := range details {
			if d.Number == o.Number {
				o.Error, o.Answer = d.Error, d.Answer
			}
		}
	}
	return list, nil
}

// detailsTime is how long the details of a list of deliveries may take, all of them:
// while the store is away there are none.
const detailsTime = 5 * time.Second

// details opens the sealed part of a record; nil when it is gone, or cannot be read in
// time.
func (e *Engine) details(ctx context.Context, ep *endpoints.Endpoint, d *callbacks.Delivery) []detail {
	stream := journal.CallbackStream(e.Journal.Region().ID, int(d.Shard))
	sealed, err := e.streams.Details(ctx, ep.App, stream, d.Sequence)
	if err != nil || len(sealed) == 0 {
		return nil
	}
	var list []detail
	if json.Unmarshal(sealed, &list) != nil {
		return nil
	}
	return list
}
