package egress

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
)

func TestURLs(t *testing.T) {
	p := NewPolicy(nil)
	for _, raw := range []string{
		"https://example.com", "https://example.com:443/hooks?a=b", "https://a_b.example.com./x", "https://8.8.8.8/", "https://[2606:4700::1111]/",
		"https://xn--bcher-kva.example/h",
	} {
		if _, err := p.CheckURL(raw); err != nil {
			t.Errorf("%s: %v", raw, err)
		}
	}
	for _, raw := range []string{
		"", "http://example.com", "ftp://example.com", "//example.com", "https:example.com", "https://", "https:///x", "https://:443/",
		"https://user@example.com", "https://user:secret@example.com", "https://example.com/#x", "https://example.com#",
		"https://example.com:0", "https://example.com:", "https://example.com:65536", "https://example.com:22222222222", "https://example.com:http",
		"https://exa mple.com", "https://example.com/\n", "https://bücher.example", "https://-a.example", "https://a..example", "https://.",
		"https://localhost", "https://localhost.", "https://a.LOCALHOST/x",
		"https://2130706433", "https://0x7f000001", "https://0x7f.1", "https://127.1", "https://017700000001", "https://127.0.0.1.", "https://1.2.3.4.5", "https://a.0x1",
		"https://127.0.0.1", "https://0.0.0.0", "https://10.0.0.1", "https://172.16.3.4", "https://192.168.1.1", "https://169.254.169.254/latest/meta-data",
		"https://100.100.100.200", "https://192.0.0.192", "https://168.63.129.16", "https://224.0.0.1", "https://255.255.255.255", "https://198.18.0.1",
		"https://[::]", "https://[::1]", "https://[fe80::1]", "https://[fe80::1%25eth0]", "https://[fd00:ec2::254]", "https://[ff02::1]",
		"https://[::ffff:127.0.0.1]", "https://[::ffff:a9fe:a9fe]", "https://[::127.0.0.1]", "https://[64:ff9b::7f00:1]", "https://[64:ff9b:1::a9fe:a9fe]",
		"https://[2002:7f00:1::]", "https://[2001:0:4136:e378:8000:63bf:3fff:fdd2]", "https://[::ffff:0:127.0.0.1]", "https://[2001:db8::1]",
		"https://8.8.8.8:25", "https://8.8.8.8:80", "https://[fe80::1", "https://" + strings.Repeat("a", 3000) + ".example",
	} {
		if _, err := p.CheckURL(raw); !errors.Is(err, ErrForbidden) {
			t.Errorf("%q: %v", raw, err)
		}
	}
}

func TestAllowed(t *testing.T) {
	p := NewPolicy([]netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd00:1::/32")}, 8443)
	for address, ok := range map[string]bool{
		"10.1.2.3:9000": true, "10.2.0.1:443": false, "[::ffff:10.1.2.3]:1": true, "[fd00:1::5]:80": true, "[fd00:2::5]:443": false,
		"8.8.8.8:8443": true, "8.8.8.8:8444": false, "127.0.0.1:443": false,
	} {
		if err := p.CheckAddress(netip.MustParseAddrPort(address)); (err == nil) != ok || (err != nil && !errors.Is(err, ErrForbidden)) {
			t.Errorf("%s: %v", address, err)
		}
	}
	zero := &Policy{}
	if zero.CheckAddress(netip.MustParseAddrPort("127.0.0.1:443")) == nil || zero.CheckAddress(netip.MustParseAddrPort("8.8.8.8:443")) != nil {
		t.Error("the zero policy is not the one of the public internet")
	}
}

// names answers each look-up of a name with the next of its answers.
type names struct {
	answers [][]string
	asked   atomic.Int64
}

func (n *names) LookupNetIP(context.Context, string, string) ([]netip.Addr, error) {
	i := int(n.asked.Add(1)) - 1
	if i >= len(n.answers) {
		return nil, errors.New("asked too often")
	}
	var found []netip.Addr
	for _, a := range n.answers[i] {
		found = append(found, netip.MustParseAddr(a))
	}
	return found, nil
}

func client(d *Dialer, server *httptest.Server) *http.Client {
	pool := server.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs
	return &http.Client{Transport: &http.Transport{
		DialContext: d.DialContext, DisableKeepAlives: true,
		TLSClientConfig: &tls.Config{RootCAs: pool, ServerName: "example.com", MinVersion: tls.VersionTLS12},
	}}
}

func fetch(t *testing.T, c *http.Client, to string) (string, error) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, to, nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := c.Do(request)
	if err != nil {
		return "", err
	}
	defer func() { _ = response.Body.Close() }()
	body, err := io.ReadAll(response.Body)
	return string(body), err
}

