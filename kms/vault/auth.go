package vault

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/cofferdb/coffer/kms"
)

const (
	// quietAfterLogin is how long a 403 is believed without another login. A
	// withdrawn policy then costs one login in five seconds, not one a request.
	quietAfterLogin = 5 * time.Second
	// shortestLife is how long a login should last. Those that end sooner are
	// replaced ever more slowly.
	shortestLife = 2 * time.Second
	longestWait  = time.Minute
	maxSecret    = 16 << 10 // bytes in a file
)

// login is a token and what is known of it.
type login struct {
	client *api.Client
	secret *api.Secret
	at     time.Time
	hasty  int // how many logins before this one ended too soon
	stop   context.CancelFunc
}

// session keeps the provider logged in.
type session struct {
	provider *Provider
	auth     Auth
	log      *slog.Logger
	connect  func(token string) (*api.Client, error)
	quiet    time.Duration
	life     context.Context //nolint:containedctx // the provider's own lifetime
	end      context.CancelFunc
	wait     sync.WaitGroup

	mu      sync.Mutex
	current *login  // nil before the first login; guarded by mu
	flight  *flight // the login under way, or nil; guarded by mu
	closed  bool    // guarded by mu
}

// flight is a login that callers wait for together.
type flight struct {
	done  chan struct{}
	login *login // these two are set when done is closed
	err   error
}

// login returns the present login, after making one if there is none.
func (s *session) login(ctx context.Context) (*login, error) {
	s.mu.Lock()
	if l := s.current; l != nil {
		s.mu.Unlock()
		return l, nil
	}
	f := s.start()
	s.mu.Unlock()
	return s.await(ctx, f)
}

// loginAgain replaces a login whose token was refused. It returns the same login
// when that is too young to blame.
func (s *session) loginAgain(ctx context.Context, refused *login) (*login, error) {
	s.mu.Lock()
	if l := s.current; l != refused || time.Since(l.at) < s.quiet {
		s.mu.Unlock()
		return l, nil
	}
	f := s.start()
	s.mu.Unlock()
	return s.await(ctx, f)
}

// start begins a login, or joins the one under way. The caller holds mu.
//
// It runs apart from the callers, so that one who gives up does not take the
// others with him.
func (s *session) start() *flight {
	if s.flight != nil {
		return s.flight
	}
	f := &flight{done: make(chan struct{})}
	if s.closed {
		f.err = s.provider.fail("login", kms.ErrUnavailable, "the provider is closed")
		close(f.done)
		return f
	}
	s.flight = f
	s.wait.Go(func() {
		l, err := s.authenticate()
		s.mu.Lock()
		if err == nil {
			s.install(l)
		}
		f.login, f.err = l, err
		s.flight = nil
		s.mu.Unlock()
		close(f.done)
	})
	return f
}

func (s *session) await(ctx context.Context, f *flight) (*login, error) {
	select {
	case <-f.done:
		return f.login, f.err
	case <-ctx.Done():
		return nil, caused(ctx, s.provider.fail("login", kms.ErrUnavailable, "no login in time"))
	}
}

// install makes l the present login and watches it. The caller holds mu.
func (s *session) install(l *login) {
	if old := s.current; old != nil {
		if time.Since(old.at) < shortestLife {
			l.hasty = old.hasty + 1
		}
		old.stop()
	}
	s.current = l
	ctx, stop := context.WithCancel(s.life)
	l.stop = stop
	if a := l.secret.Auth; a.LeaseDuration > 0 && !s.closed {
		s.wait.Go(func() { s.watch(ctx, l) })
	}
}

