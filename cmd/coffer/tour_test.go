package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestTour runs the commands of the README's tour as they stand there, in one
// shell, in a folder of their own: every fenced sh block between the markers.
func TestTour(t *testing.T) {
	readme, err := os.ReadFile(filepath.Join("..", "..", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	blocks := tourBlocks(t, string(readme))
	if len(blocks) < 4 {
		t.Fatalf("the tour has %d blocks of commands; it imports, replays and pages", len(blocks))
	}
	tour := strings.Join(blocks, "\n")
	for _, command := range []string{"coffer serve --dev", "coffer import agora", "coffer replay", "coffer history", "coffer listen"} {
		if !strings.Contains(tour, command) {
			t.Errorf("the tour has no %q", command)
		}
	}
	var script strings.Builder
	for i, b := range blocks {
		fmt.Fprintf(&script, "echo '== block %d' >&2\n%s\n", i+1, b)
	}
	dir := t.TempDir()
	// Something of the tour that never ends must not hold up the tests.
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-eu", "-o", "pipefail", "-c", script.String())
	cmd.Dir = dir
	cmd.Env = append(withoutCoffer(os.Environ()), "HOME="+dir)
	var out, talk bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &talk
	// The server that the tour starts is in the shell's group, which is ended as a
	// whole whatever happens to the shell.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	err = cmd.Run()
	if cmd.Process != nil {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	}
	if err != nil {
		log, _ := os.ReadFile(filepath.Join(dir, "server.log"))
		t.Fatalf("the tour failed: %v\n%s\n%s\nserver:\n%s", err, talk.String(), out.String(), log)
	}
	for _, want := range []string{`"end":{"count":`, `"position":"`, "MESSAGE", `"signature":"valid"`} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the tour printed no %s:\n%s", want, out.String())
		}
	}
}

// tourBlocks returns the fenced sh blocks between the markers.
func tourBlocks(t *testing.T, readme string) []string {
	t.Helper()
	_, rest, begun := strings.Cut(readme, "\n<!-- tour -->\n")
	tour, _, ended := strings.Cut(rest, "\n<!-- /tour -->\n")
	if !begun || !ended {
		t.Fatal("the README has no tour between <!-- tour --> and <!-- /tour -->")
	}
	var blocks []string
	var block strings.Builder
	fence := ""
	for line := range strings.Lines(tour) {
		text := strings.TrimRight(line, "\n")
		switch {
		case fence == "" && strings.HasPrefix(text, "```"):
			fence = text
			block.Reset()
		case fence != "" && text == "```":
			if fence != "```sh" {
				t.Errorf("the tour has a block %q: only sh blocks are run, and nothing else belongs there", fence)
			}
			blocks = append(blocks, block.String())
			fence = ""
		case fence != "":
			block.WriteString(line)
		}
	}
	if fence != "" {
		t.Error("the tour ends inside a block")
	}
	return blocks
}

func withoutCoffer(environ []string) []string {
	var kept []string
	for _, e := range environ {
		if !strings.HasPrefix(e, "COFFER_") {
			kept = append(kept, e)
		}
	}
	return kept
}
