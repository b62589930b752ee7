package server

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/journal"
)

// caller is who sent a request.
type caller struct {
	kind callers
	app  journal.AppID // of appBackend and endUser
	user string        // of endUser

	operator string // the name of one

	expires time.Time // of the token; zero for an operator's
}

// actor names an operator in the audit log.
func (c caller) actor() string { return "operator:" + c.operator }

func (c callers) String() string {
	switch c {
	case appBackend:
		return "app"
	case endUser:
		return "user"
	case operator:
		return "operator"
	case anyone, linkHolder:
	}
	return "none"
}

// authorize finds out who calls and whether the route table lets it, and loads
// the app of routes below one.
func (s *Server) authorize(c *call) error {
	if c.route.who == anyone {
		return nil
	}
	var app journal.AppID
	if c.route.ofApp() {
		var err error
		// Before the credential: it says nothing that the id itself does not,
		// and a caller of the wrong region should be told the right one.
		if app, err = s.appOfPath(c.vars["app"]); err != nil {
			return err
		}
	}
	who, err := s.identify(c.r, app)
	if err != nil {
		return err
	}
	c.caller = who
	if who.kind&c.route.who == 0 {
		return s.kinds.privilegeMissing.problem(denied(who.kind, c.route.who))
	}
	if !c.route.ofApp() {
		if who.kind == operator {
			return nil
		}
		app = who.app // the route is about the region, and the app is the token's
	}
	return s.enter(c, app)
}

// enter loads the app that the request is for and counts the request.
func (s *Server) enter(c *call, app journal.AppID) (err error) {
	if err := s.stands(c, app); err != nil {
		return err
	}
	return s.admit(c)
}

// stands loads the app and reports whether it is served, and its account.
func (s *Server) stands(c *call, app journal.AppID) (err error) {
	if c.app, err = s.journal.App(c.r.Context(), app); err != nil {
		return err
	}
	if c.app.Disabled {
		return journal.ErrDisabled
	}
	return s.useAccount(c, c.app)
}

// alarm tells the streams of a server that an app or account has changed, so
// that one that is no longer served ends at once.
type alarm struct {
	mu sync.Mutex
	ch chan struct{} // closed by the next change
}

// next returns a channel that the next change closes.
func (a *alarm) next() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.ch == nil {
		a.ch = make(chan struct{})
	}
	return a.ch
}

func (a *alarm) ring() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.ch != nil {
		close(a.ch)
		a.ch = nil
	}
}

func denied(kind, who callers) string {
	switch {
	case kind == operator:
		return "an operator's token opens no route of an app: operators see no messages"
	case who == operator:
		return "this route is for operators"
	case kind == endUser:
		return "a user's token (chat privilege 1) does not open this route; the app's token (chat privilege 2) is needed"
	}
	return "the credential does not allow this"
}

// appOfPath parses an app id and checks that it is of this region.
func (s *Server) appOfPath(text string) (journal.AppID, error) {
	app, err := journal.ParseAppID(text)
	if err != nil {
		return app, s.invalidParameter("app", "an app id is 32 lower-case hex digits")
	}
	if app.Region() == s.region.Number {
		return app, nil
	}
	return app, s.misdirected(app)
}

// notElsewhere refuses a name that is the id of another region's app.
func (s *Server) notElsewhere(name string) error {
	app, err := journal.ParseAppID(name)
	if err != nil || app.Region() == s.region.Number {
		return nil //nolint:nilerr // what else it is, its route says
	}
	return s.misdirected(app)
}

// misdirected says where an app of another region lives, if that is known.
func (s *Server) misdirected(app journal.AppID) error {
	place, ok := s.elsewhere[app.Region()]
	if !ok {
		return s.kinds.notFound.problem("there is no such app")
	}
	p := s.kinds.wrongRegion.problem("this is region " + s.region.ID + "; the app belongs to region " + place.Region)
	p.Region, p.URL = place.Region, place.URL
	return p
}

// identify checks the request's credential. For a path below an app, want is
// that app and a token of any other is refused before anything is looked up.
func (s *Server) identify(r *http.Request, want journal.AppID) (caller, error) {
	token, err := s.bearer(r)
	if err != nil {
		return caller{}, err
	}
	if name, ok := s.operators.Identify(token); ok {
		return caller{kind: operator, operator: name}, nil
	}
	parsed, err := auth.Parse(token)
	if err != nil {
		return caller{}, err
	}
	app, err := journal.ParseAppID(parsed.AppID)
	if err != nil || (!want.IsZero() && app != want) || app.Region() != s.region.Number {
		return caller{}, s.kinds.tokenInvalid.problem("the token is for another app")
	}
	certificates, err := s.certificates(r.Context(), app)
	if err != nil {
		return caller{}, err
	}
	claims, err := parsed.Verify(certificates, s.now())
	if err != nil {
		return caller{}, err
	}
	if claims.App {
		return caller{kind: appBackend, app: app, expires: claims.Expires}, nil
	}
	return caller{kind: endUser, app: app, user: claims.User, expires: claims.Expires}, nil
}

func (s *Server) certificates(ctx context.Context, id journal.AppID) ([]string, error) {
	app, err := s.journal.App(ctx, id)
	if errors.Is(err, journal.ErrUnknownApp) {
		return nil, s.kinds.notFound.problem("there is no such app")
	}
	if err != nil {
		return nil, err
	}
	texts := make([]string, len(app.Certificates))
	for i, c := range app.Certificates {
		texts[i] = c.Reveal()
	}
	return texts, nil
}

// bearer returns the token of the one Authorization header.
func (s *Server) bearer(r *http.Request) (string, error) {
	values := r.Header.Values("Authorization")
	if len(values) == 0 {
		return "", s.kinds.tokenInvalid.problem("a token is needed: Authorization: Bearer TOKEN")
	}
	scheme, token, ok := strings.Cut(values[0], " ")
	if len(values) > 1 || !ok || !strings.EqualFold(scheme, "Bearer") || token == "" {
		return "", s.kinds.tokenInvalid.problem("one header is needed: Authorization: Bearer TOKEN")
	}
	return token, nil
}
