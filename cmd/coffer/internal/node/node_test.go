package node

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/journal/journaltest"
)

func checkLeaks(t *testing.T) {
	t.Helper()
	leaks := goleak.IgnoreCurrent()
	t.Cleanup(func() {
		http.DefaultClient.CloseIdleConnections()
		goleak.VerifyNone(t, leaks)
	})
}

func startDev(t *testing.T, dir string) *Process {
	t.Helper()
	p, err := Dev(t.Context(), DevOptions{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(context.Background()); err != nil {
			t.Errorf("closing: %v", err)
		}
	})
	return p
}

// need skips a test for want of a program, and fails it where everything has
// been installed.
func need(t *testing.T, program, install string) {
	t.Helper()
	if _, err := exec.LookPath(program); err == nil {
		return
	}
	if os.Getenv("COFFER_TEST_REQUIRE") == "all" {
		t.Fatalf("needs %s; %s", program, install)
	}
	t.Skipf("skipped: needs %s; %s", program, install)
}

func TestDevFiles(t *testing.T) {
	checkLeaks(t)
	dir := filepath.Join(t.TempDir(), "data with a 'quote'")
	p := startDev(t, dir)
	if len(p.Regions) != 4 {
		t.Fatalf("%d regions", len(p.Regions))
	}
	for name, mode := range map[string]fs.FileMode{
		".": 0o700, "eu": 0o700, "dev.env": 0o600, "dev.json": 0o600, "ca.key": 0o600, "operator.token": 0o600,
		"eu/tls.key": 0o600, "eu/kek.json": 0o600, "us/tls.key": 0o600,
	} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Error(err)
		} else if got := info.Mode().Perm(); got != mode {
			t.Errorf("%s has mode %o, want %o", name, got, mode)
		}
	}
	text, err := os.ReadFile(p.File)
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Regions map[string]map[string]string `json:"regions"`
	}
	if err := json.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	for _, r := range p.Regions {
		e := file.Regions[r.ID]
		if e["COFFER_URL"] != r.URL || e["COFFER_APP"] != r.App || e["COFFER_TOKEN"] == "" || e["COFFER_CA"] != p.CAFile {
			t.Errorf("region %s: %v", r.ID, e)
		}
	}
	t.Run("shell", func(t *testing.T) {
		need(t, "sh", "it is part of every Unix system")
		for name, want := range file.Regions["eu"] {
			out, err := exec.CommandContext(t.Context(), "sh", "-c", `set -eu; . "$1"; eval "printf %s \"\$$2\""`, "sh", p.EnvFile, name).Output()
			if err != nil || string(out) != want {
				t.Errorf("%s in a shell: %q, %v; want %q", name, out, err, want)
			}
		}
	})
	t.Run("curl line", func(t *testing.T) {
		need(t, "sh", "it is part of every Unix system")
		need(t, "curl", "apt-get install curl")
		out, err := exec.CommandContext(t.Context(), "sh", "-c", p.CurlLine()).CombinedOutput()
		if err != nil || !strings.Contains(string(out), `"position"`) {
			t.Errorf("%v %s", err, out)
		}
		if strings.Contains(p.CurlLine(), file.Regions["eu"]["COFFER_TOKEN"]) {
			t.Error("the line shows the token")
		}
	})
}

func TestOneProcessOnly(t *testing.T) {
	checkLeaks(t)
	dir := filepath.Join(t.TempDir(), "data")
	p := startDev(t, dir)
	_, err := Dev(t.Context(), DevOptions{Dir: dir})
	if !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Fatalf("second process: %v", err)
	}
	if _, err := os.Stat(p.EnvFile); err != nil {
		t.Errorf("the second process has taken the first one's files: %v", err)
	}
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(p.EnvFile); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("dev.env is left behind, as if the regions were ready: %v", err)
	}
	startDev(t, dir)
}

func TestPortInUse(t *testing.T) {
	checkLeaks(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	dir := filepath.Join(t.TempDir(), "data")
	// The taken port is the third region's; a stranger may have one before it.
	base := l.Addr().(*net.TCPAddr).Port - 2
	if _, err := Dev(t.Context(), DevOptions{Dir: dir, PortBase: base}); !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), "region ") {
		t.Fatalf("got %v", err)
	}
	startDev(t, dir) // everything that had begun was ended
}

