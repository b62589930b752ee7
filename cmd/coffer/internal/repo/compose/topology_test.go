package compose

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/client"
)

// TestTopology runs what docker-compose.yml describes as plain processes: the same
// set-up scripts, the same configuration files, a NATS server with TLS and synced
// JetStream, a Vault where the machine has one, and coffer. It writes through both
// being killed, and looks for content where only sealed bytes belong.
func TestTopology(t *testing.T) {
	if testing.Short() {
		t.Skip("skipped: builds two binaries; run without -short")
	}
	top := newTopology(t)
	top.startVault()
	top.vaultSetup()
	top.startNATS()
	top.startCoffer()
	top.healthCheck()

	app, token := top.makeApp()
	c := top.client(client.Config{App: app, Token: client.StaticToken(token)})
	written := &ledger{}
	write := func(ctx context.Context, from, to int) {
		for i := from; i < to && ctx.Err() == nil; i++ {
			id := fmt.Sprintf("event-%05d", i)
			results, err := c.Append(ctx, event(id, i))
			if err == nil && results[0].Err == nil {
				written.add(id)
			}
		}
	}
	write(t.Context(), 0, 50)
	if n := written.len(); n != 50 {
		t.Fatalf("%d of 50 events were acknowledged", n)
	}

	// The stream server dies while events come in, then coffer does.
	var writers sync.WaitGroup
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	for w := range 4 {
		writers.Go(func() { write(ctx, 1000*(w+1), 1000*(w+1)+200) })
	}
	written.await(t, 100)
	top.nats.kill()
	top.startNATS()
	written.await(t, 200)
	top.coffer.kill()
	top.startCoffer()
	written.await(t, 300)
	stop()
	writers.Wait()
	top.check(c, written)

	// Everything starts again, Vault sealed as it always is at first.
	top.coffer.kill()
	top.nats.stop()
	if top.vault != nil {
		top.vault.kill()
		top.startVault()
		top.vaultSetup()
	}
	top.startNATS()
	top.startCoffer()
	top.check(c, written)
	top.searchFor("canary-in-the-hold", "sender-3", "the-quay")

	// An empty store in the place of the region's is a loss and no new region.
	top.coffer.kill()
	top.nats.stop()
	if err := os.Rename(top.path("nats-data"), top.path("nats-data.away")); err != nil {
		t.Fatal(err)
	}
	top.startNATS()
	top.coffer = start(t, top.binary, "serve", "--config", top.path("etc/coffer/coffer.toml"))
	select {
	case <-top.coffer.done:
	case <-time.After(time.Minute):
		t.Fatal("coffer serves an emptied store")
	}
	if !strings.Contains(top.coffer.text(), journal.ErrIncarnation.Error()) {
		t.Error("coffer does not say that the store is another one")
	}
}

func event(id string, i int) journal.Event {
	return journal.Event{
		ID: id, Type: journal.MessageSent, Sender: fmt.Sprintf("sender-%d", i%4),
		Conversation: "the-quay", ConversationType: journal.Group,
		Data: jsontext.Value(`{"bodies":[{"type":"txt","msg":"canary-in-the-hold"}]}`),
	}
}

// ledger is what has been acknowledged.
type ledger struct {
	mu  sync.Mutex
	ids map[string]bool
}

func (l *ledger) add(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ids == nil {
		l.ids = make(map[string]bool)
	}
	l.ids[id] = true
}

func (l *ledger) len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.ids)
}

func (l *ledger) await(t *testing.T, n int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d acknowledged events", n), func() bool { return l.len() >= n })
}

// topology is the processes, in one temporary folder.
type topology struct {
	t                   *testing.T
	dir                 string
	natsServer, binary  string
	vaultServer         string // "" where the machine has none
	natsAddr, apiAddr   string
	vaultURL            string
	nats, vault, coffer *process
}

