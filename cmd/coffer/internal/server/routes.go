package server

import (
	"net/http"
	"slices"
	"strings"

	"github.com/cofferdb/coffer/cmd/coffer/internal/profiles"
)

// callers is a set of kinds of callers.
type callers uint8

const (
	anyone     callers = 1 << iota // without a credential
	appBackend                     // AccessToken2 with the app's privilege
	endUser                        // AccessToken2 with a user's privilege
	operator                       // the operators' bearer token
)

// route is a row of the table. What is not in it cannot be called.
type route struct {
	method string
	path   string // segments in braces are variables
	who    callers
	bodies []string // the media types it takes; none: a body is refused
	limit  int64    // bytes of the body
	query  []string // the parameters it knows; others are refused
	handle func(*Server, *call) error
}

// routes is the whole interface, and the only place that says who may do what.
//
// An end user reads the conversations that it takes part in and its own inbox,
// and sends as itself: what else is there answers it as what is not. Which
// conversations those are is not in the table; takespart.go decides it.
//
// An operator reaches no route that opens an event.
func (s *Server) routes() []route {
	table := []route{
		{method: "GET", path: "/livez", who: anyone, handle: (*Server).livez},
		{method: "GET", path: "/readyz", who: anyone, handle: (*Server).readyz},
		{method: "GET", path: "/openapi.json", who: anyone, handle: (*Server).openapi},

		{
			method: "POST", path: "/v1/apps/{app}/events", who: appBackend | endUser,
			bodies: []string{typeJSON, typeEvent, typeEventBatch, typeNDJSON, typeNDJSON2}, query: []string{"presend"},
			limit: s.limits.RequestBytes, handle: (*Server).appendEvents,
		},
		{
			method: "GET", path: "/v1/apps/{app}/events", who: appBackend | endUser,
			query: []string{
				"from", "until", "after", "conversation", "user", "type", "limit", "order", "min_position", "follow",
			},
			handle: (*Server).replayEvents,
		},
		{method: "GET", path: "/v1/apps/{app}/events/{event}", who: appBackend | endUser, query: []string{"min_position"}, handle: (*Server).oneEvent},
		{
			method: "GET", path: "/v1/apps/{app}/conversations/{conversation}/messages", who: appBackend | endUser,
			query: []string{"before", "after", "limit", "min_position"}, handle: (*Server).messages,
		},
		{
			method: "GET", path: "/v1/apps/{app}/conversations", who: appBackend | endUser,
			query: []string{"user", "before", "limit", "min_position"}, handle: (*Server).conversations,
		},
		{
			method: "GET", path: "/v1/apps/{app}/users/{user}/inbox", who: appBackend | endUser,
			query: []string{"after", "limit", "min_position"}, handle: (*Server).inbox,
		},
		{
			method: "POST", path: "/v1/apps/{app}/users/{user}/inbox/ack", who: appBackend | endUser,
			bodies: []string{typeJSON}, limit: 64 << 10, handle: (*Server).ackInbox,
		},

		{method: "GET", path: "/v1/apps/{app}/presend", who: appBackend, handle: (*Server).showPresend},
		{method: "PUT", path: "/v1/apps/{app}/presend", who: appBackend, bodies: []string{typeJSON}, limit: 4 << 10, handle: (*Server).setPresend},
		{method: "DELETE", path: "/v1/apps/{app}/presend", who: appBackend, handle: (*Server).removePresend},
		{method: "GET", path: "/v1/apps/{app}/endpoints", who: appBackend, handle: (*Server).listEndpoints},
		{method: "POST", path: "/v1/apps/{app}/endpoints", who: appBackend, bodies: []string{typeJSON}, limit: 64 << 10, handle: (*Server).createEndpoint},
		{method: "GET", path: "/v1/apps/{app}/endpoints/{endpoint}", who: appBackend, handle: (*Server).showEndpoint},
		{method: "PATCH", path: "/v1/apps/{app}/endpoints/{endpoint}", who: appBackend, bodies: []string{typeJSON}, limit: 64 << 10, handle: (*Server).changeEndpoint},
		{method: "DELETE", path: "/v1/apps/{app}/endpoints/{endpoint}", who: appBackend, handle: (*Server).deleteEndpoint},
		{method: "POST", path: "/v1/apps/{app}/endpoints/{endpoint}/secret-rotations", who: appBackend, bodies: []string{typeJSON}, limit: 4 << 10, handle: (*Server).rotateSecret},
		{method: "POST", path: "/v1/apps/{app}/endpoints/{endpoint}/test", who: appBackend, handle: (*Server).testEndpoint},
		{method: "GET", path: "/v1/apps/{app}/endpoints/{endpoint}/deliveries", who: appBackend, query: []string{"status", "before", "limit"}, handle: (*Server).listDeliveries},
		{method: "POST", path: "/v1/apps/{app}/endpoints/{endpoint}/replays", who: appBackend, bodies: []string{typeJSON}, limit: 64 << 10, handle: (*Server).startReplay},
		{method: "GET", path: "/v1/apps/{app}/callbacks", who: appBackend, query: []string{"endpoint", "after", "limit"}, handle: (*Server).pollCallbacks},
		{method: "GET", path: "/v1/apps/{app}/replays/{replay}", who: appBackend, handle: (*Server).showReplay},
		{method: "DELETE", path: "/v1/apps/{app}/replays/{replay}", who: appBackend, handle: (*Server).cancelReplay},
		{
			method: "PUT", path: "/v1/apps/{app}/attachments/{attachment}", who: appBackend | endUser,
			bodies: []string{typeAny}, limit: s.limits.AttachmentBytes, query: []string{"conversation", "conversationtype", "sender"}, handle: (*Server).putAttachment,
		},
		{method: "GET", path: "/v1/apps/{app}/attachments/{attachment}", who: appBackend | endUser, handle: (*Server).getAttachment},
		{method: "DELETE", path: "/v1/apps/{app}/attachments/{attachment}", who: appBackend, handle: (*Server).deleteAttachment},

		{method: "GET", path: "/v1/admin/apps", who: operator, query: []string{"account"}, handle: (*Server).listApps},
		{method: "POST", path: "/v1/admin/apps", who: operator, bodies: []string{typeJSON}, limit: 64 << 10, handle: (*Server).createApp},
		{method: "GET", path: "/v1/admin/apps/{app}", who: operator, handle: (*Server).showApp},
		{method: "POST", path: "/v1/admin/apps/{app}/plan", who: operator, bodies: []string{typeJSON}, limit: 64 << 10, handle: (*Server).changePlan},
		{method: "GET", path: "/v1/admin/apps/{app}/moves/{move}", who: operator, handle: (*Server).showMove},
		{method: "GET", path: "/v1/admin/accounts", who: operator, handle: (*Server).listAccounts},
		{method: "POST", path: "/v1/admin/accounts", who: operator, bodies: []string{typeJSON}, limit: 64 << 10, handle: (*Server).createAccount},
		{method: "PATCH", path: "/v1/admin/apps/{app}", who: operator, bodies: []string{typeJSON}, limit: 64 << 10, handle: (*Server).changeApp},
		{method: "POST", path: "/v1/admin/apps/{app}/certificates", who: operator, handle: (*Server).rotateCertificate},
		{method: "DELETE", path: "/v1/admin/apps/{app}/certificates/previous", who: operator, handle: (*Server).withdrawCertificate},
		{method: "GET", path: "/v1/apps/{app}/users/{user}/profile", who: appBackend | endUser, handle: (*Server).showProfile},
		{method: "PUT", path: "/v1/apps/{app}/users/{user}/profile", who: appBackend | endUser, bodies: []string{typeJSON}, limit: profiles.MaxBytes, handle: (*Server).storeProfile},
		{method: "DELETE", path: "/v1/apps/{app}/users/{user}/profile", who: appBackend | endUser, handle: (*Server).deleteProfile},
		{method: "DELETE", path: "/v1/admin/apps/{app}", who: operator, query: []string{"dry_run"}, handle: (*Server).deleteApp},
		{method: "DELETE", path: "/v1/admin/accounts/{account}", who: operator, query: []string{"dry_run"}, handle: (*Server).deleteAccount},
		{method: "GET", path: "/v1/admin/deletions", who: operator, handle: (*Server).listDeletions},
		{method: "GET", path: "/v1/admin/deletions/{deletion}", who: operator, handle: (*Server).showDeletion},
		{method: "GET", path: "/v1/admin/accounts/{account}", who: operator, handle: (*Server).showAccount},
		{method: "PATCH", path: "/v1/admin/accounts/{account}", who: operator, bodies: []string{typeJSON}, limit: 64 << 10, handle: (*Server).changeAccount},
		{method: "PUT", path: "/v1/admin/accounts/{account}/regions/{region}", who: operator, handle: (*Server).grantRegion},
		{method: "DELETE", path: "/v1/admin/accounts/{account}/regions/{region}", who: operator, handle: (*Server).revokeRegion},
		{method: "GET", path: "/v1/admin/streams", who: operator, handle: (*Server).listStreams},

		{method: "GET", path: "/v1/admin/keys/status", who: operator, handle: (*Server).keysStatus},
		{method: "GET", path: "/v1/admin/keys/inventory", who: operator, query: []string{"app"}, handle: (*Server).keysInventory},
		{method: "GET", path: "/v1/admin/keys/doctor", who: operator, handle: (*Server).keysDoctor},
		{method: "POST", path: "/v1/admin/keys/rotate", who: operator, handle: (*Server).keysRotate},
		{method: "GET", path: "/v1/admin/keys/jobs", who: operator, handle: (*Server).keysJobs},
		{method: "POST", path: "/v1/admin/keys/jobs", who: operator, bodies: []string{typeJSON}, limit: 64 << 10, handle: (*Server).keysStart},
		{method: "GET", path: "/v1/admin/keys/jobs/{job}", who: operator, handle: (*Server).keysJob},
		{method: "POST", path: "/v1/admin/keys/retire", who: operator, bodies: []string{typeJSON}, limit: 64 << 10, handle: (*Server).keysRetire},
		{method: "POST", path: "/v1/admin/keys/shred", who: operator, bodies: []string{typeJSON}, limit: 64 << 10, handle: (*Server).keysShred},
		{method: "GET", path: "/v1/admin/keys/backups", who: operator, handle: (*Server).keysBackups},
		{method: "POST", path: "/v1/admin/keys/backups", who: operator, bodies: []string{typeJSON}, limit: 64 << 10, handle: (*Server).keysBackup},
		{method: "GET", path: "/v1/admin/audit", who: operator, query: []string{"from"}, handle: (*Server).auditLog},
		{method: "GET", path: "/v1/admin/audit/head", who: operator, handle: (*Server).auditHead},
	}
	return slices.Concat(table, s.exportRoutes(), s.erasureRoutes(), s.residencyRoutes(), s.metricsRoutes())
}

