package cli

import (
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/cofferdb/coffer/journal/client"
)

type accountCmds struct {
	Create  accountCreateCmd  `cmd:"" help:"Make an account in the server's region."`
	List    accountListCmd    `cmd:"" help:"List the accounts of the server's region."`
	Show    accountShowCmd    `cmd:"" help:"Show one account."`
	Change  accountChangeCmd  `cmd:"" help:"Change an account's name or e-mail address."`
	Disable accountDisableCmd `cmd:"" help:"Let all apps of an account answer nobody."`
	Enable  accountEnableCmd  `cmd:"" help:"Undo disable."`
	Grant   accountGrantCmd   `cmd:"" help:"Let an account of Mainland China use the server's region beside cn."`
	Revoke  accountRevokeCmd  `cmd:"" help:"Undo grant; apps that are there stay."`
	Delete  accountDeleteCmd  `cmd:"" help:"Delete an account with its apps, for ever."`
}

func (accountCmds) Help() string {
	return `An account owns apps. Regions share nothing: an account that has apps in two regions is made in each. Its
registration data (name, e-mail address) is kept until the account is deleted or nobody has used it, or an app of it,
for 180 days; docs/operations/accounts.md tells more.`
}

type accountCreateCmd struct {
	ID    string   `arg:"" help:"The account's id: lower-case letters, digits, - and _."`
	Name  string   `help:"A name for people."`
	Email string   `help:"The e-mail address of the account's owner."`
	China bool     `help:"An account of Mainland China: it can use the region cn only, unless it is granted another."`
	Grant []string `help:"Regions that an account of Mainland China may use beside cn." placeholder:"REGION"`
	JSON  bool     `name:"json" help:"Print JSON."`
	operatorServer
}

func (c *accountCreateCmd) Run(r *runner) error {
	spec := client.AccountSpec{ID: c.ID, Name: c.Name, Email: c.Email, Regions: c.Grant}
	if c.China {
		spec.Home = "cn"
	}
	return c.account(r, c.JSON, func(cl *client.Client) (client.Account, error) { return cl.CreateAccount(r.interrupt, spec) })
}

// account runs a call and prints the account that it answers with.
func (s operatorServer) account(r *runner, asJSON bool, do func(*client.Client) (client.Account, error)) error {
	return s.with(r, func(cl *client.Client) error {
		a, err := do(cl)
		if err != nil {
			return err
		}
		if asJSON {
			return printJSON(r, a)
		}
		return printAccount(r, a)
	})
}

func printAccount(r *runner, a client.Account) error {
	w := tabwriter.NewWriter(r.Stdout, 0, 8, 2, ' ', 0)
	row := func(name, value string) {
		if value != "" {
			_, _ = fmt.Fprintf(w, "%s\t%s\n", name, value)
		}
	}
	moment := func(t time.Time) string {
		if t.IsZero() {
			return ""
		}
		return t.UTC().Format(time.RFC3339)
	}
	row("account", a.ID)
	row("name", printable(a.Name, 0))
	row("email", printable(a.Email, 0))
	row("home", a.Home)
	row("granted", strings.Join(a.Regions, ", "))
	row("state", accountState(a))
	row("created", moment(a.Created))
	row("used", moment(a.Used))
	row("ends", moment(a.Ends))
	return w.Flush()
}

func accountState(a client.Account) string {
	if a.Disabled {
		return a.State + ", disabled"
	}
	return a.State
}

type accountListCmd struct {
	JSON bool `name:"json" help:"Print JSON lines."`
	operatorServer
}

func (c *accountListCmd) Run(r *runner) error {
	return c.with(r, func(cl *client.Client) error {
		accounts, err := cl.Accounts(r.interrupt)
		if err != nil {
			return err
		}
		if c.JSON {
			for _, a := range accounts {
				if err := printJSON(r, a); err != nil {
					return err
				}
			}
			return nil
		}
		w := tabwriter.NewWriter(r.Stdout, 0, 8, 2, ' ', 0)
		_, _ = fmt.Fprintln(w, "ACCOUNT\tHOME\tSTATE\tCREATED\tNAME")
		for _, a := range accounts {
			_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", a.ID, a.Home, accountState(a), a.Created.UTC().Format(time.DateOnly), printable(a.Name, 0))
		}
		return w.Flush()
	})
}

// accountID is the argument that the other commands share.
type accountID struct {
	ID   string `arg:"" help:"The account's id."`
	JSON bool   `name:"json" help:"Print JSON."`
	operatorServer
}

type accountShowCmd struct{ accountID }

func (c *accountShowCmd) Run(r *runner) error {
	return c.account(r, c.JSON, func(cl *client.Client) (client.Account, error) { return cl.Account(r.interrupt, c.ID) })
}

type accountChangeCmd struct {
	accountID

	Name  *string `help:"A name for people."`
	Email *string `help:"The e-mail address of the account's owner."`
}

func (c *accountChangeCmd) Run(r *runner) error {
	return c.account(r, c.JSON, func(cl *client.Client) (client.Account, error) {
		return cl.ChangeAccount(r.interrupt, c.ID, client.AccountChange{Name: c.Name, Email: c.Email})
	})
}

type accountDisableCmd struct{ accountID }

func (c *accountDisableCmd) Run(r *runner) error { return c.disable(r, true) }

type accountEnableCmd struct{ accountID }

func (c *accountEnableCmd) Run(r *runner) error { return c.disable(r, false) }

func (c *accountID) disable(r *runner, disabled bool) error {
	return c.account(r, c.JSON, func(cl *client.Client) (client.Account, error) {
		return cl.ChangeAccount(r.interrupt, c.ID, client.AccountChange{Disabled: &disabled})
	})
}

type accountGrantCmd struct{ accountID }

func (*accountGrantCmd) Help() string {
	return `The region is that of the server, COFFER_URL: what an account may do in another region is written there. The
grant is recorded in the audit log.`
}

func (c *accountGrantCmd) Run(r *runner) error { return c.grant(r, true) }

type accountRevokeCmd struct{ accountID }

func (c *accountRevokeCmd) Run(r *runner) error { return c.grant(r, false) }

func (c *accountID) grant(r *runner, granted bool) error {
	return c.account(r, c.JSON, func(cl *client.Client) (client.Account, error) {
		ready, err := cl.Ready(r.interrupt)
		if err != nil {
			return client.Account{}, err
		}
		return cl.GrantRegion(r.interrupt, c.ID, ready.Region, granted)
	})
}
