package vault_test

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/hashicorp/vault/api"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/kmstest"
	"github.com/cofferdb/coffer/kms/vault"
)

// suite knows of each provider of kmstest.RunProvider where its key is and what
// stands before Vault.
type suite struct {
	s *server

	mu      sync.Mutex
	clients map[kms.Provider]*suiteClient // guarded by mu
	n       int                           // guarded by mu
}

type suiteClient struct {
	options vault.Options
	key     string
	proxy   *proxy
	calls   *calls
}

func (u *suite) open(tb testing.TB, key string) kms.Provider {
	tb.Helper()
	c := &suiteClient{key: key, proxy: newProxy(tb, u.s.process.URL), calls: &calls{}}
	c.options = u.s.tokenOptions(key)
	// A token file of its own, that a test may replace.
	c.options.Auth.TokenFile = u.s.secret("token-"+tb.Name()[strings.LastIndex(tb.Name(), "/")+1:]+fmt.Sprint(len(u.clients)), u.readToken(tb))
	c.options.Address, c.options.Host, c.options.Key = c.proxy.URL, "vault.test", key
	c.options.Observe = c.calls.observe
	p := open(tb, c.options)
	u.mu.Lock()
	u.clients[p] = c
	u.mu.Unlock()
	return p
}

func (u *suite) readToken(tb testing.TB) string {
	tb.Helper()
	token, err := os.ReadFile(u.s.dir + "/token")
	must(tb, err)
	return string(token)
}

func (u *suite) newKey(tb testing.TB) string {
	tb.Helper()
	u.mu.Lock()
	u.n++
	key := fmt.Sprintf("suite-%d", u.n)
	u.mu.Unlock()
	u.s.makeKey(key)
	policy := strings.ReplaceAll(smallestPolicy+operatorPolicy, "coffer-eu", key)
	must(tb, u.s.admin.Sys().PutPolicy(key, policy))
	return key
}

func (u *suite) of(p kms.Provider) *suiteClient {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.clients[p]
}

func TestConformance(t *testing.T) {
	s := newServer(t)
	u := &suite{s: s, clients: map[kms.Provider]*suiteClient{}}
	revoke := func(tb testing.TB, p kms.Provider) {
		tb.Helper()
		token, err := os.ReadFile(u.of(p).options.Auth.TokenFile)
		must(tb, err)
		must(tb, s.admin.Auth().Token().RevokeTree(string(token)))
	}
	renew := func(tb testing.TB, p kms.Provider) {
		tb.Helper()
		c := u.of(p)
		secret, err := s.admin.Auth().Token().Create(&api.TokenCreateRequest{Policies: []string{c.key}})
		must(tb, err)
		must(tb, os.WriteFile(c.options.Auth.TokenFile, []byte(secret.Auth.ClientToken), 0o600))
	}
	kmstest.RunProvider(t, kmstest.Harness{
		New:   func(tb testing.TB) kms.Provider { return u.open(tb, u.newKey(tb)) },
		Again: func(tb testing.TB, p kms.Provider) kms.Provider { return u.open(tb, u.of(p).key) },
		Fail: map[error]func(testing.TB, kms.Provider) func(){
			kms.ErrNotFound: func(tb testing.TB, p kms.Provider) func() {
				key := u.of(p).key
				s.write("transit/keys/"+key+"/config", map[string]any{"deletion_allowed": true})
				_, err := s.admin.Logical().Delete("transit/keys/" + key)
				must(tb, err)
				return nil // what is deleted stays so
			},
			kms.ErrAccessDenied: func(tb testing.TB, p kms.Provider) func() {
				key := u.of(p).key
				policy, err := s.admin.Sys().GetPolicy(key)
				must(tb, err)
				must(tb, s.admin.Sys().PutPolicy(key, `path "sys/nothing" { capabilities = ["read"] }`))
				return func() { must(tb, s.admin.Sys().PutPolicy(key, policy)) }
			},
			kms.ErrUnauthenticated: func(tb testing.TB, p kms.Provider) func() {
				revoke(tb, p)
				return func() { renew(tb, p) }
			},
			kms.ErrThrottled: func(tb testing.TB, p kms.Provider) func() {
				const quota = "sys/quotas/rate-limit/transit"
				s.write(quota, map[string]any{"path": "transit", "rate": 0.001, "interval": "1h"})
				_, _ = s.admin.Logical().Read("transit/keys/" + u.of(p).key) // uses up the burst of one
				return func() {
					_, err := s.admin.Logical().Delete(quota)
					must(tb, err)
				}
			},
			kms.ErrQuota: func(_ testing.TB, p kms.Provider) func() {
				u.of(p).proxy.set(answering(429, `request path "transit/decrypt/k": lease count quota exceeded`))
				return func() { u.of(p).proxy.set(nil) }
			},
			kms.ErrUnavailable: func(tb testing.TB, _ kms.Provider) func() {
				must(tb, s.admin.Sys().Seal())
				return s.unsealNow
			},
		},
		Hang: func(tb testing.TB, _ kms.Provider) func() {
			s.process.Pause(tb)
			return func() { s.process.Continue(tb) }
		},
		ExpireCredentials: func(tb testing.TB, p kms.Provider) {
			revoke(tb, p)
			renew(tb, p)
		},
		Calls: func(p kms.Provider) []kms.Call {
			c := u.of(p).calls
			c.mu.Lock()
			defer c.mu.Unlock()
			return append([]kms.Call(nil), c.seen...)
		},
		Cannot: map[string]string{
			"WrongRegion":                             "Vault has no regions; the binding context carries ours",
			"Fail: " + kms.ErrDisabled.Error():        "a transit key has no such state",
			"Fail: " + kms.ErrPendingDeletion.Error(): "a transit key is deleted at once",
		},
		Secrets: []string{"hvs."}, // how every token begins
	})
}