// ofApp reports whether the path is below one app, whose token it then needs.
func (r route) ofApp() bool { return strings.HasPrefix(r.path, "/v1/apps/{app}/") }

// match finds the route of a request, or the problem: no such path, or none for
// the method. Paths are compared as they were sent: nothing is cleaned,
// redirected or joined.
func (s *Server) match(table []route, r *http.Request) (*route, map[string]string, error) {
	segments := strings.Split(r.URL.Path, "/")
	var allow []string
	for i := range table {
		candidate := &table[i]
		vars, ok := candidate.fits(segments)
		if !ok {
			continue
		}
		if candidate.method == r.Method || (candidate.method == http.MethodGet && r.Method == http.MethodHead) {
			return candidate, vars, nil
		}
		allow = append(allow, candidate.method)
	}
	if allow != nil {
		p := s.kinds.methodNotAllowed.problem("the path takes " + strings.Join(allow, ", "))
		p.allow = strings.Join(allow, ", ")
		return nil, nil, p
	}
	return nil, nil, s.kinds.notFound.problem("there is no such path")
}

func (r route) fits(segments []string) (map[string]string, bool) {
	pattern := strings.Split(r.path, "/")
	if len(pattern) != len(segments) {
		return nil, false
	}
	vars := make(map[string]string, 2)
	for i, p := range pattern {
		switch {
		case strings.HasPrefix(p, "{"):
			vars[strings.Trim(p, "{}")] = segments[i]
		case p != segments[i]:
			return nil, false
		}
	}
	return vars, true
}
