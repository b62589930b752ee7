package server

import (
	"errors"
	"net/http"
	"strconv"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/cmd/coffer/internal/accounts"
	"github.com/cofferdb/coffer/cmd/coffer/internal/agora"
	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/cmd/coffer/internal/deletion"
	"github.com/cofferdb/coffer/cmd/coffer/internal/deliver"
	"github.com/cofferdb/coffer/cmd/coffer/internal/egress"
	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/cmd/coffer/internal/erasures"
	"github.com/cofferdb/coffer/cmd/coffer/internal/exports"
	"github.com/cofferdb/coffer/cmd/coffer/internal/keys"
	"github.com/cofferdb/coffer/cmd/coffer/internal/presend"
	"github.com/cofferdb/coffer/cmd/coffer/internal/profiles"
	"github.com/cofferdb/coffer/cmd/coffer/internal/signing"
	"github.com/cofferdb/coffer/cmd/coffer/internal/webhook"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/attachments"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/history"
)

// problemPrefix makes a problem's type, a URI that identifies and is not meant
// to be opened (RFC 9457 section 3.1.1).
const problemPrefix = "urn:coffer:problem:"

// problem is an answer of application/problem+json. It is also an error, so
// that handlers return it like any other.
type problem struct {
	Type      string       `json:"type"`
	Title     string       `json:"title"`
	Status    int          `json:"status"`
	Detail    string       `json:"detail,omitempty"`
	Code      string       `json:"code"` // the last part of Type
	Retryable bool         `json:"retryable"`
	RequestID string       `json:"request_id,omitempty"`
	Errors    []inputError `json:"errors,omitempty"`

	// Region and URL say where the app lives (wrong-region).
	Region string `json:"region,omitempty"`
	URL    string `json:"url,omitempty"`
	// OldestAvailable is the time before which nothing is kept
	// (cursor-expired, retention-expired).
	OldestAvailable *time.Time `json:"oldest_available,omitempty"`
	// OldestPosition is where to begin again: after it comes the oldest event
	// that is kept (cursor-expired).
	OldestPosition string `json:"oldest_position,omitempty"`
	// Needed counts what still needs a key, and Uses names some of it
	// (key-needed).
	Needed int        `json:"needed,omitzero"`
	Uses   []keys.Use `json:"uses,omitempty"`

	retryAfter int    // seconds
	allow      string // for 405
	cause      error
}

// inputError says what is wrong with one part of the input: a JSON pointer into
// the body, or the name of a parameter or header.
type inputError struct {
	Pointer   string `json:"pointer,omitempty"`
	Parameter string `json:"parameter,omitempty"`
	Header    string `json:"header,omitempty"`
	Detail    string `json:"detail"`
}

func (p *problem) Error() string {
	if p.cause != nil {
		return p.Code + ": " + p.cause.Error()
	}
	return p.Code + ": " + p.Detail
}

func (p *problem) Unwrap() error { return p.cause }

// kind is a class of problems.
type kind struct {
	status     int
	code       string
	title      string
	retryable  bool
	retryAfter int // seconds, 0 for none
}

func (k kind) problem(detail string) *problem {
	return &problem{
		Type: problemPrefix + k.code, Code: k.code, Title: k.title, Status: k.status,
		Detail: detail, Retryable: k.retryable, retryAfter: k.retryAfter,
	}
}

