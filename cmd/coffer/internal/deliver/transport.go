package deliver

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/egress"
	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/journal"
)

// TransportOptions is what an [HTTP] transport may do.
type TransportOptions struct {
	// Dialer judges where connections may go; required, with its policy.
	Dialer *egress.Dialer
	// Roots are the certificates that are trusted; nil means the system's.
	Roots *x509.CertPool
	// Timeout bounds an attempt; 0 means 20 seconds.
	Timeout time.Duration
}

// HTTP sends requests over HTTPS, each endpoint over connections of its own.
type HTTP struct {
	options TransportOptions

	mu      sync.Mutex // guards clients
	clients map[journal.EndpointID]*client
}

type client struct {
	revision uint64
	http     *http.Transport
}

// NewHTTP returns a transport.
func NewHTTP(o TransportOptions) *HTTP {
	if o.Timeout <= 0 {
		o.Timeout = 20 * time.Second
	}
	return &HTTP{options: o, clients: make(map[journal.EndpointID]*client)}
}

// Check is part of [Transport].
func (t *HTTP) Check(url string) error {
	_, err := t.options.Dialer.Policy.CheckURL(url)
	return err
}

// Send is part of [Transport].
func (t *HTTP) Send(ctx context.Context, r *Request) Answer {
	ctx, cancel := context.WithTimeout(ctx, t.options.Timeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, r.Endpoint.URL, io.NopCloser(bytes.NewReader(r.Body)))
	if err != nil {
		return Answer{Cause: journal.CauseConnect, Err: errors.New("the URL cannot be used")}
	}
	request.ContentLength = int64(len(r.Body))
	request.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(r.Body)), nil }
	request.Header = r.Header
	transport, err := t.client(r.Endpoint)
	if err != nil {
		return Answer{Cause: journal.CauseConnect, Err: err}
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		return failed(ctx, err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, MaxAnswer))
	if err != nil && response.StatusCode/100 == 2 {
		return failed(ctx, err) // an acknowledgement that was cut is none
	}
	return Answer{Status: response.StatusCode, RetryAfter: retryAfter(response.Header.Get("Retry-After")), Body: body}
}

func failed(ctx context.Context, err error) Answer {
	var timeout net.Error
	switch {
	case errors.Is(err, egress.ErrForbidden):
		return Answer{Cause: journal.CauseAddress, Err: err}
	case ctx.Err() != nil, errors.As(err, &timeout) && timeout.Timeout():
		return Answer{Cause: journal.CauseTimeout, Err: errors.New("no answer in time")}
	}
	return Answer{Cause: journal.CauseConnect, Err: err}
}

// retryAfter reads the header in either of its forms.
func retryAfter(text string) time.Duration {
	if seconds, err := strconv.ParseUint(text, 10, 31); err == nil {
		return time.Duration(seconds) * time.Second
	}
	if at, err := http.ParseTime(text); err == nil {
		return max(time.Until(at), 0)
	}
	return 0
}

// Forget is part of [Transport].
func (t *HTTP) Forget(id journal.EndpointID) {
	t.mu.Lock()
	c := t.clients[id]
	delete(t.clients, id)
	t.mu.Unlock()
	if c != nil {
		c.http.CloseIdleConnections()
	}
}

// Close closes the connections that nobody uses, and the others when they are
// left.
func (t *HTTP) Close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, c := range t.clients {
		c.http.CloseIdleConnections()
	}
}

func (t *HTTP) client(e *endpoints.Endpoint) (*http.Transport, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c := t.clients[e.ID]; c != nil {
		if c.revision == e.Revision() {
			return c.http, nil
		}
		c.http.CloseIdleConnections()
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: t.options.Roots}
	if e.Certificate != "" {
		pair, err := tls.X509KeyPair([]byte(e.Certificate), []byte(e.CertificateKey))
		if err != nil {
			return nil, errors.New("the client certificate cannot be used")
		}
		config.Certificates = []tls.Certificate{pair}
	}
	c := &client{revision: e.Revision(), http: &http.Transport{
		DialContext: t.options.Dialer.DialContext, TLSClientConfig: config, ForceAttemptHTTP2: true,
		MaxIdleConnsPerHost: endpoints.MaxConcurrency, IdleConnTimeout: 30 * time.Second, TLSHandshakeTimeout: 10 * time.Second,
		ResponseHeaderTimeout: t.options.Timeout, MaxResponseHeaderBytes: 32 << 10, DisableCompression: true,
	}}
	t.clients[e.ID] = c
	return c.http, nil
}
