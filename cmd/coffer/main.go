// Coffer is an event-sourced, encrypted store for the messages of chat backends.
package main

import (
	"os"

	"github.com/cofferdb/coffer/cmd/coffer/internal/cli"
)

func main() {
	os.Exit(cli.Main(os.Args[1:], cli.System{
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Environ: os.Environ(),
	}))
}
