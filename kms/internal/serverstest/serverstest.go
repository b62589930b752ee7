// Package serverstest starts the key servers that tests need, and skips the
// tests where the servers are not installed.
package serverstest

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The servers. Each is found by an environment variable, or where
// .ci/test-servers puts it.
const (
	Vault    = "COFFER_TEST_VAULTSERVER"
	LocalKMS = "COFFER_TEST_LOCALKMS"
	Moto     = "COFFER_TEST_MOTO"
)

// Binary returns the path of a server. Without it the test is skipped, or fails
// if COFFER_TEST_REQUIRE is "all".
func Binary(t testing.TB, variable string) string {
	t.Helper()
	if path := os.Getenv(variable); path != "" { //nolint:forbidigo // only for tests
		return path
	}
	file := map[string]string{Vault: "vaultserver", LocalKMS: "localkms", Moto: "moto/bin/moto_server"}[variable]
	if path := filepath.Join(moduleRoot(t), ".cache", file); isFile(path) {
		return path
	}
	const how = `run .ci/test-servers once, or set its variables with: set -a; eval "$(.ci/test-servers)"; set +a`
	if os.Getenv("COFFER_TEST_REQUIRE") == "all" { //nolint:forbidigo // only for tests
		t.Fatalf("needs the server of %s: %s", variable, how)
	}
	t.Skipf("skipped: needs the server of %s; %s", variable, how)
	return ""
}

func moduleRoot(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for !isFile(filepath.Join(dir, ".ci", "test-servers")) {
		up := filepath.Dir(dir)
		if up == dir {
			return ""
		}
		dir = up
	}
	return dir
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

// Process is a running server.
type Process struct {
	URL  string
	cmd  *exec.Cmd
	in   io.Closer
	done chan struct{}
	log  head
}

// head keeps the beginning of what a server writes to standard error, which says
// why it does not start.
type head struct {
	mu sync.Mutex
	b  []byte // guarded by mu
}

func (h *head) Write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.b = append(h.b, p[:min(len(p), max(0, 4096-len(h.b)))]...)
	return len(p), nil
}

func (h *head) String() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return string(h.b)
}

// Start runs a server whose first line of output is its URL, until the test
// ends.
func Start(t testing.TB, path string, args ...string) *Process {
	t.Helper()
	p, out := start(t, path, args...)
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		<-p.done
		t.Fatalf("starting %s: no address: %v\n%s", path, err, &p.log)
	}
	p.URL = strings.TrimSpace(line)
	return p
}

// StartMoto runs moto's server on a free port, until the test ends.
func StartMoto(t testing.TB) *Process {
	t.Helper()
	path := Binary(t, Moto)
	ln, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // only to find a free port
	if err != nil {
		t.Fatal(err)
	}
	host, port, _ := net.SplitHostPort(ln.Addr().String()) //nolint:errcheck // our own listener's
	_ = ln.Close()
	p, out := start(t, path, "-H", host, "-p", port)
	go func() { _, _ = io.Copy(io.Discard, out) }()
	p.URL = "http://" + net.JoinHostPort(host, port)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // Python loads for seconds
	defer cancel()
	for !answers(ctx, p.URL) {
		select {
		case <-time.After(50 * time.Millisecond):
		case <-p.done:
			t.Fatalf("%s ended\n%s", path, &p.log)
		case <-ctx.Done():
			t.Fatalf("%s does not answer", path)
		}
	}
	return p
}

func answers(ctx context.Context, url string) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return false
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	_ = resp.Body.Close()
	return true
}

func start(t testing.TB, path string, args ...string) (*Process, io.Reader) {
	t.Helper()
	p := &Process{cmd: exec.Command(path, args...), done: make(chan struct{})} //nolint:gosec,noctx // ended by Stop
	p.cmd.Env = environ()
	p.cmd.Stderr = &p.log
	in, err := p.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.in = in
	out, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p.cmd.Stdout = w
	if err := p.cmd.Start(); err != nil {
		t.Fatalf("starting %s: %v", path, err)
	}
	_ = w.Close()
	go func() {
		_ = p.cmd.Wait()
		_ = out.Close()
		close(p.done)
	}()
	t.Cleanup(p.Stop)
	return p, out
}

// environ is that of the test without GODEBUG: a test in the FIPS 140-3 mode is
// about Coffer, and the servers do not work in it.
func environ() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "GODEBUG=") }) //nolint:forbidigo // only for tests
}

// Stop kills the server.
func (p *Process) Stop() {
	_ = p.cmd.Process.Kill()
	_ = p.in.Close()
	<-p.done
}

// Pause stops the server where it is: its kernel still accepts connections, and
// nothing answers. It returns once every thread has stopped.
func (p *Process) Pause(t testing.TB) {
	t.Helper()
	p.signal(t, syscall.SIGSTOP)
	for !p.stopped() {
		time.Sleep(time.Millisecond)
	}
}

func (p *Process) stopped() bool {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", p.cmd.Process.Pid)) //nolint:errcheck // the pattern is good
	for _, task := range tasks {
		stat, err := os.ReadFile(task) //nolint:gosec // of our own child
		_, rest, _ := strings.Cut(string(stat), ") ")
		if err == nil && !strings.HasPrefix(rest, "T") {
			return false
		}
	}
	return true
}

// Continue undoes Pause.
func (p *Process) Continue(t testing.TB) { p.signal(t, syscall.SIGCONT) }

func (p *Process) signal(t testing.TB, s syscall.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}