// watch renews a login's token until that no longer helps, then replaces it.
func (s *session) watch(ctx context.Context, l *login) {
	// Renewals have no context, so their client has a timeout.
	client, err := s.connect(l.secret.Auth.ClientToken)
	if err != nil {
		s.log.Error("cannot watch the vault token", "error", err)
		return
	}
	client.SetClientTimeout(s.provider.loginTimeout())
	watcher, err := client.NewLifetimeWatcher(&api.LifetimeWatcherInput{
		Secret: l.secret,
		// Failed renewals are repeated until little of the lease is left.
		RenewBehavior: api.RenewBehaviorIgnoreErrors,
	})
	if err != nil {
		s.log.Error("cannot watch the vault token", "error", err)
		return
	}
	s.wait.Go(watcher.Start)
	defer watcher.Stop()
	for renewing := true; renewing; {
		select {
		case <-ctx.Done():
			return
		case r := <-watcher.RenewCh():
			s.observe("renew", requestIDOf(r.Secret.RequestID), 0, nil)
		case <-watcher.DoneCh():
			// With or without an error, the lease is near its end.
			renewing = false
		}
	}
	for delay := pause(l); ; delay = min(2*max(delay, time.Second), longestWait) {
		if !sleep(ctx, delay) {
			return
		}
		s.mu.Lock()
		if s.current != l {
			s.mu.Unlock()
			return
		}
		f := s.start()
		s.mu.Unlock()
		_, err := s.await(ctx, f)
		if err == nil || ctx.Err() != nil {
			return
		}
		s.log.Warn("cannot replace the vault token, trying again", "error", err)
	}
}

// pause is how long to wait before a login is replaced: a random part of what
// may be left of it, so that processes started together spread out, and longer
// when logins end as soon as they are made.
func pause(l *login) time.Duration {
	left := time.Duration(l.secret.Auth.LeaseDuration) * time.Second / 20
	wait := rand.N(min(left, 10*time.Second) + 1) //nolint:gosec // jitter needs no secrecy
	if time.Since(l.at) < shortestLife {
		wait = max(wait, min(time.Second<<min(l.hasty, 6), longestWait))
	}
	return wait
}

func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// close ends what runs in the background and waits for it.
func (s *session) close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.end()
	s.wait.Wait()
}

// authenticate logs in once, with what the files hold now.
func (s *session) authenticate() (*login, error) {
	ctx, cancel := context.WithTimeout(s.life, s.provider.loginTimeout())
	defer cancel()
	start := time.Now()
	l, err := s.ask(ctx)
	if err != nil {
		err = s.refused(ctx, err)
		s.observe("login", "", time.Since(start), err)
		return nil, err
	}
	l.at = time.Now()
	s.observe("login", requestIDOf(l.secret.RequestID), time.Since(start), nil)
	s.log.Debug("logged in to vault", "method", s.auth.Method,
		"lease", time.Duration(l.secret.Auth.LeaseDuration)*time.Second, "renewable", l.secret.Auth.Renewable)
	return l, nil
}

// errSecretFile is what is wrong with a file, without its content.
type errSecretFile struct{ detail string }

func (e errSecretFile) Error() string { return e.detail }

func (s *session) ask(ctx context.Context) (*login, error) {
	mount := s.auth.Mount
	if mount = strings.Trim(mount, "/"); mount == "" {
		mount = s.auth.Method
	}
	body := map[string]any{}
	switch s.auth.Method {
	case AuthToken:
		return s.askToken(ctx)
	case AuthAppRole:
		id := s.auth.RoleID
		if id == "" {
			var err error
			if id, err = readSecret("role_id_file", s.auth.RoleIDFile, false); err != nil {
				return nil, err
			}
		}
		secret, err := readSecret("secret_id_file", s.auth.SecretIDFile, true)
		if err != nil {
			return nil, err
		}
		body["role_id"], body["secret_id"] = id, secret
	default: // AuthKubernetes
		file := s.auth.JWTFile
		if file == "" {
			file = ServiceAccountToken
		}
		// Kubernetes itself makes this file readable for every user of the pod.
		jwt, err := readSecret("jwt_file", file, false)
		if err != nil {
			return nil, err
		}
		body["role"], body["jwt"] = s.auth.Role, jwt
	}
	anonymous, err := s.connect("")
	if err != nil {
		return nil, err
	}
	secret, err := anonymous.Logical().WriteWithContext(ctx, "auth/"+mount+"/login", body)
	if err != nil {
		return nil, err
	}
	if secret == nil || secret.Auth == nil || secret.Auth.ClientToken == "" {
		return nil, errNotJSON
	}
	client, err := s.connect(secret.Auth.ClientToken)
	if err != nil {
		return nil, err
	}
	return &login{client: client, secret: secret}, nil
}

