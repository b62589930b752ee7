package cli

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/cofferdb/coffer/journal/client"
	"github.com/cofferdb/coffer/kms"
)

// Exit codes of the keys commands, beside those of every command.
const (
	exitNeeded     = 4 // refused: something still needs the key
	exitIncomplete = 5 // came to its end, and some apps failed
	exitBusy       = 6 // refused: another job is under way
)

type keysCmds struct {
	Status    keysStatusCmd    `cmd:"" help:"Tell what wraps what, and how every KEK is."`
	Inventory keysInventoryCmd `cmd:"" help:"List every app and what wraps its key."`
	Rotate    keysRotateCmd    `cmd:"" help:"Make a new version of the KEK for new apps."`
	Rewrap    keysRewrapCmd    `cmd:"" help:"Wrap app keys under the latest version of their KEK."`
	Migrate   keysMigrateCmd   `cmd:"" help:"Move app keys under another KEK."`
	Replace   keysReplaceCmd   `cmd:"" help:"Make new app keys (re-keying, after a leak of an app key)."`
	Verify    keysVerifyCmd    `cmd:"" help:"Unwrap and open every key."`
	Retire    keysRetireCmd    `cmd:"" help:"End old versions of a KEK, or a whole KEK."`
	Shred     keysShredCmd     `cmd:"" help:"Destroy the keys of an app or of a user, for ever."`
	Jobs      keysJobsCmd      `cmd:"" help:"List jobs, or show one."`
	Backup    keysBackupCmd    `cmd:"" help:"Register a kept copy of the keyring, or list them."`
	Doctor    keysDoctorCmd    `cmd:"" help:"Say what should be done about the keys."`
}

func (keysCmds) Help() string {
	return `A KEK (key encryption key) lives in Vault, AWS KMS or a file and wraps the keys of apps. These commands are
about the region of COFFER_URL and need COFFER_OPERATOR_TOKEN. No event is read or written by any of them.

Rewrapping renews the wrapper only. After a leak of an app key, replace; docs/operations/keys.md says what helps
after which leak.

Exit codes: 0 done, 1 failure (also a job that stopped: the same command goes on with it), 2 wrong usage,
4 refused because something still needs the key, 5 came to its end with failures, 6 refused because another job is
under way, 130 interrupted (the job goes on in the server).`
}

// keysFailure gives an error the exit code that scripts branch on.
func keysFailure(err error) error {
	p := (*client.Problem)(nil)
	if !errors.As(err, &p) {
		return err
	}
	switch p.Code() {
	case "key-needed":
		var text strings.Builder
		text.WriteString(p.Error())
		for _, use := range p.Uses {
			text.WriteString("; " + useText(use))
		}
		if more := p.Needed - len(p.Uses); more > 0 && len(p.Uses) > 0 {
			text.WriteString(fmt.Sprintf("; and %d more", more))
		}
		return &failure{exitNeeded, errors.New(text.String() + " (rewrap or migrate first, or let the backup run out)")}
	case "keys-busy":
		return &failure{exitBusy, fmt.Errorf("%w (coffer keys jobs tells how far it is)", err)}
	}
	return err
}

func useText(u client.KeyUse) string {
	if u.Backup != "" {
		return "backup " + u.Backup + " needs " + u.Wrap
	}
	return "app " + u.App + " needs " + u.Wrap
}

// with runs a call with a client, and maps its error to an exit code.
func (s operatorServer) with(r *runner, do func(cl *client.Client) error) error {
	cl, err := s.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	return keysFailure(do(cl))
}

type keysStatusCmd struct {
	JSON bool `name:"json" help:"Print JSON."`
	operatorServer
}

func (c *keysStatusCmd) Run(r *runner) error {
	return c.with(r, func(cl *client.Client) error {
		s, err := cl.KeyStatus(r.interrupt)
		if err != nil {
			return err
		}
		if c.JSON {
			return printJSON(r, s)
		}
		return printKeyStatus(r, s)
	})
}

