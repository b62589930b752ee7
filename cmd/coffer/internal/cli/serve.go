package cli

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/node"
)

type serveCmd struct {
	Dev            bool          `xor:"how" help:"Run the four regions on loopback ports, with an app to try things with."`
	Config         string        `xor:"how" placeholder:"FILE" help:"Run what this file (TOML) says."`
	Data           string        `default:"coffer-data" placeholder:"DIR" help:"With --dev: where everything is stored (default ${default})."`
	PortBase       int           `default:"7441" help:"With --dev: the first of four ports; 0 takes free ones (default ${default})."`
	Day            time.Duration `placeholder:"TIME" help:"With --dev: how long a day lasts, 1s to 24h. Everything that is kept for days goes as much sooner; for a new data directory."`
	CallbacksAllow []string      `placeholder:"CIDR" help:"With --dev: networks that webhook requests may go to although they are not public, such as 127.0.0.0/8 for receivers on this machine."`
	Compat         bool          `help:"With --dev: also listen as Agora Chat's REST interface, on a free port for each region."`
	LogLevel       string        `default:"warn" enum:"debug,info,warn,error" help:"With --dev: what is logged to standard error."`
}

func (*serveCmd) Help() string {
	return `With --dev everything is made on the first start: an authority and certificates for TLS, keys in files, an account,
and one app per region on the enterprise plan. DIR/dev.env holds what the other commands need for the region eu,
DIR/dev.json the same for every region. Both are readable by their owner only.

    coffer serve --dev
    coffer serve --dev --data /tmp/try --port-base 0
    coffer serve --dev --data /tmp/fast --day 2s    # what is kept 3 days is gone after 6 seconds
    coffer serve --config /etc/coffer/coffer.toml`
}

func (c *serveCmd) Run(r *runner) error {
	switch {
	case c.Day != 0 && !c.Dev:
		return &failure{ExitUsage, errors.New("--day is for --dev only: a server that keeps data has whole days")}
	case c.Dev:
		return c.dev(r)
	case c.Config == "":
		return &failure{ExitUsage, errors.New("say what to run: --dev for a server to try, or --config FILE")}
	}
	cfg, err := config.Load(c.Config, r.Environ)
	if err != nil {
		return err
	}
	return node.Serve(r.interrupt, cfg, cfg.Log.Logger(r.Stderr))
}

func (c *serveCmd) dev(r *runner) error {
	if c.PortBase < 0 || c.PortBase > 65532 {
		return &failure{ExitUsage, errors.New("--port-base must be 0 to 65532")}
	}
	if c.Day != 0 && (c.Day < node.MinDay || c.Day > node.MaxDay) {
		return &failure{ExitUsage, errors.New("--day must be 1s to 24h")}
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.LogLevel)); err != nil {
		return &failure{ExitUsage, err}
	}
	log := slog.New(slog.NewTextHandler(r.Stderr, &slog.HandlerOptions{Level: level}))
	p, err := node.Dev(r.interrupt, node.DevOptions{Dir: c.Data, PortBase: c.PortBase, Compat: c.Compat, Day: c.Day, Log: log, Callbacks: config.Callbacks{Allow: c.CallbacksAllow}})
	if err != nil {
		return err
	}
	err = c.introduce(r, p)
	if err == nil {
		err = p.Wait(r.interrupt)
	}
	return errors.Join(err, p.Close(r.interrupt))
}

// introduce prints what a person needs to go on.
func (c *serveCmd) introduce(r *runner, p *node.Process) error {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 8, 2, ' ', 0)
	_, _ = fmt.Fprintf(w, "Coffer is ready. Data: %s\n\n", p.Dir)
	for _, region := range p.Regions {
		_, _ = fmt.Fprintf(w, "  %s\t%s\t%s\t%s\n", region.ID, region.Place, region.URL, region.App)
	}
	for _, region := range p.Regions {
		if region.Compat != "" {
			_, _ = fmt.Fprintf(w, "  %s\tcompat\t%s\n", region.ID, region.Compat)
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(&b, "\nFor the other commands, in another shell:\n\n  set -a; . %s; set +a\n\nA request, as it can be pasted:\n\n  %s\n\nCtrl-C ends the server.\n", quoteArg(p.EnvFile), p.CurlLine())
	_, err := r.Stdout.Write([]byte(b.String()))
	return err
}
