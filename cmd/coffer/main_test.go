package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"coffer": main})
}

// startLimit is how long a server may take until it has written dev.env. It is
// no measurement: the machine may be busy with other tests.
const startLimit = 60 * time.Second

// TestScript runs the real binary by the scripts of testdata/script. Beside the
// usual commands they have
//
//	dev DIR         wait for a development server and take its environment
//	lines N FILE    fail unless the file has N lines
//	shell FILE      run a file with bash -eu
func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 filepath.Join("testdata", "script"),
		RequireExplicitExec: true,
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"dev":   cmdDev,
			"lines": cmdLines,
			"shell": func(ts *testscript.TestScript, neg bool, args []string) {
				err := ts.Exec("bash", append([]string{"-eu"}, args...)...)
				if (err != nil) != neg {
					ts.Fatalf("the shell ended with %v", err)
				}
			},
		},
		Setup: func(env *testscript.Env) error {
			// What the developer's own shell has must not leak in.
			for _, name := range []string{"COFFER_URL", "COFFER_CA", "COFFER_APP", "COFFER_APP_CERTIFICATE", "COFFER_TOKEN", "COFFER_OPERATOR_TOKEN"} {
				env.Setenv(name, "")
			}
			return nil
		},
	})
}

// readEnv parses dev.env: NAME=value or NAME='value' lines.
func readEnv(path string) (map[string]string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	vars := map[string]string{}
	for line := range strings.Lines(string(b)) {
		name, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if ok {
			vars[name] = strings.Trim(value, `'"`)
		}
	}
	if vars["COFFER_URL"] == "" {
		return nil, fmt.Errorf("%s names no server", path)
	}
	return vars, nil
}

// awaitEnv waits for a server to write dev.env.
func awaitEnv(path string) (map[string]string, error) {
	for end := time.Now().Add(startLimit); ; time.Sleep(10 * time.Millisecond) {
		vars, err := readEnv(path)
		if err == nil {
			return vars, nil
		}
		if time.Now().After(end) {
			return nil, fmt.Errorf("the server did not start: %w", err)
		}
	}
}

func cmdDev(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: dev DIR")
	}
	vars, err := awaitEnv(ts.MkAbs(filepath.Join(args[0], "dev.env")))
	ts.Check(err)
	for name, value := range vars {
		ts.Setenv(name, value)
	}
}

func cmdLines(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: lines N FILE")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	if got := bytes.Count([]byte(ts.ReadFile(args[1])), []byte("\n")); got != want {
		ts.Fatalf("%s has %d lines, want %d", args[1], got, want)
	}
}
