package vault_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/internal/serverstest"
	"github.com/cofferdb/coffer/kms/vault"
)

func TestSealAndUnseal(t *testing.T) {
	s := newServer(t)
	o := s.options()
	o.Attempts = 1
	p := open(t, o)
	key, w, err := p.Generate(t.Context(), binding)
	must(t, err)
	must(t, s.admin.Sys().Seal())
	if _, err := p.Unwrap(t.Context(), binding, w); !errors.Is(err, kms.ErrUnavailable) || !kms.Retryable(err) {
		t.Fatalf("sealed: %v, want ErrUnavailable", err)
	}
	s.unsealNow()
	got, err := p.Unwrap(t.Context(), binding, w)
	must(t, err)
	if !bytes.Equal(got, key) {
		t.Fatal("another key")
	}
}

// A Vault that stops, and comes back with what it had on disk, sealed: each
// state is unavailable, and nothing needs a restart here.
func TestStopAndStart(t *testing.T) {
	dir := t.TempDir()
	s := newServer(t, "-storage", dir)
	o := s.options()
	o.Attempts = 1
	p := open(t, o)
	key, w, err := p.Generate(t.Context(), binding)
	must(t, err)
	s.process.Stop()
	if _, err := p.Unwrap(t.Context(), binding, w); !errors.Is(err, kms.ErrUnavailable) {
		t.Fatalf("stopped: %v, want ErrUnavailable", err)
	}
	at, err := url.Parse(s.process.URL)
	must(t, err)
	s.process = serverstest.Start(t, serverstest.Binary(t, serverstest.Vault), "-storage", dir, "-addr", at.Host)
	if _, err := p.Unwrap(t.Context(), binding, w); !errors.Is(err, kms.ErrUnavailable) {
		t.Fatalf("started and sealed: %v, want ErrUnavailable", err)
	}
	s.unsealNow()
	got, err := p.Unwrap(t.Context(), binding, w)
	must(t, err)
	if !bytes.Equal(got, key) {
		t.Fatal("another key")
	}
}

// Rotating while others wrap and unwrap disturbs nobody.
func TestRotateWhileWrapping(t *testing.T) {
	s := newServer(t)
	p := open(t, s.options())
	operator := open(t, s.tokenOptions("coffer", "coffer-operator"))
	var done atomic.Bool
	var group sync.WaitGroup
	var latest atomic.Int64
	for range 4 {
		group.Go(func() {
			var kept []kms.Wrap
			var keys [][]byte
			for i := 0; !done.Load(); i++ {
				key, w, err := p.Generate(t.Context(), binding)
				if err != nil {
					t.Error(err)
					return
				}
				kept, keys = append(kept, w), append(keys, key)
				n := i / 2
				got, err := p.Unwrap(t.Context(), binding, kept[n])
				if err != nil || !bytes.Equal(got, keys[n]) {
					t.Errorf("version %s: another key, or %v", kept[n].Version, err)
					return
				}
			}
			v, _ := strconv.ParseInt(kept[len(kept)-1].Version, 10, 64)
			latest.Store(max(latest.Load(), v))
		})
	}
	for i := range 20 {
		version, err := operator.Rotate(t.Context())
		must(t, err)
		if version != strconv.Itoa(i+2) {
			t.Errorf("rotation %d made version %s", i, version)
		}
	}
	done.Store(true)
	group.Wait()
	if latest.Load() < 2 {
		t.Error("nobody used a new version")
	}
}

// A key with which Vault would ignore the binding context is refused.
func TestKeyThatWouldNotBind(t *testing.T) {
	s := newServer(t)
	for name, settings := range map[string]map[string]any{
		"not derived": {"type": "aes256-gcm96"},
		"convergent":  {"type": "aes256-gcm96", "derived": true, "convergent_encryption": true},
		"128 bits":    {"type": "aes128-gcm96", "derived": true},
		"signing":     {"type": "ed25519", "derived": true},
	} {
		t.Run(name, func(t *testing.T) {
			key := "k-" + strings.ReplaceAll(name, " ", "-")
			s.write("transit/keys/"+key, settings)
			must(t, s.admin.Sys().PutPolicy(key, strings.ReplaceAll(smallestPolicy, "coffer-eu", key)))
			o := s.tokenOptions(key)
			o.Key = key
			p := open(t, o)
			for op, do := range operations(t, p, kms.Wrap{
				Provider: vault.Name, Key: strings.TrimPrefix(s.process.URL, "http://") + "/transit/" + key,
				Version: "1", Blob: []byte("vault:v1:AAAA"),
			}) {
				if err := do(); !errors.Is(err, kms.ErrNotFound) {
					t.Errorf("%s: %v, want ErrNotFound", op, err)
				}
			}
		})
	}
}