// TestRebinding: what a name stands for is asked once for a connection, and one
// that is forbidden, alone or beside others, is not dialled.
func TestRebinding(t *testing.T) {
	var reached atomic.Int64
	server := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached.Add(1) }))
	defer server.Close()
	_, port, _ := net.SplitHostPort(server.Listener.Addr().String())
	for _, answers := range [][][]string{
		{{"127.0.0.1"}}, {{"8.8.8.8", "127.0.0.1"}}, {{"::ffff:127.0.0.1"}}, {{"::1"}}, {{"169.254.169.254"}}, {{}},
	} {
		d := &Dialer{Policy: NewPolicy(nil), Resolver: &names{answers: answers}}
		if _, err := fetch(t, client(d, server), "https://hooks.example:"+port); err == nil {
			t.Errorf("%v was dialled", answers)
		}
	}
	if reached.Load() != 0 {
		t.Fatalf("%d requests arrived", reached.Load())
	}
	resolver := &names{answers: [][]string{{"127.0.0.1"}, {"127.0.0.2"}}}
	d := &Dialer{Policy: NewPolicy([]netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}), Resolver: resolver}
	c := client(d, server)
	if _, err := fetch(t, c, "https://hooks.example:"+port); err != nil {
		t.Fatal(err)
	}
	if resolver.asked.Load() != 1 {
		t.Errorf("the name was asked %d times for one connection", resolver.asked.Load())
	}
	if _, err := fetch(t, c, "https://hooks.example:"+port); !errors.Is(err, ErrForbidden) {
		t.Errorf("the second connection to what the name stands for now: %v", err)
	}
}

// proxy is an HTTP proxy that notes what it is asked for.
func proxy(t *testing.T, answer string) (at *url.URL, asked func() []string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	lines := make(chan string, 8)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { //nolint:gosec // of a test
		lines <- r.Method + " " + r.Host + " " + r.Header.Get("Proxy-Authorization")
		client, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer func() { _ = client.Close() }()
		_, _ = io.WriteString(client, answer)
		if !strings.HasPrefix(answer, "HTTP/1.1 200") {
			return
		}
		target, err := net.Dial("tcp", r.Host)
		if err != nil {
			return
		}
		defer func() { _ = target.Close() }()
		go func() { _, _ = io.Copy(target, client) }()
		_, _ = io.Copy(client, target)
	})}
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(func() { _ = server.Close() })
	return &url.URL{Scheme: "http", Host: listener.Addr().String(), User: url.UserPassword("coffer", "canary")}, func() []string {
		var all []string
		for {
			select {
			case l := <-lines:
				all = append(all, l)
			default:
				return all
			}
		}
	}
}

// TestProxy: a proxy gets the judged address, never a name, and nothing at all
// for a forbidden one.
func TestProxy(t *testing.T) {
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "here") }))
	defer server.Close()
	_, port, _ := net.SplitHostPort(server.Listener.Addr().String())
	allow := NewPolicy([]netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")})

	at, asked := proxy(t, "HTTP/1.1 200 Connection established\r\n\r\n")
	d := &Dialer{Policy: allow, Proxy: at, Resolver: &names{answers: [][]string{{"127.0.0.1"}, {"10.0.0.1"}}}}
	c := client(d, server)
	if body, err := fetch(t, c, "https://hooks.example:"+port); err != nil || body != "here" {
		t.Fatalf("%q %v", body, err)
	}
	if got := asked(); len(got) != 1 || got[0] != "CONNECT 127.0.0.1:"+port+" Basic Y29mZmVyOmNhbmFyeQ==" {
		t.Errorf("the proxy was asked for %q", got)
	}
	if _, err := fetch(t, c, "https://hooks.example:"+port); !errors.Is(err, ErrForbidden) {
		t.Errorf("a forbidden address: %v", err)
	}
	if got := asked(); len(got) != 0 {
		t.Errorf("the proxy was asked for %q", got)
	}
	for _, answer := range []string{
		"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "nonsense\r\n\r\n", "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", maxAnswer) + "\r\n\r\n", "",
	} {
		at, _ := proxy(t, answer)
		d := &Dialer{Policy: allow, Proxy: at}
		_, err := fetch(t, client(d, server), server.URL)
		if err == nil || !strings.Contains(err.Error(), "egress: the proxy") || strings.Contains(err.Error(), "canary") {
			t.Errorf("a proxy that answers %.20q: %v", answer, err)
		}
	}
}

func FuzzCheckURL(f *testing.F) {
	for _, seed := range []string{"https://example.com/x", "https://[::ffff:127.0.0.1]:443", "https://2130706433", "https://a@b#c"} {
		f.Add(seed)
	}
	p := NewPolicy(nil)
	f.Fuzz(func(t *testing.T, raw string) {
		u, err := p.CheckURL(raw)
		if err != nil {
			if !errors.Is(err, ErrForbidden) {
				t.Fatalf("%q: an error of another kind: %v", raw, err)
			}
			return
		}
		if u.Scheme != "https" || u.User != nil || u.Hostname() == "" || u.Fragment != "" {
			t.Fatalf("%q was allowed", raw)
		}
		if a, err := netip.ParseAddr(u.Hostname()); err == nil && (a.Unmap().IsLoopback() || a.Unmap().IsPrivate() || a.Unmap().IsLinkLocalUnicast() || a.Unmap().IsMulticast()) {
			t.Fatalf("%q was allowed", raw)
		}
	})
}
