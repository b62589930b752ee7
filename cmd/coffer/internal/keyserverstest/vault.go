package keyserverstest

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// VaultPolicy is the smallest policy of a region.
const VaultPolicy = `
path "transit/datakey/plaintext/coffer-eu" { capabilities = ["update"] }
path "transit/encrypt/coffer-eu"           { capabilities = ["update"] }
path "transit/decrypt/coffer-eu"           { capabilities = ["update"] }
path "transit/rewrap/coffer-eu"            { capabilities = ["update"] }
path "transit/keys/coffer-eu"              { capabilities = ["read"] }
`

// Vault is a Vault server in a process of its own, with the key coffer-eu, a token
// of the smallest policy, and a front before it.
type Vault struct {
	t         *testing.T
	binary    string
	storage   string
	process   *Server
	Front     *Front
	root      string
	unsealKey string
	tokenFile string
	accessor  string
	more      string // policy beside the smallest one
}

// NewVault starts a Vault until the test ends.
func NewVault(t *testing.T) *Vault {
	t.Helper()
	v := &Vault{
		t: t, binary: binary(t, "vaultserver", "COFFER_TEST_VAULTSERVER"), storage: t.TempDir(),
		tokenFile: filepath.Join(t.TempDir(), "token"), Front: NewFront(t),
	}
	t.Cleanup(http.DefaultClient.CloseIdleConnections)
	v.start()
	initialised := v.Call("PUT", "sys/init", map[string]any{"secret_shares": 1, "secret_threshold": 1})
	v.root = initialised["root_token"].(string)
	v.unsealKey = initialised["keys_base64"].([]any)[0].(string)
	v.Unseal()
	v.Call("POST", "sys/mounts/transit", map[string]any{"type": "transit"})
	v.Call("POST", "transit/keys/coffer-eu", map[string]any{"type": "aes256-gcm96", "derived": true})
	v.Grant()
	v.NewToken()
	return v
}

// Stop kills the server; Restart undoes it.
func (v *Vault) Stop() { v.process.Stop() }

func (v *Vault) start() {
	v.process = start(v.t, v.binary, "-storage", v.storage)
	v.Front.Point(v.process.URL)
}

// Call is a request of the administrator, not through the front.
func (v *Vault) Call(method, path string, body map[string]any) map[string]any {
	v.t.Helper()
	text, err := json.Marshal(body)
	if err != nil {
		v.t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(v.t.Context(), method, v.process.URL+"/v1/"+path, bytes.NewReader(text))
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

// Unseal undoes Seal.
func (v *Vault) Unseal() {
	v.t.Helper()
	v.Call("PUT", "sys/unseal", map[string]any{"key": v.unsealKey})
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		resp, err := http.Get(v.process.URL + "/v1/sys/health") //nolint:noctx // a test
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

// Seal seals the server.
func (v *Vault) Seal() { v.Call("PUT", "sys/seal", nil) }

// Restart starts the server again, with what it had.
func (v *Vault) Restart() {
	v.start()
	v.Unseal()
}

// Grant undoes Withdraw.
func (v *Vault) Grant() {
	v.Call("PUT", "sys/policies/acl/coffer", map[string]any{"policy": VaultPolicy + v.more})
}

// Withdraw takes every permission from the token.
func (v *Vault) Withdraw() {
	v.Call("PUT", "sys/policies/acl/coffer", map[string]any{"policy": "# nothing"})
}

// Permit adds to what the token may do.
func (v *Vault) Permit(policy string) {
	v.more += policy
	v.Grant()
}

// NewKey makes another key that the token may use.
func (v *Vault) NewKey(name string) {
	v.Call("POST", "transit/keys/"+name, map[string]any{"type": "aes256-gcm96", "derived": true})
	v.Permit(strings.ReplaceAll(VaultPolicy, "coffer-eu", name))
}

// Rotate makes a new version of the key.
func (v *Vault) Rotate() { v.Call("POST", "transit/keys/coffer-eu/rotate", nil) }

// NewToken puts a new token into the token's file.
func (v *Vault) NewToken() {
	auth := v.Call("POST", "auth/token/create", map[string]any{"policies": []string{"coffer"}})["auth"].(map[string]any)
	v.accessor = auth["accessor"].(string)
	if err := os.WriteFile(v.tokenFile, []byte(auth["client_token"].(string)), 0o600); err != nil {
		v.t.Fatal(err)
	}
}

// Token returns the token.
func (v *Vault) Token() string {
	v.t.Helper()
	text, err := os.ReadFile(v.tokenFile)
	if err != nil {
		v.t.Fatal(err)
	}
	return string(text)
}

// Revoke ends the token.
func (v *Vault) Revoke() {
	v.Call("POST", "auth/token/revoke-accessor", map[string]any{"accessor": v.accessor})
}

// Setting is a region's kms setting.
func (v *Vault) Setting() string { return v.SettingOf("coffer-eu") }

// SettingOf is a setting with another key.
func (v *Vault) SettingOf(key string) string {
	return "vault+" + v.Front.URL + "/transit/" + key + "?auth=token&timeout=1s&attempts=1&token_file=" + url.QueryEscape(v.tokenFile)
}