// A typo in the key's name must not make a key, as it would if the policy gave
// "create".
func TestMissingKeyIsNotMade(t *testing.T) {
	s := newServer(t)
	must(t, s.admin.Sys().PutPolicy("typo", strings.ReplaceAll(smallestPolicy, "coffer-eu", "cofer-eu")))
	o := s.tokenOptions("typo")
	o.Key = "cofer-eu"
	p := open(t, o)
	if _, _, err := p.Generate(t.Context(), binding); !errors.Is(err, kms.ErrNotFound) {
		t.Errorf("missing key: %v, want ErrNotFound", err)
	}
	o.Mount = "transitt"
	q := open(t, o)
	if _, err := q.Describe(t.Context()); !errors.Is(err, kms.ErrAccessDenied) {
		// Vault does not tell strangers whether a mount exists.
		t.Errorf("missing mount: %v, want ErrAccessDenied", err)
	}
	if secret, err := s.admin.Logical().Read("transit/keys/cofer-eu"); err != nil || secret != nil {
		t.Errorf("the key was made: %v, %v", secret, err)
	}
}

// Rewrapping stops at what fails and says which items are done.
func TestRewrapOutageInTheMiddle(t *testing.T) {
	s := newServer(t)
	front := newProxy(t, s.process.URL)
	o := s.options()
	o.Address, o.Attempts = front.URL, 1
	p := open(t, o)
	_, w, err := p.Generate(t.Context(), binding)
	must(t, err)
	items := make([]kms.RewrapItem, 1200)
	for i := range items {
		items[i] = kms.RewrapItem{Context: binding, Wrap: w}
	}
	var batches atomic.Int64
	target, err := url.Parse(s.process.URL)
	must(t, err)
	pass := reverse(target)
	front.set(func(w http.ResponseWriter, r *http.Request) {
		if batches.Add(1) == 2 {
			answering(503, "Vault is sealed")(w, r)
			return
		}
		pass.ServeHTTP(w, r)
	})
	results, err := p.Rewrap(t.Context(), items)
	must(t, err)
	for i, r := range results {
		if done := i < 500; done != (r.Err == nil) || !done && !errors.Is(r.Err, kms.ErrUnavailable) {
			t.Fatalf("item %d: %v", i, r.Err)
		}
	}
	if n := batches.Load(); n != 2 {
		t.Errorf("%d requests, want two", n)
	}
}

func TestTLS(t *testing.T) {
	dir := t.TempDir()
	ca := newCA(t)
	ca.issue(t, dir, "server", "127.0.0.1")
	ca.issue(t, dir, "client", "coffer")
	newCA(t).issue(t, dir, "stranger", "coffer")
	file := func(name string) string { return filepath.Join(dir, name) }
	s := &server{t: t, dir: dir}
	s.process = serverstest.Start(t, serverstest.Binary(t, serverstest.Vault),
		"-cert", file("server.pem"), "-key", file("server-key.pem"), "-client-ca", file("server-ca.pem"))
	s.setup(&api.TLSConfig{CACert: file("server-ca.pem"), ClientCert: file("client.pem"), ClientKey: file("client-key.pem")})
	good := vault.TLS{CAFile: file("server-ca.pem"), CertFile: file("client.pem"), KeyFile: file("client-key.pem")}

	open := func(conf vault.TLS) *vault.Provider {
		o := s.options()
		o.TLS, o.Attempts = conf, 1
		return open(t, o)
	}
	p := open(good)
	key, w, err := p.Generate(t.Context(), binding)
	must(t, err)
	got, err := p.Unwrap(t.Context(), binding, w)
	must(t, err)
	if !bytes.Equal(got, key) {
		t.Fatal("another key")
	}
	named := good
	named.ServerName = "vault.test"
	if _, err := open(named).Unwrap(t.Context(), binding, w); err != nil {
		t.Errorf("server_name that the certificate has: %v", err)
	}
	for name, conf := range map[string]vault.TLS{
		"the system's CAs":        {CertFile: good.CertFile, KeyFile: good.KeyFile},
		"another CA":              {CAFile: file("stranger-ca.pem"), CertFile: good.CertFile, KeyFile: good.KeyFile},
		"another name":            {CAFile: good.CAFile, CertFile: good.CertFile, KeyFile: good.KeyFile, ServerName: "other.test"},
		"no client certificate":   {CAFile: good.CAFile},
		"a stranger's credential": {CAFile: good.CAFile, CertFile: file("stranger.pem"), KeyFile: file("stranger-key.pem")},
	} {
		_, err := open(conf).Unwrap(t.Context(), binding, w)
		if !errors.Is(err, kms.ErrUnavailable) || !strings.Contains(err.Error(), "TLS") {
			t.Errorf("%s: %v, want ErrUnavailable for TLS", name, err)
		}
	}
	o := s.options()
	for name, conf := range map[string]vault.TLS{
		"a CA file that is missing": {CAFile: file("nothing.pem")},
		"a CA file without any":     {CAFile: file("server-key.pem")},
		"a key of another":          {CertFile: file("client.pem"), KeyFile: file("server-key.pem")},
	} {
		o.TLS = conf
		if p, err := vault.New(o); err == nil {
			_ = p.Close()
			t.Errorf("%s was accepted", name)
		}
	}
}