// kinds returns the closed set of problems, by the names the code uses.
func kinds() kindTable {
	return kindTable{
		invalidRequest:    kind{status: 400, code: "invalid-request", title: "The request is not valid"},
		cursorMismatch:    kind{status: 400, code: "cursor-mismatch", title: "The cursor belongs to another query"},
		requestTimeout:    kind{status: 408, code: "request-timeout", title: "The request did not arrive in time", retryable: true},
		tokenInvalid:      kind{status: 401, code: "token-invalid", title: "The credential is not valid"},
		tokenExpired:      kind{status: 401, code: "token-expired", title: "The token has expired"},
		privilegeMissing:  kind{status: 403, code: "privilege-missing", title: "The credential does not allow this"},
		appDisabled:       kind{status: 403, code: "app-disabled", title: "The app is disabled"},
		originForbidden:   kind{status: 403, code: "origin-forbidden", title: "The page's origin may not do this"},
		regionForbidden:   kind{status: 403, code: "region-forbidden", title: "The account may not use this region"},
		notFound:          kind{status: 404, code: "not-found", title: "There is no such thing"},
		methodNotAllowed:  kind{status: 405, code: "method-not-allowed", title: "The path does not take this method"},
		notAcceptable:     kind{status: 406, code: "not-acceptable", title: "No form that is accepted can be given"},
		conflict:          kind{status: 409, code: "idempotency-conflict", title: "The id is taken by another content"},
		exists:            kind{status: 409, code: "already-exists", title: "It exists already"},
		exportUnfinished:  kind{status: 409, code: "export-unfinished", title: "The export is not done"},
		exportsFull:       kind{status: 409, code: "exports-full", title: "The app has as many exports as it may"},
		keyNeeded:         kind{status: 409, code: "key-needed", title: "The key is still needed"},
		rotating:          kind{status: 409, code: "certificate-rotating", title: "The certificate is being rotated already"},
		deleted:           kind{status: 410, code: "deleted", title: "It has been deleted"},
		planChanging:      kind{status: 409, code: "plan-changing", title: "The app's plan is being changed", retryable: true, retryAfter: 5},
		keysBusy:          kind{status: 409, code: "keys-busy", title: "Another key job is under way"},
		notSupported:      kind{status: 422, code: "not-supported", title: "The key service cannot do this"},
		endpointInvalid:   kind{status: 422, code: "endpoint-invalid", title: "The endpoint cannot be used like this"},
		urlForbidden:      kind{status: 422, code: "endpoint-url-forbidden", title: "The endpoint's URL may not be called"},
		tooMany:           kind{status: 409, code: "too-many", title: "There are as many as there may be"},
		messageRefused:    kind{status: 403, code: "message-refused", title: "The message was refused by the app's own rules"},
		presendAway:       kind{status: 503, code: "presend-unavailable", title: "Whether the message may be stored could not be asked", retryable: true, retryAfter: 1},
		userErased:        kind{status: 409, code: "user-erased", title: "The user has been erased"},
		cursorExpired:     kind{status: 410, code: "cursor-expired", title: "The cursor is older than what is kept"},
		erased:            kind{status: 410, code: "erased", title: "It has been erased"},
		retentionExpired:  kind{status: 410, code: "retention-expired", title: "It is older than the plan keeps"},
		tooOld:            kind{status: 422, code: "retention-expired", title: "The event is older than the plan keeps"},
		payloadTooLarge:   kind{status: 413, code: "payload-too-large", title: "The request is over a size limit"},
		rangeUnfit:        kind{status: 416, code: "range-not-satisfiable", title: "The range lies beyond the end"},
		unsupportedType:   kind{status: 415, code: "unsupported-media-type", title: "The body is in a form that is not taken"},
		wrongRegion:       kind{status: 421, code: "wrong-region", title: "The app belongs to another region"},
		overloaded:        kind{status: 429, code: "rate-limited", title: "Too much at once", retryable: true, retryAfter: 1},
		internal:          kind{status: 500, code: "internal", title: "The server has failed"},
		dataCorrupt:       kind{status: 500, code: "data-corrupt", title: "Stored data is damaged"},
		kmsUnavailable:    kind{status: 503, code: "kms-unavailable", title: "The keys cannot be used at present", retryable: true, retryAfter: 5},
		kmsRefused:        kind{status: 503, code: "kms-unavailable", title: "The keys cannot be used until an operator acts"},
		storeUnavailable:  kind{status: 503, code: "store-unavailable", title: "The store cannot be used at present", retryable: true, retryAfter: 1},
		storeInconsistent: kind{status: 503, code: "store-inconsistent", title: "The store is not what was registered; an operator must act"},
		viewBehind:        kind{status: 503, code: "view-behind", title: "The view has not come that far yet", retryable: true, retryAfter: 1},
		storeFull:         kind{status: 507, code: "store-full", title: "The store is full", retryable: true, retryAfter: 60},
	}
}

