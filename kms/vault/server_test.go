package vault_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"go.uber.org/goleak"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/internal/serverstest"
	"github.com/cofferdb/coffer/kms/vault"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

// The smallest policy, as docs/operations/keys-setup.md has it.
const smallestPolicy = `
path "transit/datakey/plaintext/coffer-eu" { capabilities = ["update"] }
path "transit/encrypt/coffer-eu"           { capabilities = ["update"] }
path "transit/decrypt/coffer-eu"           { capabilities = ["update"] }
path "transit/rewrap/coffer-eu"            { capabilities = ["update"] }
path "transit/keys/coffer-eu"              { capabilities = ["read"] }
`

// What the operator's identity may do beside that.
const operatorPolicy = `
path "transit/keys/coffer-eu/rotate" { capabilities = ["update"] }
path "transit/keys/coffer-eu/config" { capabilities = ["update"] }
path "transit/keys/coffer-eu/trim"   { capabilities = ["update"] }
`

// server is a real Vault, initialised and unsealed, with a transit engine, the
// key "coffer-eu", the two policies and AppRole.
type server struct {
	t       testing.TB
	process *serverstest.Process
	admin   *api.Client
	unseal  string
	dir     string // for secret files
	roleID  string
}

func newServer(t testing.TB, args ...string) *server {
	t.Helper()
	s := &server{t: t, dir: t.TempDir()}
	s.process = serverstest.Start(t, serverstest.Binary(t, serverstest.Vault), args...)
	s.setup(nil)
	return s
}

func (s *server) setup(tls *api.TLSConfig) {
	t := s.t
	t.Helper()
	conf := api.DefaultConfig()
	conf.Address = s.process.URL
	if tls != nil {
		must(t, conf.ConfigureTLS(tls))
	}
	client, err := api.NewClient(conf)
	must(t, err)
	client.ClearToken()
	s.admin = client
	t.Cleanup(conf.HttpClient.CloseIdleConnections)
	keys, err := client.Sys().Init(&api.InitRequest{SecretShares: 1, SecretThreshold: 1})
	must(t, err)
	s.unseal = keys.KeysB64[0]
	s.unsealNow()
	client.SetToken(keys.RootToken)
	must(t, client.Sys().Mount("transit", &api.MountInput{Type: "transit"}))
	s.makeKey("coffer-eu")
	must(t, client.Sys().PutPolicy("coffer", smallestPolicy))
	must(t, client.Sys().PutPolicy("coffer-operator", operatorPolicy))
	must(t, client.Sys().EnableAuthWithOptions("approle", &api.EnableAuthOptions{Type: "approle"}))
	s.role(map[string]any{"token_policies": "coffer"})
	s.roleID = s.read("auth/approle/role/coffer/role-id")["role_id"].(string)
	s.newSecretID()
}

func (s *server) unsealNow() {
	s.t.Helper()
	status, err := s.admin.Sys().Unseal(s.unseal)
	must(s.t, err)
	if status.Sealed {
		s.t.Fatal("still sealed")
	}
	// Active a moment later.
	for range 2400 {
		if h, err := s.admin.Sys().Health(); err == nil && !h.Sealed && !h.Standby {
			return
		}
		time.Sleep(25 * time.Millisecond)
	}
	s.t.Fatal("not active")
}

func (s *server) makeKey(name string) {
	s.t.Helper()
	s.write("transit/keys/"+name, map[string]any{"type": "aes256-gcm96", "derived": true})
}

// role sets the AppRole role "coffer".
func (s *server) role(settings map[string]any) {
	s.t.Helper()
	s.write("auth/approle/role/coffer", settings)
}

func (s *server) newSecretID() {
	s.t.Helper()
	s.secret("secret-id", s.write("auth/approle/role/coffer/secret-id", nil)["secret_id"].(string)+"\n")
}

// newToken makes a token and writes it into a file.
func (s *server) newToken(r *api.TokenCreateRequest) (file string) {
	s.t.Helper()
	secret, err := s.admin.Auth().Token().Create(r)
	must(s.t, err)
	return s.secret("token", secret.Auth.ClientToken)
}

func (s *server) secret(name, content string) (file string) {
	s.t.Helper()
	file = filepath.Join(s.dir, name)
	must(s.t, os.WriteFile(file, []byte(content), 0o600))
	return file
}

func (s *server) write(path string, data map[string]any) map[string]any {
	s.t.Helper()
	return s.answer(s.admin.Logical().Write(path, data))
}

func (s *server) read(path string) map[string]any {
	s.t.Helper()
	return s.answer(s.admin.Logical().Read(path))
}

func (s *server) answer(secret *api.Secret, err error) map[string]any {
	s.t.Helper()
	must(s.t, err)
	if secret == nil {
		return nil
	}
	return secret.Data
}

func (s *server) options() vault.Options {
	return vault.Options{
		Address: s.process.URL, Mount: "transit", Key: "coffer-eu",
		Auth: vault.Auth{Method: vault.AuthAppRole, RoleID: s.roleID, SecretIDFile: filepath.Join(s.dir, "secret-id")},
	}
}

// tokenOptions logs in with a token of the given policies.
func (s *server) tokenOptions(policies ...string) vault.Options {
	s.t.Helper()
	o := s.options()
	o.Auth = vault.Auth{Method: vault.AuthToken, TokenFile: s.newToken(&api.TokenCreateRequest{Policies: policies})}
	return o
}

func open(t testing.TB, o vault.Options) *vault.Provider {
	t.Helper()
	p, err := vault.New(o)
	must(t, err)
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// calls records what Observe is told.
type calls struct {
	mu   sync.Mutex
	seen []kms.Call // guarded by mu
}

func (c *calls) observe(_ context.Context, call kms.Call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seen = append(c.seen, call)
}

func (c *calls) of(operation string) (of []kms.Call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, call := range c.seen {
		if call.Operation == operation {
			of = append(of, call)
		}
	}
	return of
}

func (c *calls) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var b strings.Builder
	for _, call := range c.seen {
		fmt.Fprintf(&b, "%s(%d) %v\n", call.Operation, call.Items, call.Err)
	}
	return b.String()
}

var binding = kms.Context{Region: "eu", App: "03aa", Purpose: kms.PurposeApp}

// eventually looks often for what a test waits for.
func eventually(t testing.TB, what string, done func() bool) {
	t.Helper()
	for range 1200 {
		if done() {
			return
		}
		time.Sleep(25 * time.Millisecond)
	}
	t.Fatalf("never: %s", what)
}

func asText(v any) string { return fmt.Sprint(v) }
