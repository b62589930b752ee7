package deliver

import (
	"context"
	"fmt"
	"net/http"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/cmd/coffer/internal/webhook"
)

const typeQuestion = "message.question"

// Ask asks an endpoint about an event, JSON, that is not stored yet. The request
// is signed as all others, and sealed where the endpoint's bodies are.
func (e *Engine) Ask(ctx context.Context, ep *endpoints.Endpoint, event []byte) (Answer, error) {
	id := "msg_" + randomText()
	body, err := control(ep, id, typeQuestion, e.now(), jsontext.Value(event))
	if err != nil {
		return Answer{}, fmt.Errorf("making a request: %w", err)
	}
	h := make(http.Header, 8)
	h.Set("Content-Type", typeEvent)
	if ep.Mode == endpoints.Sealed {
		recipient, err := webhook.ParseRecipient([]byte(ep.Encryption))
		if err != nil {
			return Answer{}, fmt.Errorf("endpoint %s: %w", ep.IDText(), err)
		}
		sealed, err := recipient.Seal(body)
		clear(body)
		if err != nil {
			return Answer{}, fmt.Errorf("endpoint %s: %w", ep.IDText(), err)
		}
		h.Set("Content-Type", webhook.TypeSealed)
		body = []byte(sealed)
	}
	return e.post(ctx, ep, id, h, body), nil
}