func printKeyStatus(r *runner, s client.KeyStatus) error {
	w := tabwriter.NewWriter(r.Stdout, 0, 8, 2, ' ', 0)
	_, _ = fmt.Fprintf(w, "region %s\t%d apps\t%d keys in memory\n", s.Region, s.Apps, s.Cached)
	for _, k := range s.KEKs {
		state := k.Error
		latest := ""
		if k.Description != nil {
			state, latest = string(k.Description.State), k.Description.Version
		}
		if !k.Configured {
			state = "not configured"
		}
		if k.Primary {
			state += ", for new apps"
		}
		_, _ = fmt.Fprintf(w, "%s\t%s\n", k.Identity, state)
		for _, v := range slices.Sorted(maps.Keys(k.Versions)) {
			note := ""
			if v == latest {
				note = "latest"
			}
			_, _ = fmt.Fprintf(w, "  version %s\t%d wraps\t%s\n", v, k.Versions[v], note)
		}
		if _, used := k.Versions[latest]; latest != "" && !used {
			_, _ = fmt.Fprintf(w, "  version %s\t0 wraps\tlatest\n", latest)
		}
	}
	for _, u := range s.Unknown {
		_, _ = fmt.Fprintf(w, "%s\tdoes not answer: %s\n", u.Setting, u.Error)
	}
	if s.Bridged > 0 {
		_, _ = fmt.Fprintf(w, "bridged\t%d keys are used past their revalidation since %s\n", s.Bridged, s.Since.UTC().Format(time.RFC3339))
	}
	for _, b := range s.Backups {
		_, _ = fmt.Fprintf(w, "backup %s\tkept until %s\n", b.ID, b.Until.UTC().Format(time.RFC3339))
	}
	if s.Job != nil {
		_, _ = fmt.Fprintf(w, "last job\t%s\n", jobText(*s.Job))
	}
	return w.Flush()
}

type keysInventoryCmd struct {
	App  string `placeholder:"ID" help:"Only this app, with the epochs of its keys."`
	JSON bool   `name:"json" help:"Print JSON lines."`
	operatorServer
}

func (*keysInventoryCmd) Help() string {
	return `With --app also the epochs: each has a key of its own, which is destroyed when the last of what it seals has
expired. Those whose key was destroyed more than 30 days ago are left out.

    coffer keys inventory
    coffer keys inventory --app "$COFFER_APP"`
}

func (c *keysInventoryCmd) Run(r *runner) error {
	return c.with(r, func(cl *client.Client) error {
		w := tabwriter.NewWriter(r.Stdout, 0, 8, 2, ' ', 0)
		list := func(fn func(client.AppKeys) error) error { return cl.KeyInventory(r.interrupt, fn) }
		if c.App != "" {
			list = func(fn func(client.AppKeys) error) error {
				app, err := cl.KeysOf(r.interrupt, c.App)
				if err != nil {
					return err
				}
				return fn(app)
			}
		}
		err := list(func(app client.AppKeys) error {
			if c.JSON {
				return printJSON(r, app)
			}
			if app.Destroyed {
				_, _ = fmt.Fprintf(w, "%s\tdestroyed\n", app.App)
			}
			for _, e := range app.Epochs {
				state := "does not end"
				switch {
				case !e.Destroyed.IsZero():
					state = "destroyed " + e.Destroyed.UTC().Format(time.RFC3339)
				case !e.Expires.IsZero():
					state = "until " + e.Expires.UTC().Format(time.RFC3339)
				}
				_, _ = fmt.Fprintf(w, "%s\tepoch %d\t%s\t%s\n", app.App, e.ID, e.Class, state)
			}
			for _, key := range app.Keys {
				for _, wrap := range key.Wraps {
					_, _ = fmt.Fprintf(w, "%s\tkey %d\t%s:%s\tversion %s\t%s\n", app.App, key.Generation, wrap.Provider, wrap.Key, wrap.Version, wrap.WrappedAt.UTC().Format(time.RFC3339))
				}
			}
			return nil
		})
		return errors.Join(err, w.Flush())
	})
}

type keysRotateCmd struct {
	JSON bool `name:"json" help:"Print JSON."`
	operatorServer
}

func (*keysRotateCmd) Help() string {
	return `New wraps use the new version at once; what is wrapped already stays readable. "coffer keys rewrap" brings it
under the new version, after which "coffer keys retire" can end the old ones.`
}

