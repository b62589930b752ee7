package deliver

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"
	"unicode/utf8"

	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections/history"
)

const (
	userAgent = "Coffer-Callbacks/1"
	maxKept   = 512 // bytes of an answer that are kept
	maxError  = 200 // bytes of an error's text that are kept
)

// A delivery is one event on its way to an endpoint.
type delivery struct {
	number       uint64
	position     journal.Position
	conversation kms.Tag // zero where the order does not matter
	arrived      int64   // milliseconds
	attempts     int
	due          time.Time // zero for the first attempt

	// item is what was read for the first attempt; later ones read it again.
	item *history.Item
}

// A result is what became of a request.
type result struct {
	sent   []*delivery
	answer Answer
	took   time.Duration
	// held is why no request was made: the keys or the store are away, or the
	// body cannot be made.
	held error
}

// pauseText names what is away.
func pauseText(err error) string {
	if kms.Class(err) != nil {
		return "keys"
	}
	return "store"
}

// attempt makes a request for deliveries, sends it, and says what became of it.
func (e *Engine) attempt(ctx context.Context, ep *endpoints.Endpoint, sent []*delivery) result {
	select {
	case e.requests <- struct{}{}:
		defer func() { <-e.requests }()
	case <-ctx.Done():
		return result{sent: sent, held: ctx.Err()}
	}
	messages := make([]Message, len(sent))
	positions := make([]journal.Position, len(sent))
	for i, d := range sent {
		m, err := e.message(ctx, ep, d)
		if err != nil {
			return result{sent: sent, held: err}
		}
		messages[i], positions[i] = m, d.position
	}
	id := messages[0].ID
	if len(sent) > 1 {
		var err error
		if id, err = e.messageID(ctx, ep, positions...); err != nil {
			return result{sent: sent, held: err}
		}
	}
	started := time.Now()
	answer := e.send(ctx, ep, id, messages)
	if answer.Cause != journal.CauseNone && ctx.Err() != nil {
		return result{sent: sent, held: ctx.Err()} // cut by the worker's end
	}
	return result{sent: sent, answer: answer, took: time.Since(started)}
}

// send encodes, signs and posts messages.
func (e *Engine) send(ctx context.Context, ep *endpoints.Endpoint, id string, messages []Message) Answer {
	h := make(http.Header, 8+len(ep.Headers))
	body, err := e.Encoder.Encode(ctx, nil, h, ep, messages)
	if err != nil {
		return Answer{Cause: journal.CauseBody, Err: err}
	}
	return e.post(ctx, ep, id, h, body)
}

// post signs a body and sends it.
func (e *Engine) post(ctx context.Context, ep *endpoints.Endpoint, id string, h http.Header, body []byte) Answer {
	for name, value := range ep.Headers {
		h.Set(name, value)
	}
	h.Set("User-Agent", userAgent)
	if err := e.Signer.Sign(h, ep, id, e.now(), body); err != nil {
		return Answer{Cause: journal.CauseBody, Err: err}
	}
	return e.Transport.Send(ctx, &Request{Endpoint: ep, Header: h, Body: body})
}

// message opens the event of a delivery. An event that cannot be opened any more
// is no error: it keeps its number.
func (e *Engine) message(ctx context.Context, ep *endpoints.Endpoint, d *delivery) (Message, error) {
	m := Message{Number: d.number, Position: d.position, Stored: time.UnixMilli(d.arrived)}
	var err error
	if m.ID, err = e.messageID(ctx, ep, d.position); err != nil {
		return m, err
	}
	item := d.item
	d.item = nil
	if item == nil {
		if item, err = e.read(ctx, ep.App, d.position); err != nil {
			return m, err
		}
	}
	// What waited longer than the message is kept goes without it, also when the
	// view has not let go of it yet.
	expired := item == nil
	if item != nil {
		if expired, err = e.expired(ctx, ep.App, item); err != nil {
			return m, err
		}
	}
	if expired {
		m.Gone = "expired"
		return m, nil
	}
	m.Type = item.Type
	if item.Recalled {
		m.Gone = "recalled"
		return m, nil
	}
	m.Event, err = e.Journal.OpenRecord(ctx, nil, ep.App, item.Record)
	switch {
	case err == nil:
		return m, nil
	case errors.Is(err, kms.ErrSubjectErased), errors.Is(err, kms.ErrAppDestroyed):
		m.Gone = "erased"
	case errors.Is(err, kms.ErrEpochDestroyed):
		m.Gone = "expired"
	default:
		return m, fmt.Errorf("opening the event at position %s: %w", d.position, err)
	}
	m.Event = nil
	return m, nil
}

// expired reports whether an event is no longer served to anybody.
func (e *Engine) expired(ctx context.Context, id journal.AppID, item *history.Item) (bool, error) {
	app, err := e.Journal.App(ctx, id)
	if err != nil {
		return false, err
	}
	h, err := journal.ParseHeader(item.Record)
	if err != nil {
		return false, fmt.Errorf("event at position %s: %w", item.Position, err)
	}
	clock := min(h.Millis, item.Stored.UnixMilli())
	return clock < e.Journal.Oldest(app, e.now()).UnixMilli(), nil
}

// read reads one event again; nil when it has left the view.
func (e *Engine) read(ctx context.Context, app journal.AppID, position journal.Position) (*history.Item, error) {
	var item *history.Item
	_, err := e.Events.Replay(ctx, app, history.Query{After: position - 1, Before: position + 1, Reverse: true}, func(i history.Item) error {
		item = keep(i)
		return nil
	})
	return item, err
}

// keep copies an item out of a replay.
func keep(i history.Item) *history.Item {
	i.Record = append([]byte(nil), i.Record...)
	return &i
}

// detail is what an attempt's record says in its sealed part.
type detail struct {
	Number uint64 `json:"n"`
	Error  string `json:"error,omitzero"`
	Answer string `json:"answer,omitzero"`
}

func detailOf(number uint64, a Answer) (detail, bool) {
	d := detail{Number: number}
	if a.Err != nil {
		d.Error = cut(a.Err.Error(), maxError)
	}
	if !a.Delivered() {
		d.Answer = cut(string(a.Body), maxKept)
	}
	return d, d.Error != "" || d.Answer != ""
}

// cut returns the beginning of a text, as valid UTF-8.
func cut(s string, n int) string {
	if len(s) > n {
		s = s[:n]
	}
	if utf8.ValidString(s) {
		return s
	}
	out := make([]rune, 0, len(s))
	for _, r := range s { // what is not UTF-8 becomes U+FFFD
		out = append(out, r)
	}
	for string(out) != "" && len(string(out)) > n {
		out = out[:len(out)-1]
	}
	return string(out)
}
