package deliver

import (
	"fmt"
	"net/http"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/cmd/coffer/internal/webhook"
)

// Standard signs as Standard Webhooks 1.0 does, with every secret that is valid
// at the time of the attempt.
type Standard struct{}

// Sign is part of [Signer].
func (Standard) Sign(h http.Header, e *endpoints.Endpoint, id string, at time.Time, body []byte) error {
	var secrets []*webhook.Secret
	for _, s := range e.Signing(at) {
		secret, err := webhook.ParseSecret(string(s.Key))
		if err != nil {
			return fmt.Errorf("signing for endpoint %s: %w", e.IDText(), err)
		}
		secrets = append(secrets, secret)
	}
	if err := webhook.Sign(h, id, at, body, secrets...); err != nil {
		return fmt.Errorf("signing for endpoint %s: %w", e.IDText(), err)
	}
	return nil
}
