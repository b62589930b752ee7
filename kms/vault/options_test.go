package vault_test

import (
	"bytes"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/vault"
)

func TestParseURL(t *testing.T) {
	const approle = "auth=approle&role_id=r&secret_id_file=/run/secrets/id"
	good := map[string]vault.Options{
		"vault+https://vault.example:8200/transit/coffer-eu?" + approle: {
			Address: "https://vault.example:8200", Mount: "transit", Key: "coffer-eu",
			Auth: vault.Auth{Method: "approle", RoleID: "r", SecretIDFile: "/run/secrets/id"},
		},
		"vault+https://vault.example/team/eu/transit/k.1_x?auth=kubernetes&role=coffer&auth_mount=k8s/eu&namespace=ns1/ns2&host=old.example": {
			Address: "https://vault.example", Mount: "team/eu/transit", Key: "k.1_x", Namespace: "ns1/ns2", Host: "old.example",
			Auth: vault.Auth{Method: "kubernetes", Mount: "k8s/eu", Role: "coffer"},
		},
		"vault+http://127.0.0.1:8200/transit/k?auth=token&token_file=/t&trim=true&timeout=2s&attempts=3": {
			Address: "http://127.0.0.1:8200", Mount: "transit", Key: "k", Trim: true, Timeout: 2 * time.Second, Attempts: 3,
			Auth: vault.Auth{Method: "token", TokenFile: "/t"},
		},
		"vault+https://[2001:db8::1]:8200/transit/k?auth=token&token_file=/t&ca_file=/ca&server_name=v&cert_file=/c&key_file=/k": {
			Address: "https://[2001:db8::1]:8200", Mount: "transit", Key: "k",
			Auth: vault.Auth{Method: "token", TokenFile: "/t"},
			TLS:  vault.TLS{CAFile: "/ca", ServerName: "v", CertFile: "/c", KeyFile: "/k"},
		},
	}
	for setting, want := range good {
		got, err := vault.ParseURL(setting)
		if err != nil {
			t.Errorf("%s: %v", setting, err)
			continue
		}
		if got.Address != want.Address || got.Mount != want.Mount || got.Key != want.Key || got.Namespace != want.Namespace ||
			got.Host != want.Host || got.Auth != want.Auth || got.TLS != want.TLS || got.Trim != want.Trim ||
			got.Timeout != want.Timeout || got.Attempts != want.Attempts {
			t.Errorf("%s:\n got %+v\nwant %+v", setting, got, want)
		}
	}
	for setting, why := range map[string]string{
		"https://vault.example/transit/k?" + approle:                                                     "scheme",
		"vault+http://vault.example/transit/k?" + approle:                                                "loopback",
		"vault+http://127.0.0.1.example.com/transit/k?" + approle:                                        "loopback",
		"vault+https:///transit/k?" + approle:                                                            "address",
		"vault+https://vault.example/k?" + approle:                                                       "MOUNT/KEY",
		"vault+https://vault.example/transit/?" + approle:                                                "key",
		"vault+https://vault.example//k?" + approle:                                                      "mount",
		"vault+https://vault.example/transit/../k?" + approle:                                            "mount",
		"vault+https://vault.example/sys/%2e%2e/k?" + approle:                                            "mount",
		"vault+https://vault.example/transit/a%2fb%3fc?" + approle:                                       "key",
		"vault+https://user:pw@vault.example/transit/k?" + approle:                                       "password",
		"vault+https://vault.example/transit/k#x?" + approle:                                             "fragment",
		"vault+https://vault.example/transit/k":                                                          "auth is not",
		"vault+https://vault.example/transit/k?auth=ldap":                                                "auth is not",
		"vault+https://vault.example/transit/k?auth=token":                                               "token_file",
		"vault+https://vault.example/transit/k?auth=token&token=hvs.SECRET":                              "token_file",
		"vault+https://vault.example/transit/k?auth=approle&role_id=r&secret_id=SECRET":                  "secret_id_file",
		"vault+https://vault.example/transit/k?auth=approle&secret_id_file=/s":                           "role_id",
		"vault+https://vault.example/transit/k?auth=approle&role_id=r&role_id_file=/r&secret_id_file=/s": "both",
		"vault+https://vault.example/transit/k?auth=kubernetes&role=r&token_file=/t":                     "does not use",
		"vault+https://vault.example/transit/k?auth=kubernetes":                                          "role",
		"vault+https://vault.example/transit/k?auth=approle&role_id=r&role_id=s&secret_id_file=/s":       "one value",
		"vault+https://vault.example/transit/k?auth=approle&role_id=&secret_id_file=/s":                  "one value",
		"vault+https://vault.example/transit/k?" + approle + "&insecure=true":                            "unknown",
		"vault+https://vault.example/transit/k?" + approle + "&timeout=fast":                             "duration",
		"vault+https://vault.example/transit/k?" + approle + "&timeout=-1s":                              "range",
		"vault+https://vault.example/transit/k?" + approle + "&attempts=x":                               "number",
		"vault+https://vault.example/transit/k?" + approle + "&attempts=1000":                            "range",
		"vault+https://vault.example/transit/k?" + approle + "&trim=perhaps":                             "true or false",
		"vault+https://vault.example/transit/k?" + approle + "&namespace=../x":                           "namespace",
		"vault+https://vault.example/transit/k?" + approle + "&auth_mount=../sys":                        "auth_mount",
		"vault+https://vault.example/transit/k?" + approle + "&cert_file=/c":                             "key_file",
		"vault+https://vault.example/transit/k?" + approle + "&host=a/b":                                 "host",
		"vault+http://127.0.0.1/transit/k?" + approle + "&ca_file=/ca":                                   "TLS",
		"vault+https://vault.example/transit/k?%zz":                                                      "malformed",
		"vault+https://vault.example/transit/\x00k?" + approle:                                           "URL",
		"vault+https://vault.example:notaport/transit/k?" + approle:                                      "URL",
	} {
		o, err := vault.ParseURL(setting)
		if err == nil {
			t.Errorf("%q was accepted as %+v", setting, o)
			continue
		}
		if !strings.Contains(err.Error(), why) {
			t.Errorf("%q: %v, want it to name %q", setting, err, why)
		}
		if strings.Contains(err.Error(), "SECRET") || strings.Contains(err.Error(), "pw") {
			t.Errorf("%q: the error shows a secret: %v", setting, err)
		}
	}
}

