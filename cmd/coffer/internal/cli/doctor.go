package cli

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/journal/client"
)

type doctorCmd struct {
	JSON              bool   `name:"json" help:"Print the checks as JSON."`
	OperatorTokenFile string `placeholder:"FILE" help:"File with the operators' token, instead of COFFER_OPERATOR_TOKEN."`
	RegionKey         string `placeholder:"KID" help:"Id of the key that the region signs with, as it was kept when the region was set up."`
	Config            string `placeholder:"FILE" help:"The region's configuration: ask its NATS servers and key services themselves."`
	appServer
}

func (*doctorCmd) Help() string {
	return `Checks, in this order: that the server can be reached, its TLS certificate, that the region says it is ready, that
the app's token is accepted, that the streams are those of the plan table, and that the region's signed residency
manifest is signed and keeps the rules. With --config the NATS servers and key services are asked themselves, and each
difference from the manifest is an error. A check that needs a credential which is not set is left out and said to be.
The exit code is 0 when no check failed.

    coffer doctor
    coffer doctor --config /etc/coffer/coffer.toml --region-key NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs
    coffer doctor --url https://127.0.0.1:7443 --ca coffer-data/ca.pem`
}

// check is one line of the diagnosis.
type check struct {
	Name   string `json:"name"`
	Status string `json:"status"` // ok, failed, skipped
	Detail string `json:"detail"`
	Advice string `json:"advice,omitzero"`
}

const (
	checkOK      = "ok"
	checkFailed  = "failed"
	checkSkipped = "skipped"
)

func (c *doctorCmd) Run(r *runner) error {
	checks := c.diagnose(r)
	failed := 0
	for _, k := range checks {
		if k.Status == checkFailed {
			failed++
		}
	}
	if c.JSON {
		err := printJSON(r, struct {
			Healthy bool    `json:"healthy"`
			URL     string  `json:"url"`
			Checks  []check `json:"checks"`
		}{failed == 0, c.URL, checks})
		if err != nil {
			return err
		}
	} else if err := printChecks(r, checks); err != nil {
		return err
	}
	if failed > 0 {
		return &failure{ExitFailure, fmt.Errorf("%d of %d checks failed", failed, len(checks))}
	}
	return nil
}

func printChecks(r *runner, checks []check) error {
	w := tabwriter.NewWriter(r.Stdout, 0, 8, 2, ' ', 0)
	for _, k := range checks {
		_, _ = fmt.Fprintf(w, "%s\t%s\t%s\n", k.Status, k.Name, k.Detail)
		if k.Advice != "" {
			_, _ = fmt.Fprintf(w, "\t\t→ %s\n", k.Advice)
		}
	}
	return w.Flush()
}

// diagnose runs the checks. After one that the others need it stops.
func (c *doctorCmd) diagnose(r *runner) []check {
	cfg, err := c.config(r)
	if err != nil {
		return []check{{Name: "configuration", Status: checkFailed, Detail: err.Error()}}
	}
	cfg.RetryFor = -1
	anonymous, err := client.New(cfg)
	if err != nil {
		return []check{{Name: "configuration", Status: checkFailed, Detail: err.Error(), Advice: "set COFFER_URL or --url, such as https://127.0.0.1:7443"}}
	}
	defer anonymous.Close()
	ctx, cancel := context.WithTimeout(r.interrupt, 30*time.Second)
	defer cancel()
	reached, conn := reach(ctx, c.URL)
	checks := []check{reached}
	if conn == nil {
		return checks
	}
	defer func() { _ = conn.Close() }()
	if u, _, err := address(c.URL); err == nil && u.Scheme == "https" {
		handshake := checkTLS(ctx, conn, u.Hostname(), cfg.RootCAs)
		if checks = append(checks, handshake); handshake.Status == checkFailed {
			return checks
		}
	}
	checks = append(checks, ready(ctx, anonymous))
	checks = append(checks, c.token(ctx, r), c.streams(ctx, r, cfg))
	return append(checks, c.residency(ctx, r, cfg)...)
}

func address(s string) (u *url.URL, hostport string, err error) {
	if u, err = url.Parse(s); err != nil {
		return nil, "", err
	}
	port := u.Port()
	if port == "" {
		port = map[string]string{"https": "443", "http": "80"}[u.Scheme]
	}
	return u, net.JoinHostPort(u.Hostname(), port), nil
}

func reach(ctx context.Context, target string) (check, net.Conn) {
	k := check{Name: "reachable"}
	_, hostport, err := address(target)
	if err == nil {
		var conn net.Conn
		start := time.Now()
		if conn, err = (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp", hostport); err == nil {
			k.Status, k.Detail = checkOK, fmt.Sprintf("%s answers after %s", hostport, time.Since(start).Round(10*time.Microsecond))
			return k, conn
		}
	}
	k.Status, k.Detail = checkFailed, err.Error()
	k.Advice = "start the server, or correct the host and port of COFFER_URL"
	return k, nil
}

