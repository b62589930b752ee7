package awskms

import (
	"context"
	"errors"
	"net/http"
	"regexp"
	"strconv"
	"strings"

	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/smithy-go"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/internal/bounded"
)

// verdict is a class of the closed set, and words of our own.
type verdict struct {
	class  error
	detail string
	state  bool // KMS complained about a state of the key, which DescribeKey tells
}

// classify judges what the SDK returned.
func classify(err error) verdict {
	status := 0
	if answer, ok := errors.AsType[*awshttp.ResponseError](err); ok {
		status = answer.HTTPStatusCode()
	}
	api, ok := errors.AsType[smithy.APIError](err)
	if !ok {
		return classifyTransport(err, status)
	}
	// Typed and generic errors alike have a code; throttling and denials come as
	// generic ones. A prefix such as com.amazonaws.kms# is the protocol's.
	code := api.ErrorCode()
	if i := strings.LastIndexByte(code, '#'); i >= 0 {
		code = code[i+1:]
	}
	detail := codeName(code)
	if class := classOf(code); class != nil {
		return verdict{class: class, detail: detail}
	}
	if code == "KMSInvalidStateException" {
		// The documented text for the state that matters most; others are asked for.
		if strings.Contains(api.ErrorMessage(), "pending deletion") {
			return verdict{class: kms.ErrPendingDeletion, detail: detail}
		}
		return verdict{class: kms.ErrDisabled, detail: detail, state: true}
	}
	switch {
	case status == http.StatusTooManyRequests || status == http.StatusServiceUnavailable && strings.Contains(code, "Throttl"):
		return verdict{class: kms.ErrThrottled, detail: detail}
	case status == http.StatusForbidden:
		return verdict{class: kms.ErrAccessDenied, detail: detail}
	case status == http.StatusUnauthorized:
		return verdict{class: kms.ErrUnauthenticated, detail: detail}
	default:
		return verdict{class: kms.ErrUnavailable, detail: detail}
	}
}

// classOf is the class of the codes that have one, whatever their status.
func classOf(code string) error {
	switch code {
	case "NotFoundException", "InvalidArnException", "InvalidAliasNameException", "InvalidKeyUsageException",
		"UnsupportedOperationException":
		return kms.ErrNotFound
	case "DisabledException":
		return kms.ErrDisabled
	case "InvalidCiphertextException", "IncorrectKeyException":
		return kms.ErrMismatch
	case "AccessDeniedException", "AccessDenied", "NotAuthorized", "UnauthorizedOperation", "KMSAccessDeniedException":
		return kms.ErrAccessDenied
	case "UnrecognizedClientException", "InvalidClientTokenId", "InvalidAccessKeyId", "ExpiredTokenException", "ExpiredToken",
		"InvalidSignatureException", "SignatureDoesNotMatch", "IncompleteSignature", "IncompleteSignatureException",
		"MissingAuthenticationToken", "MissingAuthenticationTokenException", "RequestExpired", "OptInRequired":
		return kms.ErrUnauthenticated
	case "ThrottlingException", "Throttling", "ThrottledException", "RequestThrottledException", "RequestThrottled",
		"TooManyRequestsException", "RequestLimitExceeded", "SlowDown", "EC2ThrottledException":
		return kms.ErrThrottled
	case "LimitExceededException":
		return kms.ErrQuota
	case "KMSInternalException", "KeyUnavailableException", "DependencyTimeoutException", "ConflictException",
		"InternalFailure", "InternalServerError", "ServiceUnavailable", "ServiceUnavailableException",
		"CustomKeyStoreInvalidStateException", "CloudHsmClusterNotActiveException":
		return kms.ErrUnavailable
	default:
		return nil
	}
}

func classifyTransport(err error, status int) verdict {
	var malformed *smithy.DeserializationError
	switch {
	case errors.Is(err, bounded.ErrTooLarge):
		return verdict{class: kms.ErrUnavailable, detail: bounded.ErrTooLarge.Error()}
	case errors.Is(err, bounded.ErrRedirect):
		return verdict{class: kms.ErrUnavailable, detail: bounded.ErrRedirect.Error()}
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return verdict{class: kms.ErrUnavailable, detail: "no answer in time"}
	case status == http.StatusTooManyRequests:
		return verdict{class: kms.ErrThrottled, detail: "status 429"}
	case errors.As(err, &malformed):
		// Not even a denial: KMS itself denies in its own format, so this comes
		// from something on the way.
		return verdict{class: kms.ErrUnavailable, detail: "the answer is not what KMS answers"}
	case status != 0:
		return verdict{class: kms.ErrUnavailable, detail: "status " + strconv.Itoa(status)}
	default:
		return verdict{class: kms.ErrUnavailable, detail: "no usable answer"}
	}
}

var identifier = regexp.MustCompile(`^[A-Za-z0-9]{1,64}$`)

// codeName lets a code into the text of an error if it can be one.
func codeName(code string) string {
	if !identifier.MatchString(code) {
		return "unknown error code"
	}
	return code
}
