package cli

import (
	"errors"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/client"
)

type appCmds struct {
	Create appCreateCmd `cmd:"" help:"Make an app in the server's region."`
	List   appListCmd   `cmd:"" help:"List the apps of the server's region."`
	Show   appShowCmd   `cmd:"" help:"Show one app."`

	Recall      appRecallCmd       `cmd:"" help:"Say whether what is recalled is only hidden, or erased."`
	Disable     appDisableCmd      `cmd:"" help:"Let an app answer nobody."`
	Enable      appEnableCmd       `cmd:"" help:"Undo disable."`
	Certificate appCertificateCmds `cmd:"" help:"Rotate the certificate that signs the app's tokens."`
	Plan        appPlanCmd         `cmd:"" help:"Change an app's plan, or tell what that would do."`
	Delete      appDeleteCmd       `cmd:"" help:"Delete an app and everything that it owns, for ever."`
}

type appCreateCmd struct {
	Plan    string `required:"" help:"The plan, which says how long messages are kept: free, basic, pro, enterprise."`
	Name    string `help:"A name for people."`
	Account string `help:"The account that owns the app."`
	JSON    bool   `name:"json" help:"Print JSON."`
	operatorServer
}

func (*appCreateCmd) Help() string {
	return `The region is the server's and can never change. The certificate, which signs the app's tokens, is shown
this once only. Example:

    coffer app create --plan pro --name ferries`
}

func (c *appCreateCmd) Run(r *runner) error {
	cl, err := c.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	app, err := cl.CreateApp(r.interrupt, client.AppSpec{Name: c.Name, Account: c.Account, Plan: c.Plan})
	if err != nil {
		if errors.Is(err, client.ErrUnavailable) {
			return fmt.Errorf("%w; the app may have been made: coffer app list shows it", err)
		}
		return err
	}
	if err := printApp(r, app, c.JSON); err != nil {
		return err
	}
	if !c.JSON && len(app.Certificates) > 0 {
		r.say("Keep the certificate: it is not shown again. As COFFER_APP and COFFER_APP_CERTIFICATE it lets the other commands act for the app.")
	}
	return nil
}

type appListCmd struct {
	Account string `help:"Only the apps of this account."`
	JSON    bool   `name:"json" help:"Print JSON lines."`
	operatorServer
}

func (c *appListCmd) Run(r *runner) error {
	cl, err := c.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	apps, err := cl.Apps(r.interrupt, c.Account)
	if err != nil {
		return err
	}
	if c.JSON {
		for _, a := range apps {
			if err := printJSON(r, a); err != nil {
				return err
			}
		}
		return nil
	}
	w := tabwriter.NewWriter(r.Stdout, 0, 8, 2, ' ', 0)
	_, _ = fmt.Fprintln(w, "APP\tREGION\tPLAN\tCREATED\tNAME")
	for _, a := range apps {
		_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s%s\n", a.ID, a.Region, a.Plan, a.Created.UTC().Format(time.DateOnly), printable(a.Name, 0), disabled(a))
	}
	return w.Flush()
}

func disabled(a client.App) string {
	if a.Disabled {
		return " (disabled)"
	}
	return ""
}

type appShowCmd struct {
	ID   string `arg:"" optional:"" env:"COFFER_APP" help:"The app: 32 hex digits."`
	JSON bool   `name:"json" help:"Print JSON."`
	operatorServer
}

func (c *appShowCmd) Run(r *runner) error {
	id, err := appServer{App: c.ID}.appID()
	if err != nil {
		return err
	}
	cl, err := c.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	app, err := cl.App(r.interrupt, id)
	if err != nil {
		return err
	}
	return printApp(r, app, c.JSON)
}

func printApp(r *runner, a client.App, asJSON bool) error {
	if asJSON {
		return printJSON(r, a)
	}
	w := tabwriter.NewWriter(r.Stdout, 0, 8, 2, ' ', 0)
	row := func(name, value string) {
		if value != "" {
			_, _ = fmt.Fprintf(w, "%s\t%s\n", name, value)
		}
	}
	row("app", a.ID.String())
	row("name", printable(a.Name, 0)+disabled(a))
	row("account", a.Account)
	row("region", a.Region)
	row("plan", a.Plan)
	for _, p := range journal.DefaultPlans() {
		if p.ID == a.Plan {
			row("", fmt.Sprintf("(keeps messages %d days unless the region's plan table says otherwise)", int(p.Retention/(24*time.Hour))))
		}
	}
	row("created", a.Created.UTC().Format(time.RFC3339))
	if a.OnRecall == string(journal.RecallErases) {
		row("recalls", "erase what was recalled, in the journal and the views")
	}
	if a.Rotating {
		row("rotating", "tokens of the certificate before are accepted too, until it is withdrawn")
	}
	for _, certificate := range a.Certificates {
		row("certificate", certificate)
	}
	return w.Flush()
}

func printJSON(r *runner, v any) error {
	b, err := json.Marshal(v, json.Deterministic(true), jsontext.SpaceAfterComma(false))
	if err != nil {
		return fmt.Errorf("encoding the answer: %w", err)
	}
	_, err = r.Stdout.Write(append(b, '\n'))
	return err
}