func checkTLS(ctx context.Context, conn net.Conn, host string, roots *x509.CertPool) check {
	k := check{Name: "tls"}
	client := tls.Client(conn, &tls.Config{RootCAs: roots, ServerName: host, MinVersion: tls.VersionTLS12})
	if err := client.HandshakeContext(ctx); err != nil {
		k.Status, k.Detail = checkFailed, err.Error()
		var unknown x509.UnknownAuthorityError
		var invalid x509.CertificateInvalidError
		switch {
		case errors.As(err, &unknown):
			k.Advice = "set COFFER_CA or --ca to the file with the server's authority (DIR/ca.pem of a development server)"
		case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
			k.Advice = "renew the server's certificate, and check this machine's clock"
		default:
			k.Advice = "check that COFFER_URL names a Coffer server, by a name that its certificate has"
		}
		return k
	}
	state := client.ConnectionState()
	leaf := state.PeerCertificates[0]
	k.Status = checkOK
	k.Detail = fmt.Sprintf("%s, certificate valid until %s", tls.VersionName(state.Version), leaf.NotAfter.UTC().Format(time.DateOnly))
	if time.Until(leaf.NotAfter) < 14*24*time.Hour {
		k.Advice = "the certificate ends within two weeks: renew it"
	}
	return k
}

func ready(ctx context.Context, c *client.Client) check {
	k := check{Name: "ready"}
	answer, err := c.Ready(ctx)
	switch {
	case err != nil:
		k.Status, k.Detail = checkFailed, err.Error()
		k.Advice = "is it a Coffer server of this release that listens there?"
	case !answer.Ready:
		reasons := make([]string, len(answer.Reasons))
		for i, reason := range answer.Reasons {
			reasons[i] = reason.Part + ": " + reason.Detail
		}
		k.Status, k.Detail = checkFailed, "region "+answer.Region+" is not ready: "+strings.Join(reasons, "; ")
		k.Advice = "see the server's log"
	default:
		k.Status, k.Detail = checkOK, "region "+answer.Region
	}
	return k
}

// token asks for something small as the app.
func (c *doctorCmd) token(ctx context.Context, r *runner) check {
	k := check{Name: "token", Status: checkSkipped, Detail: "COFFER_APP with COFFER_TOKEN or COFFER_APP_CERTIFICATE is not set"}
	source, err := c.tokens(r)
	if err == nil && (source == nil || c.App == "") {
		return k
	}
	c.Timeout = 0 // a diagnosis does not wait
	var cl *client.Client
	if err == nil {
		cl, err = c.client(r)
	}
	if err == nil {
		defer cl.Close()
		_, err = cl.Event(ctx, "coffer-doctor")
	}
	switch {
	case err == nil, errors.Is(err, client.ErrNotFound) && !strings.Contains(err.Error(), "no such app"):
		k.Status, k.Detail = checkOK, "accepted for app "+c.App
	case errors.Is(err, client.ErrForbidden) && strings.Contains(err.Error(), "privilege-missing"):
		k.Status, k.Detail = checkOK, "accepted for app "+c.App+", as a user's: reading needs the app's own"
	default:
		k.Status, k.Detail = checkFailed, advise(err)
	}
	return k
}

// streams compares the streams with the plan table.
func (c *doctorCmd) streams(ctx context.Context, r *runner, cfg client.Config) check {
	k := check{Name: "streams", Status: checkSkipped, Detail: "COFFER_OPERATOR_TOKEN is not set"}
	token, err := secret(r, c.OperatorTokenFile, "COFFER_OPERATOR_TOKEN")
	if err == nil && token == "" {
		return k
	}
	var cl *client.Client
	if err == nil {
		cfg.OperatorToken = client.StaticToken(token)
		cl, err = client.New(cfg)
	}
	var list struct {
		Data  []stream `json:"data"`
		Drift []drift  `json:"drift"`
	}
	if err == nil {
		defer cl.Close()
		var raw []byte
		if raw, err = cl.Streams(ctx); err == nil {
			err = json.Unmarshal(raw, &list)
		}
	}
	if err != nil {
		k.Status, k.Detail = checkFailed, err.Error()
		return k
	}
	var wrong []string
	plans := map[string]bool{}
	for _, s := range list.Data {
		plans[s.Plan] = true
		if fault := s.fault(); fault != "" {
			wrong = append(wrong, s.Name+": "+fault)
		}
	}
	for _, d := range list.Drift {
		if d.Field != "max_age" { // which was told above
			wrong = append(wrong, fmt.Sprintf("%s: %s is %s, and should be %s", d.Stream, d.Field, d.Have, d.Want))
		}
	}
	switch {
	case len(list.Data) == 0:
		k.Status, k.Detail = checkFailed, "the region has no message stream"
	case len(wrong) > 0:
		k.Status, k.Detail = checkFailed, strings.Join(wrong, "; ")
		k.Advice = "somebody has changed the streams or the plan table: set the one back to the other"
	default:
		k.Status, k.Detail = checkOK, fmt.Sprintf("%d streams of %d plans keep what the plan table says", len(list.Data), len(plans))
	}
	return k
}

// stream is what the server says of one stream.
type stream struct {
	Name      string `json:"name"`
	Plan      string `json:"plan"`
	Retention int64  `json:"retention_seconds"` // of the plan
	MaxAge    *int64 `json:"max_age_seconds"`   // of the stream
}

// drift is a setting of a stream, or of a bucket, that is not what it should be.
type drift struct {
	Stream string `json:"stream"`
	Field  string `json:"field"`
	Want   string `json:"want"`
	Have   string `json:"have"`
}

func (s stream) fault() string {
	switch {
	case s.Retention <= 0:
		return "its plan " + s.Plan + " is not in the plan table"
	case s.MaxAge != nil && *s.MaxAge != s.Retention:
		return fmt.Sprintf("keeps %s, and the plan %s says %s", time.Duration(*s.MaxAge)*time.Second, s.Plan, time.Duration(s.Retention)*time.Second)
	}
	return ""
}
