package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/server"
)

// compat is a region's second listener, in the form of another service.
type compat struct {
	listener net.Listener
	http     *http.Server
	url      string
}

// address is where the listener's callers reach it; empty without one.
func (c *compat) address() string {
	if c == nil {
		return ""
	}
	return c.url
}

// listenCompat opens the address of the compatibility listener, if the region has
// one.
func (r *region) listenCompat(ctx context.Context, connections int) error {
	if r.config.Compat.Listen == "" {
		return nil
	}
	l, err := listen(ctx, r.config.Compat.Listen, connections)
	if err != nil {
		return fmt.Errorf("compat: %w", err)
	}
	r.compat = &compat{listener: l, url: r.config.Compat.URL}
	if r.compat.url == "" {
		if at, ok := l.Addr().(*net.TCPAddr); ok && !at.IP.IsUnspecified() {
			r.compat.url = scheme(r.config) + l.Addr().String()
		}
	}
	return nil
}

// serveCompat serves until closeCompat. When it fails the region stays: its own
// interface is the one that counts.
func (r *region) serveCompat() {
	if r.compat == nil {
		return
	}
	var err error
	if r.config.Plaintext {
		err = r.compat.http.Serve(r.compat.listener)
	} else {
		err = r.compat.http.ServeTLS(r.compat.listener, "", "")
	}
	if !errors.Is(err, http.ErrServerClosed) {
		r.log.Error("the compatibility listener has ended", "err", err)
	}
}

// prepareCompat makes the HTTP server, with the settings of the region's own.
func (r *region) prepareCompat() {
	if r.compat == nil {
		return
	}
	r.compat.http = &http.Server{
		ReadHeaderTimeout: r.http.ReadHeaderTimeout, IdleTimeout: r.http.IdleTimeout, MaxHeaderBytes: r.http.MaxHeaderBytes,
		ErrorLog: r.http.ErrorLog, ConnContext: r.http.ConnContext, TLSConfig: r.http.TLSConfig.Clone(),
		Handler: r.server.Compat(server.CompatOptions{
			URL: r.compat.url, Apps: r.config.Compat.Table(), RecallWindow: time.Duration(r.config.Compat.RecallWindow),
		}),
	}
}

// closeCompat stops taking requests and lets those under way finish.
func (r *region) closeCompat(ctx context.Context) error {
	if r.compat == nil {
		return nil
	}
	if r.compat.http != nil {
		if err := r.compat.http.Shutdown(ctx); err != nil {
			return errors.Join(fmt.Errorf("requests were cut: %w", err), r.compat.http.Close())
		}
	}
	_ = r.compat.listener.Close() // closed already when it was served
	return nil
}
