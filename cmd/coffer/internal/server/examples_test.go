package server_test

import (
	"bytes"
	"compress/zlib"
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
)

// need skips without a program, or fails where all of them are asked for.
func need(t *testing.T, program, advice string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		missing(t, "skipped: needs "+program+"; "+advice)
	}
	return path
}

func missing(t *testing.T, reason string) {
	t.Helper()
	if os.Getenv("COFFER_TEST_REQUIRE") == "all" {
		t.Fatal(reason)
	}
	t.Skip(reason)
}

// TestExamples runs the programs of docs/api/examples against a server.
func TestExamples(t *testing.T) {
	s := newSite(t, config.Limits{})
	for file, program := range map[string]string{"curl.sh": "curl", "python.py": "python3", "javascript.mjs": "node"} {
		t.Run(file, func(t *testing.T) {
			run := need(t, program, "install "+program)
			if program == "curl" {
				run = "sh"
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, run, filepath.Join("../../../../docs/api/examples", file))
			cmd.Env = []string{
				"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME"), "COFFER_URL=" + s.url, "COFFER_APP=" + s.app,
				"COFFER_CA=" + s.regions["eu"]["COFFER_CA"], "COFFER_TOKEN=" + s.token,
			}
			out, err := cmd.CombinedOutput()
			if err != nil || !strings.Contains(string(out), "stored ") {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
	if events, _ := s.replay(""); len(events) == 0 && !t.Skipped() {
		t.Log("no example has run")
	}
}

// agoraToken is the ecosystem's own builder of tokens, on npm (MIT).
const agoraToken = "agora-token@2.0.6"

const buildTokens = `
const { ChatTokenBuilder } = require("agora-token");
const [app, certificate] = JSON.parse(require("fs").readFileSync(0, "utf8"));
console.log(JSON.stringify({
  app: ChatTokenBuilder.buildAppToken(app, certificate, 3600),
  user: ChatTokenBuilder.buildUserToken(app, certificate, "ann", 3600),
  stranger: ChatTokenBuilder.buildAppToken(app, certificate.replace(/./g, "0"), 3600),
}));`

// TestTokensOfAgoraToken: what the npm package agora-token builds is accepted for
// what it says, and refused with any character changed.
func TestTokensOfAgoraToken(t *testing.T) {
	npm, node := need(t, "npm", "install Node.js"), need(t, "node", "install Node.js")
	cache, err := filepath.Abs("../../../../.cache/agora-token")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(cache, "node_modules/agora-token")); err != nil {
		install := exec.CommandContext(t.Context(), npm, "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", cache, agoraToken)
		if out, err := install.CombinedOutput(); err != nil {
			missing(t, "skipped: needs npm's registry for "+agoraToken+": "+err.Error()+" "+string(out))
		}
	}
	s := newSite(t, config.Limits{})
	cmd := exec.CommandContext(t.Context(), node, "-e", buildTokens)
	cmd.Dir = cache
	secret, err := json.Marshal([]string{s.app, s.certificate})
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdin = strings.NewReader(string(secret))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var tokens struct{ App, User, Stranger string }
	if err := json.Unmarshal(out, &tokens); err != nil {
		t.Fatal(err)
	}
	status := func(method, token, body string) int {
		return s.do(request{method: method, path: s.events(), token: token, body: body}).status
	}
	if got := status("GET", tokens.App, ""); got != 200 {
		t.Errorf("the app's token reads: %d", got)
	}
	if got := status("POST", tokens.User, sent("by-ann", "ann", "ben", "x")); got != 201 {
		t.Errorf("the user's token sends: %d", got)
	}
	if got := status("POST", tokens.User, sent("by-ben", "ben", "ann", "x")); got != 403 {
		t.Errorf("the user's token sends as another: %d", got)
	}
	own := s.do(request{path: s.events() + "?conversation=ann,ben", token: tokens.User})
	if own.status != 200 || len(own.json(t)["data"].([]any)) != 1 {
		t.Errorf("the user's token reads its conversation: %d %s", own.status, own.body)
	}
	if got := s.do(request{path: s.events() + "?conversation=harbour", token: tokens.User}).status; got != 404 {
		t.Errorf("the user's token reads another conversation: %d", got)
	}
	if got := status("GET", tokens.Stranger, ""); got != 401 {
		t.Errorf("a token of another certificate: %d", got)
	}
	for i := range len(tokens.App) {
		changed := byte('A')
		if tokens.App[i] == changed {
			changed = 'B'
		}
		tampered := tokens.App[:i] + string(changed) + tokens.App[i+1:]
		if same(tokens.App, tampered) {
			continue // a few bits before the checksum mean nothing to deflate
		}
		if got := status("GET", tampered, ""); got != 401 {
			t.Errorf("with character %d changed: %d", i, got)
		}
	}
}

// same reports whether two tokens hold the same signed content.
func same(a, b string) bool {
	var content [2][]byte
	for i, token := range []string{a, b} {
		if len(token) < 3 || token[:3] != "007" {
			return false
		}
		packed, err := base64.StdEncoding.Strict().DecodeString(token[3:])
		if err != nil {
			return false
		}
		r, err := zlib.NewReader(bytes.NewReader(packed))
		if err != nil {
			return false
		}
		if content[i], err = io.ReadAll(r); err != nil {
			return false
		}
	}
	return bytes.Equal(content[0], content[1])
}
