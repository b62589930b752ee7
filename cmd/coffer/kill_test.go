package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/journal"
)

// server is a development server in a process of its own.
type server struct {
	t    *testing.T
	dir  string
	base int
	cmd  *exec.Cmd
	log  bytes.Buffer
}

// freePorts finds four free ports in a row: a server that is killed has to come
// back at the same addresses.
func freePorts(t *testing.T) int {
	t.Helper()
	for range 200 {
		base := 20000 + rand.IntN(10000)
		free := 0
		for i := range 4 {
			l, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(base+i))
			if err != nil {
				break
			}
			_ = l.Close()
			free++
		}
		if free == 4 {
			return base
		}
	}
	t.Fatal("no four free ports in a row")
	return 0
}

func (s *server) start() {
	s.t.Helper()
	s.cmd = exec.Command("coffer", "serve", "--dev", "--data", s.dir, "--port-base", strconv.Itoa(s.base))
	s.cmd.Env = withoutCoffer(os.Environ())
	s.cmd.Stdout, s.cmd.Stderr = io.Discard, &s.log
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(s.kill)
}

// kill is kill -9.
func (s *server) kill() {
	if s.cmd.ProcessState == nil {
		_ = s.cmd.Process.Kill()
		_ = s.cmd.Wait()
	}
}

// environ waits for the server and returns the environment of a command.
func (s *server) environ() []string {
	s.t.Helper()
	vars, err := awaitEnv(filepath.Join(s.dir, "dev.env"))
	if err != nil {
		s.t.Fatalf("%v\n%s", err, s.log.String())
	}
	env := withoutCoffer(os.Environ())
	for name, value := range vars {
		env = append(env, name+"="+value)
	}
	return env
}

// history writes the messages from to until-1, of a few conversations, in the
// order of their ids.
func history(t *testing.T, from, until int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "history.jsonl")
	var b bytes.Buffer
	now := time.Now().Add(-time.Hour).UnixMilli()
	for i := from; i < until; i++ {
		fmt.Fprintf(&b, `{"msg_id":"%d","timestamp":%d,"direction":"outgoing","from":"user%d","to":"group%d","chat_type":"groupchat","payload":{"bodies":[{"type":"txt","msg":"message number %d"}],"ext":{}}}`+"\n",
			i, now+int64(i), i%101, i%23, i)
	}
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// replayed runs coffer replay and checks that every message is there once, and in
// order within its conversation.
func replayed(t *testing.T, env []string, want int) {
	t.Helper()
	cmd := exec.Command("coffer", "replay")
	cmd.Env = env
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("replay: %v", err)
	}
	if trailer := checkOnce(t, string(out), want); !strings.Contains(trailer, `"count":`+strconv.Itoa(want)+",") {
		t.Errorf("trailer %s", trailer)
	}
}

// checkOnce checks that a replay has each of the messages 0 to want-1 once, and
// in order within its conversation. It returns the trailer.
func checkOnce(t *testing.T, out string, want int) (trailer string) {
	t.Helper()
	seen := make(map[string]int, want)
	last := map[string]int{}
	var position journal.Position
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, `{"end":`) {
			trailer = line
			continue
		}
		e, err := journal.ParseReplayed([]byte(line))
		if err != nil {
			t.Fatal(err)
		}
		if e.Position <= position {
			t.Errorf("position %s after %s", e.Position, position)
		}
		position = e.Position
		n, err := strconv.Atoi(e.ID)
		if err != nil {
			t.Fatal(err)
		}
		seen[e.ID]++
		if before, ok := last[e.Conversation]; ok && n < before {
			t.Errorf("conversation %s has message %d after %d", e.Conversation, n, before)
		}
		last[e.Conversation] = n
	}
	twice := 0
	for _, times := range seen {
		if times > 1 {
			twice++
		}
	}
	if len(seen) != want || twice > 0 {
		t.Errorf("%d messages replayed, %d of them more than once, want %d once", len(seen), twice, want)
	}
	return trailer
}

// stored waits until the server holds at least n events, and returns false when
// the import has ended before.
func stored(t *testing.T, env []string, n int, ended <-chan struct{}) bool {
	t.Helper()
	for {
		select {
		case <-ended:
			return false
		default:
		}
		cmd := exec.Command("coffer", "replay", "--order", "desc", "--limit", "1", "--timeout", "0")
		cmd.Env = env
		out, err := cmd.Output()
		if err == nil {
			var e struct {
				Position journal.Position `json:"position"`
			}
			line, _, _ := bytes.Cut(out, []byte("\n"))
			if json.Unmarshal(line, &e) == nil && int(e.Position.Sequence()) >= n {
				return true
			}
		}
	}
}

