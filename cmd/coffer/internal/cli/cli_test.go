package cli

import (
	"bytes"
	"context"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/cmd/coffer/internal/importer"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/client"
)

// run calls Main as a shell would, without its environment.
func run(t *testing.T, environ []string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, talk bytes.Buffer
	code = Main(args, System{Stdin: strings.NewReader(""), Stdout: &out, Stderr: &talk, Environ: environ})
	return code, out.String(), talk.String()
}

func TestMoment(t *testing.T) {
	now := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	for in, want := range map[string]string{
		"":                     "0001-01-01T00:00:00Z",
		"2026-01-02T03:04:05Z": "2026-01-02T03:04:05Z",
		"2026-01-02":           "2026-01-02T00:00:00Z",
		"36h":                  "2026-03-02T17:06:07Z",
		"7d":                   "2026-02-25T05:06:07Z",
		"0d":                   "2026-03-04T05:06:07Z",
	} {
		got, err := moment(in, now)
		if err != nil || got.UTC().Format(time.RFC3339) != want {
			t.Errorf("%q: %s, %v, want %s", in, got, err, want)
		}
	}
	for _, in := range []string{"yesterday", "-1h", "-7d", "7d7d", "7 d", "999999d", "d", "2026-13-01", "2026-01-02 03:04"} {
		if got, err := moment(in, now); err == nil {
			t.Errorf("%q was accepted as %s", in, got)
		}
	}
}

func TestQuoteArg(t *testing.T) {
	for in, want := range map[string]string{
		"alice,bob": "alice,bob", "c1_AAA-_": "c1_AAA-_", "a b": "'a b'", "it's": `'it'\''s'`, "$(x)": "'$(x)'", "~x": "'~x'",
	} {
		if got := quoteArg(in); got != want {
			t.Errorf("%q: %s, want %s", in, got, want)
		}
	}
}

// TestPrintable: what users wrote must not act on the terminal of who reads it.
func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{
		"plain, ünï, 漢字":     "plain, ünï, 漢字",
		"\x1b[31mred\x1b[0m": "·[31mred·[0m",
		"two\nlines\tand\r":  "two·lines·and·",
		"left\u202eright":    "left·right",
		"\x00\x7f\u0085":     "···",
		"zero\u200bwidth":    "zero·width",
	} {
		if got := printable(in, 0); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
	if got := printable("漢字漢字", 3); got != "漢字漢…" {
		t.Errorf("cut to %q", got)
	}
}

func TestSummary(t *testing.T) {
	for data, want := range map[string]string{
		`{"bodies":[{"type":"txt","msg":"hello"},{"type":"img","filename":"a.jpg"}]}`: "hello [img a.jpg]",
		`{"bodies":[{"type":"custom","customEvent":"gift"}]}`:                         "[custom gift]",
		`{"bodies":[{"type":"cmd","action":"ring"},{"type":"loc","addr":"quay"}]}`:    "[cmd ring] [loc quay]",
		`{"bodies":[{"type":"combine","title":"old times"},{"type":"voice"}]}`:        "[combine old times] [voice]",
		`{"bodies":7}`: "(a message of a form this version does not know)",
	} {
		if got := summary([]byte(data)); got != want {
			t.Errorf("%s: %q, want %q", data, got, want)
		}
	}
}

