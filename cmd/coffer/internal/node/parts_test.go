package node

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestAuthority(t *testing.T) {
	dir := t.TempDir()
	now := time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC)
	certFile, keyFile := filepath.Join(dir, "tls.pem"), filepath.Join(dir, "tls.key")
	open := func(at time.Time) (*authority, *x509.Certificate) {
		t.Helper()
		a, err := openAuthority(dir, at)
		if err != nil {
			t.Fatal(err)
		}
		if err := a.issue(certFile, keyFile, "eu", at); err != nil {
			t.Fatal(err)
		}
		c, _, err := readPair(certFile, keyFile)
		if err != nil {
			t.Fatal(err)
		}
		roots := x509.NewCertPool()
		roots.AddCert(a.certificate)
		for _, name := range []string{"localhost", "127.0.0.1", "::1"} {
			if _, err := c.Verify(x509.VerifyOptions{Roots: roots, DNSName: name, CurrentTime: at}); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		return a, c
	}
	a1, c1 := open(now)
	a2, c2 := open(now.Add(24 * time.Hour))
	if !a1.certificate.Equal(a2.certificate) || !c1.Equal(c2) {
		t.Error("not used again")
	}
	a3, c3 := open(c1.NotAfter.Add(-24 * time.Hour))
	if !a1.certificate.Equal(a3.certificate) || c1.Equal(c3) {
		t.Error("a server certificate that runs out is not replaced")
	}
	// What the authority signs for other hosts is worth nothing.
	if _, err := tls.LoadX509KeyPair(certFile, keyFile); err != nil {
		t.Error(err)
	}
	if len(a1.certificate.PermittedDNSDomains) != 1 || !a1.certificate.PermittedDNSDomainsCritical {
		t.Error("the authority is good for any host")
	}
	if err := os.Remove(filepath.Join(dir, "ca.key")); err != nil {
		t.Fatal(err)
	}
	if a4, c4 := open(now); a4.certificate.Equal(a1.certificate) || c4.Equal(c3) {
		t.Error("without its key the authority goes on")
	}
	if err := os.WriteFile(filepath.Join(dir, "ca.key"), []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openAuthority(dir, now); !errors.Is(err, errPEM) {
		t.Errorf("damaged key: %v", err)
	}
}

func TestCertificateRenewal(t *testing.T) {
	dir := t.TempDir()
	a, err := openAuthority(dir, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	certFile, keyFile := filepath.Join(dir, "tls.pem"), filepath.Join(dir, "tls.key")
	if err := a.issue(certFile, keyFile, "eu", time.Now()); err != nil {
		t.Fatal(err)
	}
	c, err := newCertificates(certFile, keyFile, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	serialNow := func() string {
		t.Helper()
		c.checked = time.Time{} // as if some time had passed
		pair, err := c.current(nil)
		if err != nil {
			t.Fatal(err)
		}
		return pair.Leaf.SerialNumber.String()
	}
	first := serialNow()
	if serialNow() != first {
		t.Error("another certificate without a reason")
	}
	if err := os.Remove(certFile); err != nil {
		t.Fatal(err)
	}
	if serialNow() != first {
		t.Error("the certificate in memory is gone with its file")
	}
	if err := a.issue(certFile, keyFile, "eu", time.Now()); err != nil {
		t.Fatal(err)
	}
	if serialNow() == first {
		t.Error("a renewed certificate is not noticed")
	}
}

func TestConnectionLimit(t *testing.T) {
	l, err := listen(t.Context(), "127.0.0.1:0", 2)
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan net.Conn)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	dial := func() {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
	}
	for range 3 {
		dial()
	}
	first, second := <-accepted, <-accepted
	select {
	case <-accepted:
		t.Fatal("a third connection")
	case <-time.After(20 * time.Millisecond):
	}
	_ = first.Close()
	_ = first.Close() // gives back one place, not two
	third := <-accepted
	dial()
	select {
	case <-accepted:
		t.Fatal("a fourth connection")
	case <-time.After(20 * time.Millisecond):
	}
	_ = l.Close()
	<-ended
	_ = second.Close()
	_ = third.Close()
}

func TestShare(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	for _, c := range []struct {
		files         uint64
		regions, want int
		got           int
		err           error
	}{
		{1 << 20, 4, 4096, 4096, nil},
		{65536, 1, 4096, 4096, nil},
		{4096, 1, 4096, 3584, nil},
		{1024, 4, 4096, 128, nil},
		{1023, 1, 10, 0, ErrFiles},
	} {
		got, err := share(c.files, c.regions, c.want, log)
		if got != c.got || !errors.Is(err, c.err) {
			t.Errorf("%d files, %d regions: %d %v, want %d", c.files, c.regions, got, err, c.got)
		}
	}
}

func TestShellQuote(t *testing.T) {
	for in, want := range map[string]string{
		"https://127.0.0.1:7443": "https://127.0.0.1:7443", "007eJx+/=": "007eJx+/=", "": "''", "a b": "'a b'", "it's": `'it'\''s'`, "$x": "'$x'", "`x`": "'`x`'",
	} {
		if got := shellQuote(in); got != want {
			t.Errorf("%q becomes %s, want %s", in, got, want)
		}
	}
}
