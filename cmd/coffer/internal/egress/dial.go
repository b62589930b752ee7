package egress

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"time"
)

const (
	dialTimeout = 5 * time.Second // of one address
	maxAnswer   = 8 << 10         // bytes of a proxy's answer to CONNECT
	maxTried    = 4               // addresses of a name that are tried
)

// Resolver finds the addresses of a name; [net.Resolver] does.
type Resolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// Dialer opens connections to addresses that its policy allows. The zero value
// of every field but Policy is useful.
type Dialer struct {
	Policy *Policy
	// Proxy is an HTTP proxy through which connections go, by CONNECT to the
	// judged address: the proxy never resolves a name. User information in it
	// is sent as basic authentication.
	Proxy *url.URL
	// Resolver finds addresses; nil means the system's.
	Resolver Resolver
}

// DialContext resolves the host, judges every address of it, and connects to
// the first that answers. One forbidden address among several forbids the name.
func (d *Dialer) DialContext(ctx context.Context, _, address string) (net.Conn, error) {
	host, portText, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("%w: not a host and a port", ErrForbidden)
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("%w: not a port", ErrForbidden)
	}
	addresses, err := d.resolve(ctx, host)
	if err != nil {
		return nil, err
	}
	for _, a := range addresses {
		if err := d.Policy.CheckAddress(netip.AddrPortFrom(a, uint16(port))); err != nil {
			return nil, err
		}
	}
	var failures []error
	for _, a := range addresses[:min(len(addresses), maxTried)] {
		conn, err := d.connect(ctx, netip.AddrPortFrom(a.Unmap(), uint16(port)))
		if err == nil {
			return conn, nil
		}
		failures = append(failures, err)
	}
	return nil, errors.Join(failures...)
}

func (d *Dialer) resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{a}, nil
	}
	var r Resolver = net.DefaultResolver
	if d.Resolver != nil {
		r = d.Resolver
	}
	addresses, err := r.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, fmt.Errorf("egress: resolve %s: %w", host, err)
	}
	if len(addresses) == 0 {
		return nil, fmt.Errorf("egress: %s has no address", host)
	}
	return addresses, nil
}

func (d *Dialer) connect(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	var direct net.Dialer
	if d.Proxy == nil {
		return direct.DialContext(ctx, "tcp", to.String())
	}
	conn, err := direct.DialContext(ctx, "tcp", d.Proxy.Host)
	if err != nil {
		return nil, fmt.Errorf("egress: the proxy: %w", err)
	}
	if err := d.tunnel(ctx, conn, to); err != nil {
		return nil, errors.Join(fmt.Errorf("egress: the proxy: %w", err), conn.Close())
	}
	return conn, nil
}

// tunnel asks a proxy for a connection to an address (RFC 9110, 9.3.6).
func (d *Dialer) tunnel(ctx context.Context, conn net.Conn, to netip.AddrPort) error {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	request := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: to.String()}, Host: to.String(), Header: make(http.Header)}
	if user := d.Proxy.User; user != nil {
		password, _ := user.Password()
		request.Header.Set("Proxy-Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(user.Username()+":"+password)))
	}
	if err := request.Write(conn); err != nil {
		return err
	}
	head, err := readHead(conn)
	if err != nil {
		return err
	}
	response, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(head)), request)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("answered %d", response.StatusCode)
	}
	if !stop() {
		return ctx.Err()
	}
	return nil
}

// readHead reads the head of an answer and not a byte more: what follows it
// belongs to the connection inside.
func readHead(conn net.Conn) ([]byte, error) {
	var head []byte
	var one [1]byte
	for !bytes.HasSuffix(head, []byte("\r\n\r\n")) {
		if len(head) == maxAnswer {
			return nil, fmt.Errorf("its answer has more than %d bytes", maxAnswer)
		}
		if _, err := conn.Read(one[:]); err != nil {
			return nil, err
		}
		head = append(head, one[0])
	}
	return head, nil
}