type kindTable struct {
	endpointInvalid, urlForbidden, tooMany, messageRefused, presendAway,
	invalidRequest, cursorMismatch, requestTimeout, tokenInvalid, tokenExpired, privilegeMissing, appDisabled,
	originForbidden, regionForbidden, notFound, methodNotAllowed, notAcceptable, conflict, exists, userErased, cursorExpired, erased,
	retentionExpired, tooOld, payloadTooLarge, rangeUnfit, unsupportedType, wrongRegion, overloaded, internal, dataCorrupt,
	rotating, deleted,
	planChanging, exportUnfinished, exportsFull, keyNeeded, keysBusy, notSupported, kmsUnavailable, kmsRefused, storeUnavailable, storeInconsistent, viewBehind, storeFull kind
}

// mapping is a row of the error table. An empty detail means that the error's
// own text is for callers; only errors of the input are.
type mapping struct {
	err    error
	kind   kind
	detail string
}

// errorTable maps the errors that callers of the libraries branch on to
// problems. The first row that matches counts, so narrower ones come first. A
// test holds that every exported sentinel of the libraries is in it.
func errorTable() []mapping {
	k := kinds()
	return []mapping{
		// Input.
		{journal.ErrTooLarge, k.payloadTooLarge, ""},
		{journal.ErrTimeRange, k.invalidRequest, ""},
		{journal.ErrExpired, k.tooOld, "the event is older than the app's plan keeps events; it was not stored"},
		{journal.ErrUnknownPlan, k.invalidRequest, "the region has no such plan"},
		{journal.ErrInvalid, k.invalidRequest, ""},
		{accounts.ErrInvalid, k.invalidRequest, ""},

		{egress.ErrForbidden, k.urlForbidden, ""},
		{endpoints.ErrInvalid, k.endpointInvalid, ""},
		{endpoints.ErrNotFound, k.notFound, "the app has no such endpoint"},
		{endpoints.ErrTooMany, k.tooMany, ""},
		{endpoints.ErrChanged, k.storeUnavailable, "the endpoint was changed by another at the same time"},
		{deliver.ErrNoReplay, k.notFound, "the app has no such replay"},
		{deliver.ErrReplays, k.tooMany, "the endpoint has four replays under way; wait for one to end, or cancel it"},
		{deliver.ErrNoDelivery, k.notFound, "no delivery of the endpoint is parked"},
		{presend.ErrRefused, k.messageRefused, ""},
		{presend.ErrUnanswered, k.presendAway, "the app's endpoint did not say whether the message may be stored; send it again with the same id"},
		{presend.ErrNotSet, k.notFound, "the app has no endpoint that is asked before messages are stored"},
		{agora.ErrFIPS, k.notSupported, "the mode agora needs MD5, which this server may not compute"},
		{webhook.ErrSealed, k.internal, "the server has failed"},
		{webhook.ErrSecret, k.endpointInvalid, ""},
		{webhook.ErrKey, k.endpointInvalid, ""},
		{webhook.ErrSignature, k.internal, "the server has failed"},

		// Credentials.
		{auth.ErrExpired, k.tokenExpired, "ask the app's backend for a new token"},
		{auth.ErrNotYetValid, k.tokenInvalid, "the token is issued in the future; check the clock of the issuing machine"},
		{auth.ErrLifetime, k.tokenInvalid, "the token asks to be valid for more than 86,400 seconds"},
		{auth.ErrPrivilege, k.privilegeMissing, "the token has no chat privilege: 1 with a user id, or 2 without"},
		{auth.ErrSignature, k.tokenInvalid, "the token is not signed by a certificate of its app"},
		{auth.ErrMalformed, k.tokenInvalid, "the token is not an AccessToken2"},
		{auth.ErrSecretFile, k.internal, "a secret of the server cannot be read"},
		{auth.ErrSecretExposed, k.internal, "a secret of the server cannot be read"},

		// Things and their state.
		{journal.ErrAppDeleted, k.deleted, "the app has been deleted"},
		{profiles.ErrInvalid, k.invalidRequest, ""},
		{profiles.ErrTooLarge, k.payloadTooLarge, ""},
		{profiles.ErrNotFound, k.notFound, "the user has no profile"},
		{deletion.ErrNoDeletion, k.notFound, "there is no such deletion"},
		{journal.ErrUnknownApp, k.notFound, "there is no such app"},
		{journal.ErrAppExists, k.exists, "an app with this id exists"},
		{journal.ErrWrongRegion, k.wrongRegion, "the app belongs to another region"},
		{journal.ErrDisabled, k.appDisabled, "an operator has disabled the app"},
		{journal.ErrMoving, k.planChanging, "another plan change of the app is under way; it can be looked at under /moves"},
		{journal.ErrUnknownMove, k.notFound, "there is no such plan change; an app's last one can be seen"},
		{journal.ErrConflict, k.conflict, "an event with this id and another content is stored"},
		{accounts.ErrNotFound, k.notFound, "there is no such account"},
		{accounts.ErrExists, k.exists, "an account with this id exists"},
		{accounts.ErrDeleted, k.deleted, "the account has been deleted"},
		{accounts.ErrDisabled, k.appDisabled, "an operator has disabled the account"},
		{journal.ErrRotating, k.rotating, "the certificate before the newest is still accepted; withdraw it first"},
		{accounts.ErrRegionForbidden, k.regionForbidden, "an account of Mainland China can use cn only, unless an operator has granted it more"},
		{erasures.ErrNotFound, k.notFound, "there is no such erasure"},
		{erasures.ErrReceipt, k.invalidRequest, "a receipt was not signed by this region, or not as a receipt"},
		{erasures.ErrCorrupt, k.dataCorrupt, "a row of an erasure is damaged"},
		{signing.ErrSignature, k.invalidRequest, "a text was not signed by this region"},
		{signing.ErrCorrupt, k.dataCorrupt, "the row of the region's signing key is damaged"},
		{attachments.ErrNotFound, k.notFound, "there is no such attachment, or none any more"},
		{attachments.ErrConflict, k.conflict, "an attachment with this id and another content, type, sender or conversation is stored"},
		{attachments.ErrTooLarge, k.payloadTooLarge, "the attachment is over the limit"},
		{attachments.ErrDigest, k.invalidRequest, "the content that arrived has another digest; nothing was stored"},
		{attachments.ErrCorrupt, k.dataCorrupt, "a stored attachment is damaged"},
		{kms.ErrSubjectErased, k.erased, "the user's keys have been destroyed"},
		{kms.ErrEpochDestroyed, k.retentionExpired, "the keys of that time have been destroyed with its last event"},
		{kms.ErrAppDestroyed, k.notFound, "there is no such app"},

		// Damage: nothing is skipped, an operator must look.
		{journal.ErrCorrupt, k.dataCorrupt, "a stored record is damaged"},
		{kms.ErrEnvelope, k.dataCorrupt, "a stored envelope cannot be read by this version"},
		{kms.ErrKeyMismatch, k.dataCorrupt, "a stored envelope names another key than its own"},
		{kms.ErrAuthentication, k.dataCorrupt, "a stored envelope fails authentication"},
		{kms.ErrKeyUnknown, k.dataCorrupt, "the keyring lacks the key of a stored envelope"},
		{kms.ErrKeyringCorrupt, k.dataCorrupt, "a row of the keyring is damaged"},
		{kms.ErrAppUnknown, k.dataCorrupt, "the keyring has no keys of the app"},
		{projections.ErrCorrupt, k.dataCorrupt, "the view store is damaged"},
		{journal.ErrGap, k.storeInconsistent, "a stream has a gap"},
		{journal.ErrIncarnation, k.storeInconsistent, "a stream is missing or is not the registered one"},
		{projections.ErrStopped, k.storeInconsistent, "the view has stopped at an event that it cannot apply"},

		// Exports.
		{exports.ErrSpec, k.invalidRequest, ""},
		{exports.ErrNotFound, k.notFound, "there is no such export, or no such file of it"},
		{exports.ErrUnfinished, k.exportUnfinished, ""},
		{exports.ErrTooMany, k.exportsFull, "delete one of them; they also go by themselves after a while"},
		{exports.ErrExists, k.conflict, "an export with this Idempotency-Key and other filters exists"},
		{exports.ErrCorrupt, k.dataCorrupt, "a row of the export is damaged; delete the export and ask again"},

		// Administration of keys.
		{keys.ErrSpec, k.invalidRequest, ""},
		{keys.ErrNoJob, k.notFound, "there is no such job"},
		{keys.ErrNoApp, k.notFound, "the keyring has no such app"},
		{keys.ErrBusy, k.keysBusy, ""},
		{keys.ErrNeeded, k.keyNeeded, ""},
		{keys.ErrNotSupported, k.notSupported, ""},
		{keys.ErrCorrupt, k.dataCorrupt, "a row of the key administration is damaged"},

		// Keys. Whether waiting helps depends on who has to act.
		{kms.ErrThrottled, k.kmsUnavailable, "the key service is busy"},
		{kms.ErrUnavailable, k.kmsUnavailable, "the key service does not answer"},
		{kms.ErrQuota, k.kmsRefused, "a quota of the key service is used up"},
		{kms.ErrNotFound, k.kmsRefused, "the key service does not know the region's key"},
		{kms.ErrAccessDenied, k.kmsRefused, "the key service denies access to the region's key"},
		{kms.ErrUnauthenticated, k.kmsRefused, "the key service does not accept the region's credentials"},
		{kms.ErrDisabled, k.kmsRefused, "the region's key is disabled"},
		{kms.ErrPendingDeletion, k.kmsRefused, "the region's key is about to be deleted"},
		{kms.ErrVersionRetired, k.kmsRefused, "the version of the region's key that is needed has been retired"},
		{kms.ErrMismatch, k.kmsRefused, "a wrapped key does not fit its place"},

		// The store and the view.
		{journal.ErrFull, k.storeFull, "nothing more is accepted until an operator makes room"},
		{journal.ErrUnavailable, k.storeUnavailable, "the journal did not answer; the events may or may not have been stored: send them again with the same ids"},
		{projections.ErrRebuilding, k.viewBehind, "the view is being rebuilt"},
		{projections.ErrUnavailable, k.storeUnavailable, "the view store cannot be read"},
		{projections.ErrLocked, k.storeUnavailable, "the view store is in use by another process"},
		{projections.ErrUnknown, k.internal, "the server has failed"},
		{history.ErrTrimmed, k.cursorExpired, "what follows the cursor has expired and is not kept any more; begin again after oldest_position"},
		{journal.ErrAuditChain, k.storeInconsistent, "the audit log does not verify"},
		{kms.ErrLastWrap, k.exists, "it is the last wrap of the key; without it nothing could be opened"},
		{kms.ErrRowNotFound, k.storeUnavailable, "a row of the registry is missing"},
		{kms.ErrRowConflict, k.storeUnavailable, "a row was changed by another at the same time"},
		{kms.ErrClosed, k.storeUnavailable, "the server is shutting down"},
		{kms.ErrInput, k.internal, "the server has failed"},
	}
}

