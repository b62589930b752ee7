package vault

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/internal/retry"
)

const (
	// quietAfterLogin is how long a 403 is believed after one has led to a new
	// login. A withdrawn policy then costs one login in five seconds, not one a
	// request.
	quietAfterLogin = 5 * time.Second
	// Credentials that Vault refused are offered again when their files change,
	// or after a while, for the fault may be on Vault's side. AppRole's while is
	// long: Vault locks a role for 15 minutes after five refused logins, for every
	// process that uses it. The others' doubles.
	appRoleRefusal = 4 * time.Minute
	firstRefusal   = time.Second
	longestRefusal = 30 * time.Second
	// shortestLife is how long a login should last. Those that end sooner are
	// replaced ever more slowly.
	shortestLife = time.Second
	longestWait  = time.Minute
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

	mu      sync.Mutex // guards what follows
	current *login     // nil before the first login
	flight  *flight    // the login under way, or nil
	again   time.Time  // when a 403 last led to a login
	refusal refusal    // of the last login
	closed  bool
}

// refusal remembers credentials that Vault did not accept.
type refusal struct {
	err         error // nil: they were accepted
	fingerprint [sha256.Size]byte
	until       time.Time
	wait        time.Duration
}

// flight is a login that callers wait for together.
type flight struct {
	done    chan struct{}
	refused bool   // a 403 led to it; guarded by session.mu
	login   *login // these two are set when done is closed
	err     error
}

// login returns the present login, after making one if there is none.
func (s *session) login(ctx context.Context) (*login, error) {
	s.mu.Lock()
	if l := s.current; l != nil {
		s.mu.Unlock()
		return l, nil
	}
	f := s.start(false) //nolint:contextcheck // a login serves all who wait
	s.mu.Unlock()
	return s.await(ctx, f)
}

// loginAgain replaces a login whose token was refused. It returns the same login
// when a new one has just been made for that reason.
func (s *session) loginAgain(ctx context.Context, refused *login) (*login, error) {
	s.mu.Lock()
	if s.current != refused || time.Since(s.again) < s.quiet {
		l := s.current
		s.mu.Unlock()
		return l, nil
	}
	f := s.start(true) //nolint:contextcheck // as above
	s.mu.Unlock()
	return s.await(ctx, f)
}

// start begins a login, or joins the one under way. The caller holds mu.
//
// It runs apart from the callers, so that one who gives up does not take the
// others with him.
func (s *session) start(refused bool) *flight {
	if s.flight != nil {
		s.flight.refused = s.flight.refused || refused
		return s.flight
	}
	f := &flight{done: make(chan struct{}), refused: refused}
	if s.closed {
		f.err = s.provider.fail("login", kms.ErrUnavailable, "the provider is closed")
		close(f.done)
		return f
	}
	s.flight = f
	last := s.refusal
	s.wait.Go(func() {
		l, now, err := s.authenticate(last)
		s.mu.Lock()
		s.refusal = now
		if err == nil {
			if f.refused {
				s.again = l.at
			}
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
		return nil, retry.Caused(ctx, s.provider.fail("login", kms.ErrUnavailable, "no login in time"))
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
			s.observe("renew", retry.RequestID(r.Secret.RequestID), 0, nil)
		case err := <-watcher.DoneCh():
			// With or without an error, the lease is near its end.
			if err != nil {
				s.log.Debug("the vault token can no longer be renewed", "reason", classify("renew", err).detail)
			}
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
		f := s.start(false) //nolint:contextcheck // as above
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

// authenticate logs in once, with what the files hold now, unless that was
// refused only just before.
func (s *session) authenticate(last refusal) (*login, refusal, error) {
	ctx, cancel := context.WithTimeout(s.life, s.provider.loginTimeout())
	defer cancel()
	start := time.Now()
	c, err := s.credentials()
	if err != nil {
		err = s.refused(ctx, err)
		s.observe("login", "", time.Since(start), err)
		return nil, last, err
	}
	same := last.err != nil && last.fingerprint == c.fingerprint
	if same && start.Before(last.until) {
		return nil, last, last.err
	}
	l, err := s.ask(ctx, c)
	if err != nil {
		err = s.refused(ctx, err)
		s.observe("login", "", time.Since(start), err)
		if !errors.Is(err, kms.ErrUnauthenticated) {
			return nil, last, err
		}
		wait := firstRefusal
		switch {
		case s.auth.Method == AuthAppRole:
			wait = appRoleRefusal
		case same:
			wait = min(2*last.wait, longestRefusal)
		}
		return nil, refusal{err: err, fingerprint: c.fingerprint, until: time.Now().Add(wait), wait: wait}, err
	}
	l.at = time.Now()
	s.observe("login", retry.RequestID(l.secret.RequestID), time.Since(start), nil)
	s.log.Debug("logged in to vault", "method", s.auth.Method,
		"lease", time.Duration(l.secret.Auth.LeaseDuration)*time.Second, "renewable", l.secret.Auth.Renewable)
	return l, refusal{}, nil
}

// credentials are what the files hold at the moment.
type credentials struct {
	token       string         // AuthToken
	body        map[string]any // of the other methods' login
	fingerprint [sha256.Size]byte
}

func (s *session) credentials() (c credentials, err error) {
	var parts [2]string
	switch a := s.auth; a.Method {
	case AuthToken:
		c.token, err = readSecret("token_file", a.TokenFile, true)
		parts[0] = c.token
	case AuthAppRole:
		parts[0] = a.RoleID
		if a.RoleID == "" {
			parts[0], err = readSecret("role_id_file", a.RoleIDFile, false)
		}
		if err == nil {
			parts[1], err = readSecret("secret_id_file", a.SecretIDFile, true)
		}
		c.body = map[string]any{"role_id": parts[0], "secret_id": parts[1]}
	default: // AuthKubernetes
		file := a.JWTFile
		if file == "" {
			file = ServiceAccountToken
		}
		parts[0] = a.Role
		// Kubernetes itself makes this file readable for every user of the pod.
		parts[1], err = readSecret("jwt_file", file, false)
		c.body = map[string]any{"role": parts[0], "jwt": parts[1]}
	}
	c.fingerprint = sha256.Sum256([]byte(strings.Join(parts[:], "\n")))
	return c, err
}

func (s *session) ask(ctx context.Context, c credentials) (*login, error) {
	if s.auth.Method == AuthToken {
		return s.askToken(ctx, c.token)
	}
	mount := strings.Trim(s.auth.Mount, "/")
	if mount == "" {
		mount = s.auth.Method
	}
	anonymous, err := s.connect("")
	if err != nil {
		return nil, err
	}
	secret, err := anonymous.Logical().WriteWithContext(ctx, "auth/"+mount+"/login", c.body)
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
func (s *session) askToken(ctx context.Context, token string) (*login, error) {
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
	if file, ok := errors.AsType[errSecretFile](err); ok {
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
	v := classify("login", err)
	fail.Class, fail.Detail = v.class, v.detail
	return retry.Caused(ctx, fail)
}

func (s *session) observe(op, requestID string, d time.Duration, err error) {
	s.provider.observe(s.life, kms.Call{
		Provider: Name, Key: s.provider.identity, Operation: op, RequestID: requestID, Duration: d, Err: err,
	})
}
