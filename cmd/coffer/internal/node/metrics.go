package node

import (
	"context"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/deliver"
	"github.com/cofferdb/coffer/cmd/coffer/internal/monitor"
)

// meteredTransport counts the requests to webhook endpoints.
type meteredTransport struct {
	deliver.Transport

	meter *monitor.Meter
}

func (t meteredTransport) Send(ctx context.Context, r *deliver.Request) deliver.Answer {
	began := time.Now()
	answer := t.Transport.Send(ctx, r)
	outcome := monitor.OutcomeOf(answer.Status)
	if outcome == monitor.OK && !answer.Delivered() {
		outcome = monitor.Refused // a redirect
	}
	t.meter.Observe(r.Endpoint.App, monitor.Deliver, outcome, time.Since(began))
	return answer
}
