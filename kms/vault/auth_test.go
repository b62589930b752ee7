package vault_test

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/vault"
)

// A token that can be renewed lives on, one that reaches its maximum is
// replaced by a new login, and nobody notices either.
func TestTokenIsRenewedAndReplaced(t *testing.T) {
	s := newServer(t)
	s.role(map[string]any{"token_policies": "coffer", "token_ttl": "2s", "token_max_ttl": "5s"})
	o := s.options()
	var seen calls
	o.Observe = seen.observe
	p := open(t, o)
	key, w, err := p.Generate(t.Context(), binding)
	must(t, err)
	eventually(t, "two renewals and two more logins", func() bool {
		got, err := p.Unwrap(t.Context(), binding, w)
		if err != nil || !bytes.Equal(got, key) {
			t.Fatalf("with %s%v", &seen, err)
		}
		return len(seen.of("renew")) >= 2 && len(seen.of("login")) >= 3
	})
	for _, call := range append(seen.of("renew"), seen.of("login")...) {
		if call.Err != nil || call.RequestID == "" {
			t.Errorf("%s: request %q, %v", call.Operation, call.RequestID, call.Err)
		}
	}
}

// A lease that cannot be renewed is replaced before it ends: no request is ever
// refused for it.
func TestNonRenewableLease(t *testing.T) {
	s := newServer(t)
	s.role(map[string]any{"token_policies": "coffer", "token_type": "batch", "token_ttl": "2s"})
	o := s.options()
	var seen calls
	o.Observe = seen.observe
	p := open(t, o)
	_, w, err := p.Generate(t.Context(), binding)
	must(t, err)
	eventually(t, "three logins", func() bool {
		_, err := p.Unwrap(t.Context(), binding, w)
		must(t, err)
		return len(seen.of("login")) >= 3
	})
	if n := len(seen.of("renew")); n != 0 {
		t.Errorf("%d renewals of what cannot be renewed", n)
	}
}

// Many requests refused together cost one login, also when it does not help.
func TestRefusedTogetherLogInOnce(t *testing.T) {
	s := newServer(t)
	o := s.options()
	var seen calls
	o.Observe = seen.observe
	p := open(t, o)
	_, w, err := p.Generate(t.Context(), binding)
	must(t, err)
	all := func() (failed int) {
		var mu sync.Mutex
		var group sync.WaitGroup
		for range 50 {
			group.Go(func() {
				if _, err := p.Unwrap(t.Context(), binding, w); err != nil {
					mu.Lock()
					defer mu.Unlock()
					failed++
					if !errors.Is(err, kms.ErrAccessDenied) {
						t.Error(err)
					}
				}
			})
		}
		group.Wait()
		return failed
	}
	// The token ends: all succeed with the new one.
	s.revokeAll(t)
	if failed := all(); failed != 0 {
		t.Errorf("%d of 50 failed", failed)
	}
	if n := len(seen.of("login")); n != 2 {
		t.Fatalf("%d logins, want 2", n)
	}
	// The policy is withdrawn: all are denied, and given back: all succeed.
	must(t, s.admin.Sys().PutPolicy("coffer", `path "sys/nothing" { capabilities = ["read"] }`))
	if failed := all() + all(); failed != 100 {
		t.Errorf("%d of 100 were denied", failed)
	}
	if n := len(seen.of("login")); n > 3 {
		t.Errorf("%d logins, want at most one more", n)
	}
	must(t, s.admin.Sys().PutPolicy("coffer", smallestPolicy))
	if failed := all(); failed != 0 {
		t.Errorf("%d of 50 failed after the policy came back", failed)
	}
}

// revokeAll ends every token that AppRole has given out.
func (s *server) revokeAll(t testing.TB) {
	t.Helper()
	_, err := s.admin.Logical().Write("sys/leases/revoke-prefix/auth/approle/login", nil)
	must(t, err)
}

// Credentials that were refused are not offered again and again, which would
// lock the role, but at once when their file changes.
func TestRefusedCredentials(t *testing.T) {
	s := newServer(t)
	good := s.secret("good", "")
	must(t, os.Rename(s.dir+"/secret-id", good))
	s.secret("secret-id", "00000000-0000-0000-0000-000000000000")
	front := newProxy(t, s.process.URL)
	o := s.options()
	o.Address = front.URL
	p := open(t, o)
	for range 5 {
		_, _, err := p.Generate(t.Context(), binding)
		if !errors.Is(err, kms.ErrUnauthenticated) {
			t.Fatalf("wrong secret id: %v, want ErrUnauthenticated", err)
		}
		if strings.Contains(err.Error(), "00000000-0000") {
			t.Fatalf("the error shows the secret: %v", err)
		}
	}
	if n := front.requests.Load(); n != 1 {
		t.Errorf("%d requests with credentials that were refused, want one", n)
	}
	must(t, os.Rename(good, s.dir+"/secret-id"))
	_, _, err := p.Generate(t.Context(), binding)
	must(t, err)
}

