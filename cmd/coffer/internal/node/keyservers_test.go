package node

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// keyServer returns the path of a server that .ci/test-servers builds.
func keyServer(t *testing.T, name, variable string) string {
	t.Helper()
	path := os.Getenv(variable)
	if path == "" {
		path = filepath.Join("..", "..", "..", "..", ".cache", name)
	}
	if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
		return path
	}
	if os.Getenv("COFFER_TEST_REQUIRE") == "all" {
		t.Fatalf("needs the server of %s; run .ci/test-servers once", variable)
	}
	t.Skipf("skipped: needs the server of %s; run .ci/test-servers once", variable)
	return ""
}

// serverProcess is a running server whose first line is its address.
type serverProcess struct {
	cmd *exec.Cmd
	in  io.Closer
	url string
}

func startKeyServer(t *testing.T, path string, args ...string) *serverProcess {
	t.Helper()
	p := &serverProcess{cmd: exec.Command(path, args...)}
	// A test in the FIPS 140-3 mode is about Coffer, and the servers do not work
	// in it.
	p.cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "GODEBUG=") })
	var err error
	if p.in, err = p.cmd.StdinPipe(); err != nil { // it ends with us
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.stop)
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("%s gives no address: %v", path, err)
	}
	p.url = strings.TrimSpace(line)
	return p
}

func (p *serverProcess) stop() {
	if p.cmd.ProcessState == nil {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	}
}

// front stands before a key server: at an address that stays while the server
// behind it goes, and it does what networks and servers do in bad times.
type front struct {
	*httptest.Server

	mu       sync.Mutex // guards what follows
	behind   string
	rule     http.HandlerFunc
	release  chan struct{} // ends hanging
	requests map[string]int
}

func newFront(t *testing.T) *front {
	t.Helper()
	f := &front{requests: map[string]int{}}
	transport := &http.Transport{}
	f.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		f.mu.Lock()
		behind, rule := f.behind, f.rule
		f.requests[r.URL.Path]++
		f.mu.Unlock()
		if rule != nil {
			rule(w, r)
			return
		}
		target, err := url.Parse(behind)
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		(&httputil.ReverseProxy{
			Rewrite:      func(p *httputil.ProxyRequest) { p.SetURL(target) },
			Transport:    transport,
			ErrorHandler: func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) }, // as a server that is gone
		}).ServeHTTP(w, r)
	}))
	t.Cleanup(func() {
		f.set(nil)
		f.CloseClientConnections()
		f.Close()
		transport.CloseIdleConnections()
	})
	return f
}

func (f *front) set(rule http.HandlerFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rule = rule
	if f.release != nil {
		close(f.release)
		f.release = nil
	}
}

func (f *front) answer(status int) {
	f.set(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, `{"errors":[]}`)
	})
}

func (f *front) hang() {
	release := make(chan struct{})
	f.set(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
		case <-release:
		}
	})
	f.mu.Lock()
	defer f.mu.Unlock()
	f.release = release
}

func (f *front) point(to string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.behind = to
}

// count returns how many requests there were for paths that end so.
func (f *front) count(suffix string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for path, times := range f.requests {
		if strings.HasSuffix(path, suffix) {
			n += times
		}
	}
	return n
}

const vaultPolicy = `
path "transit/datakey/plaintext/coffer-eu" { capabilities = ["update"] }
path "transit/encrypt/coffer-eu"           { capabilities = ["update"] }
path "transit/decrypt/coffer-eu"           { capabilities = ["update"] }
path "transit/rewrap/coffer-eu"            { capabilities = ["update"] }
path "transit/keys/coffer-eu"              { capabilities = ["read"] }
`

// realVault is a Vault server in a process of its own, with a key and a token of
// the smallest policy, and a front.
type realVault struct {
	t         *testing.T
	binary    string
	storage   string
	process   *serverProcess
	front     *front
	root      string
	unsealKey string
	tokenFile string
	accessor  string
}

func newVault(t *testing.T) *realVault {
	t.Helper()
	v := &realVault{
		t: t, binary: keyServer(t, "vaultserver", "COFFER_TEST_VAULTSERVER"), storage: t.TempDir(),
		tokenFile: filepath.Join(t.TempDir(), "token"), front: newFront(t),
	}
	v.start()
	initialised := v.call("PUT", "sys/init", map[string]any{"secret_shares": 1, "secret_threshold": 1})
	v.root = initialised["root_token"].(string)
	v.unsealKey = initialised["keys_base64"].([]any)[0].(string)
	v.unseal()
	v.call("POST", "sys/mounts/transit", map[string]any{"type": "transit"})
	v.call("POST", "transit/keys/coffer-eu", map[string]any{"type": "aes256-gcm96", "derived": true})
	v.grant()
	v.newToken()
	return v
}

