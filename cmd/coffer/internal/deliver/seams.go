package deliver

import (
	"context"
	"net/http"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/journal"
)

// A Request is one attempt, complete and signed.
type Request struct {
	Endpoint *endpoints.Endpoint
	Header   http.Header
	Body     []byte
}

// An Answer is what became of a request.
type Answer struct {
	// Status is that of HTTP, 0 without an answer.
	Status int
	// RetryAfter is what the endpoint asked for, 0 if nothing.
	RetryAfter time.Duration
	// Body is the beginning of the answer.
	Body []byte
	// Cause is why there is no answer; CauseNone when there is one.
	Cause journal.Cause
	// Err says it in words, without anything of the request's content.
	Err error
}

// Delivered reports whether the endpoint has taken the request: only 2xx does.
func (a Answer) Delivered() bool { return a.Cause == journal.CauseNone && a.Status/100 == 2 }

// A Transport sends requests. It must be safe for concurrent use.
type Transport interface {
	// Check returns egress.ErrForbidden when a URL may not be called, as far as
	// that can be told without resolving it.
	Check(url string) error
	// Send posts a request and reads its answer. It follows no redirect, reads
	// no more than MaxAnswer bytes, and ends within its own time-out or ctx.
	Send(ctx context.Context, r *Request) Answer
	// Forget drops what is kept of an endpoint: connections, resolved
	// addresses.
	Forget(id journal.EndpointID)
}

// MaxAnswer is how much of an endpoint's answer is read.
const MaxAnswer = 64 << 10

// A Signer adds the signature headers of a request.
type Signer interface {
	// Sign sets the headers webhook-id, webhook-timestamp and webhook-signature
	// for a body that is sent at the time.
	Sign(h http.Header, e *endpoints.Endpoint, id string, at time.Time, body []byte) error
}

// A Message is one event for an endpoint.
type Message struct {
	ID       string // webhook-id
	Number   uint64 // within the endpoint, without a gap; 0 in a replay
	Position journal.Position
	Type     journal.Type
	Stored   time.Time
	// Event is the event's canonical JSON; nil when it can no longer be opened.
	Event []byte
	// Gone says why Event is nil: "erased", "recalled" or "expired".
	Gone string
}

// An Encoder makes the body of a request. It is called at the attempt, so that
// what was erased meanwhile is not sent.
type Encoder interface {
	// Encode appends the body for the messages to dst, one or more in order, and
	// sets the headers that belong to it, Content-Type above all.
	Encode(ctx context.Context, dst []byte, h http.Header, e *endpoints.Endpoint, messages []Message) ([]byte, error)
}
