package main

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestFIPS runs the ordinary binary in the FIPS 140-3 mode of the toolchain in
// which anything else than approved algorithms is an error: it starts with TLS,
// takes an import and replays it.
func TestFIPS(t *testing.T) {
	const messages = 500
	t.Setenv("GODEBUG", "fips140=only")
	s := &server{t: t, dir: filepath.Join(t.TempDir(), "data"), base: freePorts(t)}
	s.start()
	env := s.environ() // with the GODEBUG of this test
	cmd := exec.Command("coffer", "import", "agora", "--json", "--rejects", filepath.Join(t.TempDir(), "rejects"), history(t, 0, messages))
	cmd.Env = env
	var talk bytes.Buffer
	cmd.Stdout, cmd.Stderr = io.Discard, &talk
	if err := cmd.Run(); err != nil {
		t.Fatalf("import: %v\n%s\nserver:\n%s", err, &talk, s.log.String())
	}
	replayed(t, env, messages)
	s.kill()
	s.start()
	replayed(t, s.environ(), messages)
	if os.Getenv("GODEBUG") != "fips140=only" {
		t.Error("the mode was not on")
	}
}
