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

// verdict is a class of the closed set, and words of our own.
type verdict struct {
	class  error
	detail string
}

// classify judges what the client returned.
func classify(op string, err error) verdict {
	if answer, ok := errors.AsType[*api.ResponseError](err); ok {
		return classifyStatus(op, answer.StatusCode, strings.Join(answer.Errors, "\n"))
	}
	var refused *net.OpError
	switch {
	case errors.Is(err, bounded.ErrTooLarge):
		return verdict{kms.ErrUnavailable, bounded.ErrTooLarge.Error()}
	case errors.Is(err, bounded.ErrRedirect):
		return verdict{kms.ErrUnavailable, bounded.ErrRedirect.Error()}
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return verdict{kms.ErrUnavailable, "no answer in time"}
	case isTLS(err):
		return verdict{kms.ErrUnavailable, "TLS handshake failed"}
	case errors.As(err, &refused) && refused.Op == "dial":
		return verdict{kms.ErrUnavailable, "cannot connect"}
	default:
		return verdict{kms.ErrUnavailable, "no usable answer"}
	}
}

// classifyStatus judges an answer by its status and, where Vault gives many
// faults one status, by the words of its code.
func classifyStatus(op string, status int, text string) verdict {
	has := func(s string) bool { return strings.Contains(text, s) }
	switch {
	case status == http.StatusBadRequest:
		return classifyText(op, text)
	case status == http.StatusUnauthorized:
		return verdict{kms.ErrUnauthenticated, "status 401"}
	case status == http.StatusForbidden && (has("invalid token") || has("bad token") || has("missing client token")):
		return verdict{kms.ErrUnauthenticated, "the token is not valid"}
	case status == http.StatusForbidden:
		return verdict{kms.ErrAccessDenied, "the policy of the token does not allow it"}
	case status == http.StatusNotFound && strings.HasSuffix(op, "describe"):
		return verdict{kms.ErrNotFound, "no such key or mount"}
	case status == http.StatusNotFound, status == http.StatusMethodNotAllowed:
		return verdict{kms.ErrNotFound, "no such mount, or not a transit engine"}
	case status == http.StatusTooManyRequests && has("lease count quota"):
		return verdict{kms.ErrQuota, "lease count quota"}
	case status == http.StatusTooManyRequests:
		return verdict{kms.ErrThrottled, "status 429"}
	case status == http.StatusServiceUnavailable:
		return verdict{kms.ErrUnavailable, "status 503: sealed, or no active node"}
	default:
		// 412, 472 and 473 are nodes that cannot answer; so are other 5xx.
		return verdict{kms.ErrUnavailable, fmt.Sprintf("status %d", status)}
	}
}

// classifyText judges the text of a 400, and of an item of a batch.
func classifyText(op, text string) verdict {
	has := func(s string) bool { return strings.Contains(text, s) }
	switch {
	case has("key not found"), has("no existing key named"), has("invalid key name"):
		return verdict{kms.ErrNotFound, "no such key"}
	case has("disallowed by policy (too old)"), has("no such key version"):
		return verdict{kms.ErrVersionRetired, "the version is below the minimum that decrypts"}
	case has("message authentication failed"):
		return verdict{kms.ErrMismatch, "authentication failed"}
	case has("invalid ciphertext"):
		return verdict{kms.ErrMismatch, "the blob is no ciphertext of this key"}
	case has("not supported for key type"):
		return verdict{kms.ErrNotFound, "the key cannot encrypt"}
	case has("missing client token"):
		return verdict{kms.ErrUnauthenticated, "no token"}
	case op == "unwrap" || op == "rewrap":
		// What remains are complaints about the ciphertext.
		return verdict{kms.ErrMismatch, "refused as malformed"}
	default:
		return verdict{kms.ErrUnavailable, "refused with status 400"}
	}
}

// isTLS reports whether a connection failed for the certificates.
func isTLS(err error) bool {
	text := err.Error() // the causes have a dozen types, all with this prefix
	return strings.Contains(text, "tls: ") || strings.Contains(text, "x509: ")
}
