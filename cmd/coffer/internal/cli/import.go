package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/exportdir"
	"github.com/cofferdb/coffer/cmd/coffer/internal/importer"
	"github.com/cofferdb/coffer/journal/client"
)

const defaultRejects = "coffer-rejects.ndjson"

type importCmds struct {
	Agora  importAgoraCmd  `cmd:"" help:"Import the history export of Agora Chat (Easemob)."`
	Events importEventsCmd `cmd:"" help:"Import what coffer export or coffer replay has written."`
}

// importFlags are those of every import.
type importFlags struct {
	Files   []string `arg:"" name:"file" help:"Files of JSON lines, plain or gzip; - is standard input; a directory that coffer export has written is verified and read."`
	Rejects string   `placeholder:"FILE" default:"${rejects}" help:"Where lines that cannot be imported are kept (default ${default})."`
	JSON    bool     `name:"json" help:"Print the summary as JSON."`
	Batch   int      `default:"500" help:"Messages in a request, at most 1000."`
	appServer
}

type importAgoraCmd struct {
	RebaseTime bool `help:"Shift all times alike, so that the newest message is of now."`
	Lanes      int  `default:"4" help:"Requests under way at once; a conversation keeps to one of them."`
	importFlags
}

type importEventsCmd struct {
	Lanes int `default:"1" help:"Requests under way at once. With more than one the order is kept within conversations only."`
	importFlags
}

func (*importEventsCmd) Help() string {
	return `Reads events as coffer export --format ndjson and coffer replay write them, and appends each with its id, time and
content, in the order of the files. Into the app that they came from everything is a duplicate; into another one, or
the same after its data was lost, they are stored again, with new positions.

Events of types that only a server writes are counted and left out. Exit codes are those of coffer import agora.

    coffer import events out
    coffer replay --from 24h | coffer import events --app OTHER -`
}

func (c *importEventsCmd) Run(r *runner) error {
	return c.run(r, importer.Options{Parse: importer.ParseEvent, Lanes: c.Lanes}, client.ExportNDJSON)
}

func (c *importAgoraCmd) Run(r *runner) error {
	return c.run(r, importer.Options{Rebase: c.RebaseTime, Lanes: c.Lanes}, client.ExportAgora)
}

func (*importAgoraCmd) Help() string {
	return `Reads one JSON object a line, as the history export and the post-send callbacks have them, and appends each as an
event whose id is the message's. What is stored already is not stored again, so an import that was interrupted is
run again with the same command, and so is one whose rejected lines were repaired.

Messages older than the app's plan keeps are counted and skipped. With --rebase-time the newest message becomes one
of now and the others keep their distance from it; a second run finds the shift of the first by what is stored.

A line that cannot be imported is reported with file and line and kept in the rejects file, a JSON line each with
file, line, reason and the raw line. The others are imported all the same.

Exit codes: 0 everything imported, 1 stopped by a failure, 3 came to the end with rejected lines or unreadable
files, 130 interrupted.

    coffer import agora 2026010100.gz 2026010101.gz
    coffer import agora --rebase-time history.jsonl.gz
    zcat *.gz | coffer import agora -`
}

// report is the summary as JSON.
type report struct {
	importer.Summary
	Shift       string `json:"shift,omitzero"` // what --rebase-time added to the times
	RejectsFile string `json:"rejects_file,omitzero"`
	Complete    bool   `json:"complete"` // every file was read to its end
}

// files replaces directories by the files of the exports in them.
func (c *importFlags) files(format string) ([]string, error) {
	var all []string
	for _, name := range c.Files {
		if info, err := os.Stat(name); err != nil || !info.IsDir() {
			all = append(all, name)
			continue
		}
		paths, has, err := exportdir.Files(name)
		if err != nil {
			return nil, err
		}
		if has != format {
			return nil, &failure{ExitUsage, fmt.Errorf("%s has an export of the format %s: coffer import %s reads it", name, has, map[string]string{
				client.ExportNDJSON: "events", client.ExportAgora: "agora",
			}[has])}
		}
		all = append(all, paths...)
	}
	return all, nil
}

func (c *importFlags) run(r *runner, o importer.Options, format string) error {
	if c.Batch < 1 || c.Batch > 1000 || o.Lanes < 1 || o.Lanes > 64 {
		return &failure{ExitUsage, errors.New("--batch must be 1 to 1000 and --lanes 1 to 64")}
	}
	var err error
	if o.Files, err = c.files(format); err != nil {
		return err
	}
	cl, err := c.clientWith(r, func(cfg *client.Config) { cfg.Unasked = true })
	if err != nil {
		return err
	}
	defer cl.Close()
	progress := newProgress(r)
	quit := context.AfterFunc(r.interrupt, func() {
		_, _ = fmt.Fprintln(progress, "finishing what is under way; interrupt again to stop at once")
	})
	defer quit()
	o.Stdin, o.Rejects, o.Batch, o.Stop, o.Talk, o.Progress = r.Stdin, c.Rejects, c.Batch, r.interrupt.Done(), progress, progress.show
	// The first interrupt lets the batches under way finish; a second one ends the
	// process (see Main).
	result, err := importer.Run(context.WithoutCancel(r.interrupt), cl, o)
	progress.finish()
	complete := err == nil || errors.Is(err, importer.ErrUnreadable)
	if printErr := c.print(r, result, complete, o.Rebase); printErr != nil {
		return printErr
	}
	switch {
	case errors.Is(err, importer.ErrInterrupted):
		r.say("coffer: interrupted; what was sent is stored. Run the same command again to go on: nothing is stored twice.")
		return &failure{code: ExitInterrupted}
	case errors.Is(err, importer.ErrUnreadable):
		return &failure{ExitPartial, err}
	case err != nil:
		return fmt.Errorf("the import stopped: %w; run the same command again to go on, nothing is stored twice", err)
	case result.Rejected > 0:
		return &failure{ExitPartial, fmt.Errorf("%d lines were rejected: see %s, repair them and import that file's raw lines", result.Rejected, result.RejectsFile)}
	}
	return nil
}

func (c *importFlags) print(r *runner, res importer.Result, complete, rebase bool) error {
	if res.SkippedExpired > 0 && !rebase {
		r.say("%d messages are older than the app's plan keeps and were skipped; import agora --rebase-time would shift all times", res.SkippedExpired)
	}
	if res.SkippedServer > 0 {
		r.say("%d events are of types that only a server writes and were left out", res.SkippedServer)
	}
	if rebase && res.ShiftFound {
		r.say("the times were shifted as in the earlier import of these messages, by %s", res.Shift)
	}
	if c.JSON {
		out := report{Summary: res.Summary, RejectsFile: res.RejectsFile, Complete: complete}
		if rebase {
			out.Shift = res.Shift.String()
		}
		return printJSON(r, out)
	}
	_, err := fmt.Fprintf(r.Stdout, "read %d, imported %d, duplicates %d, skipped as expired %d, rejected %d\n",
		res.Read, res.Imported, res.Duplicates, res.SkippedExpired, res.Rejected)
	return err
}

// spoken rounds a time that is left for reading.
func spoken(d time.Duration) string {
	if d > time.Minute {
		return d.Round(time.Minute).String()
	}
	return d.Round(time.Second).String()
}
