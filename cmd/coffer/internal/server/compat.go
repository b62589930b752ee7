package server

import (
	"crypto/hmac"
	"encoding/hex"
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/journal"
)

// linkHolder is who has a link to a history file. It stands for no credential.
const linkHolder callers = 1 << 7

const (
	linkLifetime  = 30 * time.Minute
	recallWindow  = 2 * time.Minute
	maxCompatBody = 64 << 10
	compatHour    = "2006010215"
)

// CompatOptions says how the compatibility listener answers.
type CompatOptions struct {
	// URL is where its callers reach it; links to files begin with it.
	URL string
	// Apps maps "ORG/APP", as they stand in paths, to apps of the region. Beside
	// it an app is reached as its account's id and its own: /ACCOUNT/APP-ID/….
	Apps map[string]journal.AppID
	// RecallWindow is how long after a message it can be recalled without force;
	// 2 minutes.
	RecallWindow time.Duration
}

// Compat answers some requests in the form of Agora Chat's REST interface, for
// scripts that were written for it: hourly history files, roaming messages and
// recalls (docs/operations/compat.md). Who may do what stands in its own table;
// credentials, limits and logs are the server's.
type Compat struct {
	s     *Server
	o     CompatOptions
	table []route
}

// Compat returns the compatibility interface of the server's region.
func (s *Server) Compat(o CompatOptions) *Compat {
	if o.RecallWindow <= 0 {
		o.RecallWindow = recallWindow
	}
	o.URL = strings.TrimSuffix(o.URL, "/")
	p := &Compat{s: s, o: o}
	p.table = p.routes()
	return p
}

// routes is the whole compatibility interface, and the only place that says who
// may do what. Paths are below /{org}/{app}.
func (p *Compat) routes() []route {
	const base = "/{org}/{app}"
	bodies := []string{typeJSON}
	return []route{
		{method: "GET", path: base + "/chatmessages/{hour}", who: appBackend, handle: p.historyLink},
		{
			method: "GET", path: base + "/chatmessages/{hour}/history.gz", who: appBackend | linkHolder,
			query: []string{"expires", "signature"}, handle: p.historyFile,
		},
		{method: "POST", path: base + "/messages/msg_recall", who: appBackend, bodies: bodies, limit: maxCompatBody, handle: p.recall},
		{method: "POST", path: base + "/messages/recall", who: appBackend, bodies: bodies, limit: maxCompatBody, handle: p.recall},
		{method: "GET", path: base + "/callbacks/storage/info", who: appBackend, handle: p.storageInfo},
		{method: "POST", path: base + "/callbacks/storage/retry", who: appBackend, bodies: bodies, limit: maxCompatBody, handle: p.storageRetry},
		{method: "POST", path: base + "/rest/message/roaming/chat/user/{user}", who: appBackend, bodies: bodies, limit: maxCompatBody, handle: p.roamChat},
		{method: "POST", path: base + "/rest/message/roaming/group/user/{user}", who: appBackend, bodies: bodies, limit: maxCompatBody, handle: p.roamGroup},
	}
}

// ServeHTTP answers one request and logs it.
func (p *Compat) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	started := p.s.now()
	c := &call{w: &responseWriter{ResponseWriter: w}, r: r, id: requestID()}
	c.refuse = func(c *call, problem *problem) { p.refuse(c, problem, started) }
	p.s.answer(c, p.serve) //nolint:contextcheck // see answer
}

func (p *Compat) serve(c *call) error {
	s := p.s
	var err error
	s.bodyDeadline(c)
	if c.route, c.vars, err = s.match(p.table, c.r); err != nil {
		return err
	}
	if c.query, err = s.parseQuery(c.r, c.route); err != nil {
		return err
	}
	if err := p.authorize(c); err != nil {
		return err
	}
	if c.route.bodies == nil && (c.r.ContentLength > 0 || len(c.r.TransferEncoding) > 0) {
		return s.invalidBody("", "this request takes no body")
	}
	return c.route.handle(s, c)
}

// authorize finds the app and who calls, and whether the table lets it.
func (p *Compat) authorize(c *call) error {
	s := p.s
	app, err := p.app(c)
	if err != nil {
		return err
	}
	if c.route.who&linkHolder != 0 && c.query.Has("signature") {
		if err := p.checkLink(c, app); err != nil {
			return err
		}
		c.caller = caller{kind: linkHolder, app: app}
		return s.enter(c, app)
	}
	if c.caller, err = s.identify(c.r, app); err != nil {
		return err
	}
	if c.caller.kind&c.route.who == 0 {
		return s.kinds.privilegeMissing.problem(denied(c.caller.kind, c.route.who))
	}
	if err := s.enter(c, app); err != nil {
		return err
	}
	if _, ok := p.o.Apps[c.vars["org"]+"/"+c.vars["app"]]; !ok && c.app.Account != c.vars["org"] {
		return s.kinds.notFound.problem("there is no such app")
	}
	return nil
}

// app finds the app of a path.
func (p *Compat) app(c *call) (journal.AppID, error) {
	if id, ok := p.o.Apps[c.vars["org"]+"/"+c.vars["app"]]; ok {
		return id, nil
	}
	id, err := journal.ParseAppID(c.vars["app"])
	if err != nil {
		return id, p.s.kinds.notFound.problem("there is no such app")
	}
	if id.Region() == p.s.region.Number {
		return id, nil
	}
	return id, p.misdirected(id)
}

