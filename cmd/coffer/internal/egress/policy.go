package egress

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"code.dny.dev/ssrf"
)

// ErrForbidden means that a URL or an address is one that must not be called.
// The owner of the endpoint has to give another; an operator may allow a
// network.
var ErrForbidden = errors.New("egress: forbidden destination")

// maxURL is the length of a URL in bytes, at most.
const maxURL = 2048

// azureWire is the one metadata service with an address from the public range.
const azureWire = "168.63.129.16/32"

// Policy says which destinations may be called. The zero value allows the
// public internet on port 443.
type Policy struct {
	// Allow are networks that may be called although they are not public.
	Allow []netip.Prefix
	// Ports may be called besides 443 at public addresses.
	Ports []uint16

	guard *ssrf.Guardian
}

// NewPolicy returns a policy with the networks and ports.
func NewPolicy(allow []netip.Prefix, ports ...uint16) *Policy {
	return &Policy{Allow: allow, Ports: ports, guard: ssrf.New(
		ssrf.WithPorts(append([]uint16{443}, ports...)...),
		ssrf.WithDeniedV4Prefixes(netip.MustParsePrefix(azureWire)),
	)}
}

// CheckURL judges a URL by its text alone: https, a host, no user information,
// no fragment, and a host that is a name or an address in its one usual form.
// Names are resolved when they are dialled.
func (p *Policy) CheckURL(raw string) (*url.URL, error) {
	if len(raw) > maxURL {
		return nil, fmt.Errorf("%w: a URL has at most %d bytes", ErrForbidden, maxURL)
	}
	for i := range len(raw) {
		if raw[i] <= ' ' || raw[i] >= 0x7f {
			return nil, fmt.Errorf("%w: a URL is visible ASCII; others are percent-encoded", ErrForbidden)
		}
	}
	u, err := url.Parse(raw)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: not a URL", ErrForbidden)
	case u.Scheme != "https":
		return nil, fmt.Errorf("%w: the scheme is https", ErrForbidden)
	case u.User != nil:
		return nil, fmt.Errorf("%w: a URL has no user name or password; use a header", ErrForbidden)
	case u.Fragment != "" || strings.Contains(raw, "#"):
		return nil, fmt.Errorf("%w: a URL has no fragment", ErrForbidden)
	case u.Opaque != "" || u.Hostname() == "":
		return nil, fmt.Errorf("%w: a URL has a host", ErrForbidden)
	}
	port := uint64(443)
	if text := u.Port(); text != "" || strings.HasSuffix(u.Host, ":") {
		if port, err = strconv.ParseUint(text, 10, 16); err != nil || port == 0 {
			return nil, fmt.Errorf("%w: the port is a number from 1 to 65535", ErrForbidden)
		}
	}
	return u, p.checkHost(u.Hostname(), uint16(port))
}

func (p *Policy) checkHost(host string, port uint16) error {
	if address, err := netip.ParseAddr(host); err == nil {
		if address.Zone() != "" {
			return fmt.Errorf("%w: an address has no zone", ErrForbidden)
		}
		return p.CheckAddress(netip.AddrPortFrom(address, port))
	}
	if strings.Contains(host, ":") {
		return fmt.Errorf("%w: not an address", ErrForbidden)
	}
	labels := strings.Split(strings.TrimSuffix(host, "."), ".")
	for _, label := range labels {
		if !isLabel(label) {
			return fmt.Errorf("%w: the host is not a name", ErrForbidden)
		}
	}
	// Resolvers of the C library read 2130706433, 0x7f.1 and 127.1 as addresses.
	last := labels[len(labels)-1]
	if len(host) > 253 || strings.Trim(last, "0123456789") == "" || strings.HasPrefix(strings.ToLower(last), "0x") {
		return fmt.Errorf("%w: the host is neither a name nor an address in its usual form", ErrForbidden)
	}
	if strings.EqualFold(last, "localhost") && !p.allows(netip.MustParseAddr("127.0.0.1")) {
		return fmt.Errorf("%w: the host is this machine", ErrForbidden)
	}
	return nil
}

// isLabel reports whether s is a label of a host name (RFC 1123), or one with
// the underscores that some of them have.
func isLabel(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_':
		default:
			return false
		}
	}
	return true
}

// CheckAddress judges an address that is about to be dialled.
func (p *Policy) CheckAddress(a netip.AddrPort) error {
	address := a.Addr().Unmap()
	if p.allows(address) {
		return nil
	}
	if err := p.guardian().SafeAddrPort(netip.AddrPortFrom(address, a.Port())); err != nil {
		if errors.Is(err, ssrf.ErrProhibitedPort) {
			return fmt.Errorf("%w: port %d", ErrForbidden, a.Port())
		}
		return fmt.Errorf("%w: %s is not a public address", ErrForbidden, address)
	}
	return nil
}

func (p *Policy) allows(a netip.Addr) bool {
	return slices.ContainsFunc(p.Allow, func(network netip.Prefix) bool { return network.Contains(a) })
}

func (p *Policy) guardian() *ssrf.Guardian {
	if p.guard == nil {
		return NewPolicy(p.Allow, p.Ports...).guard
	}
	return p.guard
}
