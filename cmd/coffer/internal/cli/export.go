package cli

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"

	"github.com/cofferdb/coffer/cmd/coffer/internal/exportdir"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/client"
)

type exportCmd struct {
	Dir          string   `arg:"" name:"dir" help:"Where the files go; made when it is not there."`
	Format       string   `enum:"ndjson,agora" default:"ndjson" help:"ndjson: lines as a replay has them. agora: a gzip file of lines for each UTC hour, as Agora Chat exports them."`
	From         string   `placeholder:"TIME" help:"Only events of this time or later: RFC 3339, or a date."`
	Until        string   `placeholder:"TIME" help:"Only events before this time."`
	Conversation string   `placeholder:"ID" help:"Only events of this conversation."`
	User         string   `placeholder:"ID" help:"Only events that this user sent, or was sent directly."`
	Type         []string `placeholder:"TYPE" help:"Only events of these types: message.sent, receipt.read, …"`
	Keep         bool     `help:"Leave the export at the server, which removes it after a week."`
	Verify       bool     `help:"Fetch nothing: compare the files of DIR with their manifest."`
	JSON         bool     `name:"json" help:"Print the manifest as JSON."`
	appServer
}

func (*exportCmd) Help() string {
	return `Asks the server for an export of what the app has now, waits until it is made, and writes its files and manifest.json
into DIR, readable by their owner only. Every file is compared with its digest. The same command goes on after an
interrupt, a kill or a cut connection: what is there already is not fetched again.

Events that are recalled, erased or expire while the export is fetched are not in it. "coffer import events DIR", and
"coffer import agora DIR" for hourly files, read it back.

    coffer export out
    coffer export --format agora --from 2026-01-02 --until 2026-01-03 hours
    coffer export --verify out`
}

func (c *exportCmd) Run(r *runner) error {
	if c.Verify {
		m, err := exportdir.Verify(c.Dir)
		if err != nil {
			return err
		}
		return c.print(r, m)
	}
	o, err := c.options()
	if err != nil {
		return &failure{ExitUsage, err}
	}
	if o.App, err = c.appID(); err != nil {
		return err
	}
	cl, err := c.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	shown := newExportProgress(r)
	o.Progress = shown.show
	m, err := exportdir.Fetch(r.interrupt, cl, c.Dir, o)
	shown.finish()
	switch {
	case errors.Is(err, exportdir.ErrComplete), errors.Is(err, exportdir.ErrAnother), errors.Is(err, exportdir.ErrFailed):
		return err
	case err != nil && r.interrupt.Err() != nil:
		r.say("coffer: interrupted; the same command goes on")
		return &failure{code: ExitInterrupted}
	case err != nil:
		return fmt.Errorf("the export stopped: %w; the same command goes on", err)
	}
	return c.print(r, m)
}

// options takes times that mean the same when the command is repeated: an age
// would not.
func (c *exportCmd) options() (exportdir.Options, error) {
	o := exportdir.Options{
		Format: c.Format, Keep: c.Keep,
		Filters: client.ExportFilters{Conversation: c.Conversation, User: c.User},
	}
	for _, at := range []struct {
		flag, text string
		into       *time.Time
	}{{"--from", c.From, &o.Filters.From}, {"--until", c.Until, &o.Filters.Until}} {
		if at.text == "" {
			continue
		}
		t, err := time.Parse(time.RFC3339Nano, at.text)
		if err != nil {
			t, err = time.Parse(time.DateOnly, at.text)
		}
		if err != nil {
			return o, fmt.Errorf("%s: %q is no time: write 2026-01-02T15:04:05Z or 2026-01-02", at.flag, at.text)
		}
		*at.into = t.UTC()
	}
	for _, list := range c.Type {
		for name := range strings.SplitSeq(list, ",") {
			if _, err := journal.ParseType(name); err != nil {
				return o, fmt.Errorf("--type: %q is not a type of event", name)
			}
			o.Filters.Types = append(o.Filters.Types, name)
		}
	}
	return o, nil
}

func (c *exportCmd) print(r *runner, m client.ExportManifest) error {
	if c.JSON {
		return printJSON(r, m)
	}
	_, err := fmt.Fprintf(r.Stdout, "events %d, files %d, bytes %d, through %s, sha256 %s\n", m.Events, len(m.Files), m.Bytes, m.Through, m.SHA256)
	if m.LeftOut > 0 {
		r.say("%d events have no form in the hourly files and were left out; --format ndjson has them", m.LeftOut)
	}
	return err
}

// exportProgress shows how far an export is: a bar on a terminal, otherwise a line
// now and then.
type exportProgress struct {
	r       *runner
	watched bool
	bar     *progressbar.ProgressBar
	making  bool
	last    time.Time
}

func newExportProgress(r *runner) *exportProgress {
	p := &exportProgress{r: r, last: time.Now()}
	if f, ok := r.Stderr.(*os.File); ok {
		p.watched = term.IsTerminal(int(f.Fd()))
	}
	return p
}

func (p *exportProgress) show(s exportdir.Progress) {
	if p.watched {
		p.draw(s)
		return
	}
	now := time.Now()
	if now.Sub(p.last) < quietInterval {
		return
	}
	p.last = now
	if !s.Fetching {
		p.r.say("the server is making the export: %.0f %%", 100*s.Making)
		return
	}
	p.r.say("fetched %d of %d files, %.0f %%", s.Files, s.Of, 100*float64(s.Bytes)/float64(max(1, s.Total)))
}

// draw moves a bar: of thousandths while the export is made, then of bytes.
func (p *exportProgress) draw(s exportdir.Progress) {
	if p.bar == nil || p.making == s.Fetching {
		p.finish()
		total, what := int64(1000), "making"
		if s.Fetching {
			total, what = max(1, s.Total), "fetching"
		}
		p.making = !s.Fetching
		p.bar = progressbar.NewOptions64(total,
			progressbar.OptionSetWriter(p.r.Stderr), progressbar.OptionThrottle(drawInterval), progressbar.OptionFullWidth(),
			progressbar.OptionShowBytes(s.Fetching), progressbar.OptionSetPredictTime(true), progressbar.OptionClearOnFinish(),
			progressbar.OptionSetDescription(what))
	}
	if s.Fetching {
		_ = p.bar.Set64(min(s.Bytes, max(0, s.Total-1))) // finish removes it
	} else {
		_ = p.bar.Set64(min(999, int64(1000*s.Making)))
	}
}

func (p *exportProgress) finish() {
	if p.bar != nil {
		_ = p.bar.Clear()
	}
}
