package deliver_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections/callbacks"
)

// clientCertificate makes a certificate that signs itself, and its key, in PEM.
func clientCertificate(t *testing.T, name string) (certificate, key string, parsed *x509.Certificate) {
	t.Helper()
	private := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	raw := must[[]byte](t)(x509.CreateCertificate(rand.Reader, template, template, private.Public(), private))
	encoded := must[[]byte](t)(x509.MarshalPKCS8PrivateKey(private))
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw})),
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: encoded})), must[*x509.Certificate](t)(x509.ParseCertificate(raw))
}

// TestMutualTLS: an endpoint's certificate is shown to its receiver, the next one
// from the change on, and an endpoint without one gets nothing through.
func TestMutualTLS(t *testing.T) {
	t.Parallel()
	r := newRig(t, short)
	certificate, key, parsed := clientCertificate(t, "first")
	next, nextKey, nextParsed := clientCertificate(t, "second")
	pool := x509.NewCertPool()
	pool.AddCert(parsed)
	pool.AddCert(nextParsed)
	var mu sync.Mutex
	shown := map[string]int{}
	rc := r.receive(nil, func(s *httptest.Server) {
		s.TLS = &tls.Config{MinVersion: tls.VersionTLS12, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
		inner := s.Config.Handler
		s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			mu.Lock()
			shown[q.TLS.PeerCertificates[0].Subject.CommonName]++
			mu.Unlock()
			inner.ServeHTTP(w, q)
		})
	})
	e := r.endpoint(rc.URL, func(e *endpoints.Endpoint) { e.Certificate, e.CertificateKey = certificate, endpoints.Key(key) })
	without := r.endpoint(rc.URL)
	r.append(5, "group-1")
	r.eventually("the first events", func() bool { return r.progress(e).Done == 5 })
	if _, err := r.endpoints.Change(t.Context(), e.App, e.ID, func(e *endpoints.Endpoint) error {
		e.Certificate, e.CertificateKey = next, endpoints.Key(nextKey)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	r.eventually("the change", func() bool { // what was under way may show the first
		r.append(1, "group-1")
		mu.Lock()
		defer mu.Unlock()
		return shown["second"] > 0
	})
	r.eventually("a refusal without a certificate", func() bool { return r.progress(without).Waiting > 0 })
	outcomes, err := r.engine.Outcomes(t.Context(), &without, callbacks.Query{State: journal.DeliveryWaiting, Limit: 1})
	if err != nil || len(outcomes) != 1 || outcomes[0].Cause != journal.CauseConnect || outcomes[0].Error == "" {
		t.Errorf("without a certificate: %+v, %v", outcomes, err)
	}
	if n := r.progress(without).Done; n != 0 {
		t.Errorf("%d deliveries without a certificate", n)
	}
}