// problemOf turns any error into a problem. What it does not know is an
// internal error whose text stays in the log.
func (s *Server) problemOf(err error) *problem {
	if p, ok := errors.AsType[*problem](err); ok {
		return p
	}
	p := s.kinds.internal.problem("the server has failed; the log of the region has the reason")
	for _, m := range s.errors {
		if !errors.Is(err, m.err) {
			continue
		}
		detail := m.detail
		if detail == "" {
			detail = err.Error()
		}
		p = m.kind.problem(detail)
		break
	}
	if input, ok := errors.AsType[*journal.InputError](err); ok {
		p.Errors = []inputError{{Pointer: input.Pointer, Detail: input.Detail}}
	}
	withSetting(p, err)
	p.cause = err
	return p
}

func (s *Server) invalidParameter(name, detail string) *problem {
	p := s.kinds.invalidRequest.problem("the parameter " + name + " is not valid: " + detail)
	p.Errors = []inputError{{Parameter: name, Detail: detail}}
	return p
}

func (s *Server) invalidHeader(k kind, name, detail string) *problem {
	p := k.problem(detail)
	p.Errors = []inputError{{Header: name, Detail: detail}}
	return p
}

func (s *Server) invalidBody(pointer, detail string) *problem {
	p := s.kinds.invalidRequest.problem(detail)
	p.Errors = []inputError{{Pointer: pointer, Detail: detail}}
	return p
}

func writeProblem(w http.ResponseWriter, p *problem) {
	h := w.Header()
	h.Set("Content-Type", "application/problem+json")
	h.Set("Cache-Control", "no-store")
	if p.allow != "" {
		h.Set("Allow", p.allow)
	}
	if p.retryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(p.retryAfter))
	}
	if p.Status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", `Bearer realm="coffer"`)
	}
	body, err := json.Marshal(p, json.Deterministic(true))
	if err != nil {
		// Every member is a string, number or bool of our own making.
		body = []byte(`{"type":"` + problemPrefix + `internal","status":500,"retryable":false}`)
	}
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(p.Status)
	_, _ = w.Write(body)
}
