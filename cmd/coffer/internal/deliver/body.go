package deliver

import (
	"context"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/cmd/coffer/internal/webhook"
)

const (
	typeEvent      = "application/cloudevents+json; charset=utf-8"
	typeJSON       = "application/json; charset=utf-8"
	typeEventBatch = "application/cloudevents-batch+json; charset=utf-8"

	timeLayout = "2006-01-02T15:04:05.000Z07:00"
)

// Events encodes messages as CloudEvents: the thin form, ids and positions, the
// full event, or that encrypted to the endpoint's public key.
type Events struct{}

// thinEvent is what of an event goes into the thin form.
type thinEvent struct {
	ID               string `json:"id"`
	Source           string `json:"source"`
	Time             string `json:"time"`
	Conversation     string `json:"conversation,omitzero"`
	ConversationType string `json:"conversationtype,omitzero"`
	Target           string `json:"target,omitzero"`
}

// Encode is part of [Encoder].
func (Events) Encode(_ context.Context, dst []byte, h http.Header, e *endpoints.Endpoint, messages []Message) ([]byte, error) {
	start := len(dst)
	dst, err := events(dst, h, e, messages)
	if err != nil || e.Mode != endpoints.Sealed {
		return dst, err
	}
	recipient, err := webhook.ParseRecipient([]byte(e.Encryption))
	if err != nil {
		return dst[:start], fmt.Errorf("endpoint %s: %w", e.IDText(), err)
	}
	mediaType, _, _ := strings.Cut(h.Get("Content-Type"), ";")
	sealed, err := recipient.Seal(dst[start:], mediaType)
	clear(dst[start:])
	if err != nil {
		return dst[:start], fmt.Errorf("endpoint %s: %w", e.IDText(), err)
	}
	h.Set("Content-Type", webhook.TypeSealed)
	return append(dst[:start], sealed...), nil
}

// events appends messages in the form of an endpoint, before any encryption.
func events(dst []byte, h http.Header, e *endpoints.Endpoint, messages []Message) ([]byte, error) {
	var encode func([]byte, *endpoints.Endpoint, *Message) ([]byte, error)
	switch e.Mode {
	case endpoints.Thin:
		encode = appendThin
	case endpoints.Full, endpoints.Sealed:
		encode = appendFull
	case endpoints.Agora:
		h.Set("Content-Type", typeJSON)
		return appendAgora(dst, e, &messages[0])
	default:
		return dst, fmt.Errorf("endpoint %s: bodies of the mode %q cannot be made", e.IDText(), e.Mode)
	}
	var err error
	if e.Batch <= 1 {
		h.Set("Content-Type", typeEvent)
		return encode(dst, e, &messages[0])
	}
	h.Set("Content-Type", typeEventBatch)
	for i := range messages {
		if i == 0 {
			dst = append(dst, '[')
		} else {
			dst = append(dst, ',')
		}
		if dst, err = encode(dst, e, &messages[i]); err != nil {
			return dst, err
		}
	}
	return append(dst, ']'), nil
}

// appendFull appends the event as a replay gives it, and its number.
func appendFull(dst []byte, e *endpoints.Endpoint, m *Message) ([]byte, error) {
	if m.Event == nil {
		return appendGone(dst, e, m), nil
	}
	dst = append(dst, m.Event[:len(m.Event)-1]...)
	return appendPlace(dst, m), nil
}

func appendThin(dst []byte, e *endpoints.Endpoint, m *Message) ([]byte, error) {
	if m.Event == nil {
		return appendGone(dst, e, m), nil
	}
	var t thinEvent
	if err := json.Unmarshal(m.Event, &t); err != nil {
		return dst, fmt.Errorf("event at position %s: %w", m.Position, err)
	}
	dst = append(dst, `{"specversion":"1.0","id":"`...)
	dst = append(dst, t.ID...) // ids need no escapes
	dst = append(dst, `","source":"`...)
	dst = append(dst, t.Source...)
	dst = append(dst, `","type":"`...)
	dst = append(dst, m.Type.String()...)
	dst = append(dst, `","time":"`...)
	dst = append(dst, t.Time...)
	for _, a := range [...]struct{ name, value string }{
		{"conversation", t.Conversation}, {"conversationtype", t.ConversationType}, {"target", t.Target},
	} {
		if a.value != "" {
			dst = append(dst, `","`+a.name+`":"`...)
			dst = append(dst, a.value...)
		}
	}
	return appendPlace(append(dst, '"'), m), nil
}

// appendGone stands for an event that cannot be opened any more: its number and
// position, so that the consumer sees that there is no hole.
func appendGone(dst []byte, e *endpoints.Endpoint, m *Message) []byte {
	kind := "event.gone"
	if m.Type.Known() {
		kind = m.Type.String()
	}
	dst = append(dst, `{"specversion":"1.0","id":"`+m.ID+`","source":"/apps/`+e.App.String()+`","type":"`+kind+
		`","time":"`+m.Stored.UTC().Format(timeLayout)+`","gone":"`+m.Gone+`"`...)
	return appendPlace(dst, m)
}

func appendPlace(dst []byte, m *Message) []byte {
	dst = append(dst, `,"position":"`+m.Position.String()+`"`...)
	if m.Number > 0 { // a replay has none
		dst = append(dst, `,"number":"`...)
		dst = append(strconv.AppendUint(dst, m.Number, 10), '"')
	}
	return append(dst, '}')
}

// control is the body of a request that carries no event.
func control(e *endpoints.Endpoint, id, kind string, at time.Time, data any) ([]byte, error) {
	raw, err := json.Marshal(data)
	if err != nil {
		return nil, err
	}
	return json.Marshal(struct {
		SpecVersion string         `json:"specversion"`
		ID          string         `json:"id"`
		Source      string         `json:"source"`
		Type        string         `json:"type"`
		Time        string         `json:"time"`
		ContentType string         `json:"datacontenttype"`
		Data        jsontext.Value `json:"data"`
	}{"1.0", id, "/apps/" + e.App.String(), kind, at.UTC().Format(timeLayout), "application/json", raw})
}
