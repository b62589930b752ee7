package cli

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/client"
)

// server is the flags of a command that speaks to a server.
type server struct {
	URL     string        `name:"url" env:"COFFER_URL" placeholder:"URL" help:"Address of the region's server, https://host:port."`
	CA      string        `name:"ca" env:"COFFER_CA" placeholder:"FILE" help:"Certificates (PEM) that the server's is verified by, instead of the system's."`
	Timeout time.Duration `default:"1m" help:"How long to go on trying while the server is away or busy."`
}

// appServer is the flags of a command that speaks for an app.
type appServer struct {
	server
	App             string `env:"COFFER_APP" placeholder:"ID" help:"The app: 32 hex digits."`
	TokenFile       string `placeholder:"FILE" help:"File with an access token, instead of COFFER_TOKEN."`
	CertificateFile string `placeholder:"FILE" help:"File with the app's certificate, instead of COFFER_APP_CERTIFICATE."`
}

// operatorServer is the flags of a command that speaks for an operator.
type operatorServer struct {
	server
	OperatorTokenFile string `placeholder:"FILE" help:"File with the operators' token, instead of COFFER_OPERATOR_TOKEN."`
}

const setUp = "for a development server: set -a; . coffer-data/dev.env; set +a"

func (s server) config(r *runner) (client.Config, error) {
	if s.URL == "" {
		return client.Config{}, fmt.Errorf("no server is named: set COFFER_URL or --url (%s)", setUp)
	}
	cfg := client.Config{URL: s.URL, RetryFor: s.Timeout, Log: r.log}
	if s.Timeout <= 0 {
		cfg.RetryFor = -1
	}
	if s.CA != "" {
		pem, err := os.ReadFile(s.CA)
		if err != nil {
			return client.Config{}, fmt.Errorf("reading the certificates of COFFER_CA or --ca: %w", err)
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return client.Config{}, fmt.Errorf("%s holds no certificate in PEM form", s.CA)
		}
	}
	return cfg, nil
}

func (s appServer) appID() (journal.AppID, error) {
	if s.App == "" {
		return journal.AppID{}, fmt.Errorf("no app is named: set COFFER_APP or --app (%s)", setUp)
	}
	id, err := journal.ParseAppID(s.App)
	if err != nil {
		return journal.AppID{}, fmt.Errorf("COFFER_APP or --app: %w", err)
	}
	return id, nil
}

// certificate returns the app's certificate, or "" when none is given.
func (s appServer) certificate(r *runner) (string, error) {
	text, err := secret(r, s.CertificateFile, "COFFER_APP_CERTIFICATE")
	if err != nil || text == "" {
		return "", err
	}
	c, err := journal.ParseCertificate(text)
	if err != nil {
		return "", fmt.Errorf("COFFER_APP_CERTIFICATE or --certificate-file: %w", err)
	}
	return c.Reveal(), nil
}

// secret reads a secret from a file, when one is named, or the environment.
func secret(r *runner, file, variable string) (string, error) {
	if file == "" {
		return r.env(variable), nil
	}
	if file == "-" {
		b, err := io.ReadAll(io.LimitReader(r.Stdin, 64<<10))
		return strings.TrimRight(string(b), "\r\n"), err
	}
	return auth.ReadSecret(file)
}

func (s appServer) client(r *runner) (*client.Client, error) {
	return s.clientWith(r, func(*client.Config) {})
}

func (s appServer) clientWith(r *runner, adjust func(*client.Config)) (*client.Client, error) {
	cfg, err := s.config(r)
	if err != nil {
		return nil, err
	}
	if cfg.App, err = s.appID(); err != nil {
		return nil, err
	}
	if cfg.Token, err = s.tokens(r); err != nil {
		return nil, err
	}
	if cfg.Token == nil {
		return nil, fmt.Errorf("no credential: set COFFER_TOKEN or COFFER_APP_CERTIFICATE, or name a file with --token-file or --certificate-file (%s)", setUp)
	}
	adjust(&cfg)
	return client.New(cfg)
}

// tokens returns the source of the app's tokens, nil when there is none. A token
// that is given is used while it is valid; with a certificate, new ones are made
// as the old expire, so that a long import outlives a token.
func (s appServer) tokens(r *runner) (client.TokenSource, error) {
	token, err := secret(r, s.TokenFile, "COFFER_TOKEN")
	if err != nil {
		return nil, err
	}
	certificate, err := s.certificate(r)
	if err != nil {
		return nil, err
	}
	switch {
	case certificate == "" && token == "":
		return nil, nil //nolint:nilnil // no source is an answer here
	case certificate == "":
		return client.StaticToken(token), nil
	}
	m := &minter{app: s.App, certificate: certificate, current: token}
	if token == "" || m.expired(time.Now()) {
		m.current, m.own = "", true
	}
	return m.token, nil
}

const tokenLifetime = time.Hour

// minter makes tokens of the app's backend.
type minter struct {
	app, certificate string

	mu      sync.Mutex // guards what follows
	current string
	own     bool // whether current is to be replaced when it is old
	made    time.Time
}

func (m *minter) expired(now time.Time) bool {
	t, err := auth.Parse(m.current)
	if err != nil {
		return false // the server will say what is wrong with it
	}
	_, err = t.Verify([]string{m.certificate}, now)
	return errors.Is(err, auth.ErrExpired)
}

func (m *minter) token(context.Context) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	if !m.own {
		if !m.expired(now) {
			return m.current, nil
		}
		m.own = true
	}
	if now.Sub(m.made) < tokenLifetime/2 {
		return m.current, nil
	}
	token, err := auth.Build(auth.Spec{AppID: m.app, Certificate: m.certificate, Issued: now, Lifetime: tokenLifetime, Salt: rand.Uint32()}) //nolint:gosec // not a secret
	if err != nil {
		return "", err
	}
	m.current, m.made = token, now
	return token, nil
}

func (s operatorServer) client(r *runner) (*client.Client, error) {
	cfg, err := s.config(r)
	if err != nil {
		return nil, err
	}
	token, err := secret(r, s.OperatorTokenFile, "COFFER_OPERATOR_TOKEN")
	if err != nil {
		return nil, err
	}
	if token == "" {
		return nil, fmt.Errorf("no operator's credential: set COFFER_OPERATOR_TOKEN or --operator-token-file (%s)", setUp)
	}
	cfg.OperatorToken = client.StaticToken(token)
	return client.New(cfg)
}

// advise adds to an error what to do next, where that is known.
func advise(err error) string {
	text := strings.ReplaceAll(err.Error(), "\n", "; ")
	var unknown x509.UnknownAuthorityError
	var host x509.HostnameError
	switch {
	case errors.As(err, &unknown):
		return text + " (set COFFER_CA or --ca to the file that holds the server's authority)"
	case errors.As(err, &host):
		return text + " (check the host of COFFER_URL or --url)"
	case errors.Is(err, client.ErrUnauthorized):
		return text + " (check COFFER_APP, and COFFER_TOKEN or COFFER_APP_CERTIFICATE)"
	case errors.Is(err, client.ErrForbidden) && strings.Contains(text, "wrong-region"):
		return text + " (set COFFER_URL to the server of the app's region)"
	case errors.Is(err, client.ErrProtocol):
		return text + " (is COFFER_URL a Coffer server of this release?)"
	case errors.Is(err, client.ErrUnavailable):
		return text + " (is the server running? coffer doctor tells more)"
	}
	return text
}
