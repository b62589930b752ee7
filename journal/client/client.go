package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/cofferdb/coffer/journal"
)

const (
	defaultRetryFor = 30 * time.Second
	attemptTimeout  = 60 * time.Second
	firstPause      = 100 * time.Millisecond
	longestPause    = 5 * time.Second
)

// TokenSource gives the bearer token of a request. It is called for every
// request, so it may renew the token; it must be safe for concurrent use.
type TokenSource func(ctx context.Context) (string, error)

// StaticToken is a token that never changes.
func StaticToken(token string) TokenSource {
	return func(context.Context) (string, error) { return token, nil }
}

// Config says which server to speak to, and as whom. Its zero value lacks URL.
type Config struct {
	// URL of the region's server: scheme, host and port. http is accepted for
	// loopback addresses only.
	URL string
	// App is the app whose events are meant. The zero App can be used for the
	// operator's calls only.
	App journal.AppID
	// Token authorizes the app's calls.
	Token TokenSource
	// OperatorToken authorizes the operator's calls.
	OperatorToken TokenSource
	// RootCAs verifies the server; nil means the system's roots.
	RootCAs *x509.CertPool
	// HTTP is used instead of an own http.Client when set; RootCAs is then
	// ignored.
	HTTP *http.Client
	// RetryFor is how long a call is repeated while the server is away or busy;
	// 0 means 30 s, a negative value never.
	RetryFor time.Duration
	// Unasked has events stored without the question that the app's presend
	// setting asks, as what is imported should be.
	Unasked bool
	// Log is told about repeated attempts; nil means nobody.
	Log *slog.Logger
}

// Client calls one server. It is safe for concurrent use.
type Client struct {
	base     string
	app      journal.AppID
	token    TokenSource
	operator TokenSource
	http     *http.Client
	retryFor time.Duration
	unasked  bool
	log      *slog.Logger
}

