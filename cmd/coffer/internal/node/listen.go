package node

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/server"
)

const (
	maxHeaderBytes = 32 << 10
	headerTimeout  = 10 * time.Second
	idleTimeout    = 2 * time.Minute
)

func scheme(r config.Region) string {
	if r.Plaintext {
		return "http://"
	}
	return "https://"
}

// listen opens the region's address for a limited number of connections. What
// is over the limit waits in the kernel's queue and costs nothing here.
func listen(ctx context.Context, address string, connections int) (net.Listener, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listening: %w", err)
	}
	return server.Gather(&limited{Listener: l, slots: make(chan struct{}, connections), done: make(chan struct{})}), nil
}

type limited struct {
	net.Listener

	slots chan struct{}
	done  chan struct{}
	once  sync.Once
}

func (l *limited) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.done:
		return nil, net.ErrClosed
	}
	conn, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	return &limitedConn{Conn: conn, release: sync.OnceFunc(func() { <-l.slots })}, nil
}

func (l *limited) Close() error {
	l.once.Do(func() { close(l.done) })
	return l.Listener.Close()
}

type limitedConn struct {
	net.Conn

	release func()
}

func (c *limitedConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}

// prepareHTTP makes the HTTP server; its handler is set when the region runs.
func (r *region) prepareHTTP() error {
	limits := r.options.config.Limits
	r.http = &http.Server{
		ReadHeaderTimeout: orDefault(time.Duration(limits.HeaderTimeout), headerTimeout),
		IdleTimeout:       orDefault(time.Duration(limits.IdleTimeout), idleTimeout),
		MaxHeaderBytes:    maxHeaderBytes,
		// Bodies and answers have deadlines of their own, by route: a replay may
		// take hours and a header may not.
		ErrorLog:    log.New(&httpLog{r.log}, "", 0),
		ConnContext: server.GatherContext,
	}
	if r.config.Plaintext {
		return nil
	}
	certificates, err := newCertificates(r.config.TLS.CertFile, r.config.TLS.KeyFile, r.log)
	if err != nil {
		return err
	}
	r.http.TLSConfig = tlsConfig(certificates)
	return nil
}

func orDefault(v, d time.Duration) time.Duration {
	if v <= 0 {
		return d
	}
	return v
}

func (r *region) serve() error {
	if r.config.Plaintext {
		return r.http.Serve(r.listener)
	}
	return r.http.ServeTLS(r.listener, "", "")
}

// tlsConfig is TLS 1.3, and 1.2 with forward secrecy and authenticated
// encryption only.
func tlsConfig(c *certificates) *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS12,
		GetCertificate: c.current,
		CipherSuites: []uint16{ // of TLS 1.2; those of 1.3 are not chosen
			tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
			tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
			tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
			tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
			tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
			tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
		},
	}
}

// httpLog receives what net/http has to say. Its texts hold callers' addresses,
// so they are for debugging only.
type httpLog struct{ log *slog.Logger }

func (l *httpLog) Write(b []byte) (int, error) {
	l.log.Debug("http server", "text", string(b))
	return len(b), nil
}

// certificates is a certificate read from files, and read again when they
// change, so that a renewal needs no restart.
type certificates struct {
	certFile, keyFile string
	log               *slog.Logger

	mu      sync.Mutex // guards what follows
	checked time.Time
	stamp   string
	now     *tls.Certificate
}

// certificatesEvery is how often the files are looked at, at most.
const certificatesEvery = 10 * time.Second

func newCertificates(certFile, keyFile string, log *slog.Logger) (*certificates, error) {
	c := &certificates{certFile: certFile, keyFile: keyFile, log: log}
	if err := c.load(); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *certificates) current(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.checked) > certificatesEvery {
		if err := c.load(); err != nil {
			// The one in memory still serves.
			c.log.Error("the TLS certificate cannot be read again", "err", err)
		}
	}
	if c.now == nil {
		return nil, errors.New("no TLS certificate")
	}
	return c.now, nil
}

// load is called with mu held, or before c is shared.
func (c *certificates) load() error {
	c.checked = time.Now()
	stamp, err := fileStamp(c.certFile, c.keyFile)
	if err != nil {
		return fmt.Errorf("reading the TLS certificate: %w", err)
	}
	if c.now != nil && stamp == c.stamp {
		return nil
	}
	pair, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		// The error of a PEM block does not quote it.
		return fmt.Errorf("reading the TLS certificate: %w", err)
	}
	c.now, c.stamp = &pair, stamp
	return nil
}