func newTopology(t *testing.T) *topology {
	top := &topology{t: t, dir: topologyDir(t), natsAddr: freeAddr(t), apiAddr: freeAddr(t)}
	bin := t.TempDir()
	top.natsServer, top.binary = filepath.Join(bin, "nats-server"), filepath.Join(bin, "coffer")
	for target, pkg := range map[string]string{
		top.natsServer: "github.com/nats-io/nats-server/v2", top.binary: module + "/cmd/coffer",
	} {
		build := exec.CommandContext(t.Context(), "go", "build", "-o", target, pkg)
		build.Dir = root
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("building %s: %v\n%s", pkg, err, out)
		}
	}
	top.vaultServer = os.Getenv("COFFER_TEST_VAULTSERVER")
	if top.vaultServer == "" {
		built, err := filepath.Abs(filepath.Join(root, ".cache/vaultserver"))
		if _, statErr := os.Stat(built); err == nil && statErr == nil {
			top.vaultServer = built
		} else if os.Getenv("COFFER_TEST_REQUIRE") == "all" {
			t.Fatal("needs the Vault of the tests; run .ci/test-servers")
		} else {
			t.Log("without a Vault (run .ci/test-servers for one): keys come from a file")
		}
	}
	place(t, natsConf, top.path("etc/nats/nats.conf"),
		"/etc/nats/secrets", top.path("etc/nats/secrets"),
		`"/data"`, `"`+top.path("nats-data")+`"`,
		"0.0.0.0:4222", top.natsAddr,
		"127.0.0.1:8222", freeAddr(t),
	)
	return top
}

func (top *topology) path(name string) string { return filepath.Join(top.dir, name) }

func (top *topology) startNATS() {
	top.t.Helper()
	top.nats = start(top.t, top.natsServer, "--config", top.path("etc/nats/nats.conf"))
	top.nats.await("Server is ready")
}

func (top *topology) startVault() {
	top.t.Helper()
	if top.vaultServer == "" {
		return
	}
	addr := "127.0.0.1:0"
	if top.vaultURL != "" {
		addr = strings.TrimPrefix(top.vaultURL, "https://")
	}
	top.vault = start(top.t, top.vaultServer, "-addr", addr, "-storage", top.path("vault-data"),
		"-cert", top.path("vault/vault.pem"), "-key", top.path("vault/vault.key"))
	top.vault.await("https://")
	top.vaultURL = top.vault.line("https://")
}

// vaultSetup is the service of that name.
func (top *topology) vaultSetup() {
	top.t.Helper()
	if top.vault == nil {
		return
	}
	requireTool(top.t, "curl", "apt-get install curl")
	script := filepath.Join(root, "docs/operations/compose/vault-setup.sh")
	setup := exec.CommandContext(top.t.Context(), "bash", script, top.vaultURL, top.path("authority"), top.path("etc/coffer/secrets"))
	if out, err := setup.CombinedOutput(); err != nil || len(out) > 0 {
		top.t.Fatalf("vault-setup.sh: %v\n%s", err, out)
	}
	if _, err := os.Stat(top.path("authority/vault.root")); err == nil {
		top.t.Error("the root token is still there after the set-up")
	}
}

// startCoffer is the service of that name, with the same file.
func (top *topology) startCoffer() {
	top.t.Helper()
	pairs := []string{
		"/etc/coffer/secrets", top.path("etc/coffer/secrets"),
		"/var/lib/coffer", top.path("coffer-data"),
		"tls://nats:4222", "tls://" + top.natsAddr,
		"0.0.0.0:7443", top.apiAddr,
		"https://localhost:7443", "https://" + top.apiAddr,
	}
	if top.vault != nil {
		pairs = append(pairs, "vault+https://vault:8200", "vault+"+top.vaultURL)
	}
	config := top.path("etc/coffer/coffer.toml")
	place(top.t, "docs/operations/compose/coffer.toml", config, pairs...)
	if top.vault == nil {
		text, err := os.ReadFile(config)
		if err != nil {
			top.t.Fatal(err)
		}
		lines := strings.Split(string(text), "\n")
		for i, line := range lines {
			if strings.HasPrefix(line, "kms = ") {
				lines[i] = `kms = "local:` + top.path("coffer-data/eu.key") + `"`
			}
		}
		if err := os.WriteFile(config, []byte(strings.Join(lines, "\n")), 0o600); err != nil {
			top.t.Fatal(err)
		}
	}
	top.coffer = start(top.t, top.binary, "serve", "--config", config)
	c := top.client(client.Config{})
	eventually(top.t, "coffer to be ready", func() bool {
		top.coffer.mustRun()
		ready, err := c.Ready(top.t.Context())
		return err == nil && ready.Ready
	})
}

