package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestExportAfterKills kills the command, and once the server, while files arrive:
// the same command goes on, and what is there in the end is the whole export.
func TestExportAfterKills(t *testing.T) {
	const hours, each, rounds = 48, 40, 6
	s := &server{t: t, dir: filepath.Join(t.TempDir(), "data"), base: freePorts(t)}
	s.start()
	env := s.environ()
	coffer := func(args ...string) *exec.Cmd {
		cmd := exec.Command("coffer", args...)
		cmd.Env = env
		return cmd
	}
	var lines strings.Builder
	now := time.Now().Truncate(time.Hour)
	for h := range hours {
		for i := range each {
			fmt.Fprintf(&lines, `{"msg_id":"%d-%d","timestamp":%d,"from":"user%d","to":"g%d","chat_type":"groupchat","payload":{"bodies":[{"type":"txt","msg":"message %d"}]}}`+"\n",
				h, i, now.Add(time.Duration(h-hours)*time.Hour).Add(time.Duration(i)*time.Second).UnixMilli(), i%7, i%3, i)
		}
	}
	file := filepath.Join(t.TempDir(), "history.jsonl")
	if err := os.WriteFile(file, []byte(lines.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := coffer("import", "agora", file).CombinedOutput(); err != nil {
		t.Fatalf("import: %v: %s", err, out)
	}
	dir := filepath.Join(t.TempDir(), "out")
	here := func() int {
		files, err := filepath.Glob(filepath.Join(dir, "*.gz"))
		if err != nil {
			t.Fatal(err)
		}
		return len(files)
	}
	killed, most := 0, 0
	for round := range rounds {
		cmd := coffer("export", "--format", "agora", dir)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		whole := false
		// The kill comes when something more is there, and then a random moment later.
		for most+rand.N(4) >= here() && !whole {
			select {
			case <-ended:
				whole = true
			case <-time.After(time.Millisecond):
			}
		}
		if whole {
			break // it was faster
		}
		_ = cmd.Process.Kill()
		<-ended
		killed++
		if n := here(); n < most {
			t.Errorf("after round %d there are %d files, there were %d", round, n, most)
		}
		most = here()
		if round == 2 {
			s.kill()
			s.start()
			env = s.environ()
		}
	}
	t.Logf("killed %d times, with up to %d files", killed, most)
	if killed == 0 {
		t.Error("nothing was killed")
	}
	out, err := coffer("export", "--format", "agora", dir).CombinedOutput()
	if err != nil && !strings.Contains(string(out), "complete export") {
		t.Fatalf("%v: %s\n%s", err, out, s.log.String())
	}
	out, err = coffer("export", "--verify", dir).CombinedOutput()
	if want := fmt.Sprintf("events %d, files %d,", hours*each, hours); err != nil || !strings.HasPrefix(string(out), want) {
		t.Fatalf("verify: %v: %s, want %s", err, out, want)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*.part")); err != nil || len(left) > 0 {
		t.Errorf("%v is left, %v", left, err)
	}
	out, err = coffer("import", "agora", dir).CombinedOutput()
	if want := fmt.Sprintf("read %d, imported 0, duplicates %d,", hours*each, hours*each); err != nil || !strings.HasPrefix(string(out), want) {
		t.Errorf("import: %v: %s", err, out)
	}
}