func (c *keysRotateCmd) Run(r *runner) error {
	return c.with(r, func(cl *client.Client) error {
		v, err := cl.RotateKEK(r.interrupt)
		switch {
		case errors.Is(err, client.ErrUnavailable):
			return fmt.Errorf("%w; it may have been done: coffer keys status shows the latest version", err)
		case err != nil:
			return err
		case c.JSON:
			return printJSON(r, v)
		}
		_, err = fmt.Fprintf(r.Stdout, "%s is at version %s\n", v.Identity, v.Version)
		return err
	})
}

type keysRetireCmd struct {
	KEK    string `name:"kek" placeholder:"PROVIDER:KEY" help:"The KEK, as status shows it; the one for new apps if left out."`
	Before string `placeholder:"VERSION" help:"End the versions before this one; before the latest if left out."`
	Whole  bool   `help:"Retire the whole KEK: disable it where that can be done from here, and take it out of the region's settings."`
	DryRun bool   `help:"Only tell what still needs it."`
	Yes    bool   `help:"Do not ask."`
	JSON   bool   `name:"json" help:"Print JSON."`
	operatorServer
}

func (*keysRetireCmd) Help() string {
	return `Refuses (exit code 4), and names what needs it, while an app or a registered backup does. It reports success only
once the provider confirms it. It cannot be undone everywhere. AWS KMS keeps old versions for ever: there migrate to
another key and retire the old one with --whole.

    coffer keys retire --dry-run
    coffer keys retire --kek vault:vault.example:8200/transit/coffer-eu --before 3 --yes`
}

func (c *keysRetireCmd) Run(r *runner) error {
	return c.with(r, func(cl *client.Client) error {
		id, before, err := c.which(r, cl)
		if err != nil {
			return err
		}
		what := "the versions of " + id.String() + " before " + before
		if c.Whole {
			what = "the whole KEK " + id.String()
		}
		if !c.DryRun {
			if err := confirm(r, c.Yes, "retire "+what, before, "retire"); err != nil {
				return err
			}
		}
		found, err := cl.RetireKEK(r.interrupt, id, before, c.DryRun)
		if err != nil {
			return err
		}
		if c.JSON {
			err = printJSON(r, found)
		} else {
			for _, use := range found.Uses {
				_, _ = fmt.Fprintln(r.Stdout, useText(use))
			}
			switch {
			case found.Done:
				_, err = fmt.Fprintf(r.Stdout, "retired %s\n", what)
			case found.Needed == 0:
				_, err = fmt.Fprintf(r.Stdout, "nothing needs %s\n", what)
			}
		}
		if err == nil && found.Needed > 0 {
			return &failure{exitNeeded, fmt.Errorf("%d wraps still need %s", found.Needed, what)}
		}
		return err
	})
}

// which finds out what was left out.
func (c *keysRetireCmd) which(r *runner, cl *client.Client) (id kms.Identity, before string, err error) {
	if c.Whole && (c.Before != "" || c.KEK == "") {
		return id, "", &failure{ExitUsage, errors.New("--whole goes with --kek and without --before")}
	}
	if c.KEK != "" {
		var ok bool
		if id.Provider, id.Key, ok = strings.Cut(c.KEK, ":"); !ok {
			return id, "", &failure{ExitUsage, errors.New("--kek is PROVIDER:KEY, as coffer keys status shows it")}
		}
	}
	if c.Whole || (c.KEK != "" && c.Before != "") {
		return id, c.Before, nil
	}
	s, err := cl.KeyStatus(r.interrupt)
	if err != nil {
		return id, "", err
	}
	for _, k := range s.KEKs {
		if (c.KEK == "" && !k.Primary) || (c.KEK != "" && k.Identity != id) {
			continue
		}
		if c.Before != "" {
			return k.Identity, c.Before, nil
		}
		if k.Description == nil {
			return id, "", fmt.Errorf("%s does not tell its latest version now: %s", k.Identity, k.Error)
		}
		return k.Identity, k.Description.Version, nil
	}
	return id, "", errors.New("the region has no such KEK: see coffer keys status")
}