func TestSecretFiles(t *testing.T) {
	s := newServer(t)
	secret, err := os.ReadFile(s.dir + "/secret-id")
	must(t, err)
	for name, spoil := range map[string]func(file string) error{
		"missing":          os.Remove,
		"a directory":      func(f string) error { _ = os.Remove(f); return os.Mkdir(f, 0o700) },
		"world-readable":   func(f string) error { return os.Chmod(f, 0o604) },
		"empty":            func(f string) error { return os.WriteFile(f, nil, 0o600) },
		"only a line end":  func(f string) error { return os.WriteFile(f, []byte("\n"), 0o600) },
		"two lines":        func(f string) error { return os.WriteFile(f, append([]byte("x\n"), secret...), 0o600) },
		"binary":           func(f string) error { return os.WriteFile(f, []byte{0x80, 1, 2}, 0o600) },
		"larger than 16 K": func(f string) error { return os.WriteFile(f, bytes.Repeat(secret, 1000), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			o := s.options()
			o.Auth.SecretIDFile = t.TempDir() + "/secret-id"
			must(t, os.WriteFile(o.Auth.SecretIDFile, secret, 0o600))
			must(t, spoil(o.Auth.SecretIDFile))
			p := open(t, o)
			_, _, err := p.Generate(t.Context(), binding)
			if !errors.Is(err, kms.ErrUnauthenticated) || !strings.Contains(err.Error(), "secret_id_file") {
				t.Fatalf("%v, want ErrUnauthenticated that names secret_id_file", err)
			}
			if strings.Contains(err.Error(), string(bytes.TrimSpace(secret))) {
				t.Fatalf("the error shows the secret: %v", err)
			}
			must(t, os.RemoveAll(o.Auth.SecretIDFile))
			must(t, os.WriteFile(o.Auth.SecretIDFile, secret, 0o600))
			_, _, err = p.Generate(t.Context(), binding)
			must(t, err)
		})
	}
}

// A token in a file may be replaced there, by Vault Agent or by hand.
func TestTokenFileIsReadAgain(t *testing.T) {
	s := newServer(t)
	o := s.tokenOptions("coffer")
	p := open(t, o)
	_, w, err := p.Generate(t.Context(), binding)
	must(t, err)
	old, err := os.ReadFile(o.Auth.TokenFile)
	must(t, err)
	must(t, s.admin.Auth().Token().RevokeTree(string(old)))
	_, err = p.Unwrap(t.Context(), binding, w)
	if !errors.Is(err, kms.ErrUnauthenticated) {
		t.Fatalf("a revoked token: %v, want ErrUnauthenticated", err)
	}
	s.newToken(&api.TokenCreateRequest{Policies: []string{"coffer"}})
	_, err = p.Unwrap(t.Context(), binding, w)
	must(t, err)
	// One that ends by itself.
	s.newToken(&api.TokenCreateRequest{Policies: []string{"coffer"}, TTL: "1s", ExplicitMaxTTL: "1s"})
	q := open(t, o)
	_, err = q.Unwrap(t.Context(), binding, w)
	must(t, err)
	eventually(t, "the token's end", func() bool {
		_, err := q.Unwrap(t.Context(), binding, w)
		if err != nil && !errors.Is(err, kms.ErrUnauthenticated) {
			t.Fatal(err)
		}
		return err != nil
	})
	s.newToken(&api.TokenCreateRequest{Policies: []string{"coffer"}})
	_, err = q.Unwrap(t.Context(), binding, w)
	must(t, err)
}

