package webhook

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The official libraries of other languages (MIT), pinned.
const (
	javaScriptLibrary = "standardwebhooks@1.1.1"
	pythonLibrary     = "standardwebhooks==1.1.0"
)

const javaScript = `
const { Webhook } = require("standardwebhooks");
const { secret, body, headers } = JSON.parse(require("fs").readFileSync(0, "utf8"));
const check = (text) => { try { new Webhook(secret).verify(text, headers); return true } catch { return false } };
console.log(JSON.stringify([check(body), check(body + " ")]));`

const python = `
import json, sys
from standardwebhooks.webhooks import Webhook
m = json.load(sys.stdin)
def check(text):
    try:
        Webhook(m["secret"]).verify(text, m["headers"])
        return True
    except Exception:
        return False
print(json.dumps([check(m["body"]), check(m["body"] + " ")]))`

func missing(t *testing.T, reason string) {
	t.Helper()
	if os.Getenv("COFFER_TEST_REQUIRE") == "all" {
		t.Fatal(reason)
	}
	t.Skip(reason)
}

// run runs a program and returns what it printed; its failure ends the test.
func run(t *testing.T, dir, in string, program string, args ...string) []byte {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir, cmd.Stdin = dir, strings.NewReader(in)
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v: %s", program, err, stderr.String())
	}
	return out.Bytes()
}

// TestOtherLanguages: the official libraries accept what is signed here, while a
// secret is replaced too, and refuse another body.
func TestOtherLanguages(t *testing.T) {
	cache, err := filepath.Abs("../../../../.cache/standardwebhooks")
	if err != nil {
		t.Fatal(err)
	}
	older, newer := must(NewSecret(Symmetric))(t), must(NewSecret(Symmetric))(t)
	header := make(http.Header)
	const body = `{"text":"naïve ☕"}`
	if err := Sign(header, "msg_1", time.Now(), []byte(body), newer, older); err != nil {
		t.Fatal(err)
	}
	headers := make(map[string]string)
	for name := range header {
		headers[strings.ToLower(name)] = header.Get(name)
	}
	check := func(t *testing.T, program string, args ...string) {
		t.Helper()
		for _, s := range []*Secret{older, newer, must(NewSecret(Symmetric))(t)} {
			in, err := json.Marshal(map[string]any{"secret": s.Verifier(), "body": body, "headers": headers})
			if err != nil {
				t.Fatal(err)
			}
			want := "[true, false]"
			if s != older && s != newer {
				want = "[false, false]"
			}
			got := strings.ReplaceAll(strings.TrimSpace(string(run(t, cache, string(in), program, args...))), ",f", ", f")
			if got != want {
				t.Errorf("%s: %s, want %s", program, got, want)
			}
		}
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Run("JavaScript", func(t *testing.T) {
		for _, program := range []string{"node", "npm"} {
			if _, err := exec.LookPath(program); err != nil {
				missing(t, "skipped: needs "+program+"; install Node.js")
			}
		}
		if _, err := os.Stat(filepath.Join(cache, "node_modules/standardwebhooks")); err != nil {
			if os.Getenv("COFFER_TEST_REQUIRE") != "all" {
				missing(t, "skipped: needs the npm package "+javaScriptLibrary+"; COFFER_TEST_REQUIRE=all installs it")
			}
			run(t, cache, "", "npm", "install", "--no-save", "--no-audit", "--no-fund", "--prefix", cache, javaScriptLibrary)
		}
		check(t, "node", "-e", javaScript)
	})
	t.Run("Python", func(t *testing.T) {
		if _, err := exec.LookPath("python3"); err != nil {
			missing(t, "skipped: needs python3; install Python")
		}
		interpreter := filepath.Join(cache, "venv/bin/python")
		if _, err := os.Stat(filepath.Join(cache, "venv/complete")); err != nil {
			if os.Getenv("COFFER_TEST_REQUIRE") != "all" {
				missing(t, "skipped: needs the Python package "+pythonLibrary+"; COFFER_TEST_REQUIRE=all installs it")
			}
			run(t, cache, "", "python3", "-m", "venv", "venv")
			run(t, cache, "", interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", pythonLibrary)
			if err := os.WriteFile(filepath.Join(cache, "venv/complete"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		check(t, interpreter, "-c", python)
	})
}
