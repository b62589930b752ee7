package server

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/cofferdb/coffer/cmd/coffer/internal/accounts"
	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/cmd/coffer/internal/deletion"
	"github.com/cofferdb/coffer/cmd/coffer/internal/deliver"
	"github.com/cofferdb/coffer/cmd/coffer/internal/erasures"
	"github.com/cofferdb/coffer/cmd/coffer/internal/exports"
	"github.com/cofferdb/coffer/cmd/coffer/internal/keys"
	"github.com/cofferdb/coffer/cmd/coffer/internal/monitor"
	"github.com/cofferdb/coffer/cmd/coffer/internal/presend"
	"github.com/cofferdb/coffer/cmd/coffer/internal/profiles"
	"github.com/cofferdb/coffer/cmd/coffer/internal/residency"
	"github.com/cofferdb/coffer/cmd/coffer/internal/signing"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/attachments"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/history"
	"github.com/cofferdb/coffer/projections/roaming"
)

// Limits bounds what requests may take. Zero values mean the defaults named.
type Limits struct {
	RequestBytes int64         // body of an append after decoding; 16 MiB
	BatchEvents  int           // events of one append; 1,000
	BodyBytes    int64         // all bodies in memory at a time; 256 MiB
	BodyTimeout  time.Duration // from the first byte of a body to its last; 60 s
	WriteTimeout time.Duration // for each part of an answer; 30 s
	WaitTimeout  time.Duration // for the view to reach min_position; 5 s
	KeepAlive    time.Duration // between signs of life of a followed stream; 15 s
	Streams      int           // replays at a time; 4,096
	AppRequests  int           // requests of one app a second; 5,000
	AppBurst     int           // requests of one app at once; 10,000
	AppStreams   int           // streams of one app at a time; 1,024
	UserRequests int           // requests of one user a second; 50
	UserBurst    int           // requests of one user at once; 100
	UserStreams  int           // streams of one user at a time; 16

	AttachmentBytes int64 // of one attachment, for the document; 10 MiB
	Event           journal.Limits
}

func (l Limits) withDefaults() Limits {
	setDefault(&l.RequestBytes, 16<<20)
	setDefault(&l.BatchEvents, 1000)
	setDefault(&l.BodyBytes, 256<<20)
	setDefault(&l.BodyTimeout, 60*time.Second)
	setDefault(&l.WriteTimeout, 30*time.Second)
	setDefault(&l.WaitTimeout, 5*time.Second)
	setDefault(&l.KeepAlive, 15*time.Second)
	setDefault(&l.Streams, 4096)
	setDefault(&l.AppRequests, 5000)
	setDefault(&l.AppBurst, 2*l.AppRequests)
	setDefault(&l.AppStreams, 1024)
	setDefault(&l.UserRequests, 50)
	setDefault(&l.UserBurst, 2*l.UserRequests)
	setDefault(&l.UserStreams, 16)
	setDefault(&l.AttachmentBytes, 10<<20)
	return l
}

func setDefault[T int | int64 | time.Duration](v *T, d T) {
	if *v <= 0 {
		*v = d
	}
}

// Place is a region that is served elsewhere or by another listener.
type Place struct {
	Region string
	URL    string // may be empty
	Compat string // URL of its compatibility listener, if one is known
}

// Unready is a reason why the region is not ready.
type Unready struct {
	Part   string `json:"part"` // nats, kms, view, …
	Detail string `json:"detail"`
}

// Options is what a server needs. All are required but Elsewhere, Ready,
// Limits, Log and Now.
type Options struct {
	Mover    *journal.Mover
	Region   journal.Region
	Journal  *journal.Journal
	History  *history.View
	Roaming  *roaming.View
	Runner   *projections.Runner
	Accounts *accounts.Store
	Keys     *keys.Admin
	// Callbacks deliver to webhook endpoints.
	Callbacks *deliver.Engine
	// Presend asks endpoints before messages are stored.
	Presend *presend.Asker
	// Deletions delete apps and accounts.
	Deletions *deletion.Deletions
	Profiles  *profiles.Store
	Exports   *exports.Exports
	Operators auth.Operators
	Attached  *attachments.Store
	Erasures  *erasures.Erasures
	Signing   *signing.Key
	// Residency says where the region's data lies.
	Residency func(ctx context.Context) (residency.Manifest, error)

	// Meter counts what is served; nil counts nothing. Metrics are what /metrics
	// gives.
	Meter   *monitor.Meter
	Metrics *monitor.Metrics

	// Elsewhere names the other regions, by their number.
	Elsewhere map[byte]Place
	// Ready says what is wrong at present; nil means nothing ever is.
	Ready  func(ctx context.Context) []Unready
	Limits Limits
	Log    *slog.Logger
	Now    func() time.Time
}

