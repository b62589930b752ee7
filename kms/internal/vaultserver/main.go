// Command vaultserver is a real Vault core behind its real HTTP handler, small
// enough to be started by a test: the transit and kv secrets engines, the
// approle, kubernetes and (built-in) token auth methods, policies, namespaces
// excepted, the file audit device, seal and unseal.
//
// It stands in a module of its own because the versions it needs clash with
// those of the client library that coffer ships; nothing of it is linked into
// coffer. The core is HashiCorp Vault 1.14.2, the last line of releases under
// MPL-2.0. It is years old and gets no security fixes: it listens on loopback
// and refuses any other address.
//
// The first line of its standard output is its URL. The client initialises and
// unseals it through the ordinary API. It ends when its standard input ends,
// so that a killed test leaves no server behind.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/audit"
	"github.com/hashicorp/vault/builtin/audit/file"
	vaulthttp "github.com/hashicorp/vault/http"
	"github.com/hashicorp/vault/internalshared/configutil"
	"github.com/hashicorp/vault/sdk/physical"
	physicalfile "github.com/hashicorp/vault/sdk/physical/file"
	"github.com/hashicorp/vault/sdk/physical/inmem"
	"github.com/hashicorp/vault/vault"
)

type options struct {
	addr     string
	storage  string
	cert     string
	key      string
	clientCA string
	logLevel string
}

func main() {
	var o options
	flag.StringVar(&o.addr, "addr", "127.0.0.1:0", "loopback address to listen on; port 0 takes a free one")
	flag.StringVar(&o.storage, "storage", "", "directory for file storage; empty keeps everything in memory")
	flag.StringVar(&o.cert, "cert", "", "TLS certificate file; empty serves plain HTTP")
	flag.StringVar(&o.key, "key", "", "TLS key file")
	flag.StringVar(&o.clientCA, "client-ca", "", "file of the CA that client certificates must chain to; empty asks for none")
	flag.StringVar(&o.logLevel, "log-level", "warn", "level of the server's own log, on standard error")
	flag.Parse()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	if err := serve(o); err != nil {
		fmt.Fprintln(os.Stderr, "vaultserver:", err)
		os.Exit(1)
	}
}

func serve(o options) error {
	bind, err := netip.ParseAddrPort(o.addr)
	if err != nil {
		return fmt.Errorf("reading -addr: %w", err)
	}
	if !bind.Addr().IsLoopback() {
		return errors.New("this server is for tests and listens on loopback only")
	}
	logger := hclog.New(&hclog.LoggerOptions{Level: hclog.LevelFromString(o.logLevel), Output: os.Stderr})
	storage, kind, err := openStorage(o.storage, logger)
	if err != nil {
		return fmt.Errorf("opening storage: %w", err)
	}
	tlsConfig, err := serverTLS(o)
	if err != nil {
		return fmt.Errorf("reading TLS files: %w", err)
	}
	ln, err := net.Listen("tcp", bind.String())
	if err != nil {
		return err
	}
	url := "http://" + ln.Addr().String()
	if tlsConfig != nil {
		ln = tls.NewListener(ln, tlsConfig)
		url = "https://" + ln.Addr().String()
	}
	core, err := vault.NewCore(&vault.CoreConfig{
		Physical:           storage,
		StorageType:        kind,
		RedirectAddr:       url,
		Logger:             logger,
		DisableMlock:       true,
		LogicalBackends:    secretEngines,
		CredentialBackends: authMethods,
		AuditBackends:      map[string]audit.Factory{"file": file.Factory},
		BuiltinRegistry:    builtins{},
		DefaultLeaseTTL:    time.Hour,
		MaxLeaseTTL:        24 * time.Hour,
	})
	if err != nil {
		return fmt.Errorf("making the core: %w", err)
	}
	server := &http.Server{
		Handler: vaulthttp.Handler.Handler(&vault.HandlerProperties{
			Core: core,
			ListenerConfig: &configutil.Listener{
				MaxRequestSize:     vaulthttp.DefaultMaxRequestSize,
				MaxRequestDuration: vault.DefaultMaxRequestDuration,
			},
		}),
		ReadHeaderTimeout: 10 * time.Second,
	}
	fmt.Println(url)
	return server.Serve(ln)
}

func openStorage(dir string, logger hclog.Logger) (physical.Backend, string, error) {
	if dir == "" {
		b, err := inmem.NewInmem(nil, logger)
		return b, "inmem", err
	}
	b, err := physicalfile.NewFileBackend(map[string]string{"path": dir}, logger)
	return b, "file", err
}

func serverTLS(o options) (*tls.Config, error) {
	if o.cert == "" {
		return nil, nil
	}
	pair, err := tls.LoadX509KeyPair(o.cert, o.key)
	if err != nil {
		return nil, err
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}}
	if o.clientCA == "" {
		return c, nil
	}
	pem, err := os.ReadFile(o.clientCA)
	if err != nil {
		return nil, err
	}
	c.ClientCAs = x509.NewCertPool()
	if !c.ClientCAs.AppendCertsFromPEM(pem) {
		return nil, errors.New("no certificate in " + o.clientCA)
	}
	c.ClientAuth = tls.RequireAndVerifyClientCert
	return c, nil
}