// TestResume: the command that is printed when a replay is cut has everything
// that the first had.
func TestResume(t *testing.T) {
	c := &replayCmd{From: "2026-01-02", Conversation: "a,b", Type: []string{"message.sent"}, Order: "desc", Limit: 10}
	cl, err := client.New(client.Config{URL: "https://127.0.0.1:1"})
	if err != nil {
		t.Fatal(err)
	}
	replay := cl.Replay(t.Context(), client.Query{After: "42"})
	if got, want := c.resume(replay), "--from 2026-01-02 --conversation a,b --type message.sent --order desc --limit 10 --after 42"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// TestMinter: a token is used while it is valid, then replaced by one of our own.
func TestMinter(t *testing.T) {
	const certificate = "00112233445566778899aabbccddeeff"
	app := journal.NewAppID(3).String()
	build := func(issued time.Time) string {
		token, err := auth.Build(auth.Spec{AppID: app, Certificate: certificate, Issued: issued, Lifetime: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	source := func(token string) string {
		r := &runner{System: System{Environ: []string{"COFFER_TOKEN=" + token, "COFFER_APP_CERTIFICATE=" + certificate}}}
		s, err := appServer{App: app}.tokens(r)
		if err != nil {
			t.Fatal(err)
		}
		got, err := s(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	valid := build(time.Now())
	if got := source(valid); got != valid {
		t.Error("a valid token was not used")
	}
	for name, token := range map[string]string{"expired": build(time.Now().Add(-2 * time.Hour)), "missing": ""} {
		got := source(token)
		parsed, err := auth.Parse(got)
		if err != nil || got == token {
			t.Fatalf("%s: %v", name, err)
		}
		if claims, err := parsed.Verify([]string{certificate}, time.Now()); err != nil || !claims.App {
			t.Errorf("%s: the new token: %+v, %v", name, claims, err)
		}
	}
	if got := source("007broken"); got != "007broken" {
		t.Error("a broken token was replaced silently")
	}
}

// fake is a server that is up and of which one thing is wrong.
func fake(t *testing.T, ready, streams string) (environ []string) {
	t.Helper()
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/readyz":
			if strings.Contains(ready, `"ready":false`) {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
			_, _ = io.WriteString(w, ready)
		case "/v1/admin/streams":
			_, _ = io.WriteString(w, streams)
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	}))
	t.Cleanup(srv.Close)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	if err := os.WriteFile(ca, block, 0o600); err != nil {
		t.Fatal(err)
	}
	// kong reads the flags' variables from the process.
	t.Setenv("COFFER_URL", srv.URL)
	t.Setenv("COFFER_CA", ca)
	t.Setenv("COFFER_APP", "")
	return []string{"COFFER_OPERATOR_TOKEN=operator"}
}

func TestDoctorNamesWhatIsWrong(t *testing.T) {
	const good = `{"data":[{"name":"coffer_eu_msg_pro_0","plan":"pro","shard":0,"retention_seconds":7776000,"max_age_seconds":7776000}],"drift":[]}`
	const up = `{"ready":true,"region":"eu","reasons":[]}`
	for name, tt := range map[string]struct {
		ready, streams string
		code           int
		want           string
	}{
		"healthy":        {up, good, ExitOK, "1 streams of 1 plans keep what the plan table says"},
		"not ready":      {`{"ready":false,"region":"eu","reasons":[{"part":"kms","detail":"the key is disabled"}]}`, good, ExitFailure, "region eu is not ready: kms: the key is disabled"},
		"no coffer":      {"<html>", good, ExitFailure, "failed   ready"},
		"no streams":     {up, `{"data":[],"drift":[]}`, ExitFailure, "no message stream"},
		"other age":      {up, strings.Replace(good, `"max_age_seconds":7776000`, `"max_age_seconds":86400`, 1), ExitFailure, "coffer_eu_msg_pro_0: keeps 24h0m0s, and the plan pro says 2160h0m0s"},
		"unknown plan":   {up, strings.Replace(good, `"retention_seconds":7776000`, `"retention_seconds":0`, 1), ExitFailure, "its plan pro is not in the plan table"},
		"another bucket": {up, strings.Replace(good, `"drift":[]`, `"drift":[{"stream":"KV_x","field":"replicas","want":"3","have":"1"}]`, 1), ExitFailure, "KV_x: replicas is 1, and should be 3"},
	} {
		t.Run(name, func(t *testing.T) {
			code, out, talk := run(t, fake(t, tt.ready, tt.streams), "doctor")
			if code != tt.code || !strings.Contains(out, tt.want) {
				t.Errorf("exit code %d, want %d\n%s%s\nwant %q", code, tt.code, out, talk, tt.want)
			}
			if code, out, _ := run(t, []string{"COFFER_OPERATOR_TOKEN=operator"}, "doctor", "--json"); code != tt.code || !strings.Contains(out, fmt.Sprintf(`"healthy":%v`, tt.code == ExitOK)) {
				t.Errorf("as JSON: exit code %d, %s", code, out)
			}
		})
	}
}

// TestHelpOfEveryCommand: each command's help says what it is and shows an
// example, and names no flag that takes a secret.
// TestServeUsage: what serve cannot do is the caller's mistake, and makes no folder.
func TestServeUsage(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, args := range [][]string{
		{"serve"},
		{"serve", "--day", "2s"},
		{"serve", "--dev", "--day", "1ms"},
		{"serve", "--dev", "--day", "25h"},
		{"serve", "--dev", "--day", "-1s"},
		{"serve", "--dev", "--day", "soon"},
		{"serve", "--dev", "--port-base", "70000"},
	} {
		if code, _, stderr := run(t, nil, args...); code != ExitUsage || stderr == "" {
			t.Errorf("%v: exit code %d, %s", args, code, stderr)
		}
	}
	if left, err := os.ReadDir("."); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestHelpOfEveryCommand(t *testing.T) {
	for _, command := range []string{
		"serve", "import agora", "replay", "history", "token app", "token user", "app create", "doctor", "bench",
	} {
		code, out, talk := run(t, nil, append(strings.Fields(command), "--help")...)
		if code != ExitOK || talk != "" || !strings.Contains(out, "\n    coffer "+command) && !strings.Contains(out, "$(coffer "+command) {
			t.Errorf("%s: exit code %d, no example:\n%s%s", command, code, out, talk)
		}
		for _, flag := range []string{"--token=", "--certificate=", "--operator-token="} {
			if strings.Contains(out, flag) {
				t.Errorf("%s takes a secret as an argument: %s", command, flag)
			}
		}
	}
}

func TestProgressWithoutATerminal(t *testing.T) {
	var talk bytes.Buffer
	p := newProgress(&runner{System: System{Stderr: &talk}})
	p.show(importerProgress(1000, 10, 100))
	if talk.Len() > 0 {
		t.Errorf("said at once: %s", talk.String())
	}
	p.last = p.last.Add(-time.Minute)
	p.start = p.start.Add(-time.Minute)
	p.show(importerProgress(6000, 50, 100))
	if got := talk.String(); !strings.HasPrefix(got, "imported 6000 lines, ") || !strings.Contains(got, ", 50 %, about 1m0s left\n") {
		t.Errorf("said %q", got)
	}
}

func importerProgress(read int, bytes, total int64) importer.Progress {
	return importer.Progress{Bytes: bytes, Total: total, Summary: importer.Summary{Read: read}}
}