// TestKilledServer: the server is killed with -9 again and again while an import
// runs. The import goes on by itself, and in the end every message is there once.
func TestKilledServer(t *testing.T) {
	const messages, kills = 20000, 3
	s := &server{t: t, dir: filepath.Join(t.TempDir(), "data"), base: freePorts(t)}
	s.start()
	env := s.environ()

	cmd := exec.Command("coffer", "import", "agora", "--json", "--batch", "100", "--timeout", "2m",
		"--rejects", filepath.Join(t.TempDir(), "rejects"), history(t, 0, messages))
	cmd.Env = env
	var out, talk bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &talk
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	var importErr error
	go func() {
		importErr = cmd.Wait()
		close(ended)
	}()
	killed := 0
	for i := range kills {
		// A quarter of the work between kills, and a moment at random.
		if !stored(t, env, (i+1)*messages/(kills+2), ended) {
			break
		}
		time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond)
		s.kill()
		killed++
		s.start()
	}
	<-ended
	if importErr != nil {
		t.Fatalf("the import failed: %v\n%s\nserver:\n%s", importErr, talk.String(), s.log.String())
	}
	if killed == 0 {
		t.Fatal("the import was over before the server could be killed")
	}
	var sum struct {
		Read       int `json:"read"`
		Imported   int `json:"imported"`
		Duplicates int `json:"duplicates"`
		Rejected   int `json:"rejected"`
	}
	if err := json.Unmarshal(out.Bytes(), &sum); err != nil {
		t.Fatal(err)
	}
	if sum.Read != messages || sum.Imported+sum.Duplicates != messages || sum.Rejected != 0 {
		t.Errorf("summary %+v", sum)
	}
	replayed(t, env, messages)
	t.Logf("killed %d times; %d of %d were stored by an attempt whose answer was lost", killed, sum.Duplicates, messages)
}

// TestInterruptedImport: an interrupt finishes the batches under way and says how
// to go on; the second run completes the work.
func TestInterruptedImport(t *testing.T) {
	const messages = 20000
	s := &server{t: t, dir: filepath.Join(t.TempDir(), "data"), base: freePorts(t)}
	s.start()
	env := s.environ()
	args := []string{"import", "agora", "--json", "--batch", "50", "--rejects", filepath.Join(t.TempDir(), "rejects"), history(t, 0, messages)}
	run := func(interrupt bool) (code, imported, duplicates int, talk string) {
		cmd := exec.Command("coffer", args...)
		cmd.Env = env
		var out, errOut bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errOut
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		var waitErr error
		go func() {
			waitErr = cmd.Wait()
			close(ended)
		}()
		if interrupt {
			if !stored(t, env, messages/10, ended) {
				t.Fatal("the import was over before it could be interrupted")
			}
			if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
				t.Fatal(err)
			}
		}
		<-ended
		if exit := (*exec.ExitError)(nil); errors.As(waitErr, &exit) {
			code = exit.ExitCode()
		} else if waitErr != nil {
			t.Fatal(waitErr)
		}
		var sum struct {
			Imported   int `json:"imported"`
			Duplicates int `json:"duplicates"`
		}
		if err := json.Unmarshal(out.Bytes(), &sum); err != nil {
			t.Fatalf("%v: %s %s", err, out.String(), errOut.String())
		}
		return code, sum.Imported, sum.Duplicates, errOut.String()
	}
	code, first, _, talk := run(true)
	if code != 130 || !strings.Contains(talk, "finishing what is under way") || !strings.Contains(talk, "Run the same command again to go on") {
		t.Errorf("exit code %d, standard error %q", code, talk)
	}
	if first == 0 || first == messages {
		t.Errorf("%d imported before the interrupt", first)
	}
	code, second, duplicates, talk := run(false)
	if code != 0 || first+second != messages || duplicates != first {
		t.Errorf("exit code %d, imported %d and then %d, duplicates %d; %s", code, first, second, duplicates, talk)
	}
	replayed(t, env, messages)
}

// TestFollowOverARestart: a replay that follows the end goes on when the server
// has been killed and started again, and gives each event once.
func TestFollowOverARestart(t *testing.T) {
	const half = 1000
	s := &server{t: t, dir: filepath.Join(t.TempDir(), "data"), base: freePorts(t)}
	s.start()
	env := s.environ()
	path := filepath.Join(t.TempDir(), "follow.ndjson")
	out, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	var talk bytes.Buffer
	follow := exec.Command("coffer", "replay", "--follow", "--timeout", "2m")
	follow.Env, follow.Stdout, follow.Stderr = env, out, &talk
	if err := follow.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = follow.Process.Kill() })
	lines := func() (string, int) {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(b), bytes.Count(b, []byte("\n"))
	}
	load := func(from, until int) {
		cmd := exec.Command("coffer", "import", "agora", "--rejects", filepath.Join(t.TempDir(), "rejects"), history(t, from, until))
		cmd.Env = env
		if b, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("import: %v\n%s", err, b)
		}
		for end := time.Now().Add(startLimit); ; time.Sleep(10 * time.Millisecond) {
			if _, n := lines(); n >= until {
				return
			} else if time.Now().After(end) {
				t.Fatalf("%d of %d events followed; %s", n, until, s.log.String())
			}
		}
	}
	load(0, half)
	s.kill()
	s.start()
	load(half, 2*half)
	if err := follow.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	err = follow.Wait()
	exit := (*exec.ExitError)(nil)
	if !errors.As(err, &exit) || exit.ExitCode() != 130 {
		t.Errorf("the interrupted replay ended with %v", err)
	}
	text, n := lines()
	if trailer := checkOnce(t, text, 2*half); n != 2*half || trailer != "" {
		t.Errorf("%d lines, trailer %q", n, trailer)
	}
	last := text[strings.LastIndex(text, `"position":"`)+len(`"position":"`):]
	want := "coffer replay --follow --after " + strings.TrimRight(last, "\"}\n")
	if !strings.Contains(talk.String(), want) {
		t.Errorf("standard error %q does not say %q", talk.String(), want)
	}
}