func TestSecureDir(t *testing.T) {
	root := t.TempDir()
	mk := func(name string, mode fs.FileMode, files ...string) string {
		dir := filepath.Join(root, name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if err := os.WriteFile(filepath.Join(dir, f), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	for _, c := range []struct {
		name, dir string
		want      error
	}{
		{"missing", filepath.Join(root, "new", "below"), nil},
		{"closed", mk("closed", 0o700, "x"), nil},
		{"open and empty", mk("empty", 0o755), nil},
		{"open and ours", mk("ours", 0o755, lockName), nil},
		{"open and somebody's", mk("other", 0o755, "x"), ErrExposed},
	} {
		err := secureDir(c.dir)
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
		info, statErr := os.Stat(c.dir)
		if statErr != nil {
			t.Fatal(statErr)
		}
		if closed := info.Mode().Perm() == 0o700; closed != (c.want == nil) {
			t.Errorf("%s: mode %o", c.name, info.Mode().Perm())
		}
	}
}

// production writes a configuration as an operator would.
func production(t *testing.T, more string) config.Config {
	t.Helper()
	dir := t.TempDir()
	ca, err := openAuthority(dir, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := ca.issue(filepath.Join(dir, "tls.pem"), filepath.Join(dir, "tls.key"), "eu", time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := writeSecret(filepath.Join(dir, "operator.token"), []byte(auth.NewOperatorToken())); err != nil {
		t.Fatal(err)
	}
	text := strings.ReplaceAll(`
data_dir = "DIR/data"
operator_token_file = "DIR/operator.token"
shutdown_timeout = "5s"
[[region]]
id = "eu"
listen = "127.0.0.1:0"
kms = "local:DIR/eu.key"
[region.tls]
cert_file = "DIR/tls.pem"
key_file = "DIR/tls.key"
`+more, "DIR", dir)
	path := filepath.Join(dir, "coffer.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Load(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

func plain(cfg config.Config) config.Config {
	cfg.Regions[0].Plaintext, cfg.Regions[0].TLS = true, config.TLS{}
	return cfg
}

// call is a request to a region without TLS.
func call(t *testing.T, p *Process, method, path, token, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, p.Regions[0].URL+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	if body == "" {
		req.Body = nil
		req.ContentLength = 0
	} else {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(answer)
}

// appendOne makes an app and stores an event in it; it returns the app's token
// and path.
func appendOne(t *testing.T, p *Process) (token, events string) {
	t.Helper()
	operator, err := auth.ReadSecret(p.cfg.OperatorTokenFile)
	if err != nil {
		t.Fatal(err)
	}
	status, answer := call(t, p, "POST", "/v1/admin/apps", operator, `{"name":"x","plan":"pro"}`)
	if status != http.StatusCreated {
		t.Fatalf("creating an app: %d %s", status, answer)
	}
	var app struct {
		ID           string   `json:"id"`
		Certificates []string `json:"certificates"`
	}
	if err := json.Unmarshal([]byte(answer), &app); err != nil {
		t.Fatal(err)
	}
	token, err = auth.Build(auth.Spec{AppID: app.ID, Certificate: app.Certificates[0], Issued: time.Now(), Lifetime: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	events = "/v1/apps/" + app.ID + "/events"
	event := `{"id":"e1","type":"message.sent","sender":"ann","recipient":"ben","data":{"bodies":[{"type":"txt","msg":"hello"}]}}`
	if status, answer = call(t, p, "POST", events, token, event); status != http.StatusCreated {
		t.Fatalf("append: %d %s", status, answer)
	}
	return token, events
}

// readOne waits for the event in the view.
func readOne(t *testing.T, p *Process, token, events string) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		status, answer := call(t, p, "GET", events, token, "")
		if status == http.StatusOK && strings.Contains(answer, `"id":"e1"`) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("reading: %d %s", status, answer)
		}
	}
}

func TestOpen(t *testing.T) {
	checkLeaks(t)
	cfg := plain(production(t, ""))
	var token, events string
	for i := range 3 {
		p, err := Open(t.Context(), cfg, nil)
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			token, events = appendOne(t, p)
		}
		readOne(t, p, token, events)
		if err := p.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := p.Close(t.Context()); err != nil {
			t.Errorf("closing again: %v", err)
		}
	}
}

// TestExternalNATS runs a region against a server outside it, as one with its
// own NATS does, and restarts that server underneath.
func TestExternalNATS(t *testing.T) {
	checkLeaks(t)
	nats, err := embedded.Start(t.Context(), embedded.Options{StoreDir: t.TempDir(), Listen: "127.0.0.1:0", SyncAlways: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = nats.Close() }()
	cfg := plain(production(t, "[region.nats]\nurl = \"nats://127.0.0.1:4222\"\n"))
	cfg.Regions[0].NATS.URL = nats.ClientURL()
	p, err := Open(t.Context(), cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	token, events := appendOne(t, p)
	readOne(t, p, token, events)
	if status, answer := call(t, p, "GET", "/readyz", "", ""); status != http.StatusOK {
		t.Errorf("ready: %d %s", status, answer)
	}
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(cfg.DataDir, "eu", "nats")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a store of its own was made: %v", err)
	}
}

// TestThreeReplicas runs a region whose streams three NATS servers keep: it goes
// on when the leader of the app's stream is gone, and what it says of itself and
// of an erasure counts all copies.
func TestThreeReplicas(t *testing.T) {
	cluster := journaltest.StartCluster(t)
	cfg := plain(production(t, "[region.nats]\nurl = \"nats://127.0.0.1:4222\"\nreplicas = 3\n"))
	cfg.Regions[0].NATS.URL = cluster.URL()
	p, err := Open(t.Context(), cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := p.Close(context.Background()); err != nil {
			t.Errorf("closing: %v", err)
		}
	}()
	if drift, err := p.regions[0].journal.Check(t.Context()); err != nil || len(drift) > 0 {
		t.Errorf("drift: %v, %v", drift, err)
	}
	token, events := appendOne(t, p)
	readOne(t, p, token, events)

	app := strings.TrimSuffix(events, "/events")
	status, answer := call(t, p, "PUT", app+"/users/ann/profile", token, `{"nickname":"Ann"}`)
	if status/100 != 2 {
		t.Fatalf("profile: %d %s", status, answer)
	}
	cluster.Stop(cluster.StreamLeader(journal.StreamName("eu", "pro", 0)))
	event := `{"id":"e2","type":"message.sent","sender":"ben","recipient":"ann","data":{"bodies":[{"type":"txt","msg":"hello"}]}}`
	if status, answer = call(t, p, "POST", events, token, event); status != http.StatusCreated {
		t.Fatalf("append without the leader: %d %s", status, answer)
	}
	var erased struct {
		State   string `json:"state"`
		Receipt string `json:"receipt"`
		ID      string `json:"id"`
	}
	if status, answer = call(t, p, "POST", app+"/erasures", token, `{"user":"ann"}`); status != http.StatusAccepted {
		t.Fatalf("erasing: %d %s", status, answer)
	}
	if err := json.Unmarshal([]byte(answer), &erased); err != nil {
		t.Fatal(err)
	}
	if status, answer = call(t, p, "GET", app+"/erasures/"+erased.ID, token, ""); status != http.StatusOK {
		t.Fatalf("erasure: %d %s", status, answer)
	}
	if err := json.Unmarshal([]byte(answer), &erased); err != nil {
		t.Fatal(err)
	}
	payload, err := base64.RawURLEncoding.DecodeString(strings.Split(erased.Receipt+"..", ".")[1])
	if err != nil || !strings.Contains(string(payload), "Raft logs") {
		t.Errorf("the receipt does not name the Raft logs: %s", payload)
	}
	if status, answer = call(t, p, "POST", events, token, strings.ReplaceAll(event, "ben", "ann")); status != http.StatusConflict {
		t.Errorf("an event of the erased user: %d %s", status, answer)
	}
}

// TestDamagedView flips bytes in the view store while the process is down: it
// is noticed, and what is read afterwards is what was stored.
func TestDamagedView(t *testing.T) {
	checkLeaks(t)
	cfg := plain(production(t, ""))
	p, err := Open(t.Context(), cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	token, events := appendOne(t, p)
	readOne(t, p, token, events)
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	views := filepath.Join(cfg.DataDir, "eu", "views")
	manifests, err := filepath.Glob(filepath.Join(views, "MANIFEST-*"))
	if err != nil || len(manifests) == 0 {
		t.Fatalf("no manifest: %v", err)
	}
	for _, m := range manifests {
		if err := os.Remove(m); err != nil {
			t.Fatal(err)
		}
	}
	var logged bytes.Buffer
	p, err = Open(t.Context(), cfg, slog.New(slog.NewTextHandler(&logged, nil)))
	if err != nil {
		t.Fatal(err)
	}
	readOne(t, p, token, events)
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(logged.String(), "view store is damaged") {
		t.Errorf("not logged: %s", &logged)
	}
}

func TestOpenRefuses(t *testing.T) {
	checkLeaks(t)
	for name, c := range map[string]struct {
		change func(*config.Config)
		want   error
		says   string
	}{
		"unknown provider":     {func(c *config.Config) { c.Regions[0].KMS = "abacus:x" }, ErrProvider, "abacus"},
		"broken Vault setting": {func(c *config.Config) { c.Regions[0].KMS = "vault+https://vault.example.com/transit?x=1" }, nil, "key provider"},
		"broken AWS setting":   {func(c *config.Config) { c.Regions[0].KMS = "awskms:///key?surprise=1" }, nil, "key provider"},
		"no certificate":       {func(c *config.Config) { c.Regions[0].TLS.CertFile += ".none" }, fs.ErrNotExist, "TLS"},
		"not a certificate": {func(c *config.Config) {
			c.Regions[0].TLS.CertFile = c.OperatorTokenFile
		}, nil, "TLS"},
		"exposed directory": {func(c *config.Config) {
			c.DataDir = filepath.Dir(c.DataDir)
			if err := os.Chmod(c.DataDir, 0o755); err != nil {
				panic(err)
			}
		}, ErrExposed, "0755"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := production(t, "")
			c.change(&cfg)
			p, err := Open(t.Context(), cfg, nil)
			if err == nil {
				_ = p.Close(t.Context())
				t.Fatal("opened")
			}
			if c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v", err)
			}
		})
	}
	t.Run("lost key file", func(t *testing.T) {
		cfg := plain(production(t, ""))
		p, err := Open(t.Context(), cfg, nil)
		if err != nil {
			t.Fatal(err)
		}
		appendOne(t, p)
		if err := p.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(strings.TrimPrefix(cfg.Regions[0].KMS, "local:")); err != nil {
			t.Fatal(err)
		}
		if p, err := Open(t.Context(), cfg, nil); err == nil {
			_ = p.Close(t.Context())
			t.Error("a new key was made for old data")
		}
	})
}

// ExampleServe shows what the serve command does.
func ExampleServe() {
	dir, err := os.MkdirTemp("", "coffer-*")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = os.RemoveAll(dir) }()
	token := filepath.Join(dir, "operator.token")
	if err := os.WriteFile(token, []byte(auth.NewOperatorToken()), 0o600); err != nil {
		fmt.Println(err)
		return
	}
	cfg, err := config.Load("", []string{
		"COFFER_SERVER_DATA_DIR=" + filepath.Join(dir, "data"), "COFFER_SERVER_OPERATOR_TOKEN_FILE=" + token,
		"COFFER_SERVER_REGION_SG_URL=https://sg.example.com", // served elsewhere
	})
	fmt.Println(len(cfg.Regions), errors.Is(err, config.ErrInvalid))
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // Serve runs until its context ends
	cfg = config.Config{File: config.File{DataDir: filepath.Join(dir, "data")}, PlanTable: journal.DefaultPlans()}
	fmt.Println(Serve(ctx, cfg, nil))
	// Output:
	// 0 true
	// <nil>
}

// TestEmptiedStore takes a region's streams away while the process is down: it
// is said, at every start, and nothing is made anew in their place.
func TestEmptiedStore(t *testing.T) {
	checkLeaks(t)
	cfg := plain(production(t, ""))
	p, err := Open(t.Context(), cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	token, events := appendOne(t, p)
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	store := filepath.Join(cfg.DataDir, "eu", "nats")
	if err := os.Rename(store, store+".away"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		p, err := Open(t.Context(), cfg, nil)
		if err == nil {
			_ = p.Close(t.Context())
			t.Fatal("an emptied store is served")
		}
		if !errors.Is(err, journal.ErrIncarnation) || !strings.Contains(err.Error(), witnessName) {
			t.Errorf("got %v", err)
		}
	}
	if err := os.RemoveAll(store); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(store+".away", store); err != nil {
		t.Fatal(err)
	}
	if p, err = Open(t.Context(), cfg, nil); err != nil {
		t.Fatal(err)
	}
	readOne(t, p, token, events)
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}
