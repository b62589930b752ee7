package vault

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"os"

	"github.com/hashicorp/vault/api"

	"github.com/cofferdb/coffer/kms/internal/bounded"
)

// maxAnswer is what 500 rewrapped keys need forty times.
const maxAnswer = 4 << 20

// newTransport reads the certificates and returns the way to Vault.
func newTransport(t TLS) (*bounded.Transport, error) {
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
	return bounded.New(conf, maxAnswer), nil
}

// connector makes clients of one address that differ in their token. The
// client library reads VAULT_TOKEN, VAULT_NAMESPACE and VAULT_HEADERS by
// itself; what it found there is put aside.
//
// They have no timeout of their own: with one the library's raw calls end their
// context as they return, and the rest of a longer answer cannot be read.
func connector(address, namespace string, t *bounded.Transport) func(token string) (*api.Client, error) {
	return func(token string) (*api.Client, error) {
		c, err := api.NewClient(&api.Config{
			Address:          address,
			HttpClient:       t.Client(),
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
