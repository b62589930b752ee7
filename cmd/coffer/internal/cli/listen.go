package cli

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/term"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/cmd/coffer/internal/listen"
	"github.com/cofferdb/coffer/cmd/coffer/internal/node"
	"github.com/cofferdb/coffer/cmd/coffer/internal/webhook"
	"github.com/cofferdb/coffer/journal/client"
)

type listenCmd struct {
	Register     bool          `help:"Make an endpoint for as long as this runs."`
	Mode         string        `default:"thin" enum:"thin,full,sealed,agora" help:"With --register: ${enum}. The key of sealed bodies is made for the occasion, unless --key-file names one."`
	Type         []string      `placeholder:"TYPE" help:"With --register: only events of these types."`
	Conversation []string      `placeholder:"ID" help:"With --register: only events of these conversations."`
	User         []string      `placeholder:"ID" help:"With --register: only events of or to these users."`
	Ordered      bool          `help:"With --register: in order within a conversation."`
	Signature    string        `default:"hmac" enum:"hmac,ed25519" help:"With --register: how requests are signed, ${enum}."`
	SecretFile   string        `placeholder:"FILE" help:"File with the endpoint's secrets or public keys, instead of COFFER_WEBHOOK_SECRET. Without, signatures are not verified."`
	KeyFile      string        `placeholder:"FILE" help:"File with the private key of sealed bodies, a JWK."`
	Address      string        `default:"127.0.0.1:0" placeholder:"ADDR" help:"Loopback address and port; port 0 takes a free one (default ${default})."`
	TLSCert      string        `name:"tls-cert" placeholder:"FILE" help:"Certificate (PEM) to show, with --tls-key. Without, that of the development server of COFFER_CA, or one of its own."`
	TLSKey       string        `name:"tls-key" placeholder:"FILE" help:"Its private key (PEM)."`
	Status       int           `default:"204" placeholder:"CODE" help:"Answer events with this status (default ${default})."`
	Delay        time.Duration `help:"Answer events this much later."`
	Limit        int           `placeholder:"N" help:"End after this many requests."`
	appServer
}

func (*listenCmd) Help() string {
	return `Each request becomes a line of JSON on standard output; on a terminal, a line for people. What is not signed by the
secret is answered with 401; the member security of bodies of the mode agora is checked with COFFER_AGORA_SECRET. Verifications of endpoints are answered whatever --status and --delay say.

With --register the server of COFFER_URL is told to send here and, at the end, no longer to. A development server
does so only when it may call this machine:

    coffer serve --dev --callbacks-allow 127.0.0.0/8 &
    set -a; . coffer-data/dev.env; set +a
    coffer listen --register --mode full
    coffer listen --register --status 503            # see how failures are repeated
    coffer listen --secret-file secret --address 127.0.0.1:9443`
}

func (c *listenCmd) Run(r *runner) error {
	if c.Status < 200 || c.Status > 599 || c.Limit < 0 || c.Delay < 0 || (c.TLSCert == "") != (c.TLSKey == "") {
		return &failure{ExitUsage, errors.New("--status is 200 to 599, --limit and --delay are not negative, --tls-cert and --tls-key go together")}
	}
	o := listen.Options{Status: c.Status, Delay: c.Delay, Limit: c.Limit, Take: c.printer(r)}
	spec := client.EndpointSpec{
		Description: "coffer listen", Mode: c.Mode, Types: c.Type, Conversations: c.Conversation, Users: c.User, Ordered: c.Ordered,
	}
	if err := c.keys(r, &o, &spec); err != nil {
		return err
	}
	certificate, own, err := c.certificate()
	if err != nil {
		return err
	}
	l, err := c.open(r.interrupt)
	if err != nil {
		return err
	}
	receiver := listen.New(o)
	srv := &http.Server{
		Handler: receiver, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 64 << 10,
		ErrorLog:  slog.NewLogLogger(r.log.Handler(), slog.LevelDebug),
		TLSConfig: &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{certificate}},
	}
	served := make(chan error, 1)
	go func() { served <- srv.ServeTLS(l, "", "") }()
	spec.URL = "https://" + l.Addr().String() + "/"
	r.say("listening on %s", spec.URL)
	if own {
		r.say("its certificate is of its own making, so senders have to be told not to verify it; COFFER_CA, or --tls-cert and --tls-key, give another")
	}
	err = c.during(r, spec, receiver, served)
	ctx, stop := context.WithTimeout(context.WithoutCancel(r.interrupt), 5*time.Second)
	defer stop()
	if srv.Shutdown(ctx) != nil {
		_ = srv.Close() // requests that are delayed
	}
	return err
}

// during listens until it is told to end.
func (c *listenCmd) during(r *runner, spec client.EndpointSpec, receiver *listen.Receiver, served <-chan error) error {
	if c.Register {
		unregister, err := c.register(r, spec)
		if err != nil {
			return err
		}
		defer unregister()
	}
	select {
	case <-receiver.Done():
		return nil
	case err := <-served:
		return fmt.Errorf("listening: %w", err)
	case <-r.interrupt.Done():
		return r.interrupt.Err()
	}
}