type keysShredCmd struct {
	App  string `required:"" help:"The app: 32 hex digits."`
	User string `help:"Only what this user has sent."`
	Yes  bool   `help:"Do not ask."`
	JSON bool   `name:"json" help:"Print JSON."`
	operatorServer
}

func (*keysShredCmd) Help() string {
	return `Nothing that the keys have sealed can be opened again, by anybody, in backups of the data either. There is no way
back. Repeat it after an error: it can be done twice.`
}

func (c *keysShredCmd) Run(r *runner) error {
	return c.with(r, func(cl *client.Client) error {
		what, word := "every message of app "+c.App, c.App
		if c.User != "" {
			what, word = "every message that user "+c.User+" of app "+c.App+" has sent", c.User
		}
		if err := confirm(r, c.Yes, "destroy for ever "+what, word); err != nil {
			return err
		}
		if err := cl.ShredKeys(r.interrupt, c.App, c.User); err != nil {
			return err
		}
		if c.JSON {
			return printJSON(r, struct {
				App  string `json:"app"`
				User string `json:"user,omitempty"`
				Done bool   `json:"done"`
			}{c.App, c.User, true})
		}
		_, err := fmt.Fprintf(r.Stdout, "the keys of %s are destroyed\n", what)
		return err
	})
}

type keysBackupCmd struct {
	ID        string        `name:"id" help:"Name of the copy: a-z, 0-9 and -. Without it the copies are listed."`
	Keep      time.Duration `help:"How long the copy is kept, such as 720h."`
	Destroyed bool          `help:"The copy was destroyed: take it off the list."`
	JSON      bool          `name:"json" help:"Print JSON."`
	operatorServer
}

func (*keysBackupCmd) Help() string {
	return `A copy of the keyring can be read only while the KEKs of its wraps can unwrap. Register each before it is made:
retire then refuses to end what it needs.

    coffer keys backup --id 2026-11-24 --keep 720h
    coffer keys backup`
}

func (c *keysBackupCmd) Run(r *runner) error {
	return c.with(r, func(cl *client.Client) error {
		switch {
		case c.ID == "" && (c.Keep != 0 || c.Destroyed), c.ID != "" && (c.Keep > 0) == c.Destroyed:
			return &failure{ExitUsage, errors.New("--id goes with either --keep or --destroyed")}
		case c.Destroyed:
			return cl.EndKeyBackup(r.interrupt, c.ID)
		case c.ID != "":
			b, err := cl.AddKeyBackup(r.interrupt, c.ID, time.Now().Add(c.Keep).UTC().Truncate(time.Second))
			if err != nil {
				return err
			}
			return c.print(r, []client.KeyBackup{b})
		}
		all, err := cl.KeyBackups(r.interrupt)
		if err != nil {
			return err
		}
		return c.print(r, all)
	})
}

func (c *keysBackupCmd) print(r *runner, backups []client.KeyBackup) error {
	for _, b := range backups {
		if c.JSON {
			if err := printJSON(r, b); err != nil {
				return err
			}
			continue
		}
		if _, err := fmt.Fprintf(r.Stdout, "%s  kept until %s, needs %d versions of KEKs\n", b.ID, b.Until.UTC().Format(time.RFC3339), len(b.Wraps)); err != nil {
			return err
		}
	}
	return nil
}

type keysDoctorCmd struct {
	JSON bool `name:"json" help:"Print JSON."`
	operatorServer
}

func (c *keysDoctorCmd) Run(r *runner) error {
	return c.with(r, func(cl *client.Client) error {
		findings, err := cl.KeyFindings(r.interrupt)
		if err != nil {
			return err
		}
		problems := 0
		w := tabwriter.NewWriter(r.Stdout, 0, 8, 2, ' ', 0)
		for _, f := range findings {
			if f.Level == "problem" {
				problems++
			}
			if !c.JSON {
				_, _ = fmt.Fprintf(w, "%s\t%s\t%s\n", f.Level, f.Check, f.Detail)
			}
		}
		if c.JSON {
			err = printJSON(r, findings)
		} else {
			err = w.Flush()
		}
		if err == nil && problems > 0 {
			return &failure{ExitFailure, fmt.Errorf("%d problems", problems)}
		}
		return err
	})
}
