// Package keyserverstest runs a real Vault and emulators of AWS KMS for the tests
// of the commands and of a running region, and makes bad times before them. A test
// that needs one which is not installed is skipped, or fails if
// COFFER_TEST_REQUIRE is "all".
package keyserverstest

import (
	"bufio"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// keyServer returns the path of a server that .ci/test-servers builds.
func binary(t *testing.T, name, variable string) string {
	t.Helper()
	path := os.Getenv(variable)
	if path == "" {
		path = filepath.Join("..", "..", "..", "..", ".cache", name)
	}
	if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
		return path
	}
	if os.Getenv("COFFER_TEST_REQUIRE") == "all" {
		t.Fatalf("needs the server of %s; run .ci/test-servers once", variable)
	}
	t.Skipf("skipped: needs the server of %s; run .ci/test-servers once", variable)
	return ""
}

// Server is a running server.
type Server struct {
	cmd *exec.Cmd
	in  io.Closer
	URL string
}

// start runs a server whose first line of output is its address.
func start(t *testing.T, path string, args ...string) *Server {
	t.Helper()
	p, out := begin(t, path, args...)
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("%s gives no address: %v", path, err)
	}
	p.URL = strings.TrimSpace(line)
	return p
}

func begin(t *testing.T, path string, args ...string) (*Server, io.Reader) {
	t.Helper()
	p := &Server{cmd: exec.Command(path, args...)}
	// A test in the FIPS 140-3 mode is about Coffer, and the servers do not work
	// in it.
	p.cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "GODEBUG=") })
	var err error
	if p.in, err = p.cmd.StdinPipe(); err != nil { // it ends with us
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	return p, out
}

// Stop kills the server.
func (p *Server) Stop() {
	if p.cmd.ProcessState == nil {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	}
}