func (v *realVault) start() {
	v.process = startKeyServer(v.t, v.binary, "-storage", v.storage)
	v.front.point(v.process.url)
}

// call is a request of the administrator, not through the front.
func (v *realVault) call(method, path string, body map[string]any) map[string]any {
	v.t.Helper()
	text, err := json.Marshal(body)
	if err != nil {
		v.t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(v.t.Context(), method, v.process.url+"/v1/"+path, bytes.NewReader(text))
	if err != nil {
		v.t.Fatal(err)
	}
	req.Header.Set("X-Vault-Token", v.root)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		v.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	answer := map[string]any{}
	raw, _ := io.ReadAll(resp.Body)
	_ = json.Unmarshal(raw, &answer)
	if resp.StatusCode >= 300 {
		v.t.Fatalf("%s %s: %d %s", method, path, resp.StatusCode, raw)
	}
	return answer
}

func (v *realVault) unseal() {
	v.t.Helper()
	v.call("PUT", "sys/unseal", map[string]any{"key": v.unsealKey})
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		resp, err := http.Get(v.process.url + "/v1/sys/health") //nolint:noctx // a test
		if err == nil {
			_ = resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return
			}
		}
		if time.Now().After(end) {
			v.t.Fatal("Vault does not become active")
		}
	}
}

func (v *realVault) seal() { v.call("PUT", "sys/seal", nil) }

func (v *realVault) restart() {
	v.start()
	v.unseal()
}

func (v *realVault) grant() {
	v.call("PUT", "sys/policies/acl/coffer", map[string]any{"policy": vaultPolicy})
}

func (v *realVault) withdraw() {
	v.call("PUT", "sys/policies/acl/coffer", map[string]any{"policy": "# nothing"})
}
func (v *realVault) rotate() { v.call("POST", "transit/keys/coffer-eu/rotate", nil) }

func (v *realVault) newToken() {
	auth := v.call("POST", "auth/token/create", map[string]any{"policies": []string{"coffer"}})["auth"].(map[string]any)
	v.accessor = auth["accessor"].(string)
	if err := os.WriteFile(v.tokenFile, []byte(auth["client_token"].(string)), 0o600); err != nil {
		v.t.Fatal(err)
	}
}

func (v *realVault) revoke() {
	v.call("POST", "auth/token/revoke-accessor", map[string]any{"accessor": v.accessor})
}

// setting is the region's kms setting.
func (v *realVault) setting() string {
	return "vault+" + v.front.URL + "/transit/coffer-eu?auth=token&timeout=1s&attempts=1&token_file=" + url.QueryEscape(v.tokenFile)
}

// awsEmulator is the emulator of AWS KMS in a process of its own, with a key.
type awsEmulator struct {
	t       *testing.T
	process *serverProcess
	key     string
}

func newAWS(t *testing.T) *awsEmulator {
	t.Helper()
	for name, value := range map[string]string{
		"AWS_ACCESS_KEY_ID": "AKIDTEST", "AWS_SECRET_ACCESS_KEY": strings.Repeat("secret", 7), "AWS_EC2_METADATA_DISABLED": "true",
		"AWS_CONFIG_FILE": "/nonexistent", "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
	} {
		t.Setenv(name, value)
	}
	a := &awsEmulator{t: t, process: startKeyServer(t, keyServer(t, "localkms", "COFFER_TEST_LOCALKMS"), "-region", "eu-central-1")}
	a.key = a.call("CreateKey", map[string]any{})["KeyMetadata"].(map[string]any)["KeyId"].(string)
	return a
}

func (a *awsEmulator) call(operation string, body map[string]any) map[string]any {
	a.t.Helper()
	if a.key != "" {
		body["KeyId"] = a.key
	}
	text, err := json.Marshal(body)
	if err != nil {
		a.t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(a.t.Context(), "POST", a.process.url, bytes.NewReader(text))
	if err != nil {
		a.t.Fatal(err)
	}
	req.Header.Set("X-Amz-Target", "TrentService."+operation)
	req.Header.Set("Content-Type", "application/x-amz-json-1.1")
	req.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential=AKIDTEST/20260101/eu-central-1/kms/aws4_request, SignedHeaders=host, Signature=00")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		a.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	raw, _ := io.ReadAll(resp.Body)
	answer := map[string]any{}
	_ = json.Unmarshal(raw, &answer)
	if resp.StatusCode != http.StatusOK {
		a.t.Fatalf("%s: %d %s", operation, resp.StatusCode, raw)
	}
	return answer
}

func (a *awsEmulator) setting() string {
	return "awskms:///" + a.key + "?region=eu-central-1&timeout=1s&attempts=1&endpoint=" + url.QueryEscape(a.process.url)
}
