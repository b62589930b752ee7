package cli

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"

	"github.com/cofferdb/coffer/journal/client"
)

// keysJobFlags are those of every command that starts a job.
type keysJobFlags struct {
	App    string `help:"Only this app: 32 hex digits."`
	DryRun bool   `help:"Count what there is to do, and change nothing."`
	Wait   bool   `default:"true" negatable:"" help:"Wait for the end of the job, and show how far it is."`
	JSON   bool   `name:"json" help:"Print the job as JSON."`
	operatorServer
}

const jobHelp = `

The region works on the job also when this command is gone. The same command again shows how far it is, and goes on
with one that has stopped.`

type keysRewrapCmd struct{ keysJobFlags }

func (*keysRewrapCmd) Help() string {
	return `After "coffer keys rotate": each app's key is wrapped again under the latest version of its KEK, read back and
compared. It renews the wrapper, not the key: after a leak of an app key it does not help, "coffer keys replace"
does.` + jobHelp
}
func (c *keysRewrapCmd) Run(r *runner) error { return c.run(r, "rewrap", "") }

type keysMigrateCmd struct {
	To string `required:"" placeholder:"SETTING" help:"The new KEK, as kms in the configuration: local:PATH, vault+https://HOST/MOUNT/KEY?…, awskms:///KEY?…"`
	keysJobFlags
}

func (*keysMigrateCmd) Help() string {
	return `Moves the keys of the region's apps, or of one app, under another KEK while they are used: adds the new wraps and
verifies them, lets them be tried first, drops the old ones. New apps go under it from the beginning on. Files that
the setting names are read by the server. Afterwards let kms in the configuration name the new KEK, and retire the
old one.

    coffer keys migrate --to 'vault+https://vault.example:8200/transit/coffer-eu?auth=token&token_file=/etc/coffer/token'` + jobHelp
}
func (c *keysMigrateCmd) Run(r *runner) error { return c.run(r, "migrate", c.To) }

type keysReplaceCmd struct{ keysJobFlags }

func (*keysReplaceCmd) Help() string {
	return `Makes a new key for each app, and wraps what the old one wrapped under it. No event changes. Whoever has the old
key can no longer open what the keyring holds from now on; what they have opened already they have.` + jobHelp
}
func (c *keysReplaceCmd) Run(r *runner) error { return c.run(r, "replace", "") }

type keysVerifyCmd struct{ keysJobFlags }

func (*keysVerifyCmd) Help() string {
	return `Unwraps each app's key by each of its wraps, and opens every key below it.` + jobHelp
}
func (c *keysVerifyCmd) Run(r *runner) error { return c.run(r, "verify", "") }

func (c *keysJobFlags) run(r *runner, kind, to string) error {
	return c.with(r, func(cl *client.Client) error {
		job, err := cl.StartKeyJob(r.interrupt, client.KeyJobSpec{Kind: kind, App: c.App, To: to, DryRun: c.DryRun})
		if err != nil {
			return err
		}
		if c.Wait {
			if job, err = watchJob(r, cl, job); err != nil {
				if r.interrupt.Err() != nil {
					r.say("coffer: the job goes on: coffer keys jobs %s", job.ID)
				}
				return err
			}
		}
		if c.JSON {
			err = printJSON(r, job)
		} else {
			_, err = fmt.Fprintln(r.Stdout, jobText(job))
		}
		if err != nil {
			return err
		}
		return jobFailure(job)
	})
}

func jobFailure(job client.KeyJob) error {
	switch job.State {
	case "failed":
		var text strings.Builder
		fmt.Fprintf(&text, "%d apps failed", job.Failed)
		for _, f := range job.Failures {
			text.WriteString("; " + f.App + ": " + f.Error)
		}
		return &failure{exitIncomplete, errors.New(text.String())}
	case "stopped":
		return fmt.Errorf("the job has stopped: %s; when that is mended, the same command goes on", job.Error)
	}
	return nil
}

func jobText(j client.KeyJob) string {
	text := fmt.Sprintf("%s %s %s", j.Kind, j.ID, j.State)
	if j.DryRun {
		text += " (dry run)"
	}
	if j.Kind == "migrate" && j.Target != nil {
		text += " to " + j.Target.String()
	}
	verb := "done"
	if j.DryRun {
		verb = "to do"
	}
	text += fmt.Sprintf(": %d %s, %d skipped, %d failed of %d apps", j.Done, verb, j.Skipped, j.Failed, j.Total)
	if j.Error != "" {
		text += " (" + j.Error + ")"
	}
	return text
}