// New checks the configuration. It does not connect.
func New(cfg Config) (*Client, error) {
	base, err := checkURL(cfg.URL)
	if err != nil {
		return nil, err
	}
	c := &Client{
		base: base, app: cfg.App, token: cfg.Token, operator: cfg.OperatorToken,
		http: cfg.HTTP, retryFor: cfg.RetryFor, unasked: cfg.Unasked, log: cfg.Log,
	}
	if c.retryFor == 0 {
		c.retryFor = defaultRetryFor
	}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	if c.http == nil {
		c.http = &http.Client{
			Transport: &http.Transport{
				Proxy:                 http.ProxyFromEnvironment,
				DialContext:           (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
				TLSClientConfig:       &tls.Config{RootCAs: cfg.RootCAs, MinVersion: tls.VersionTLS12},
				TLSHandshakeTimeout:   10 * time.Second,
				ForceAttemptHTTP2:     true,
				MaxIdleConnsPerHost:   16,
				IdleConnTimeout:       90 * time.Second,
				ResponseHeaderTimeout: attemptTimeout,
			},
			// A redirect would carry the token to wherever the answer points.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}
	}
	return c, nil
}

// Close lets go of idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

func checkURL(s string) (string, error) {
	u, err := url.Parse(s)
	switch {
	case s == "":
		return "", errors.New("the server's URL is missing")
	case err != nil || u.Host == "":
		return "", errors.New("the server's URL must look like https://host:port")
	case u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.Trim(u.Path, "/") != "":
		return "", errors.New("the server's URL must have scheme, host and port only")
	case u.Scheme == "https":
	case u.Scheme == "http" && loopback(u.Hostname()):
	case u.Scheme == "http":
		return "", errors.New("the server's URL must be https: a token is not sent in the clear")
	default:
		return "", fmt.Errorf("the server's URL has the scheme %q, want https", u.Scheme)
	}
	return u.Scheme + "://" + u.Host, nil
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// request is one call, which may be attempted more than once.
type request struct {
	method   string
	path     string // below the base
	query    url.Values
	body     []byte
	mime     string // of the body
	accept   string
	operator bool

	lastEvent string // Last-Event-ID
	key       string // Idempotency-Key
	header    http.Header

	stream io.Reader // instead of body; good for one attempt
	size   int64     // of stream
}

// appPath is a path below the app.
func (c *Client) appPath(parts ...string) string {
	var b strings.Builder
	b.WriteString("/v1/apps/" + c.app.String())
	for _, p := range parts {
		b.WriteString("/" + url.PathEscape(p))
	}
	return b.String()
}

// send makes one attempt. An answer that is no success is a *Problem.
func (c *Client) send(ctx context.Context, r request) (*http.Response, error) {
	source := c.token
	if r.operator {
		source = c.operator
	} else if c.app.IsZero() {
		return nil, errors.New("no app is configured")
	}
	target := c.base + r.path
	if len(r.query) > 0 {
		target += "?" + r.query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, r.method, target, body(r.body))
	if err != nil {
		return nil, fmt.Errorf("building the request: %w", err)
	}
	if r.size > 0 {
		req.Body, req.ContentLength = io.NopCloser(r.stream), r.size
	}
	maps.Copy(req.Header, r.header)
	if source != nil {
		token, err := source(ctx)
		if err != nil {
			return nil, fmt.Errorf("getting a token: %w", err)
		}
		req.Header.Set("Authorization", "Bearer "+token)
	}
	if r.mime != "" {
		req.Header.Set("Content-Type", r.mime)
	}
	if r.lastEvent != "" {
		req.Header.Set("Last-Event-ID", r.lastEvent)
	}
	if r.key != "" {
		req.Header.Set("Idempotency-Key", r.key)
	}
	if r.accept != "" {
		req.Header.Set("Accept", r.accept)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, &connectionError{err: err}
	}
	if resp.StatusCode >= 200 && resp.StatusCode < 300 {
		return resp, nil
	}
	defer drain(resp)
	return nil, readProblem(resp)
}

func body(b []byte) io.Reader {
	if b == nil {
		return nil
	}
	// A strings or bytes reader lets net/http set the length and repeat the body.
	return strings.NewReader(string(b))
}

// drain reads a little of what is left, so that the connection can be used
// again, and closes it.
func drain(resp *http.Response) {
	_, _ = io.CopyN(io.Discard, resp.Body, 4096)
	_ = resp.Body.Close()
}

// connectionError is a failure below HTTP. It is of the class ErrUnavailable.
type connectionError struct{ err error }

func (e *connectionError) Error() string {
	if u := (*url.Error)(nil); errors.As(e.err, &u) {
		return u.Err.Error() // without the URL, whose query may name users
	}
	return e.err.Error()
}
func (e *connectionError) Unwrap() error        { return e.err }
func (e *connectionError) Is(target error) bool { return target == ErrUnavailable }

// permanent reports whether a connection error will not go away by waiting.
func (e *connectionError) permanent() bool {
	var cert *tls.CertificateVerificationError
	var host *net.DNSError
	var record tls.RecordHeaderError
	return errors.As(e.err, &cert) || errors.As(e.err, &record) || errors.As(e.err, &host) && host.IsNotFound
}

// transient reports whether repeating the call may help, and after which pause
// at the least.
func transient(err error) (time.Duration, bool) {
	if p := (*Problem)(nil); errors.As(err, &p) {
		return p.RetryAfter, p.transient()
	}
	if e := (*connectionError)(nil); errors.As(err, &e) {
		return 0, !e.permanent()
	}
	return 0, false
}

// patience measures how long a call has been failing.
type patience struct {
	limit time.Duration
	since time.Time // of the first failure in a row
	pause time.Duration
}

// wait pauses before the next attempt. It returns err when patience is at an
// end or err will not go away, and the context's cause when that ends.
func (p *patience) wait(ctx context.Context, log *slog.Logger, err error) error {
	after, ok := transient(err)
	if !ok || p.limit < 0 {
		return err
	}
	now := time.Now()
	if p.since.IsZero() {
		p.since, p.pause = now, firstPause
	}
	// Half of the pause is random, so that clients that failed together do not
	// come back together.
	pause := max(after, p.pause/2+rand.N(p.pause/2+1)) //nolint:gosec // not a secret
	p.pause = min(2*p.pause, longestPause)
	if now.Sub(p.since)+pause > p.limit {
		return err
	}
	log.DebugContext(ctx, "repeating a call", "pause", pause, "error", err)
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// reset is called when an attempt has brought something.
func (p *patience) reset() { *p = patience{limit: p.limit} }

// call repeats attempts of one exchange whose answer is read whole by read.
func (c *Client) call(ctx context.Context, r request, read func(*http.Response) error) error {
	p := patience{limit: c.retryFor}
	for {
		err := c.attempt(ctx, r, read)
		if err == nil {
			return nil
		}
		if err := p.wait(ctx, c.log, err); err != nil {
			return err
		}
	}
}

func (c *Client) attempt(ctx context.Context, r request, read func(*http.Response) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, attemptTimeout,
		&connectionError{err: fmt.Errorf("no answer within %s", attemptTimeout)})
	defer cancel()
	resp, err := c.send(ctx, r)
	if err != nil {
		return err
	}
	defer drain(resp)
	return read(resp)
}

// maxAnswer bounds an answer that is read whole.
const maxAnswer = 64 << 20

func readBody(resp *http.Response) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, &connectionError{err: fmt.Errorf("the answer was cut: %w", err)}
	}
	if len(b) > maxAnswer {
		return nil, fmt.Errorf("%w: over %d bytes", ErrProtocol, maxAnswer)
	}
	return b, nil
}
