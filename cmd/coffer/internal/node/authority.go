package node

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

const (
	authorityLife   = 10 * 365 * 24 * time.Hour
	certificateLife = 397 * 24 * time.Hour // what clients accept at most
	renewBefore     = 30 * 24 * time.Hour
)

// authority is the certificate authority of a development set-up: ECDSA P-256,
// good for names of this machine only, kept in the data directory and used
// again, so that what trusts it goes on doing so.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
	path        string // of the certificate
}

func openAuthority(dir string, now time.Time) (*authority, error) {
	certPath, keyPath := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "ca.key")
	if !exists(certPath) || !exists(keyPath) {
		return createAuthority(certPath, keyPath, now)
	}
	certificate, key, err := readPair(certPath, keyPath)
	if err != nil {
		return nil, fmt.Errorf("reading the development authority: %w", err)
	}
	if now.After(certificate.NotAfter.Add(-renewBefore)) {
		return createAuthority(certPath, keyPath, now)
	}
	return &authority{certificate: certificate, key: key, path: certPath}, nil
}

func createAuthority(certPath, keyPath string, now time.Time) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making the development authority: %w", err)
	}
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: "Coffer development authority"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(authorityLife),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true,
		// Whoever gets the key can still not speak for any other host.
		PermittedDNSDomainsCritical: true,
		PermittedDNSDomains:         []string{"localhost"},
		PermittedIPRanges: []*net.IPNet{
			{IP: net.IPv4(127, 0, 0, 0).To4(), Mask: net.CIDRMask(8, 32)},
			{IP: net.IPv6loopback, Mask: net.CIDRMask(128, 128)},
		},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, fmt.Errorf("making the development authority: %w", err)
	}
	if err := writePair(certPath, keyPath, der, key); err != nil {
		return nil, err
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("making the development authority: %w", err)
	}
	return &authority{certificate: certificate, key: key, path: certPath}, nil
}

// issue makes a server certificate for this machine's own names, unless there
// is one of this authority that is good for a while.
func (a *authority) issue(certPath, keyPath, name string, now time.Time) error {
	if exists(certPath) && exists(keyPath) {
		old, _, err := readPair(certPath, keyPath)
		if err == nil && old.CheckSignatureFrom(a.certificate) == nil && now.Before(old.NotAfter.Add(-renewBefore)) {
			return nil
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("making a server certificate: %w", err)
	}
	template := ownNames("Coffer development "+name, now)
	der, err := x509.CreateCertificate(rand.Reader, template, a.certificate, &key.PublicKey, a.key)
	if err != nil {
		return fmt.Errorf("making a server certificate: %w", err)
	}
	return writePair(certPath, keyPath, der, key)
}

func serial() *big.Int {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails, says crypto/rand
	b[0] &= 0x7f
	return new(big.Int).SetBytes(b)
}

// writePair writes the key first: a certificate without its key is noticed, and
// both are made anew.
func writePair(certPath, keyPath string, der []byte, key *ecdsa.PrivateKey) error {
	encoded, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("encoding a key: %w", err)
	}
	defer clear(encoded)
	if err := writeSecret(keyPath, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: encoded})); err != nil {
		return err
	}
	return writeSecret(certPath, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

var errPEM = errors.New("not the PEM file expected")

func readPair(certPath, keyPath string) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	der, err := readPEM(certPath, "CERTIFICATE")
	if err != nil {
		return nil, nil, err
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", certPath, err)
	}
	if der, err = readPEM(keyPath, "PRIVATE KEY"); err != nil {
		return nil, nil, err
	}
	defer clear(der)
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", keyPath, errPEM)
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || !key.PublicKey.Equal(certificate.PublicKey) {
		return nil, nil, fmt.Errorf("%s: %w: not the key of %s", keyPath, errPEM, certPath)
	}
	return certificate, key, nil
}

func readPEM(path, kind string) ([]byte, error) {
	text, err := os.ReadFile(path) //nolint:gosec // a file of the data directory
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != kind {
		return nil, fmt.Errorf("%s: %w", path, errPEM)
	}
	return block.Bytes, nil
}

// What `coffer listen` shows to a development server, in its data directory.
const (
	ListenCertificate = "listen.pem"
	ListenKey         = "listen.key"
)

// SelfSigned makes a certificate for this machine's own names that nobody has
// signed but itself.
func SelfSigned(now time.Time) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("making a certificate: %w", err)
	}
	template := ownNames("Coffer listen", now)
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("making a certificate: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// ownNames is a server certificate for this machine's own names.
func ownNames(name string, now time.Time) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: name},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(certificateLife),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}
}
