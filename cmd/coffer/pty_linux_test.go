package main

import (
	"bytes"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// terminal is a pseudo terminal with a command at it.
type terminal struct {
	t      *testing.T
	master *os.File
	cmd    *exec.Cmd
	stdout bytes.Buffer

	mu     sync.Mutex // guards what follows
	screen bytes.Buffer
	news   chan struct{}
}

// atTerminal starts coffer with a terminal as its standard input and error.
func atTerminal(t *testing.T, env []string, args ...string) *terminal {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = master.Close() })
	fd := int(master.Fd())
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 100}); err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	p := &terminal{t: t, master: master, cmd: exec.Command("coffer", args...), news: make(chan struct{}, 1)}
	p.cmd.Env, p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = env, slave, &p.stdout, slave
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = slave.Close() // the command has it
	t.Cleanup(func() {
		if p.cmd.ProcessState == nil {
			_ = p.cmd.Process.Kill()
			_ = p.cmd.Wait()
		}
	})
	go p.read()
	return p
}

func (p *terminal) read() {
	buf := make([]byte, 4096)
	for {
		n, err := p.master.Read(buf)
		p.mu.Lock()
		p.screen.Write(buf[:n])
		p.mu.Unlock()
		select {
		case p.news <- struct{}{}:
		default:
		}
		if err != nil { // EIO: nobody has the terminal any more
			return
		}
	}
}

func (p *terminal) shown() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.screen.String()
}

// await returns when the terminal shows a text.
func (p *terminal) await(text string) {
	p.t.Helper()
	deadline := time.After(startLimit)
	for !strings.Contains(p.shown(), text) {
		select {
		case <-p.news:
		case <-deadline:
			p.t.Fatalf("%q is never shown: %q", text, p.shown())
		}
	}
}

func (p *terminal) keys(text string) {
	p.t.Helper()
	if _, err := p.master.WriteString(text); err != nil {
		p.t.Fatal(err)
	}
}

// ended waits for the command and returns its exit code.
func (p *terminal) ended() int {
	p.t.Helper()
	_ = p.cmd.Wait()
	return p.cmd.ProcessState.ExitCode()
}

// TestConfirmAtTerminal: what cannot be undone is done after the right word was
// typed at a terminal, or by --yes, and not otherwise.
func TestConfirmAtTerminal(t *testing.T) {
	s := &server{t: t, dir: t.TempDir(), base: freePorts(t)}
	s.start()
	env := s.environ()
	vars, err := readEnv(s.dir + "/dev.env")
	if err != nil {
		t.Fatal(err)
	}
	app := vars["COFFER_APP"]
	destroyed := func() bool {
		cmd := exec.Command("coffer", "keys", "inventory")
		cmd.Env = env
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("inventory: %v %s", err, out)
		}
		return strings.Contains(string(out), app+"  destroyed")
	}
	for name, answer := range map[string]string{
		"another word": "yes\n", "nothing": "\n", "the beginning": app[:31] + "\n", "more": app + "x\n", "end of input": "\x04",
		"the word in between": "is it " + app + "\n",
	} {
		t.Run(name, func(t *testing.T) {
			p := atTerminal(t, env, "keys", "shred", "--app", app)
			p.await("Type " + app + " to go on: ")
			p.keys(answer)
			if code := p.ended(); code != 1 {
				t.Errorf("exit code %d: %s", code, p.shown())
			}
			p.await("nothing was done")
			if destroyed() {
				t.Fatal("the keys are destroyed")
			}
		})
	}
	t.Run("interrupted", func(t *testing.T) {
		p := atTerminal(t, env, "keys", "retire", "--before", "1")
		p.await("Type 1 to go on: ")
		if err := p.cmd.Process.Signal(os.Interrupt); err != nil {
			t.Fatal(err)
		}
		p.keys("\n")
		if code := p.ended(); code == 0 {
			t.Errorf("exit code %d: %s", code, p.shown())
		}
	})
	t.Run("--yes asks nothing", func(t *testing.T) {
		p := atTerminal(t, env, "keys", "retire", "--before", "1", "--yes")
		if code := p.ended(); code != 0 || strings.Contains(p.shown(), "Type ") {
			t.Errorf("exit code %d: %s", code, p.shown())
		}
	})
	t.Run("the word", func(t *testing.T) {
		p := atTerminal(t, env, "keys", "shred", "--app", app)
		p.await("This will destroy for ever every message of app " + app)
		p.keys(app + "\n")
		if code := p.ended(); code != 0 || !strings.Contains(p.stdout.String(), "destroyed") || !destroyed() {
			t.Errorf("exit code %d: %s %s", code, p.shown(), p.stdout.String())
		}
	})
}

// TestProgressAtTerminal watches a job whose steps the test makes: a bar on the
// terminal, which is gone at the end, and the result alone on standard output.
func TestProgressAtTerminal(t *testing.T) {
	steps := make(chan int, 1) // apps that are done
	done := 0
	answers := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		state := "running"
		select {
		case done = <-steps:
		default:
		}
		if done == 400 {
			state = "done"
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = fmt.Fprintf(w, `{"id":"0123456789abcdef","kind":"rewrap","actor":"operator:ann","state":%q,"phase":"apps","cursor":"","total":400,"done":%d,"skipped":0,"failed":0,"owner":"","lease":"2026-01-01T00:00:00Z","started":"2026-01-01T00:00:00Z","updated":"2026-01-01T00:00:00Z"}`, state, done)
	}))
	t.Cleanup(answers.Close)
	env := append(withoutCoffer(os.Environ()), "COFFER_URL="+answers.URL, "COFFER_OPERATOR_TOKEN="+strings.Repeat("t", 40), "TERM=xterm")
	p := atTerminal(t, env, "keys", "rewrap")
	for _, n := range []int{100, 300} {
		steps <- n
		p.await(fmt.Sprintf("%d/400", n))
		p.await(fmt.Sprintf("%d%%", n/4))
	}
	p.await("rewrap (")
	steps <- 400
	if code := p.ended(); code != 0 {
		t.Fatalf("exit code %d: %s", code, p.shown())
	}
	if out := p.stdout.String(); out != "rewrap 0123456789abcdef done: 400 done, 0 skipped, 0 failed of 400 apps\n" {
		t.Errorf("standard output: %q", out)
	}
	if shown := p.shown(); !strings.Contains(shown, "\r") || strings.Contains(shown, "\n") {
		t.Errorf("the bar is not on one line: %q", shown)
	}

	// Without a terminal no bar is drawn, and no control character written.
	done = 0
	steps <- 400
	cmd := exec.Command("coffer", "keys", "rewrap")
	cmd.Env = env
	var talk bytes.Buffer
	cmd.Stderr = &talk
	if out, err := cmd.Output(); err != nil || strings.ContainsAny(string(out)+talk.String(), "\r\x1b") {
		t.Errorf("%v: %q %q", err, out, talk.String())
	}
}
