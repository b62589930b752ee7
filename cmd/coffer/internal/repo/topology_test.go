package repo

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// topologyDir lays out, in a temporary folder, what the services of
// docker-compose.yml have in their containers: the secrets made by the same
// script, and the same configuration files with their paths, names and ports
// turned into this machine's.
func topologyDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	nats, coffer := filepath.Join(dir, "etc/nats"), filepath.Join(dir, "etc/coffer")
	script := filepath.Join(root, "docs/operations/compose/setup.sh")
	setup := exec.CommandContext(t.Context(), "bash", script,
		filepath.Join(dir, "authority"), filepath.Join(nats, "secrets"), filepath.Join(dir, "vault"), filepath.Join(coffer, "secrets"))
	if out, err := setup.CombinedOutput(); err != nil {
		requireTool(t, "openssl", "apt-get install openssl")
		t.Fatalf("setup.sh: %v\n%s", err, out)
	} else if len(out) > 0 {
		t.Errorf("setup.sh printed %q: nothing of what it makes belongs on a screen", out)
	}
	if err := os.MkdirAll(filepath.Join(dir, "data"), 0o700); err != nil {
		t.Fatal(err)
	}
	place(t, natsConf, filepath.Join(nats, "nats.conf"),
		"/etc/nats/secrets", filepath.Join(nats, "secrets"),
		`"/data"`, `"`+filepath.Join(dir, "nats-data")+`"`,
		"0.0.0.0:4222", "127.0.0.1:-1",
		"127.0.0.1:8222", "127.0.0.1:-1",
	)
	return dir
}

// place copies a file of the repository, replacing in pairs. A pair that is not
// in the file means that this test no longer runs what is published.
func place(t *testing.T, name, target string, pairs ...string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(pairs); i += 2 {
		if !strings.Contains(string(text), pairs[i]) {
			t.Fatalf("%s has no %s to replace", name, pairs[i])
		}
	}
	replaced := strings.NewReplacer(pairs...).Replace(string(text))
	if err := os.WriteFile(target, []byte(replaced), 0o600); err != nil {
		t.Fatal(err)
	}
}

// requireTool skips a test for want of a program; where everything has been
// installed, a missing one is a failure.
func requireTool(t *testing.T, program, install string) {
	t.Helper()
	if _, err := exec.LookPath(program); err == nil {
		return
	}
	if os.Getenv("COFFER_TEST_REQUIRE") == "all" {
		t.Fatalf("needs %s; %s", program, install)
	}
	t.Skipf("skipped: needs %s; %s", program, install)
}