// misdirected says where an app of another region is asked for in this form: the
// error's form has a place for it in its text only.
func (p *Compat) misdirected(id journal.AppID) error {
	err := p.s.misdirected(id)
	wrong, ok := errors.AsType[*problem](err)
	if place := p.s.elsewhere[id.Region()]; ok && place.Compat != "" {
		wrong.Detail += ", whose listener is " + place.Compat
	}
	return err
}

// link makes the address of a file that needs no credential, for half an hour:
// scripts fetch it without one.
func (p *Compat) link(c *call, hour time.Time) (string, error) {
	expires := strconv.FormatInt(p.s.now().Add(linkLifetime).Unix(), 10)
	sum, err := p.sign(c, c.app.ID, hour.Format(compatHour), expires)
	if err != nil {
		return "", err
	}
	base := p.o.URL
	if base == "" {
		base = "https://" + c.r.Host
	}
	return base + "/" + url.PathEscape(c.vars["org"]) + "/" + url.PathEscape(c.vars["app"]) + "/chatmessages/" + hour.Format(compatHour) +
		"/history.gz?expires=" + expires + "&signature=" + hex.EncodeToString(sum), nil
}

func (p *Compat) sign(c *call, app journal.AppID, hour, expires string) ([]byte, error) {
	sum, err := p.s.journal.MAC(c.r.Context(), app, "history file", []byte(hour+" "+expires))
	return sum[:], err
}

func (p *Compat) checkLink(c *call, app journal.AppID) error {
	refused := p.s.kinds.tokenInvalid.problem("the link is not valid, or not any more")
	given, err := hex.DecodeString(c.query.Get("signature"))
	if err != nil {
		return refused
	}
	expires, err := strconv.ParseInt(c.query.Get("expires"), 10, 64)
	if err != nil {
		return refused
	}
	sum, err := p.sign(c, app, c.vars["hour"], c.query.Get("expires"))
	if err != nil {
		return err
	}
	if !hmac.Equal(sum, given) || p.s.now().Unix() > expires {
		return refused
	}
	return nil
}

// compatAnswer is what every answer has.
type compatAnswer struct {
	Action          string `json:"action"`
	Application     string `json:"application"`
	ApplicationName string `json:"applicationName"`
	Organization    string `json:"organization"`
	Path            string `json:"path"`
	URI             string `json:"uri"`
	Data            any    `json:"data"`
	Timestamp       int64  `json:"timestamp"`
	Duration        int64  `json:"duration"`
}

func (p *Compat) write(c *call, data any, started time.Time) error {
	now := p.s.now()
	path := strings.TrimPrefix(c.r.URL.Path, "/"+c.vars["org"]+"/"+c.vars["app"])
	return p.s.writeJSON(c, http.StatusOK, compatAnswer{
		Action: strings.ToLower(c.r.Method), Application: c.app.ID.String(), ApplicationName: c.vars["app"], Organization: c.vars["org"],
		Path: path, URI: p.o.URL + c.r.URL.Path, Data: data, Timestamp: now.UnixMilli(), Duration: max(0, now.Sub(started).Milliseconds()),
	})
}

// compatRefusal is an error in the form of the other service.
type compatRefusal struct {
	Error       string `json:"error"`
	Exception   string `json:"exception"`
	Timestamp   int64  `json:"timestamp"`
	Duration    int64  `json:"duration"`
	Description string `json:"error_description"`
}

// refuse writes a problem. Its status is the problem's.
func (p *Compat) refuse(c *call, problem *problem, started time.Time) {
	now := p.s.now()
	name, exception := compatError(problem)
	body, err := json.Marshal(compatRefusal{
		Error: name, Exception: exception, Timestamp: now.UnixMilli(), Duration: max(0, now.Sub(started).Milliseconds()), Description: problem.Detail,
	})
	if err != nil {
		body = []byte(`{"error":"internal_error"}`)
	}
	h := c.w.Header()
	h.Set("Content-Type", typeJSON)
	h.Set("Content-Length", strconv.Itoa(len(body)))
	if problem.allow != "" {
		h.Set("Allow", problem.allow)
	}
	if problem.retryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(problem.retryAfter))
	}
	if problem.Status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", `Bearer realm="coffer"`)
	}
	c.w.WriteHeader(problem.Status)
	_, _ = c.w.Write(body)
}

// compatError names a problem as the other service does, where it has a name.
func compatError(p *problem) (name, exception string) {
	if p.Code == recallError {
		return recallError, "MessageRecallException"
	}
	switch p.Status {
	case http.StatusBadRequest, http.StatusRequestEntityTooLarge, http.StatusUnsupportedMediaType, http.StatusUnprocessableEntity:
		return "illegal_argument", "IllegalArgumentException"
	case http.StatusUnauthorized:
		return "unauthorized", "SecurityException"
	case http.StatusForbidden:
		return "forbidden_op", "ForbiddenOpException"
	case http.StatusNotFound, http.StatusGone, http.StatusMisdirectedRequest:
		return "service_resource_not_found", "ServiceResourceNotFoundException"
	case http.StatusMethodNotAllowed:
		return "method_not_allowed", "MethodNotAllowedException"
	case http.StatusTooManyRequests:
		return "reach_limit", "ReachLimitException"
	case http.StatusServiceUnavailable, http.StatusInsufficientStorage:
		return "service_unavailable", "ServiceUnavailableException"
	}
	return strings.ReplaceAll(p.Code, "-", "_"), "InternalException"
}
