package cli

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/journal"
)

type tokenCmds struct {
	App  tokenAppCmd  `cmd:"" help:"Make a token for the app's backend."`
	User tokenUserCmd `cmd:"" help:"Make a token for one user of the app."`
}

// tokenFlags are those of both kinds. No server is asked: a token is signed with
// the app's certificate.
type tokenFlags struct {
	App             string        `env:"COFFER_APP" placeholder:"ID" help:"The app: 32 hex digits."`
	CertificateFile string        `placeholder:"FILE" help:"File with the app's certificate, instead of COFFER_APP_CERTIFICATE."`
	TTL             time.Duration `name:"ttl" default:"1h" help:"How long the token is valid, at most 24h."`
}

type tokenAppCmd struct{ tokenFlags }

func (*tokenAppCmd) Help() string {
	return `Prints an AccessToken2 with the privilege of the app. Example:

    curl --cacert "$COFFER_CA" -H "Authorization: Bearer $(coffer token app --ttl 10m)" "$COFFER_URL/v1/apps/$COFFER_APP/events"`
}

func (c *tokenAppCmd) Run(r *runner) error { return c.print(r, "") }

type tokenUserCmd struct {
	ID string `arg:"" help:"The user's id."`
	tokenFlags
}

func (*tokenUserCmd) Help() string {
	return `Prints an AccessToken2 with the privilege of one user, who may send as itself. Example:

    coffer token user alice --ttl 24h`
}

func (c *tokenUserCmd) Run(r *runner) error {
	if err := journal.CheckUserID(c.ID); err != nil {
		return fmt.Errorf("the user's id: %w", err)
	}
	return c.print(r, c.ID)
}

func (t tokenFlags) print(r *runner, user string) error {
	s := appServer{App: t.App, CertificateFile: t.CertificateFile}
	id, err := s.appID()
	if err != nil {
		return err
	}
	certificate, err := s.certificate(r)
	if err != nil {
		return err
	}
	if certificate == "" {
		return errors.New("no certificate: set COFFER_APP_CERTIFICATE or --certificate-file (" + setUp + ")")
	}
	token, err := auth.Build(auth.Spec{
		AppID: id.String(), Certificate: certificate, User: user, Issued: time.Now(), Lifetime: t.TTL, Salt: rand.Uint32(), //nolint:gosec // not a secret
	})
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(r.Stdout, token)
	return err
}