// keys reads or makes secrets and the key of sealed bodies.
func (c *listenCmd) keys(r *runner, o *listen.Options, spec *client.EndpointSpec) error {
	text, err := secret(r, c.SecretFile, "COFFER_WEBHOOK_SECRET")
	if err != nil {
		return err
	}
	for field := range strings.FieldsSeq(text) {
		s, err := webhook.ParseSecret(field)
		if err != nil {
			return fmt.Errorf("COFFER_WEBHOOK_SECRET or --secret-file: %w", err)
		}
		o.Secrets = append(o.Secrets, s)
	}
	o.AgoraSecret = r.env("COFFER_AGORA_SECRET")
	if c.KeyFile != "" {
		key, err := auth.ReadSecretText(c.KeyFile)
		if err != nil {
			return err
		}
		if o.Key, err = webhook.ParsePrivateKey([]byte(key)); err != nil {
			return fmt.Errorf("--key-file: %w", err)
		}
	}
	if !c.Register {
		return nil
	}
	// A secret of our own, so that the first request can be verified too.
	if len(o.Secrets) == 0 {
		made, err := webhook.NewSecret(webhook.Kind(c.Signature))
		if err != nil {
			return err
		}
		o.Secrets = []*webhook.Secret{made}
	}
	spec.Secret = o.Secrets[0].Reveal()
	if c.Mode == "agora" {
		if o.AgoraSecret == "" {
			o.AgoraSecret = rand.Text()
		}
		spec.AgoraSecret = o.AgoraSecret
	}
	if c.Mode != "sealed" {
		return nil
	}
	if o.Key == nil {
		if o.Key, err = webhook.NewPrivateKey(); err != nil {
			return err
		}
	}
	public, err := o.Key.Public()
	spec.Encryption = string(public)
	return err
}

// certificate returns what to show to senders, and whether nobody else has signed
// it.
func (c *listenCmd) certificate() (pair tls.Certificate, own bool, err error) {
	certFile, keyFile := c.TLSCert, c.TLSKey
	if certFile == "" && c.CA != "" {
		dir := filepath.Dir(c.CA)
		certFile, keyFile = filepath.Join(dir, node.ListenCertificate), filepath.Join(dir, node.ListenKey)
		if _, err := os.Stat(keyFile); err != nil {
			certFile = ""
		}
	}
	if certFile == "" {
		pair, err = node.SelfSigned(time.Now())
		return pair, true, err
	}
	if pair, err = tls.LoadX509KeyPair(certFile, keyFile); err != nil {
		err = fmt.Errorf("the certificate to show: %w", err)
	}
	return pair, false, err
}

// open listens on a loopback address and on no other.
func (c *listenCmd) open(ctx context.Context) (net.Listener, error) {
	host, _, err := net.SplitHostPort(c.Address)
	if ip := net.ParseIP(host); err != nil || ip == nil || !ip.IsLoopback() {
		return nil, &failure{ExitUsage, errors.New("--address is a loopback address and a port, such as 127.0.0.1:9443")}
	}
	var config net.ListenConfig
	return config.Listen(ctx, "tcp", c.Address)
}

// register makes an endpoint; what it returns deletes it.
func (c *listenCmd) register(r *runner, spec client.EndpointSpec) (func(), error) {
	cl, err := c.client(r)
	if err != nil {
		return nil, err
	}
	e, err := cl.CreateEndpoint(r.interrupt, spec)
	if p := (*client.Problem)(nil); errors.As(err, &p) && p.Code() == "endpoint-url-forbidden" {
		cl.Close()
		return nil, fmt.Errorf("the server of COFFER_URL may not call this machine: start it with `coffer serve --dev --callbacks-allow 127.0.0.0/8`, or name the network in allow of its [callbacks] (%w)", err)
	}
	if err != nil {
		cl.Close()
		return nil, err
	}
	unregister := func() {
		defer cl.Close()
		ctx, stop := context.WithTimeout(context.WithoutCancel(r.interrupt), 10*time.Second)
		defer stop()
		if err := cl.DeleteEndpoint(ctx, e.ID); err != nil {
			r.say("the endpoint %s is still there: coffer callbacks endpoints delete %s (%v)", e.ID, e.ID, err)
		}
	}
	if e.State != "enabled" {
		unregister()
		why := "it did not get its challenge back"
		if v := e.Verification; v != nil && v.Error != "" {
			why = v.Error
		}
		return nil, fmt.Errorf("the server could not verify %s: %s (it trusts the certificates of ca_file in its [callbacks]; a development server those of its own authority)", spec.URL, why)
	}
	r.say("registered as %s", e.ID)
	return unregister, nil
}

// printer returns what prints a request.
func (c *listenCmd) printer(r *runner) func(listen.Received) error {
	width := 0
	if f, ok := r.Stdout.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		if columns, _, err := term.GetSize(int(f.Fd())); err == nil {
			width = max(40, columns-1)
		}
	}
	if width == 0 {
		return func(got listen.Received) error { return printJSON(r, got) }
	}
	return func(got listen.Received) error {
		_, err := io.WriteString(r.Stdout, receivedLine(got, width)+"\n")
		return err
	}
}

// receivedLine is a request for people.
func receivedLine(got listen.Received, width int) string {
	kind := got.Type
	if kind == "" {
		kind = "(not an event)"
	}
	if got.Sealed {
		kind += " sealed"
	}
	rest := string(got.Body)
	if rest == "" {
		rest = got.Text
	}
	if got.Error != "" {
		rest = got.Error + " " + rest
	}
	return printable(fmt.Sprintf("%s %d %-9s %-15s %s", got.Time.Local().Format(time.TimeOnly), got.Status, got.Signature, kind, rest), width)
}