// Neither token nor secret nor key may be in a log line or an error.
func TestLogsAndErrorsHoldNoSecret(t *testing.T) {
	s := newServer(t)
	var log lockedBuffer
	o := s.options()
	o.Log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	var seen calls
	o.Observe = seen.observe
	p := open(t, o)
	key, w, err := p.Generate(t.Context(), binding)
	must(t, err)
	must(t, s.admin.Sys().PutPolicy("coffer", `path "sys/nothing" { capabilities = ["read"] }`))
	_, denied := p.Unwrap(t.Context(), binding, w)
	must(t, s.admin.Sys().Seal())
	_, sealed := p.Unwrap(t.Context(), binding, w)
	secret, err := os.ReadFile(s.dir + "/secret-id")
	must(t, err)
	text := fmt.Sprintf("%s\n%v %+v\n%v %+v\n%s\n%#v", log.String(), denied, denied, sealed, sealed, &seen, p)
	for name, hidden := range map[string]string{
		"a token":       "hvs.",
		"the secret id": string(bytes.TrimSpace(secret)),
		"the key":       base64.StdEncoding.EncodeToString(key),
		"the blob":      string(w.Blob),
		"the policy":    "permission denied",
	} {
		if strings.Contains(text, hidden) {
			t.Errorf("%s shows in:\n%s", name, text)
		}
	}
	if !strings.Contains(log.String(), "logged in to vault") {
		t.Errorf("the log tells nothing: %q", log.String())
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// Kubernetes: Vault asks the cluster whose token it is; here the cluster is one
// answer. The token is read anew for each login.
func TestKubernetes(t *testing.T) {
	s := newServer(t)
	signer := newSigner(t)
	cluster := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var review struct {
			Spec struct{ Token string }
		}
		_ = json.NewDecoder(r.Body).Decode(&review)
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		good := review.Spec.Token == signer.token(t, 1)
		_ = json.NewEncoder(w).Encode(map[string]any{
			"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
			"status": map[string]any{
				"authenticated": good,
				"user":          map[string]any{"username": "system:serviceaccount:coffer:coffer", "uid": "uid-1"},
			},
		})
	}))
	defer cluster.Close()
	must(t, s.admin.Sys().EnableAuthWithOptions("k8s/eu", &api.EnableAuthOptions{Type: "kubernetes"}))
	s.write("auth/k8s/eu/config", map[string]any{
		"kubernetes_host": cluster.URL, "disable_local_ca_jwt": true,
		"kubernetes_ca_cert": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cluster.Certificate().Raw})),
		"token_reviewer_jwt": signer.token(t, 0), "disable_iss_validation": true,
	})
	s.write("auth/k8s/eu/role/coffer", map[string]any{
		"bound_service_account_names": "coffer", "bound_service_account_namespaces": "coffer",
		"token_policies": "coffer", "token_ttl": "1h",
	})
	o := s.options()
	o.Auth = vault.Auth{Method: vault.AuthKubernetes, Mount: "k8s/eu", Role: "coffer", JWTFile: s.secret("jwt", signer.token(t, 1))}
	must(t, os.Chmod(o.Auth.JWTFile, 0o644)) //nolint:gosec // as Kubernetes does
	p := open(t, o)
	key, w, err := p.Generate(t.Context(), binding)
	must(t, err)

	// The Vault token ends, and the service account's was replaced by one that
	// the cluster does not know: only the new file counts.
	s.secret("jwt", signer.token(t, 2))
	_, err = s.admin.Logical().Write("sys/leases/revoke-prefix/auth/k8s/eu/login", nil)
	must(t, err)
	if _, err := p.Unwrap(t.Context(), binding, w); !errors.Is(err, kms.ErrUnauthenticated) {
		t.Fatalf("with a token the cluster refuses: %v, want ErrUnauthenticated", err)
	}
	s.secret("jwt", signer.token(t, 1))
	got, err := p.Unwrap(t.Context(), binding, w)
	must(t, err)
	if !bytes.Equal(got, key) {
		t.Fatal("another key")
	}
}

// signer makes service account tokens.
type signer struct{ key *rsa.PrivateKey }

func newSigner(t testing.TB) signer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	return signer{key}
}

// token is the n-th token; PKCS #1 v1.5 signs alike every time.
func (s signer) token(t testing.TB, n int) string {
	t.Helper()
	part := func(v map[string]any) string {
		b, err := json.Marshal(v)
		must(t, err)
		return base64.RawURLEncoding.EncodeToString(b)
	}
	text := part(map[string]any{"alg": "RS256"}) + "." + part(map[string]any{
		"iss": "kubernetes/serviceaccount", "sub": "system:serviceaccount:coffer:coffer", "jti": fmt.Sprint(n),
		"kubernetes.io/serviceaccount/namespace":            "coffer",
		"kubernetes.io/serviceaccount/secret.name":          "coffer-token",
		"kubernetes.io/serviceaccount/service-account.name": "coffer",
		"kubernetes.io/serviceaccount/service-account.uid":  "uid-1",
	})
	sum := sha256.Sum256([]byte(text))
	sig, err := rsa.SignPKCS1v15(nil, s.key, crypto.SHA256, sum[:])
	must(t, err)
	return text + "." + base64.RawURLEncoding.EncodeToString(sig)
}

// Close waits for what runs in the background, even when Vault hangs.
func TestCloseWhileVaultHangs(t *testing.T) {
	s := newServer(t)
	s.role(map[string]any{"token_policies": "coffer", "token_ttl": "1s", "token_max_ttl": "1h"})
	o := s.options()
	o.Timeout = time.Hour
	p, err := vault.New(o)
	must(t, err)
	_, w, err := p.Generate(t.Context(), binding)
	must(t, err)
	s.process.Pause(t)
	defer s.process.Continue(t)
	done := make(chan error, 1)
	go func() { _, err := p.Unwrap(t.Context(), binding, w); done <- err }()
	time.Sleep(1500 * time.Millisecond) // a renewal hangs as well
	must(t, p.Close())
	if err := <-done; !errors.Is(err, kms.ErrUnavailable) {
		t.Errorf("the request under way: %v, want ErrUnavailable", err)
	}
	if _, err := p.Unwrap(t.Context(), binding, w); !errors.Is(err, kms.ErrUnavailable) {
		t.Errorf("after Close: %v, want ErrUnavailable", err)
	}
}