const (
	firstPoll = 50 * time.Millisecond
	lastPoll  = time.Second
)

// watchJob waits for the end of a job. Its bar is of one phase.
func watchJob(r *runner, cl *client.Client, job client.KeyJob) (client.KeyJob, error) {
	p := &jobProgress{runner: r, last: time.Now()}
	if f, ok := r.Stderr.(*os.File); ok {
		p.watched = term.IsTerminal(int(f.Fd()))
	}
	defer p.clear()
	for wait := firstPoll; !job.Ended(); wait = min(2*wait, lastPoll) {
		p.show(job)
		select {
		case <-time.After(wait):
		case <-r.interrupt.Done():
			return job, r.interrupt.Err()
		}
		next, err := cl.KeyJob(r.interrupt, job.ID)
		if err != nil {
			return job, err
		}
		job = next
	}
	return job, nil
}

type jobProgress struct {
	*runner

	watched bool
	bar     *progressbar.ProgressBar
	phase   string
	begun   time.Time
	first   int // already done when it was first seen
	last    time.Time
}

func (p *jobProgress) show(j client.KeyJob) {
	now := time.Now()
	through := j.Done + j.Skipped + j.Failed
	if p.phase != j.Phase {
		p.clear()
		p.phase, p.begun, p.first, p.bar = j.Phase, now, through, nil
	}
	rate := float64(through-p.first) / max(now.Sub(p.begun).Seconds(), 0.001)
	phases := map[string]string{"add": " 1/3", "prefer": " 2/3", "drop": " 3/3"}
	text := fmt.Sprintf("%s%s (%.0f/s)", j.Kind, phases[j.Phase], rate)
	if p.watched && j.Total > 0 {
		if p.bar == nil {
			p.bar = progressbar.NewOptions(j.Total,
				progressbar.OptionSetWriter(p.Stderr), progressbar.OptionThrottle(drawInterval), progressbar.OptionFullWidth(),
				progressbar.OptionShowCount(), progressbar.OptionSetPredictTime(true), progressbar.OptionClearOnFinish())
		}
		p.bar.Describe(text)
		_ = p.bar.Set(min(through, j.Total))
		return
	}
	if now.Sub(p.last) < quietInterval {
		return
	}
	p.last = now
	line := fmt.Sprintf("%s: %d of %d apps", text, through, j.Total)
	if rate > 0 {
		line += fmt.Sprintf(", about %s left", spoken(time.Duration(float64(j.Total-through)/rate*float64(time.Second))))
	}
	p.say("%s", line)
}

func (p *jobProgress) clear() {
	if p.bar != nil {
		_ = p.bar.Clear()
	}
}

type keysJobsCmd struct {
	ID   string `arg:"" optional:"" help:"Only this job."`
	JSON bool   `name:"json" help:"Print JSON lines."`
	operatorServer
}

func (c *keysJobsCmd) Run(r *runner) error {
	return c.with(r, func(cl *client.Client) error {
		var jobs []client.KeyJob
		var err error
		if c.ID != "" {
			var job client.KeyJob
			job, err = cl.KeyJob(r.interrupt, c.ID)
			jobs = []client.KeyJob{job}
		} else {
			jobs, err = cl.KeyJobs(r.interrupt)
		}
		if err != nil {
			return err
		}
		for _, job := range jobs {
			if c.JSON {
				err = printJSON(r, job)
			} else {
				_, err = fmt.Fprintf(r.Stdout, "%s  %s\n", job.Started.UTC().Format(time.RFC3339), jobText(job))
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// confirm lets something that cannot be undone pass: by --yes, or by a word that
// is typed at a terminal.
func confirm(r *runner, yes bool, what string, words ...string) error {
	if yes {
		return nil
	}
	f, ok := r.Stdin.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return &failure{ExitUsage, fmt.Errorf("this would %s: confirm it with --yes", what)}
	}
	words = slices.DeleteFunc(words, func(w string) bool { return w == "" })
	_, _ = fmt.Fprintf(r.Stderr, "This will %s. Type %s to go on: ", what, words[0])
	line, err := bufio.NewReader(r.Stdin).ReadString('\n')
	if err != nil || strings.TrimSpace(line) != words[0] {
		return &failure{ExitFailure, errors.New("nothing was done")}
	}
	return nil
}
