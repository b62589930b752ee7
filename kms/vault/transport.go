package vault

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"github.com/hashicorp/vault/api"
)

// maxAnswer bounds what an answer may put into memory: 500 rewrapped keys have
// about 100 KB.
const maxAnswer = 4 << 20

var (
	errTooLarge = errors.New("answer of more than 4 MiB")
	errRedirect = errors.New("answer is a redirect")
)

// transport is the way to Vault: it bounds answers, follows no redirect, and
// ends with the provider what the client's renewals do without a context.
type transport struct {
	base *http.Transport
	life context.Context //nolint:containedctx // the provider's own lifetime
}

func newTransport(life context.Context, t TLS) (*transport, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: t.ServerName}
	if t.CAFile != "" {
		pem, err := os.ReadFile(t.CAFile)
		if err != nil {
			return nil, fmt.Errorf("reading ca_file: %w", err)
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, errors.New("reading ca_file: no certificate in it")
		}
	}
	if t.CertFile != "" {
		load := func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(t.CertFile, t.KeyFile)
			return &pair, err
		}
		if _, err := load(nil); err != nil {
			return nil, fmt.Errorf("reading cert_file and key_file: %w", err)
		}
		conf.GetClientCertificate = load
	}
	return &transport{life: life, base: &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           newDialer().DialContext,
		TLSClientConfig:       conf,
		TLSHandshakeTimeout:   dialTimeout,
		ForceAttemptHTTP2:     true,
		MaxIdleConns:          32,
		MaxIdleConnsPerHost:   32,
		IdleConnTimeout:       90 * time.Second,
		ExpectContinueTimeout: time.Second,
		// Headers of an answer; the body has its own bound.
		MaxResponseHeaderBytes: 64 << 10,
	}}, nil
}

// RoundTrip implements http.RoundTripper.
func (t *transport) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancel(r.Context())
	stop := context.AfterFunc(t.life, cancel)
	end := func() { stop(); cancel() }
	resp, err := t.base.RoundTrip(r.WithContext(ctx))
	if err != nil {
		end()
		return nil, err
	}
	// The client takes an unfollowed redirect for success.
	if resp.StatusCode >= 300 && resp.StatusCode < 400 {
		_ = resp.Body.Close()
		end()
		return nil, errRedirect
	}
	resp.Body = &boundedBody{ReadCloser: resp.Body, left: maxAnswer, end: end}
	return resp, nil
}

type boundedBody struct {
	io.ReadCloser
	left int
	end  func()
}

func (b *boundedBody) Read(p []byte) (int, error) {
	if b.left < 0 {
		return 0, errTooLarge
	}
	if len(p) > b.left+1 {
		p = p[:b.left+1]
	}
	n, err := b.ReadCloser.Read(p)
	b.left -= n
	if b.left < 0 {
		return n, errTooLarge
	}
	return n, err
}

func (b *boundedBody) Close() error {
	defer b.end()
	return b.ReadCloser.Close()
}

// connector makes clients of one address that differ in their token. The
// client library reads VAULT_TOKEN, VAULT_NAMESPACE and VAULT_HEADERS by
// itself; what it found there is put aside.
//
// They have no timeout of their own: with one the library's raw calls end their
// context as they return, and the rest of a longer answer cannot be read.
func connector(address, namespace string, t *transport) func(token string) (*api.Client, error) {
	return func(token string) (*api.Client, error) {
		c, err := api.NewClient(&api.Config{
			Address:          address,
			HttpClient:       &http.Client{Transport: t, CheckRedirect: refuseRedirect},
			MaxRetries:       0,
			DisableRedirects: true,
		})
		if err != nil {
			return nil, fmt.Errorf("making the client: %w", err)
		}
		c.SetHeaders(http.Header{api.RequestHeaderName: {"true"}})
		if namespace != "" {
			c.SetNamespace(namespace)
		}
		c.ClearToken()
		if token != "" {
			c.SetToken(token)
		}
		return c, nil
	}
}

func refuseRedirect(*http.Request, []*http.Request) error { return errRedirect }
