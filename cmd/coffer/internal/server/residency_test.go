package server_test

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/residency"
)

// TestResidencyManifest: what a region says of itself is signed, is of that region
// alone, and is refused when anything in it was changed.
func TestResidencyManifest(t *testing.T) {
	s := newSite(t, config.Limits{})
	answer := s.do(request{path: "/v1/region", token: s.token}).body
	keys := s.do(request{path: "/v1/region/keys", token: "-"}).body
	m, kid, err := residency.Verify(answer, keys, "")
	if err != nil {
		t.Fatalf("%v\n%s", err, answer)
	}
	if found := residency.Check(m, s.now()); len(found) > 0 {
		t.Errorf("%v", found)
	}
	if m.Region.ID != "eu" || m.Region.Number != 3 || len(m.Streams) < 10 || len(m.Keys) != 1 || m.Endpoints[0].URL != s.url || m.NATS.Kind != "embedded" {
		t.Errorf("%+v", m)
	}
	if _, _, err := residency.Verify(answer, keys, kid); err != nil {
		t.Error(err)
	}
	if a := s.do(request{path: "/v1/region", token: s.operator}); a.status != http.StatusOK {
		t.Errorf("an operator: %d %s", a.status, a.body)
	}
	if a := s.do(request{path: "/v1/region", token: s.userToken("ann")}); a.status != http.StatusForbidden {
		t.Errorf("a user: %d %s", a.status, a.body)
	}

	us := s.regions["us"]
	foreign := s.do(request{url: us["COFFER_URL"], path: "/v1/region", token: us["COFFER_TOKEN"]}).body
	foreignKeys := s.do(request{url: us["COFFER_URL"], path: "/v1/region/keys", token: "-"}).body
	receipt := func() string {
		var e struct{ Receipt string }
		s.exchange("POST", "/v1/apps/"+s.app+"/erasures", s.token, `{"user":"ann"}`, http.StatusAccepted, &e)
		return e.Receipt
	}()
	forged := map[string][]byte{
		"another region's":      foreign,
		"renamed":               []byte(strings.Replace(string(foreign), `"region":"us"`, `"region":"eu"`, 1)),
		"shown otherwise":       []byte(strings.Replace(string(answer), `"replicas":1`, `"replicas":3`, 1)),
		"changed":               resigned(t, answer, func(m string) string { return strings.Replace(m, `"replicas":1`, `"replicas":3`, 1) }),
		"a receipt":             withSigned(t, answer, receipt),
		"no signature":          withSigned(t, answer, signedOf(t, answer)[:strings.LastIndexByte(signedOf(t, answer), '.')+1]),
		"without an algorithm":  withSigned(t, answer, "eyJhbGciOiJub25lIn0."+strings.Split(signedOf(t, answer), ".")[1]+"."),
		"not even an answer":    []byte("{"),
		"of an unknown version": resigned(t, answer, func(m string) string { return strings.Replace(m, `"version":1`, `"version":2`, 1) }),
	}
	for name, text := range forged {
		if _, _, err := residency.Verify(text, keys, ""); !errors.Is(err, residency.ErrRefused) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, err := residency.Verify(foreign, foreignKeys, kid); !errors.Is(err, residency.ErrRefused) {
		t.Errorf("a key that is not trusted: %v", err)
	}

	python := need(t, "python3", "install Python 3")
	if err := exec.CommandContext(t.Context(), python, "-c", "import cryptography").Run(); err != nil {
		missing(t, "skipped: needs python3 with the package cryptography; install it with pip install cryptography")
	}
	dir := t.TempDir()
	script := func(answer, keys []byte, args ...string) (string, error) {
		one, two := filepath.Join(dir, "manifest.json"), filepath.Join(dir, "keys.json")
		for path, text := range map[string][]byte{one: answer, two: keys} {
			if err := os.WriteFile(path, text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		args = append([]string{"../../../../docs/format/verify_residency.py", one, two}, args...)
		out, err := exec.CommandContext(t.Context(), python, args...).CombinedOutput()
		return string(out), err
	}
	if out, err := script(answer, keys, kid); err != nil || !strings.HasPrefix(out, "verified region eu: ") {
		t.Errorf("the script: %v\n%s", err, out)
	}
	if out, err := script(foreign, foreignKeys, kid); err == nil {
		t.Errorf("the script, of a key that is not trusted: %s", out)
	}
	delete(forged, "not even an answer") // which is the caller's to notice
	for name, text := range forged {
		if out, err := script(text, keys); err == nil || !strings.Contains(out, "refused: ") {
			t.Errorf("the script, of one that is %s: %v\n%s", name, err, out)
		}
	}
}

func signedOf(t *testing.T, answer []byte) string {
	t.Helper()
	var a struct{ Signed string }
	if err := json.Unmarshal(answer, &a); err != nil {
		t.Fatal(err)
	}
	return a.Signed
}

func withSigned(t *testing.T, answer []byte, signed string) []byte {
	t.Helper()
	return []byte(strings.Replace(string(answer), signedOf(t, answer), signed, 1))
}

// resigned changes a manifest under its old signature, and what is shown with it.
func resigned(t *testing.T, answer []byte, change func(string) string) []byte {
	t.Helper()
	parts := strings.Split(signedOf(t, answer), ".")
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	parts[1] = base64.RawURLEncoding.EncodeToString([]byte(change(string(payload))))
	return withSigned(t, []byte(change(string(answer))), strings.Join(parts, "."))
}
