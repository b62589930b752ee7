package vault

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"

	"github.com/hashicorp/vault/api"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/internal/bounded"
)

// classify turns what the client returned into a class and words of our own.
func classify(op string, err error) (class error, detail string) {
	if answer, ok := errors.AsType[*api.ResponseError](err); ok {
		return classifyStatus(op, answer.StatusCode, strings.Join(answer.Errors, "\n"))
	}
	var refused *net.OpError
	switch {
	case errors.Is(err, bounded.ErrTooLarge):
		return kms.ErrUnavailable, bounded.ErrTooLarge.Error()
	case errors.Is(err, bounded.ErrRedirect):
		return kms.ErrUnavailable, bounded.ErrRedirect.Error()
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return kms.ErrUnavailable, "no answer in time"
	case isTLS(err):
		return kms.ErrUnavailable, "TLS handshake failed"
	case errors.As(err, &refused) && refused.Op == "dial":
		return kms.ErrUnavailable, "cannot connect"
	default:
		return kms.ErrUnavailable, "no usable answer"
	}
}

// classifyStatus judges an answer by its status and, where Vault gives many
// faults one status, by the words of its code.
func classifyStatus(op string, status int, text string) (class error, detail string) {
	has := func(s string) bool { return strings.Contains(text, s) }
	switch {
	case status == http.StatusBadRequest:
		return classifyText(op, text)
	case status == http.StatusUnauthorized:
		return kms.ErrUnauthenticated, "status 401"
	case status == http.StatusForbidden && (has("invalid token") || has("bad token") || has("missing client token")):
		return kms.ErrUnauthenticated, "the token is not valid"
	case status == http.StatusForbidden:
		return kms.ErrAccessDenied, "the policy of the token does not allow it"
	case status == http.StatusNotFound && strings.HasSuffix(op, "describe"):
		return kms.ErrNotFound, "no such key or mount"
	case status == http.StatusNotFound, status == http.StatusMethodNotAllowed:
		return kms.ErrNotFound, "no such mount, or not a transit engine"
	case status == http.StatusTooManyRequests && has("lease count quota"):
		return kms.ErrQuota, "lease count quota"
	case status == http.StatusTooManyRequests:
		return kms.ErrThrottled, "status 429"
	case status == http.StatusServiceUnavailable:
		return kms.ErrUnavailable, "status 503: sealed, or no active node"
	default:
		// 412, 472 and 473 are nodes that cannot answer; so are other 5xx.
		return kms.ErrUnavailable, fmt.Sprintf("status %d", status)
	}
}

// classifyText judges the text of a 400, and of an item of a batch.
func classifyText(op, text string) (class error, detail string) {
	has := func(s string) bool { return strings.Contains(text, s) }
	switch {
	case has("key not found"), has("no existing key named"), has("invalid key name"):
		return kms.ErrNotFound, "no such key"
	case has("disallowed by policy (too old)"), has("no such key version"):
		return kms.ErrVersionRetired, "the version is below the minimum that decrypts"
	case has("message authentication failed"):
		return kms.ErrMismatch, "authentication failed"
	case has("invalid ciphertext"):
		return kms.ErrMismatch, "the blob is no ciphertext of this key"
	case has("not supported for key type"):
		return kms.ErrNotFound, "the key cannot encrypt"
	case has("missing client token"):
		return kms.ErrUnauthenticated, "no token"
	case op == "unwrap" || op == "rewrap":
		// What remains are complaints about the ciphertext.
		return kms.ErrMismatch, "refused as malformed"
	default:
		return kms.ErrUnavailable, "refused with status 400"
	}
}

// isTLS reports whether a connection failed for the certificates.
func isTLS(err error) bool {
	text := err.Error() // the causes have a dozen types, all with this prefix
	return strings.Contains(text, "tls: ") || strings.Contains(text, "x509: ")
}
