package node

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"runtime/pprof"
	"strings"
	"sync"
	"testing"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/keyserverstest"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/vault"
)

// lines is a log that several write to.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) bytes() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Clone(l.b.Bytes())
}

// forms are a secret, and how it could be written.
func forms(secret []byte) [][]byte {
	all := [][]byte{secret, []byte(hex.EncodeToString(secret))}
	for shift := range 3 { // the middle of each of base64's alignments
		text := base64.StdEncoding.EncodeToString(append(make([]byte, shift), secret...))
		all = append(all, []byte(text[4:len(text)-4]))
	}
	return all
}

// TestVaultCanary: of a region whose keys are with a real Vault, through its bad
// times, no content, no app key that Vault has unwrapped and no token of Vault is
// in a file, the log, an error, a metric or the profile of the heap.
func TestVaultCanary(t *testing.T) {
	const content, sender = "canary-of-a-message-body", "canary-of-a-sender"
	v := keyserverstest.NewVault(t)
	var log lines
	r := startKeyRegion(t, v.Setting(), config.Keys{}, slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	told := map[string][]byte{} // beside the content that a caller has asked for
	ask := func(what string, want int, method, path, token, body string) {
		t.Helper()
		status, answer := call(t, r.process, method, path, token, body)
		if want != 0 && status != want {
			t.Fatalf("%s: %d %s", what, status, answer)
		}
		told[what] = []byte(answer)
	}
	send := func(what string, want int, a *keyApp) {
		t.Helper()
		r.chill(a)
		ask(what, want, "POST", a.events(), a.token, fmt.Sprintf(
			`{"id":%q,"type":"message.sent","sender":%q,"recipient":"ben","data":{"bodies":[{"type":"txt","msg":%q}]}}`,
			strings.ReplaceAll(what, " ", "-"), sender, content))
	}
	send("all is well", http.StatusCreated, r.newApp())
	tokens := []string{v.Token()}
	faults := []struct {
		what       string
		begin, end func()
	}{
		{"denied", v.Withdraw, v.Grant},
		{"busy", func() { v.Front.Answer(http.StatusTooManyRequests) }, func() { v.Front.Set(nil) }},
		{"sealed", v.Seal, v.Unseal},
		{"token revoked", v.Revoke, v.NewToken},
	}
	apps := []string{r.warm.id, r.cold.id}
	cold := make([]*keyApp, len(faults)) // each of its own: a refusal is remembered for a while
	for i := range cold {
		cold[i] = r.newApp()
		apps = append(apps, cold[i].id)
	}
	for i, fault := range faults {
		fault.begin()
		send(fault.what, http.StatusServiceUnavailable, cold[i])
		ask("readiness, "+fault.what, 0, "GET", "/readyz", "", "")
		fault.end()
	}
	tokens = append(tokens, v.Token())
	ask("metrics", http.StatusOK, "GET", "/metrics", r.operator, "")
	ask("audit", http.StatusOK, "GET", "/v1/admin/audit", r.operator, "")
	ask("keys", http.StatusOK, "GET", "/v1/admin/keys/status", r.operator, "")
	var heap bytes.Buffer
	if err := pprof.Lookup("heap").WriteTo(&heap, 1); err != nil {
		t.Fatal(err)
	}
	told["heap profile"] = heap.Bytes()

	// Vault unwraps the apps' keys for this test too.
	secrets := map[string][]byte{"content": []byte(content), "sender": []byte(sender)}
	for i, token := range tokens {
		secrets[fmt.Sprint("token ", i)] = []byte(token)
	}
	o, err := vault.ParseURL(v.Setting())
	if err != nil {
		t.Fatal(err)
	}
	provider, err := vault.New(o)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = provider.Close() }()
	keys, errs := r.process.regions[0].journal.Keyring().AppsKeys(t.Context(), apps)
	for i, app := range apps {
		if errs[i] != nil {
			t.Fatal(errs[i])
		}
		key, err := provider.Unwrap(t.Context(), kms.Context{Region: "eu", App: app, Purpose: kms.PurposeApp}, keys[i][0].Wraps[0])
		if err != nil {
			t.Fatal(err)
		}
		secrets["key of "+app] = key
	}
	if err := r.process.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	told["log"] = log.bytes()
	err = filepath.WalkDir(r.cfg.DataDir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			told[path], err = os.ReadFile(path) //nolint:gosec // of this test
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(told) < 20 || bytes.Count(told["log"], []byte("\n")) < 10 || !bytes.Contains(told["metrics"], []byte("kms")) {
		t.Errorf("%d texts, and a log of %d bytes", len(told), len(told["log"]))
	}
	for what, secret := range secrets {
		if len(secret) < 16 {
			t.Errorf("%s has %d bytes", what, len(secret))
		}
		for _, form := range forms(secret) {
			for where, text := range told {
				if bytes.Contains(text, form) {
					t.Errorf("%s is in %s", what, where)
				}
			}
		}
	}
}
