// Package cli is the command line of coffer.
//
// Promises: data goes to standard output and everything else to standard error;
// an error is one line that says what to do next; a secret is read from the
// environment or from a file, never from an argument; a reader that goes away
// (`| head`) ends a command quietly.
//
// The exit codes are 0 for success, 1 for a failure, 2 for a command line that
// cannot be understood, 3 for an import that came to its end with lines that
// were rejected or files that were unreadable, and 130 after an interrupt.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/alecthomas/kong"
)

// Exit codes.
const (
	ExitOK          = 0
	ExitFailure     = 1
	ExitUsage       = 2
	ExitPartial     = 3
	ExitInterrupted = 130
)

// System is what a command has of the process.
type System struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Environ        []string // NAME=value
}

// env returns a variable's value; empty when it is not set.
func (s System) env(name string) string {
	value := ""
	for _, entry := range s.Environ {
		if n, v, ok := strings.Cut(entry, "="); ok && n == name {
			value = v // the last one counts, as for the shell
		}
	}
	return value
}

// say writes a line to standard error.
func (s System) say(format string, args ...any) {
	_, _ = fmt.Fprintf(s.Stderr, format+"\n", args...)
}

// commands is the tree of commands.
type commands struct {
	Serve     serveCmd      `cmd:"" help:"Run a server."`
	Import    importCmds    `cmd:"" help:"Import history, of another service or from an export."`
	Export    exportCmd     `cmd:"" help:"Write an app's events into files, with a manifest."`
	Replay    replayCmd     `cmd:"" help:"Replay an app's events as JSON lines."`
	History   historyCmd    `cmd:"" help:"Read a conversation, newest message first."`
	Token     tokenCmds     `cmd:"" help:"Make an access token."`
	Account   accountCmds   `cmd:"" help:"Make and change accounts (as an operator)."`
	App       appCmds       `cmd:"" help:"Make, list and change apps (as an operator)."`
	Keys      keysCmds      `cmd:"" help:"Administer the keys of a region (as an operator)."`
	Attach    attachCmds    `cmd:"" name:"attachments" help:"Store, fetch and delete attachments."`
	Erasures  erasuresCmds  `cmd:"" help:"Erase users, and keep what proves it."`
	Audit     auditCmd      `cmd:"" help:"Read and verify the audit log (as an operator)."`
	Doctor    doctorCmd     `cmd:"" help:"Check that a server can be used, and say what is wrong."`
	Callbacks callbacksCmds `cmd:"" help:"Administer webhook endpoints and deliveries."`
	Listen    listenCmd     `cmd:"" help:"Receive webhooks on this machine: verify, open and print them."`
	Version   versionCmd    `cmd:"" help:"Print the version."`
	Bench     benchCmd      `cmd:"" help:"Measure Coffer beside bare means: append, replay, history, tail, keys, callbacks."`

	Verbose bool `help:"Tell on standard error what is being done." short:"v"`
}

const description = `Coffer keeps the messages of chat backends: sealed, in order, for as long as the app's plan says.

Commands that speak to a server take it from the environment: COFFER_URL, COFFER_CA, COFFER_APP, and
COFFER_TOKEN or COFFER_APP_CERTIFICATE; operators' commands take COFFER_OPERATOR_TOKEN. A development server
writes them to a file:

    coffer serve --dev --data coffer-data &
    set -a; . coffer-data/dev.env; set +a
    coffer replay

Exit codes: 0 success, 1 failure, 2 wrong usage, 3 imported with rejects, 130 interrupted.`

// exited carries kong's wish to end the process, after --help.
type exited int

// failure is an error with an exit code of its own.
type failure struct {
	code int
	err  error // nil when everything has been said
}

func (f *failure) Error() string {
	if f.err == nil {
		return ""
	}
	return f.err.Error()
}
func (f *failure) Unwrap() error { return f.err }

// Main runs one command and returns its exit code.
func Main(args []string, sys System) (code int) {
	var c commands
	defer func() {
		if v := recover(); v != nil {
			status, ok := v.(exited)
			if !ok {
				panic(v)
			}
			code = int(status)
		}
	}()
	parser, err := kong.New(&c,
		kong.Name("coffer"), kong.Description(description),
		kong.Writers(sys.Stdout, sys.Stderr),
		kong.Exit(func(status int) { panic(exited(status)) }),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, WrapUpperBound: 100}),
		kong.Vars{"rejects": defaultRejects},
	)
	if err != nil {
		sys.say("coffer: %v", err)
		return ExitFailure
	}
	if len(args) == 0 {
		args = []string{"--help"}
	}
	parsed, err := parser.Parse(args)
	if err != nil {
		sys.say("coffer: %v", err)
		sys.say("run %q for help", strings.TrimSpace("coffer "+commandOf(err))+" --help")
		return ExitUsage
	}

	// A reader that goes away shows as EPIPE in the write, not as a signal.
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// A second interrupt ends the process as if nobody had listened.
	context.AfterFunc(ctx, func() { signal.Reset(os.Interrupt, syscall.SIGTERM) })
	r := &runner{System: sys, log: slog.New(slog.DiscardHandler), interrupt: ctx}
	if c.Verbose {
		r.log = slog.New(slog.NewTextHandler(sys.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	return r.exitCode(parsed.Run(r))
}

// commandOf is the command that could be parsed, to point at its help.
func commandOf(err error) string {
	if p := (*kong.ParseError)(nil); errors.As(err, &p) {
		var names []string
		for _, element := range p.Context.Path {
			if element.Command != nil {
				names = append(names, element.Command.Name)
			}
		}
		return strings.Join(names, " ")
	}
	return ""
}

// runner is what every command gets.
type runner struct {
	System
	log *slog.Logger
	// interrupt ends on SIGINT and SIGTERM.
	interrupt context.Context //nolint:containedctx // the process's own, made in Main
}

// exitCode says what went wrong, if anything did.
func (r *runner) exitCode(err error) int {
	f := &failure{}
	switch {
	case err == nil, errors.Is(err, syscall.EPIPE):
		return ExitOK
	case errors.As(err, &f):
		if text := f.Error(); text != "" {
			r.say("coffer: %s", text)
		}
		return f.code
	case r.interrupt.Err() != nil && errors.Is(err, context.Canceled):
		r.say("coffer: interrupted")
		return ExitInterrupted
	}
	r.say("coffer: %s", advise(err))
	return ExitFailure
}
