package cli

import (
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/client"
)

// appID is the argument that the commands about one app share.
type appID struct {
	ID   string `arg:"" optional:"" env:"COFFER_APP" help:"The app: 32 hex digits."`
	JSON bool   `name:"json" help:"Print JSON."`
	operatorServer
}

// app runs a call about the app and prints the app that it answers with.
func (c *appID) app(r *runner, do func(*client.Client, journal.AppID) (client.App, error)) error {
	id, err := appServer{App: c.ID}.appID()
	if err != nil {
		return err
	}
	return c.with(r, func(cl *client.Client) error {
		app, err := do(cl, id)
		if err != nil {
			return err
		}
		return printApp(r, app, c.JSON)
	})
}

type appDisableCmd struct{ appID }

func (*appDisableCmd) Help() string {
	return `A disabled app takes and serves nothing: its callers get 403 app-disabled, and its live tails end. Nothing of it
is lost, and what expires meanwhile expires.`
}

func (c *appDisableCmd) Run(r *runner) error { return c.disable(r, true) }

type appEnableCmd struct{ appID }

func (c *appEnableCmd) Run(r *runner) error { return c.disable(r, false) }

func (c *appID) disable(r *runner, disabled bool) error {
	return c.app(r, func(cl *client.Client, id journal.AppID) (client.App, error) {
		return cl.DisableApp(r.interrupt, id, disabled)
	})
}

type appRecallCmd struct {
	Do string `arg:"" enum:"hide,erase" help:"hide or erase."`
	appID
}

func (*appRecallCmd) Help() string {
	return `A recall always hides the message from every reader at once. With erase, the sealed bytes of the message and of
its edits are also overwritten in the journal and in the views, within seconds; what is left is that there was an
event, when, and tags of who took part. It holds for recalls from now on, and what was erased stays erased. Examples:

    coffer app recall erase
    coffer app recall hide 03440a9d9a29f81245f1988a2a99140c`
}

func (c *appRecallCmd) Run(r *runner) error {
	return c.app(r, func(cl *client.Client, id journal.AppID) (client.App, error) {
		return cl.SetOnRecall(r.interrupt, id, journal.OnRecall(c.Do))
	})
}

type appCertificateCmds struct {
	Rotate   appRotateCmd   `cmd:"" help:"Make a new certificate; tokens of the one before stay good."`
	Withdraw appWithdrawCmd `cmd:"" help:"Refuse tokens of the certificate before."`
}

type appRotateCmd struct{ appID }

func (*appRotateCmd) Help() string {
	return `The new certificate is shown this once only. Give it to the app's backend, wait until its tokens are signed
with it and the old ones have run out (24 hours at most), and then withdraw the certificate before. Until then there
is no further rotation.`
}

func (c *appRotateCmd) Run(r *runner) error {
	return c.app(r, func(cl *client.Client, id journal.AppID) (client.App, error) {
		return cl.RotateCertificate(r.interrupt, id)
	})
}

type appWithdrawCmd struct{ appID }

func (c *appWithdrawCmd) Run(r *runner) error {
	return c.app(r, func(cl *client.Client, id journal.AppID) (client.App, error) {
		return cl.WithdrawCertificate(r.interrupt, id)
	})
}