// Server answers the requests of one region.
type Server struct {
	region    journal.Region
	journal   *journal.Journal
	history   *history.View
	roaming   *roaming.View
	runner    *projections.Runner
	accounts  *accounts.Store
	keys      *keys.Admin
	callbacks *deliver.Engine
	presend   *presend.Asker
	deletions *deletion.Deletions
	profiles  *profiles.Store
	exports   *exports.Exports
	attached  *attachments.Store
	erasures  *erasures.Erasures
	signing   *signing.Key
	operators auth.Operators
	elsewhere map[byte]Place
	ready     func(ctx context.Context) []Unready
	residency func(ctx context.Context) (residency.Manifest, error)
	limits    Limits
	log       *slog.Logger
	now       func() time.Time

	mover *journal.Mover

	meter   *monitor.Meter
	metrics *monitor.Metrics

	document func() ([]byte, error) // OpenAPI, made at the first request for it

	table   []route
	kinds   kindTable
	errors  []mapping
	bodies  *semaphore.Weighted // bytes of request bodies in memory
	streams *semaphore.Weighted // replays under way
	quotas  *quotas
	news    news
	rooms   sync.Pool // of *[]byte, for pages of messages
	turns   turns

	// changed is the runner's; a test puts itself in between.
	changed func(journal.AppID) <-chan struct{}

	changes  alarm          // of apps and accounts
	sockets  sync.WaitGroup // WebSockets, which no longer belong to net/http, and what requests leave to be done
	stopping chan struct{}  // closed by Stop
	stop     sync.Once
}

// New makes a server. It starts nothing.
func New(o Options) *Server {
	s := &Server{
		region: o.Region, journal: o.Journal, history: o.History, roaming: o.Roaming, runner: o.Runner, accounts: o.Accounts, keys: o.Keys, callbacks: o.Callbacks, presend: o.Presend,
		exports:  o.Exports,
		attached: o.Attached,
		erasures: o.Erasures, signing: o.Signing,
		operators: o.Operators, elsewhere: o.Elsewhere, ready: o.Ready, limits: o.Limits.withDefaults(),
		log: o.Log, now: o.Now, kinds: kinds(), errors: errorTable(),
		stopping: make(chan struct{}),
	}
	s.mover = o.Mover
	s.meter, s.metrics = o.Meter, o.Metrics
	s.residency = o.Residency
	s.deletions, s.profiles = o.Deletions, o.Profiles
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.now == nil {
		s.now = time.Now
	}
	s.bodies = semaphore.NewWeighted(s.limits.BodyBytes)
	s.streams = semaphore.NewWeighted(int64(s.limits.Streams))
	s.quotas = newQuotas(s.limits)
	s.turns.free = runtime.GOMAXPROCS(0)
	if s.runner != nil {
		s.changed = s.runner.Changed
	}
	s.table = s.routes()
	s.document = sync.OnceValues(s.buildDocument)
	return s
}

// Stop ends the followed streams, each with its trailer, so that a listener
// which waits for open requests can shut down. Requests are still answered.
func (s *Server) Stop() { s.stop.Do(func() { close(s.stopping) }) }

// Wait returns when the WebSockets have ended after [Server.Stop], or when ctx
// ends. http.Server.Shutdown waits for all other streams but not for these.
func (s *Server) Wait(ctx context.Context) error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.sockets.Wait()
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// call is one request on its way through.
type call struct {
	w      *responseWriter
	r      *http.Request
	route  *route
	vars   map[string]string
	query  url.Values
	app    journal.App // of routes below an app
	caller caller
	id     string
	mac    macFunc // of cursors, when set

	// refuse writes a problem in another form than writeProblem's, when set.
	refuse func(*call, *problem)

	caughtUp bool     // see catchUp
	after    []func() // run at the end, the last one first
}

// ServeHTTP answers one request and logs it.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.answer(&call{w: &responseWriter{ResponseWriter: w}, r: r, id: requestID()}, s.serve) //nolint:contextcheck // see answer
}

// answer answers one request by serve and logs it. The request's context is
// c.r.Context() throughout.
func (s *Server) answer(c *call, serve func(*call) error) {
	started := s.now()
	defer func() { s.measure(c, started) }()
	h := c.w.Header()
	h.Set("X-Request-Id", c.id)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	defer func() { //nolint:contextcheck // see above
		// A panic's value may hold content, so only where it happened is logged.
		if v := recover(); v != nil {
			if v == http.ErrAbortHandler { //nolint:errorlint // this very value
				panic(v)
			}
			s.log.Error("request panicked", "request_id", c.id, "type", fmt.Sprintf("%T", v), "stack", string(debug.Stack()))
			s.finish(c, started, s.kinds.internal.problem("the server has failed"))
			if c.w.status != 0 {
				panic(http.ErrAbortHandler) // an answer that has begun must not look whole
			}
		}
	}()
	defer func() {
		for _, f := range slices.Backward(c.after) {
			f()
		}
	}()
	s.finish(c, started, serve(c)) //nolint:contextcheck // see above
	if c.w.status == 0 {
		// Nobody seems to be there. If somebody is, silence must not become the
		// 200 that net/http would send.
		panic(http.ErrAbortHandler)
	}
}

