// Package bounded is the HTTP transport of the key providers: an answer may have
// only so many bytes, a redirect is an error, and requests end with the provider
// that made them, also those which a client library makes without a context.
package bounded

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"time"
)

// Failures of a Transport. Treat both as an answer that cannot be used.
var (
	// ErrTooLarge: the body had more bytes than allowed.
	ErrTooLarge = errors.New("answer larger than allowed")
	// ErrRedirect: following it would carry credentials to another address.
	ErrRedirect = errors.New("answer is a redirect")
)

// connectTimeout bounds dialling, and the TLS handshake after it.
const connectTimeout = 5 * time.Second

// Transport is an http.RoundTripper.
type Transport struct {
	base *http.Transport
	life context.Context //nolint:containedctx // of the provider
	end  context.CancelFunc
	max  int
}

// New returns a transport for answers of at most maxBytes each.
func New(conf *tls.Config, maxBytes int) *Transport {
	life, end := context.WithCancel(context.Background())
	dialer := &net.Dialer{Timeout: connectTimeout, KeepAlive: 30 * time.Second}
	return &Transport{life: life, end: end, max: maxBytes, base: &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            dialer.DialContext,
		TLSClientConfig:        conf,
		TLSHandshakeTimeout:    connectTimeout,
		ForceAttemptHTTP2:      true,
		MaxIdleConns:           64,
		MaxIdleConnsPerHost:    64,
		IdleConnTimeout:        90 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
	}}
}

// Client is an HTTP client that follows no redirect.
func (t *Transport) Client() *http.Client {
	return &http.Client{
		Transport:     t,
		CheckRedirect: func(*http.Request, []*http.Request) error { return ErrRedirect },
	}
}

// Close ends the requests under way, and every later one.
func (t *Transport) Close() {
	t.end()
	t.base.CloseIdleConnections()
}

// RoundTrip implements http.RoundTripper.
func (t *Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancel(r.Context())
	stop := context.AfterFunc(t.life, cancel) //nolint:contextcheck // a second reason to end
	end := func() { stop(); cancel() }
	resp, err := t.base.RoundTrip(r.WithContext(ctx))
	if err != nil {
		end()
		return nil, err
	}
	if resp.StatusCode >= 300 && resp.StatusCode < 400 {
		_ = resp.Body.Close()
		end()
		return nil, ErrRedirect
	}
	resp.Body = &body{ReadCloser: resp.Body, left: t.max, end: end}
	return resp, nil
}

type body struct {
	io.ReadCloser
	left int
	end  func()
}

func (b *body) Read(p []byte) (int, error) {
	if b.left < 0 {
		return 0, ErrTooLarge
	}
	if len(p) > b.left+1 {
		p = p[:b.left+1]
	}
	n, err := b.ReadCloser.Read(p)
	if b.left -= n; b.left < 0 {
		return n - 1, ErrTooLarge
	}
	return n, err
}

func (b *body) Close() error {
	defer b.end()
	return b.ReadCloser.Close()
}