// ca signs certificates of the names given.
type ca struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newCA(t testing.TB) ca {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, &key.PublicKey, key)
	must(t, err)
	cert, err = x509.ParseCertificate(der)
	must(t, err)
	return ca{cert, key}
}

// issue writes NAME.pem, NAME-key.pem and NAME-ca.pem.
func (c ca) issue(t testing.TB, dir, name, host string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"vault.test"}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if ip := net.ParseIP(host); ip != nil {
		cert.IPAddresses = []net.IP{ip}
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, c.cert, &key.PublicKey, c.key)
	must(t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	s := &server{t: t, dir: dir}
	s.secret(name+".pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	s.secret(name+"-key.pem", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})))
	s.secret(name+"-ca.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.cert.Raw})))
}

// A caller that gives up during a login does not take the others along.
func TestLoginOutlivesItsFirstCaller(t *testing.T) {
	s := newServer(t)
	p := open(t, s.options())
	s.process.Pause(t)
	ctx, cancel := context.WithCancel(t.Context())
	gaveUp := make(chan error, 1)
	go func() { _, _, err := p.Generate(ctx, binding); gaveUp <- err }()
	waited := make(chan error, 1)
	go func() { _, _, err := p.Generate(t.Context(), binding); waited <- err }()
	time.Sleep(50 * time.Millisecond)
	cancel()
	if err := <-gaveUp; !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want context.Canceled", err)
	}
	s.process.Continue(t)
	must(t, <-waited)
}

// A change counts when Vault shows it, and a rotation whose answer is lost is
// not repeated.
func TestChangesAreReadBack(t *testing.T) {
	s := newServer(t)
	front := newProxy(t, s.process.URL)
	o := s.tokenOptions("coffer", "coffer-operator")
	o.Address = front.URL
	p := open(t, o)
	_, err := p.Rotate(t.Context())
	must(t, err)
	target, err := url.Parse(s.process.URL)
	must(t, err)
	pass := reverse(target)
	var rotations atomic.Int64
	front.set(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.HasSuffix(r.URL.Path, "/config"):
			w.WriteHeader(http.StatusNoContent) // and nothing is done
		case strings.HasSuffix(r.URL.Path, "/rotate"):
			rotations.Add(1)
			answering(500, "internal error")(w, r)
		default:
			pass.ServeHTTP(w, r)
		}
	})
	if err := p.Retire(t.Context(), "2"); !errors.Is(err, kms.ErrUnavailable) || !strings.Contains(err.Error(), "confirm") {
		t.Errorf("Retire that was not carried out: %v, want ErrUnavailable", err)
	}
	if _, err := p.Rotate(t.Context()); !errors.Is(err, kms.ErrUnavailable) || rotations.Load() != 1 {
		t.Errorf("Rotate without an answer: %v after %d requests, want ErrUnavailable after one", err, rotations.Load())
	}
}
