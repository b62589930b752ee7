package deliver

import (
	"context"
	"fmt"
	"net/http"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/cmd/coffer/internal/agora"
	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/cmd/coffer/internal/webhook"
	"github.com/cofferdb/coffer/journal"
)

const typeQuestion = "message.question"

// Ask asks an endpoint about an event that is not stored yet, in the form of the
// endpoint's mode. The request is signed as all others, and sealed where the
// endpoint's bodies are.
func (e *Engine) Ask(ctx context.Context, ep *endpoints.Endpoint, event *journal.Event) (Answer, error) {
	id := "msg_" + randomText()
	h := make(http.Header, 8)
	if ep.Mode == endpoints.Agora {
		body, err := agoraQuestion(ep, id, event)
		if err != nil {
			return Answer{}, fmt.Errorf("making a request: %w", err)
		}
		h.Set("Content-Type", typeJSON)
		return e.post(ctx, ep, id, h, body), nil
	}
	data, err := askedAbout(ep.App, event)
	if err != nil {
		return Answer{}, fmt.Errorf("making a request: %w", err)
	}
	body, err := control(ep, id, typeQuestion, e.now(), data)
	if err != nil {
		return Answer{}, fmt.Errorf("making a request: %w", err)
	}
	h.Set("Content-Type", typeEvent)
	if ep.Mode == endpoints.Sealed {
		recipient, err := webhook.ParseRecipient([]byte(ep.Encryption))
		if err != nil {
			return Answer{}, fmt.Errorf("endpoint %s: %w", ep.IDText(), err)
		}
		mediaType, _, _ := strings.Cut(typeEvent, ";")
		sealed, err := recipient.Seal(body, mediaType)
		clear(body)
		if err != nil {
			return Answer{}, fmt.Errorf("endpoint %s: %w", ep.IDText(), err)
		}
		h.Set("Content-Type", webhook.TypeSealed)
		body = []byte(sealed)
	}
	return e.post(ctx, ep, id, h, body), nil
}

// agoraQuestion is the vendor's pre-send callback.
func agoraQuestion(ep *endpoints.Endpoint, id string, event *journal.Event) ([]byte, error) {
	body, ok, err := agora.AppendCallback(nil, *event, agora.Callback{
		CallID: ep.Agora.AppKey + "_" + uuidOf(id), Secret: string(ep.Agora.Secret), Question: true,
		Delivery: []byte(`{"type":"` + typeQuestion + `"}`),
	})
	if err == nil && !ok {
		err = fmt.Errorf("%s has no form in the mode agora", event.Type)
	}
	return body, err
}

// askedAbout is an event as the other modes have it.
func askedAbout(app journal.AppID, e *journal.Event) (jsontext.Value, error) {
	return json.Marshal(struct {
		SpecVersion      string         `json:"specversion"`
		ID               string         `json:"id,omitzero"`
		Source           string         `json:"source"`
		Type             string         `json:"type"`
		Time             string         `json:"time"`
		Conversation     string         `json:"conversation"`
		ConversationType string         `json:"conversationtype"`
		Sender           string         `json:"sender,omitzero"`
		Recipient        string         `json:"recipient,omitzero"`
		Target           string         `json:"target,omitzero"`
		Data             jsontext.Value `json:"data"`
	}{
		"1.0", e.ID, "/apps/" + app.String(), e.Type.String(), e.Time.UTC().Format(timeLayout),
		e.Conversation, e.ConversationType.String(), e.Sender, e.Recipient, e.Target, e.Data,
	})
}