// The client library listens to VAULT_* variables; settings of coffer are
// complete by themselves.
func TestEnvironmentIsNotHeard(t *testing.T) {
	t.Setenv("VAULT_ADDR", "http://192.0.2.1:1")
	t.Setenv("VAULT_TOKEN", "hvs.SOMEBODYELSES")
	t.Setenv("VAULT_NAMESPACE", "elsewhere")
	t.Setenv("VAULT_HEADERS", `{"X-Other":"1"}`)
	t.Setenv("VAULT_SKIP_VERIFY", "true")
	s := newServer(t)
	var asked http.Header
	front := newProxy(t, s.process.URL)
	target, err := url.Parse(s.process.URL)
	must(t, err)
	pass := reverse(target)
	front.set(func(w http.ResponseWriter, r *http.Request) {
		asked = r.Header.Clone()
		pass.ServeHTTP(w, r)
	})
	o := s.options()
	o.Address = front.URL
	p := open(t, o)
	_, _, err = p.Generate(t.Context(), binding)
	must(t, err)
	for _, name := range []string{"X-Vault-Namespace", "X-Other"} {
		if asked.Get(name) != "" {
			t.Errorf("the request has %s: %s", name, asked.Get(name))
		}
	}
	if asked.Get("X-Vault-Request") != "true" {
		t.Error("the request lacks X-Vault-Request, which Vault Agent may require")
	}
}

// A namespace is of Vault Enterprise and OpenBao. The front stands for it: behind
// it is a Vault for who names the namespace in every request, a login's too, and
// nothing for others.
func TestNamespace(t *testing.T) {
	s := newServer(t)
	target, err := url.Parse(s.process.URL)
	must(t, err)
	pass := reverse(target)
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Trim(r.Header.Get("X-Vault-Namespace"), "/") != "team/eu" {
			answering(http.StatusNotFound, "no handler for route")(w, r)
			return
		}
		r.Header.Del("X-Vault-Namespace")
		pass.ServeHTTP(w, r)
	}))
	defer front.Close()
	o := s.options()
	o.Address = front.URL
	o.Namespace = "team/eu/"
	p := open(t, o)
	key, wrap, err := p.Generate(t.Context(), binding)
	must(t, err)
	if got, err := p.Unwrap(t.Context(), binding, wrap); err != nil || !bytes.Equal(got, key) {
		t.Errorf("another key, or %v", err)
	}
	d, err := p.Describe(t.Context())
	must(t, err)
	if want := strings.TrimPrefix(front.URL, "http://") + "/team/eu/transit/coffer-eu"; d.Key != want || wrap.Key != want {
		t.Errorf("the key is %s and %s, want %s", d.Key, wrap.Key, want)
	}
	o.Namespace = "team/us"
	if _, _, err := open(t, o).Generate(t.Context(), binding); !errors.Is(err, kms.ErrUnauthenticated) || !strings.Contains(err.Error(), "no such auth mount") {
		t.Errorf("in another namespace: %v", err)
	}
}

// The policies in the documentation are those the tests run with.
func TestDocumentedPolicies(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("..", "..", "docs", "operations", "keys-setup.md"))
	must(t, err)
	for _, policy := range []string{smallestPolicy, operatorPolicy} {
		if !strings.Contains(string(page), "```hcl"+policy+"```") {
			t.Errorf("keys-setup.md lacks the policy\n%s", policy)
		}
	}
}
