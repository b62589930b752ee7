package config

import (
	"crypto/x509"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
)

// Callbacks says where requests to webhook endpoints may go, and how.
type Callbacks struct {
	// Allow lists networks that may be called although they are not public,
	// "10.1.0.0/16"; none by default.
	Allow []string `toml:"allow"`
	// Ports may be called besides 443.
	Ports []uint16 `toml:"ports"`
	// ProxyFile holds the URL of an HTTP proxy that requests go through, by
	// CONNECT; mode 0600, because it may have a password in it.
	ProxyFile string `toml:"proxy_file"`
	// CAFile has certificates, PEM, that are trusted besides the system's.
	CAFile string `toml:"ca_file"`
	// Timeout bounds an attempt; default 20s, from 1s to 30s.
	Timeout Duration `toml:"timeout"`
	// PresendTimeout is the longest time that an app may have a question before a
	// message is stored take; default 200ms, from 10ms to 30s.
	PresendTimeout Duration `toml:"presend_timeout"`
}

const (
	minCallbackTimeout = time.Second
	maxCallbackTimeout = 30 * time.Second
	minPresendTimeout  = 10 * time.Millisecond
)

func (c Callbacks) check() error {
	if _, err := c.Networks(); err != nil {
		return err
	}
	if t := time.Duration(c.Timeout); t != 0 && (t < minCallbackTimeout || t > maxCallbackTimeout) {
		return fmt.Errorf("%w: callbacks.timeout is %s to %s", ErrInvalid, minCallbackTimeout, maxCallbackTimeout)
	}
	if t := time.Duration(c.PresendTimeout); t != 0 && (t < minPresendTimeout || t > maxCallbackTimeout) {
		return fmt.Errorf("%w: callbacks.presend_timeout is %s to %s", ErrInvalid, minPresendTimeout, maxCallbackTimeout)
	}
	if _, err := c.Proxy(); err != nil {
		return err
	}
	_, err := c.Roots()
	return err
}

// Networks parses Allow.
func (c Callbacks) Networks() ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, text := range c.Allow {
		network, err := netip.ParsePrefix(text)
		if err != nil || network != network.Masked() {
			return nil, fmt.Errorf("%w: callbacks.allow: %q is not a network such as 10.1.0.0/16", ErrInvalid, text)
		}
		out = append(out, network)
	}
	return out, nil
}

// Proxy reads ProxyFile; nil without one.
func (c Callbacks) Proxy() (*url.URL, error) {
	if c.ProxyFile == "" {
		return nil, nil //nolint:nilnil // no proxy
	}
	if err := auth.CheckSecretFile(c.ProxyFile); err != nil {
		return nil, fmt.Errorf("%w: callbacks.proxy_file: %w", ErrInvalid, err)
	}
	text, err := os.ReadFile(c.ProxyFile)
	if err != nil {
		return nil, fmt.Errorf("%w: callbacks.proxy_file: %w", ErrInvalid, err)
	}
	u, err := url.Parse(trimLine(text))
	if err != nil || u.Scheme != "http" || u.Port() == "" || u.Hostname() == "" || (u.Path != "" && u.Path != "/") || u.RawQuery != "" {
		return nil, fmt.Errorf("%w: callbacks.proxy_file holds http://[USER:PASSWORD@]HOST:PORT", ErrInvalid)
	}
	return u, nil
}

// trimLine returns the text without the line feed at its end.
func trimLine(text []byte) string {
	if n := len(text); n > 0 && text[n-1] == '\n' {
		text = text[:n-1]
	}
	return string(text)
}

// Roots returns the trusted certificates; nil stands for the system's.
func (c Callbacks) Roots() (*x509.CertPool, error) {
	if c.CAFile == "" {
		return nil, nil //nolint:nilnil // the system's
	}
	text, err := os.ReadFile(c.CAFile)
	if err != nil {
		return nil, fmt.Errorf("%w: callbacks.ca_file: %w", ErrInvalid, err)
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	if !pool.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("%w: callbacks.ca_file has no certificate", ErrInvalid)
	}
	return pool, nil
}
