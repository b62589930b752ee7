// Package retry repeats calls to a key management service, within the caller's
// deadline and a fixed number of attempts.
//
// The clients of Vault and AWS have retryers of their own. They know nothing of
// the closed set of failures, wait seconds where a reader waits for a key, and
// AWS's repeats what cannot succeed; both are switched off in favour of this one.
package retry

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/cofferdb/coffer/kms"
)

// The zero values of a Policy.
const (
	DefaultAttempts = 4
	DefaultTimeout  = 5 * time.Second
)

const (
	firstWait = 100 * time.Millisecond
	longest   = 2 * time.Second
)

// Policy bounds a call. Its zero value makes four attempts of five seconds each,
// with waits of at most 100, 200 and 400 ms between them.
type Policy struct {
	Attempts int           // 0 is DefaultAttempts
	Timeout  time.Duration // of one attempt; 0 is DefaultTimeout
}

// Do calls fn until it succeeds, fails for good, or the attempts or ctx end, and
// returns its last error. The context given to fn ends after the policy's
// timeout. fn returns errors with a class of kms; what is worth another attempt
// is what kms.Retryable says.
//
// The wait between attempts is random between half and the whole of a step that
// doubles, so that processes which failed together do not come back together. A
// wait that would outlast ctx is not begun.
func (p Policy) Do(ctx context.Context, fn func(context.Context) error) error {
	attempts, timeout := p.Attempts, p.Timeout
	if attempts <= 0 {
		attempts = DefaultAttempts
	}
	if timeout <= 0 {
		timeout = DefaultTimeout
	}
	step := firstWait
	for n := 1; ; n++ {
		err := once(ctx, timeout, fn)
		if err == nil || n == attempts || ctx.Err() != nil || !kms.Retryable(err) {
			return err
		}
		wait := step/2 + rand.N(step/2+1) //nolint:gosec // jitter needs no secrecy
		step = min(2*step, longest)
		if end, ok := ctx.Deadline(); ok && time.Until(end) <= wait {
			return err
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return err
		}
	}
}

func once(ctx context.Context, timeout time.Duration, fn func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return fn(ctx)
}