// askToken looks up the token in the file, which also tells a token that has
// ended from one that may not do something: Vault answers both with a bare 403.
func (s *session) askToken(ctx context.Context) (*login, error) {
	token, err := readSecret("token_file", s.auth.TokenFile, true)
	if err != nil {
		return nil, err
	}
	client, err := s.connect(token)
	if err != nil {
		return nil, err
	}
	secret, err := client.Auth().Token().LookupSelfWithContext(ctx)
	if err != nil {
		return nil, err
	}
	if secret == nil || secret.Data == nil {
		return nil, errNotJSON
	}
	ttl, err := secret.TokenTTL()
	if err != nil {
		return nil, errNotJSON
	}
	renewable, err := secret.TokenIsRenewable()
	if err != nil {
		return nil, errNotJSON
	}
	secret.Auth = &api.SecretAuth{ClientToken: token, LeaseDuration: int(ttl / time.Second), Renewable: renewable}
	secret.Data = nil
	return &login{client: client, secret: secret}, nil
}

// refused turns a failed login into an error of the closed set: what refuses
// the credentials is "unauthenticated", whatever its status.
func (s *session) refused(ctx context.Context, err error) error {
	fail := s.provider.fail("login", kms.ErrUnauthenticated, "")
	var file errSecretFile
	if errors.As(err, &file) {
		fail.Detail = file.detail
		return fail
	}
	if answer, ok := errors.AsType[*api.ResponseError](err); ok {
		switch answer.StatusCode {
		case http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden:
			fail.Detail = fmt.Sprintf("auth method %s refused the credentials with status %d", s.auth.Method, answer.StatusCode)
			return fail
		case http.StatusNotFound, http.StatusMethodNotAllowed:
			fail.Detail = "no such auth mount"
			return fail
		}
	}
	fail.Class, fail.Detail = classify("login", err)
	return caused(ctx, fail)
}

func (s *session) observe(op, requestID string, d time.Duration, err error) {
	s.provider.observe(s.life, kms.Call{
		Provider: Name, Key: s.provider.identity, Operation: op, RequestID: requestID, Duration: d, Err: err,
	})
}

// readSecret reads a secret from a file, without the line end that editors add.
func readSecret(setting, path string, private bool) (string, error) {
	wrong := func(detail string) error { return errSecretFile{setting + " " + path + ": " + detail} }
	f, err := os.Open(path) //nolint:gosec // the operator's own setting
	if err != nil {
		return "", wrong("cannot be opened")
	}
	defer f.Close() //nolint:errcheck // only read
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return "", wrong("not a file")
	}
	if private && info.Mode().Perm()&0o007 != 0 {
		return "", wrong("every user may read it: chmod o= it")
	}
	raw, err := io.ReadAll(io.LimitReader(f, maxSecret+1))
	if err != nil {
		return "", wrong("cannot be read")
	}
	text := strings.TrimRight(string(raw), "\r\n \t")
	switch {
	case text == "":
		return "", wrong("empty")
	case len(raw) > maxSecret:
		return "", wrong("larger than 16 KiB")
	case strings.ContainsFunc(text, func(r rune) bool { return r < 0x21 || r > 0x7e }):
		return "", wrong("not one word of printable ASCII")
	}
	return text, nil
}
