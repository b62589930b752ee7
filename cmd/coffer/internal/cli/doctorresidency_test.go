package cli

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/node"
	"github.com/cofferdb/coffer/journal/client"
	"github.com/cofferdb/coffer/journal/embedded"
)

// doctorOf runs the region of a configuration, and returns a doctor of it that
// ends the test unless it ends with a code.
func doctorOf(t *testing.T, file, token string) func(want int, args ...string) string {
	t.Helper()
	cfg, err := config.Load(file, nil)
	if err != nil {
		t.Fatal(err)
	}
	process, err := node.Open(t.Context(), cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = process.Close(t.Context()) })
	ready, err := client.New(client.Config{URL: process.Regions[0].URL})
	if err != nil {
		t.Fatal(err)
	}
	defer ready.Close()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		if r, err := ready.Ready(t.Context()); err == nil && r.Ready {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("the region does not become ready: %+v, %v", r, err)
		}
	}
	t.Setenv("COFFER_URL", process.Regions[0].URL)
	t.Setenv("COFFER_CA", "")
	t.Setenv("COFFER_APP", "")
	return func(want int, args ...string) string {
		t.Helper()
		code, out, talk := run(t, []string{"COFFER_OPERATOR_TOKEN=" + token}, append([]string{"doctor"}, args...)...)
		if code != want {
			t.Fatalf("%v: exit code %d\n%s%s", args, code, out, talk)
		}
		return out
	}
}

// TestDoctorAsksTheServers: with the configuration the doctor asks the NATS server
// itself, and each thing that is not as the manifest says is an error.
func TestDoctorAsksTheServers(t *testing.T) {
	dir := t.TempDir()
	start := func(name string) *embedded.Server {
		server, err := embedded.Start(t.Context(), embedded.Options{StoreDir: filepath.Join(dir, name), Listen: "127.0.0.1:0", SyncAlways: true})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = server.Close() })
		return server
	}
	server, other := start("nats"), start("other")
	token := auth.NewOperatorToken()
	if err := os.WriteFile(filepath.Join(dir, "operator.token"), []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	write := func(name, url string) string {
		text := strings.NewReplacer("DIR", dir, "NATS", url).Replace(`
data_dir = "DIR/data"
operator_token_file = "DIR/operator.token"
[[region]]
id = "eu"
listen = "127.0.0.1:0"
plaintext = true
kms = "local:DIR/eu.key"
[region.nats]
url = "NATS"
`)
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	file := write("coffer.toml", server.ClientURL())
	doctor := doctorOf(t, file, token)
	if out := doctor(ExitOK, "--config", file); !strings.Contains(out, "ok       residency") || !strings.Contains(out, "ok       servers") {
		t.Errorf("all is well, and it says\n%s", out)
	}
	if out := doctor(ExitFailure, "--region-key", "another"); !strings.Contains(out, "not the trusted one") {
		t.Errorf("the key is another, and it says\n%s", out)
	}
	if out := doctor(ExitFailure, "--config", write("other.toml", other.ClientURL())); strings.Count(out, "it is not there") < 10 {
		t.Errorf("the NATS is another, and it says\n%s", out)
	}

	conn, err := nats.Connect(server.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	js, err := jetstream.New(conn)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []jetstream.StreamConfig{
		{Name: "coffer_us_audit", Subjects: []string{"us.audit.>"}},
		{Name: "coffer_eu_extra", Subjects: []string{"extra"}},
		{Name: "archive", Mirror: &jetstream.StreamSource{Name: "coffer_eu_audit"}},
		{Name: "unrelated", Subjects: []string{"unrelated"}},
	} {
		if _, err := js.CreateStream(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	out := doctor(ExitFailure, "--config", file)
	for _, want := range []string{
		`coffer_us_audit: a stream of region "us" on the NATS of eu`, "coffer_eu_extra: it is there, and the manifest does not name it",
		"archive: it holds a copy of coffer_eu_audit", "→ give each region a NATS system",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("it does not say %q\n%s", want, out)
		}
	}
	if strings.Contains(out, "unrelated") {
		t.Errorf("a stream of nobody here is a fault\n%s", out)
	}
}
