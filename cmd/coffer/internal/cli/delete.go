package cli

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/cofferdb/coffer/journal/client"
)

// deletionPoll is how often a deletion that is waited for is asked about.
const deletionPoll = 200 * time.Millisecond

// deleteFlags are those of both kinds of deletions.
type deleteFlags struct {
	DryRun bool `help:"Only tell how much there is."`
	Yes    bool `help:"Do not ask."`
	NoWait bool `help:"Do not wait until everything is removed."`
	JSON   bool `name:"json" help:"Print JSON."`
	operatorServer
}

// deletion is what is to be deleted.
type deletion struct {
	what, word string
	would      func(context.Context, *client.Client) (client.WouldDelete, error)
	begin      func(context.Context, *client.Client) (client.Deletion, error)
}

func (f *deleteFlags) run(r *runner, d deletion) error {
	return f.with(r, func(cl *client.Client) error {
		if f.DryRun {
			would, err := d.would(r.interrupt, cl)
			if err != nil {
				return err
			}
			if f.JSON {
				return printJSON(r, would)
			}
			return printWould(r, would)
		}
		if err := confirm(r, f.Yes, "delete for ever "+d.what, d.word); err != nil {
			return err
		}
		job, err := d.begin(r.interrupt, cl)
		if err != nil {
			return err
		}
		for !f.NoWait && job.State != "done" {
			select {
			case <-r.interrupt.Done():
				return fmt.Errorf("the deletion goes on in the server: %w", r.interrupt.Err())
			case <-time.After(deletionPoll):
			}
			if job, err = cl.Deletion(r.interrupt, job.ID); err != nil {
				return err
			}
			if job.Error != "" {
				r.say("step %s waits: %s", job.Step, job.Error)
			}
		}
		if f.JSON {
			return printJSON(r, job)
		}
		if job.State != "done" {
			_, err = fmt.Fprintf(r.Stdout, "%s answers nobody any more; the deletion goes on in the server, at step %s\n", d.what, job.Step)
			return err
		}
		_, err = fmt.Fprintf(r.Stdout, "%s is deleted (%d removed)\n", d.what, job.Removed)
		return err
	})
}

func printWould(r *runner, would client.WouldDelete) error {
	w := tabwriter.NewWriter(r.Stdout, 0, 8, 2, ' ', 0)
	for _, app := range would.Apps {
		_, _ = fmt.Fprintf(w, "%s\tall keys\n", app.App)
		for _, kind := range slices.Sorted(maps.Keys(app.Counts)) {
			_, _ = fmt.Fprintf(w, "\t%d %s\n", app.Counts[kind], kind)
		}
	}
	if len(would.Apps) == 0 {
		_, _ = fmt.Fprintln(w, "no apps")
	}
	return w.Flush()
}

type appDeleteCmd struct {
	ID string `arg:"" help:"The app: 32 hex digits."`
	deleteFlags
}

func (*appDeleteCmd) Help() string {
	return `Destroys the app's keys, then removes its messages, views, profiles, endpoints and exports. The app answers nobody
from the first moment on, nothing of it can be opened by anybody, in backups of the data either, and its id is not
given again. There is no way back. Interrupting the command does not stop the deletion; the same command follows it.`
}

func (c *appDeleteCmd) Run(r *runner) error {
	id, err := appServer{App: c.ID}.appID()
	if err != nil {
		return err
	}
	return c.run(r, deletion{
		what: "app " + c.ID, word: c.ID,
		would: func(ctx context.Context, cl *client.Client) (client.WouldDelete, error) {
			return cl.WouldDeleteApp(ctx, id)
		},
		begin: func(ctx context.Context, cl *client.Client) (client.Deletion, error) { return cl.DeleteApp(ctx, id) },
	})
}

type accountDeleteCmd struct {
	ID string `arg:"" help:"The account's id."`
	deleteFlags
}

func (*accountDeleteCmd) Help() string {
	return `Deletes every app of the account as "coffer app delete" does, then destroys its registration data with its key. The
account's id is not given again. There is no way back.`
}

func (c *accountDeleteCmd) Run(r *runner) error {
	return c.run(r, deletion{
		what: "account " + c.ID + " with its apps", word: c.ID,
		would: func(ctx context.Context, cl *client.Client) (client.WouldDelete, error) {
			return cl.WouldDeleteAccount(ctx, c.ID)
		},
		begin: func(ctx context.Context, cl *client.Client) (client.Deletion, error) {
			return cl.DeleteAccount(ctx, c.ID)
		},
	})
}