func (s *Server) serve(c *call) error {
	var err error
	s.bodyDeadline(c)
	if c.route, c.vars, err = s.match(s.table, c.r); err != nil {
		return err
	}
	if c.query, err = s.parseQuery(c.r, c.route); err != nil {
		return err
	}
	if err := s.authorize(c); err != nil {
		return err
	}
	if c.route.bodies == nil && (c.r.ContentLength != 0 || len(c.r.TransferEncoding) > 0) {
		return s.invalidBody("", "this request takes no body")
	}
	return c.route.handle(s, c)
}

// finish writes the problem of a request that failed before its answer began,
// and the log line.
func (s *Server) finish(c *call, started time.Time, err error) {
	var p *problem
	// Over HTTP/1.1 the context also ends when a body is late; that has an answer.
	late, _ := errors.AsType[*problem](err)
	inTime := late == nil || late.Status != http.StatusRequestTimeout
	if gone := c.r.Context().Err() != nil || errors.Is(err, errCallerGone); err != nil && gone && inTime {
		// There is nobody to answer, and nothing that an operator could mend.
		s.logRequest(c, started, nil)
		return
	}
	if err != nil {
		s.extendDeadline(c)
		p = s.problemOf(err)
		p.RequestID = c.id
		switch {
		case c.w.status != 0:
		case c.refuse != nil:
			c.refuse(c, p)
		default:
			writeProblem(c.w, p)
		}
	}
	s.logRequest(c, started, p)
}

// logRequest writes no path, only the route's pattern: a path may hold the ids
// of users and conversations.
func (s *Server) logRequest(c *call, started time.Time, p *problem) {
	pattern := "none"
	if c.route != nil {
		pattern = c.route.path
	}
	attrs := []any{
		"request_id", c.id, "method", method(c.r.Method), "route", pattern, "status", c.w.status,
		"bytes", c.w.bytes, "duration_ms", float64(s.now().Sub(started).Microseconds()) / 1000,
		"caller", c.caller.kind.String(),
	}
	if c.r.Context().Err() != nil {
		attrs = append(attrs, "caller_gone", true)
	}
	if !c.app.ID.IsZero() {
		attrs = append(attrs, "app", c.app.ID.String())
	}
	level := slog.LevelInfo
	if c.route != nil && c.route.who == anyone {
		level = slog.LevelDebug
	}
	if p != nil {
		attrs = append(attrs, "problem", p.Code)
		if p.Status >= http.StatusInternalServerError && p.cause != nil {
			// The libraries' errors hold no content (a test looks for canaries).
			level = slog.LevelError
			attrs = append(attrs, "err", p.cause)
		}
	}
	s.log.Log(c.r.Context(), level, "request", attrs...)
}

func method(m string) string {
	if slices.Contains([]string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}, m) {
		return m
	}
	return "other"
}

func requestID() string {
	var b [12]byte
	_, _ = rand.Read(b[:]) // never fails, says crypto/rand
	return hex.EncodeToString(b[:])
}

// parseQuery refuses what the route does not know: a misspelt filter that is
// ignored answers another question than was asked.
func (s *Server) parseQuery(r *http.Request, route *route) (url.Values, error) {
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, s.kinds.invalidRequest.problem("the query cannot be read")
	}
	for name, v := range values {
		if !slices.Contains(route.query, name) {
			p := s.kinds.invalidRequest.problem("the query has an unknown parameter")
			p.Errors = []inputError{{Detail: "known parameters: " + fmt.Sprint(route.query)}}
			return nil, p
		}
		if len(v) != 1 && name != "type" {
			return nil, s.invalidParameter(name, "it is given more than once")
		}
	}
	return values, nil
}

// responseWriter remembers what was answered, for the log and for errors that
// come after the answer has begun.
type responseWriter struct {
	http.ResponseWriter

	status int
	bytes  int64
}

func (w *responseWriter) WriteHeader(status int) {
	if w.status == 0 && (status >= 200 || status == http.StatusSwitchingProtocols) {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *responseWriter) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	n, err := w.ResponseWriter.Write(b)
	w.bytes += int64(n)
	return n, err
}

// Unwrap lets http.ResponseController reach the connection.
func (w *responseWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
