package cli

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"

	"github.com/cofferdb/coffer/journal/client"
)

type appPlanCmd struct {
	ID     string `arg:"" help:"The app: 32 hex digits."`
	Plan   string `arg:"" help:"The new plan: free, basic, pro, enterprise, or another of the region's plan table."`
	DryRun bool   `help:"Tell what would stay and what would go, and change nothing."`
	Wait   bool   `default:"true" negatable:"" help:"Wait for the end, and show how far it is."`
	JSON   bool   `name:"json" help:"Print JSON."`
	operatorServer
}

func (*appPlanCmd) Help() string {
	return `Reading and writing go on meanwhile; positions and cursors stay. A plan that keeps less hides at once what is too
old for it and destroys its keys, which cannot be undone: look with --dry-run first. A plan that keeps more keeps
everything that has not expired yet.

The region works on it also when this command is gone. One change of an app's plan at a time: another one is refused
with exit code 6 until it is done.

    coffer app plan $COFFER_APP enterprise --dry-run
    coffer app plan $COFFER_APP enterprise`
}

func (c *appPlanCmd) Run(r *runner) error {
	id, err := appServer{App: c.ID}.appID()
	if err != nil {
		return err
	}
	cl, err := c.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	if c.DryRun {
		p, err := cl.PreviewPlan(r.interrupt, id, c.Plan)
		if err != nil {
			return err
		}
		if c.JSON {
			return printJSON(r, p)
		}
		_, err = fmt.Fprintln(r.Stdout, previewText(p))
		return err
	}
	change, err := cl.ChangePlan(r.interrupt, id, c.Plan)
	if p := (*client.Problem)(nil); errors.As(err, &p) && p.Code() == "plan-changing" {
		return &failure{exitBusy, err}
	}
	if err != nil {
		return err
	}
	if c.Wait {
		if change, err = watchPlan(r, cl, change); err != nil {
			if r.interrupt.Err() != nil {
				r.say("coffer: the plan change goes on in the server")
			}
			return err
		}
	}
	if c.JSON {
		return printJSON(r, change)
	}
	_, err = fmt.Fprintln(r.Stdout, planText(change))
	return err
}

func previewText(p client.PlanPreview) string {
	text := fmt.Sprintf("%s to %s: %d events (%d bytes); %d would stay, %d would be hidden at once and their keys destroyed",
		p.From, p.To, p.Events, p.Bytes, p.Events-p.Hidden, p.Hidden)
	if p.Hidden > 0 {
		text += fmt.Sprintf(": those from %s to before %s", p.Oldest.UTC().Format(time.RFC3339), p.Before.UTC().Format(time.RFC3339))
	}
	return text
}

func planText(p client.PlanChange) string {
	text := fmt.Sprintf("%s to %s, %s", p.From, p.To, p.State)
	if !p.Ended() {
		text += " (" + p.Step + ")"
	}
	text += fmt.Sprintf(": %d copied, %d skipped, %d verified, %d keys destroyed", p.Copied, p.Skipped, p.Verified, p.Keys)
	if p.Error != "" {
		text += " (" + p.Error + ")"
	}
	return text
}

// watchPlan waits for the end of a plan change.
func watchPlan(r *runner, cl *client.Client, change client.PlanChange) (client.PlanChange, error) {
	f, isFile := r.Stderr.(*os.File)
	watched := isFile && term.IsTerminal(int(f.Fd()))
	var bar *progressbar.ProgressBar
	defer func() {
		if bar != nil {
			_ = bar.Clear()
		}
	}()
	told := time.Now()
	for wait := firstPoll; !change.Ended(); wait = min(2*wait, lastPoll) {
		// Each event is gone through twice: it is copied, and it is compared.
		total, through := 2*change.Total, min(change.Copied+change.Skipped, change.Total)+min(change.Verified, change.Total)
		switch {
		case watched && total > 0:
			if bar == nil {
				bar = progressbar.NewOptions64(int64(total), //nolint:gosec // a number of events
					progressbar.OptionSetWriter(r.Stderr), progressbar.OptionThrottle(drawInterval), progressbar.OptionFullWidth(),
					progressbar.OptionShowCount(), progressbar.OptionSetPredictTime(true), progressbar.OptionClearOnFinish())
			}
			bar.Describe(change.Step)
			_ = bar.Set64(int64(min(through, total))) //nolint:gosec // a number of events
		case !watched && time.Since(told) >= quietInterval:
			told = time.Now()
			r.say("%s: %d of %d", change.Step, through, total)
		}
		select {
		case <-time.After(wait):
		case <-r.interrupt.Done():
			return change, r.interrupt.Err()
		}
		next, err := cl.PlanChange(r.interrupt, change.App, change.Move)
		if err != nil {
			return change, err
		}
		change = next
	}
	return change, nil
}