// healthCheck runs the command of the compose file's health check.
func (top *topology) healthCheck() {
	top.t.Helper()
	check := compose(top.t).Services["coffer"].HealthCheck
	if check == nil || len(check.Test) < 2 || check.Test[0] != "CMD" {
		top.t.Fatal("the service coffer has no health check that is a command")
	}
	args := make([]string, len(check.Test)-1)
	for i, arg := range check.Test[1:] {
		args[i] = strings.NewReplacer(
			"/usr/local/bin/coffer", top.binary,
			"/etc/coffer/secrets", top.path("etc/coffer/secrets"),
			"127.0.0.1:7443", top.apiAddr,
		).Replace(arg)
	}
	if out, err := exec.CommandContext(top.t.Context(), args[0], args[1:]...).CombinedOutput(); err != nil {
		top.t.Errorf("the health check %q: %v\n%s", args, err, out)
	}
}

func (top *topology) client(cfg client.Config) *client.Client {
	top.t.Helper()
	pem, err := os.ReadFile(top.path("etc/coffer/secrets/ca.pem"))
	if err != nil {
		top.t.Fatal(err)
	}
	cfg.RootCAs = x509.NewCertPool()
	cfg.RootCAs.AppendCertsFromPEM(pem)
	cfg.URL = "https://" + top.apiAddr
	c, err := client.New(cfg)
	if err != nil {
		top.t.Fatal(err)
	}
	top.t.Cleanup(c.Close)
	return c
}

// makeApp makes an app as an operator does, and a token as its backend does.
func (top *topology) makeApp() (journal.AppID, string) {
	top.t.Helper()
	operator, err := auth.ReadSecret(top.path("etc/coffer/secrets/operator.token"))
	if err != nil {
		top.t.Fatal(err)
	}
	app, err := top.client(client.Config{OperatorToken: client.StaticToken(operator)}).
		CreateApp(top.t.Context(), client.AppSpec{Name: "topology", Plan: "pro"})
	if err != nil {
		top.t.Fatal(err)
	}
	token, err := auth.Build(auth.Spec{
		AppID: app.ID.String(), Certificate: app.Certificates[0], Issued: time.Now(), Lifetime: time.Hour, Salt: 1,
	})
	if err != nil {
		top.t.Fatal(err)
	}
	return app.ID, token
}

// check replays everything: what was acknowledged is there, and nothing is twice.
func (top *topology) check(c *client.Client, written *ledger) {
	top.t.Helper()
	found := make(map[string]int)
	var last journal.Position
	for e, err := range c.Replay(top.t.Context(), client.Query{}).Events() {
		if err != nil {
			top.t.Fatal(err)
		}
		if e.Position <= last {
			top.t.Fatalf("position %s after %s", e.Position, last)
		}
		last = e.Position
		replayed, err := journal.ParseReplayed(e.JSON)
		if err != nil {
			top.t.Fatal(err)
		}
		found[replayed.ID]++
	}
	for id := range written.ids {
		if found[id] != 1 {
			top.t.Errorf("%s was acknowledged and is there %d times", id, found[id])
		}
	}
	for id, n := range found {
		if n != 1 {
			top.t.Errorf("%s is there %d times", id, n)
		}
	}
}

