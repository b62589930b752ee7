package client

import (
	"cmp"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
)

var (
	// ErrInvalid means that the server refused the request or an event as it
	// stands; [Problem.Errors] says where. Correct it before sending it again.
	ErrInvalid = errors.New("refused as invalid")
	// ErrUnauthorized means that the token is missing, wrong or expired. Get a
	// new one from the app's backend.
	ErrUnauthorized = errors.New("not authorized")
	// ErrForbidden means that the token is genuine and does not allow this.
	ErrForbidden = errors.New("not allowed")
	// ErrNotFound means that there is no such thing, or that it belongs to
	// somebody else.
	ErrNotFound = errors.New("not found")
	// ErrConflict means that the id is taken by something else. Give the new
	// event an id of its own.
	ErrConflict = errors.New("conflict")
	// ErrExpired means that what was asked for, or sent, is older than the app's
	// plan keeps; [Problem.OldestAvailable] says what there is, where known.
	ErrExpired = errors.New("older than is kept")
	// ErrUnavailable means that the server, its store or its key service does
	// not answer now. What was sent may or may not have been done: repeat it
	// later, with the same ids.
	ErrUnavailable = errors.New("unavailable")
	// ErrFailed means that the server has failed or found its data damaged.
	// Repeating does not help; its operator has to look.
	ErrFailed = errors.New("the server has failed")
	// ErrProtocol means that what answered does not speak this protocol: check
	// the URL, and that client and server are of the same release.
	ErrProtocol = errors.New("unexpected answer")
)

// Problem is an error as the server describes it (RFC 9457).
type Problem struct {
	Type      string       `json:"type"`
	Title     string       `json:"title"`
	Status    int          `json:"status"`
	Detail    string       `json:"detail"`
	Instance  string       `json:"instance"`
	Retryable bool         `json:"retryable"`
	Errors    []InputError `json:"errors"`
	// OldestAvailable is set where something was older than is kept.
	OldestAvailable time.Time `json:"oldest_available"`
	// Needed counts what still needs a key that was to be retired, and Uses
	// names some of it.
	Needed int      `json:"needed"`
	Uses   []KeyUse `json:"uses"`

	// RetryAfter is what the Retry-After header asked for; 0 without one.
	RetryAfter time.Duration `json:"-"`
}

// InputError points at what is wrong with an input: a place in the body, or a
// parameter, or a header.
type InputError struct {
	Pointer   string `json:"pointer"` // a JSON pointer
	Parameter string `json:"parameter"`
	Header    string `json:"header"`
	Detail    string `json:"detail"`
}

func (e InputError) where() string {
	return cmp.Or(e.Pointer, e.Parameter, e.Header)
}

// Code is the last part of the problem's type: "cursor-mismatch".
func (p *Problem) Code() string {
	return p.Type[strings.LastIndexAny(p.Type, "/:#")+1:]
}

func (p *Problem) Error() string {
	code := p.Code()
	if code == "" || code == "blank" {
		code = "HTTP " + strconv.Itoa(p.Status)
	}
	text := cmp.Or(p.Detail, p.Title)
	for i, e := range p.Errors {
		if i == 3 {
			text += "; and " + strconv.Itoa(len(p.Errors)-i) + " more"
			break
		}
		if strings.Contains(text, e.Detail) && strings.Contains(text, e.where()) {
			continue
		}
		text = join(text, join(e.where(), e.Detail, ": "), "; ")
	}
	return join(code, text, ": ")
}

func join(a, b, separator string) string {
	if a == "" || b == "" {
		return a + b
	}
	return a + separator + b
}

// Is makes errors.Is find the class of the problem.
func (p *Problem) Is(target error) bool {
	class := p.class()
	return class != nil && target == class //nolint:errorlint // the sentinels themselves are compared
}

func (p *Problem) class() error {
	// The code first: 422 is used for more than one thing.
	switch p.Code() {
	case "retention-expired", "cursor-expired", "erased":
		return ErrExpired
	}
	switch p.Status {
	case http.StatusUnauthorized:
		return ErrUnauthorized
	case http.StatusForbidden, http.StatusMisdirectedRequest:
		return ErrForbidden
	case http.StatusNotFound:
		return ErrNotFound
	case http.StatusConflict:
		return ErrConflict
	case http.StatusGone:
		return ErrExpired
	case http.StatusTooManyRequests, http.StatusInsufficientStorage:
		return ErrUnavailable
	}
	switch {
	case p.Status == http.StatusInternalServerError, p.Status == http.StatusNotImplemented, p.Code() == "store-inconsistent":
		return ErrFailed
	case p.Status >= 500:
		return ErrUnavailable
	case p.Status >= 400:
		return ErrInvalid
	}
	return nil
}

// transient reports whether repeating may help.
func (p *Problem) transient() bool {
	if p.Retryable {
		return true
	}
	// Without a code it is a proxy that speaks.
	return p.Code() == "" && (p.Status == http.StatusTooManyRequests || p.Status == http.StatusBadGateway ||
		p.Status == http.StatusServiceUnavailable || p.Status == http.StatusGatewayTimeout)
}

// maxProblem bounds what is read of an error's body.
const maxProblem = 64 << 10

// readProblem makes a Problem of an answer that is no success.
func readProblem(resp *http.Response) *Problem {
	p := &Problem{}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxProblem))
	if err != nil || !strings.Contains(resp.Header.Get("Content-Type"), "json") || json.Unmarshal(body, p) != nil {
		// A proxy's page, or something that is no Coffer at all. Its text is not
		// repeated: it may be anything.
		p = &Problem{Title: http.StatusText(resp.StatusCode)}
	}
	p.Status = resp.StatusCode
	if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && s >= 0 {
		p.RetryAfter = time.Duration(min(s, 3600)) * time.Second
	}
	return p
}