// searchFor looks for what must not be readable in anything that was written.
func (top *topology) searchFor(canaries ...string) {
	top.t.Helper()
	searched := 0
	err := filepath.WalkDir(top.dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		searched += len(text)
		for _, canary := range canaries {
			if bytes.Contains(text, []byte(canary)) {
				top.t.Errorf("%s holds %q", name, canary)
			}
		}
		return nil
	})
	if err != nil {
		top.t.Fatal(err)
	}
	if searched < 100_000 {
		top.t.Errorf("only %d bytes searched", searched)
	}
	for _, p := range []*process{top.nats, top.coffer} {
		for _, canary := range canaries {
			if strings.Contains(p.text(), canary) {
				top.t.Errorf("%s logged %q", filepath.Base(p.cmd.Path), canary)
			}
		}
	}
}

// topologyDir lays out, in a temporary folder, what the services of
// docker-compose.yml have in their containers: the secrets made by the same
// script, and the same configuration files with their paths, names and ports
// turned into this machine's.
func topologyDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	nats, coffer := filepath.Join(dir, "etc/nats"), filepath.Join(dir, "etc/coffer")
	requireTool(t, "openssl", "apt-get install openssl")
	script := filepath.Join(root, "docs/operations/compose/setup.sh")
	setup := exec.CommandContext(t.Context(), "bash", script,
		filepath.Join(dir, "authority"), filepath.Join(nats, "secrets"), filepath.Join(dir, "vault"), filepath.Join(coffer, "secrets"))
	if out, err := setup.CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("setup.sh: %v\n%s", err, out) // what it makes belongs on no screen
	}
	place(t, natsConf, filepath.Join(nats, "nats.conf"),
		"/etc/nats/secrets", filepath.Join(nats, "secrets"),
		`"/data"`, `"`+filepath.Join(dir, "nats-data")+`"`,
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

// freeAddr is a loopback address that nobody listened on a moment ago.
func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

// eventually waits for something that another process does. The bound is there to
// end a broken run, not to measure one.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if done() {
			return
		}
	}
	t.Fatalf("waited in vain for %s", what)
}

// process is a running server and what it has printed.
type process struct {
	t    *testing.T
	cmd  *exec.Cmd
	done chan struct{}
	mu   sync.Mutex
	out  bytes.Buffer // guarded by mu
}

// start runs a program until the test ends or it is killed. Its standard input
// stays open for as long, which is how the tests' Vault knows that it is wanted.
func start(t *testing.T, program string, args ...string) *process {
	t.Helper()
	p := &process{t: t, cmd: exec.Command(program, args...), done: make(chan struct{})}
	input, err := p.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.cmd.Stdout, p.cmd.Stderr = p, p
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = p.cmd.Wait()
		_ = input.Close()
		close(p.done)
	}()
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("%s said:\n%s", filepath.Base(program), tail(p.text(), 40))
		}
	})
	return p
}

// Write keeps what the process prints.
func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.Write(b)
}

func (p *process) text() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.String()
}

// line is the first line that begins with prefix.
func (p *process) line(prefix string) string {
	lines := bufio.NewScanner(strings.NewReader(p.text()))
	for lines.Scan() {
		if strings.HasPrefix(lines.Text(), prefix) {
			return lines.Text()
		}
	}
	return ""
}

func (p *process) await(text string) {
	p.t.Helper()
	eventually(p.t, text, func() bool {
		p.mustRun()
		return strings.Contains(p.text(), text)
	})
}

func (p *process) mustRun() {
	p.t.Helper()
	select {
	case <-p.done:
		p.t.Fatalf("%s has ended: %s", filepath.Base(p.cmd.Path), p.cmd.ProcessState)
	default:
	}
}

// kill ends the process as a crash would.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// stop asks it to end.
func (p *process) stop() {
	_ = p.cmd.Process.Signal(os.Interrupt)
	<-p.done
}

func tail(text string, n int) string {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
