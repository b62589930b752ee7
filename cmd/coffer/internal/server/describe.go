package server

import (
	"net/http"
	"reflect"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/cmd/coffer/internal/accounts"
	"github.com/cofferdb/coffer/cmd/coffer/internal/deletion"
	"github.com/cofferdb/coffer/cmd/coffer/internal/keys"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

// description is what the OpenAPI document says about a route beyond the route
// table.
type description struct {
	id, summary, text string

	body     reflect.Type
	query    map[string]parameter // where it differs from queryParameters
	headers  []parameter
	answers  []documented
	problems []kind // beyond those that every such route has
}

// documented is an answer of a route.
type documented struct {
	status  int
	about   string
	body    reflect.Type      // of application/json
	event   bool              // the body is an event
	streams map[string]string // other media types, and what is in them
}

type parameter struct {
	name   string // of a header
	about  string
	schema object
}

const (
	decimalPattern      = "^[0-9]+$"
	idPattern           = "^[A-Za-z0-9_@:+=~-]{1,128}$"
	userPattern         = "^[A-Za-z0-9_@:+=~-][A-Za-z0-9_@:+=~.-]{0,127}$"
	conversationPattern = "^[A-Za-z0-9_@:+=~,-][A-Za-z0-9_@:+=~,.-]{0,256}$"
	placePattern        = "^([0-9]{1,20}|c1_[A-Za-z0-9_-]{32})$"
)

func text(pattern string) object { return object{"type": "string", "pattern": pattern} }

func enum(values ...string) object { return object{"type": "string", "enum": values} }

func pathParameters() map[string]parameter {
	return map[string]parameter{
		"app":          {about: "the app", schema: text("^[0-9a-f]{32}$")},
		"event":        {about: "an event's id", schema: text(idPattern)},
		"conversation": {about: "a conversation's id; a direct one's is its two users' ids in order, with a comma", schema: text(conversationPattern)},
		"endpoint":     {about: "an endpoint's id", schema: text("^[0-9a-f]{32}$")},
		"replay":       {about: "a replay's id", schema: text("^[0-9a-f]{32}$")},
		"erasure":      {about: "an erasure's id", schema: text("^[0-9a-f]{32}-[1-9][0-9]*$")},
		"attachment":   {about: "an attachment's id", schema: text("^[A-Za-z0-9_@:+=~-]{1,117}$")},
		"export":       {about: "an export's id", schema: text("^[0-9a-f]{16}$")},
		"file":         {about: "the name of a file, from the manifest", schema: text("^(events-[0-9]{6}[.]ndjson|[0-9]{10}[.]gz)$")},
		"user":         {about: "a user's id; a user's token knows its own only", schema: text(idPattern)},
		"move":         {about: "the number of a plan change of the app; the last one can be seen", schema: text("^[0-9]{1,4}$")},
		"job":          {about: "a job's id", schema: object{"type": "string", "minLength": 1}},
		"account":      {about: "an account's id", schema: text("^[a-z0-9_-]{1,64}$")},
		"deletion":     {about: "a deletion's id: the app's, or account- and the account's", schema: text("^[a-z0-9_-]{1,80}$")},
		"region":       {about: "the region's own id", schema: text("^[a-z0-9]{1,8}$")},
	}
}

func queryParameters() map[string]parameter {
	moment := object{"type": "string", "format": "date-time"}
	return map[string]parameter{
		"from":         {about: "events of this time and later", schema: moment},
		"until":        {about: "events before this time", schema: moment},
		"after":        {about: "a cursor, the position of an event, or `latest`: only what comes", schema: text("^(latest|[0-9]{1,20}|c1_[A-Za-z0-9_-]{32})$")},
		"before":       {about: "older than this cursor or position", schema: text(placePattern)},
		"conversation": {about: "of this conversation", schema: text(conversationPattern)},
		"user":         {about: "sent by this user or directly to it", schema: text(userPattern)},
		"type":         {about: "of these types; repeated, or with commas", schema: object{"type": "array", "items": enum(eventTypes(true)...), "uniqueItems": true}},
		"limit":        {about: "how many", schema: object{"type": "integer", "minimum": 1, "maximum": maxPage}},
		"order":        {about: "the oldest first, or the newest", schema: object{"type": "string", "enum": []string{"asc", "desc"}, "default": "asc"}},
		"min_position": {about: "wait for the view to have come so far, 5 s at most: read what you wrote", schema: text("^[0-9]{1,20}$")},
		"follow":       {about: "stay at the end and send what comes; `true` unless told otherwise for server-sent events and WebSockets", schema: enum("true", "false")},
		"sender":       {about: "the user who sends it; a user's token always sends as its own", schema: text(idPattern)},
		"dry_run":      {about: "only tell what would be done", schema: enum("true", "false")},
		"account":      {about: "apps of this account", schema: object{"type": "string"}},
		"status":       {about: "of this status", schema: enum("delivered", "waiting", "held", "parked")},
		"endpoint":     {about: "as this endpoint would get it", schema: text("^[0-9a-f]{32}$")},
	}
}

// eventTypes lists the types of events that callers may send, or all.
func eventTypes(all bool) []string {
	var names []string
	for t := journal.Type(1); t < 255; t++ {
		if t.Known() && (all || !t.Reserved()) {
			names = append(names, t.String())
		}
	}
	return names
}

// eventSchema is a CloudEvent as it is sent back, or as it is taken.
func eventSchema(out bool) object {
	properties := object{
		"specversion":      object{"const": "1.0"},
		"id":               text(idPattern),
		"source":           text("^/apps/[0-9a-f]{32}$"),
		"type":             enum(eventTypes(out)...),
		"time":             object{"type": "string", "format": "date-time"},
		"conversation":     text(conversationPattern),
		"conversationtype": enum("direct", "group", "room"),
		"sender":           text(userPattern),
		"recipient":        text(userPattern),
		"target":           object{"type": "string", "pattern": idPattern, "description": "the event that is edited, recalled, delivered or read"},
		"datacontenttype":  object{"const": "application/json"},
		"data":             object{"description": "of messages: {\"bodies\": [{\"type\": \"txt\", \"msg\": \"…\"}, …], \"ext\": {…}}"},
	}
	required := []string{"type"}
	if out {
		properties["position"] = text(decimalPattern)
		required = []string{"specversion", "id", "source", "type", "time", "position"}
	}
	return object{"type": "object", "properties": properties, "required": required, "additionalProperties": false}
}

// The bodies and answers that no other code names.
type (
	eventsPage struct {
		Data            []jsontext.Value `json:"data"`
		Next            *string          `json:"next"              doc:"the cursor that goes on, null at the end"`
		ScannedThrough  string           `json:"scanned_through"   doc:"the position up to which the app's events were looked at"`
		OldestAvailable string           `json:"oldest_available"  doc:"the time before which the plan keeps nothing"`
	}
	appended struct {
		ID       string           `json:"id"`
		Position journal.Position `json:"position"`
		Time     string           `json:"time"`
	}
	appendedBatch struct {
		Data []outcome `json:"data"`
	}
	statusAnswer struct {
		Status string `json:"status"`
	}
	streamsAnswer struct {
		list[streamView]

		Drift  []driftView  `json:"drift"`
		Stored []storedView `json:"stored"`
	}
	keysStartBody struct {
		Kind   keys.Kind `json:"kind" required:""`
		App    string    `json:"app"`
		To     string    `json:"to"`
		DryRun bool      `json:"dry_run"`
	}
	keysRetireBody struct {
		Provider string `json:"provider" required:""`
		Key      string `json:"key" required:""`
		Before   string `json:"before"`
		DryRun   bool   `json:"dry_run"`
	}
	keysShredBody struct {
		App  string `json:"app" required:""`
		User string `json:"user"`
	}
	keysBackupBody struct {
		ID        string `json:"id" required:""`
		Until     string `json:"until" doc:"RFC 3339"`
		Destroyed bool   `json:"destroyed"`
	}
	keysRotated struct {
		kms.Identity

		Version string `json:"version"`
	}
	keysShredded struct {
		App  string `json:"app"`
		User string `json:"user,omitempty"`
		Done bool   `json:"done"`
	}
)

func ok[T any](status int, about string) documented {
	return documented{status: status, about: about, body: reflect.TypeFor[T]()}
}

// descriptions has an entry for every route; a test compares the two.
func (s *Server) descriptions() map[string]description {
	k := s.kinds
	view := []kind{k.viewBehind}
	keyProblems := []kind{k.keyNeeded, k.keysBusy, k.notSupported, k.exists}
	all := map[string]description{
		"GET /livez": {
			id: "live", summary: "The process answers, whatever else is wrong",
			answers: []documented{ok[statusAnswer](200, "it answers")},
		},
		"GET /readyz": {
			id: "ready", summary: "Whether the region can take and serve events, and if not, why",
			answers: []documented{ok[readiness](200, "it can"), ok[readiness](503, "it cannot; the reasons are named")},
		},
		"GET /openapi.json": {
			id: "document", summary: "This document",
			answers: []documented{{status: 200, about: "OpenAPI 3.1", body: reflect.TypeFor[map[string]any]()}},
		},
		"POST /v1/apps/{app}/events": {
			id: "append", summary: "Append an event, or a batch of them",
			text: "When the answer comes the events are on disk. A batch is not a transaction: each event has its own status. " +
				"After a 5xx or no answer an event may or may not have been stored; send it again with the same id.",
			body: reflect.TypeFor[journal.Event](),
			headers: []parameter{{
				name: "Idempotency-Key", schema: text("^[A-Za-z0-9_@:+=~-]{1,120}$"),
				about: "stands in for the id of an event without one; in a batch the id is the key, a colon and the index",
			}},
			query: map[string]parameter{"presend": {
				about: "`skip`: an app's backend stores what it has without the question that the app's `presend` sets", schema: object{"type": "string", "enum": []string{"skip"}},
			}},
			answers: []documented{
				{status: 200, about: "one event that was stored before, with its first position", body: reflect.TypeFor[appended]()},
				{status: 201, about: "stored: one event, or every event of a batch", body: reflect.TypeFor[anyOf[appended, appendedBatch]]()},
				ok[appendedBatch](207, "of a batch some were not stored; each says why"),
			},
			problems: []kind{k.conflict, k.userErased, k.erased, k.retentionExpired, k.tooOld, k.messageRefused, k.presendAway, k.storeFull, k.viewBehind},
		},
		"GET /v1/apps/{app}/events": {
			id: "replay", summary: "Replay: a page, the whole range as lines, or a live tail",
			text: "In the app's order. `Accept` chooses: `application/json` a page; `application/x-ndjson` the whole range, with a trailer line; " +
				"`text/event-stream` a live tail whose ids are cursors, resumed by `Last-Event-ID`. " +
				"`Upgrade: websocket` gives the same tail as text messages, one event each; the reason of the last frame is a code and the cursor that goes on.",
			headers: []parameter{{name: "Last-Event-ID", schema: text(placePattern), about: "of server-sent events: goes on after it, whatever `after` says"}},
			answers: []documented{
				{status: 101, about: "a WebSocket"},
				{
					status: 200, about: "the events", body: reflect.TypeFor[eventsPage](),
					streams: map[string]string{
						typeNDJSON:      "an event on each line, then {\"end\": {\"count\", \"omitted\", \"next\", \"checkpoint\"}}",
						typeEventStream: "messages with the event as data and its cursor as id; the last is named end",
					},
				},
			},
			problems: []kind{k.cursorMismatch, k.cursorExpired, k.notAcceptable, k.originForbidden, k.viewBehind, k.retentionExpired, k.erased},
		},
		"GET /v1/apps/{app}/events/{event}": {
			id: "event", summary: "One event by its id",
			answers:  []documented{{status: 200, about: "the event", event: true}},
			problems: []kind{k.erased, k.retentionExpired, k.viewBehind},
		},
		"GET /v1/apps/{app}/conversations/{conversation}/messages": {
			id: "messages", summary: "A conversation's messages, newest first, edits and recalls folded in",
			query:    map[string]parameter{"after": {about: "newer than this cursor or position", schema: text(placePattern)}},
			answers:  []documented{ok[messagesPage](200, "`next` leads to older messages, `previous` to newer ones")},
			problems: append(view, k.cursorMismatch, k.cursorExpired, k.erased, k.retentionExpired),
		},
		"GET /v1/apps/{app}/conversations": {
			id: "conversations", summary: "A user's conversations, newest first, with the newest message and what is unread",
			query: map[string]parameter{
				"user":  {about: "whose; a user's token stands for its user", schema: text(idPattern)},
				"limit": {about: "how many", schema: object{"type": "integer", "minimum": 1, "maximum": maxConversations}},
			},
			answers:  []documented{ok[conversationsPage](200, "`next` leads to older ones, as `before`")},
			problems: []kind{k.viewBehind, k.cursorMismatch, k.erased, k.retentionExpired},
		},
		"GET /v1/apps/{app}/users/{user}/inbox": {
			id: "inbox", summary: "What others sent, edited and recalled in a user's conversations since it acknowledged, oldest first",
			query: map[string]parameter{
				"after": {about: "a cursor or a position, instead of what was acknowledged", schema: text(placePattern)},
				"limit": {about: "how many", schema: object{"type": "integer", "minimum": 1, "maximum": maxInbox}},
			},
			answers:  []documented{ok[inboxPage](200, "acknowledge `scanned_through` when it has been dealt with")},
			problems: []kind{k.viewBehind, k.cursorMismatch, k.erased, k.retentionExpired},
		},
		"POST /v1/apps/{app}/users/{user}/inbox/ack": {
			id: "ackInbox", summary: "Acknowledge a user's inbox up to a position", body: reflect.TypeFor[ackBody](),
			text:     "It only moves forward. Sending it again changes nothing.",
			answers:  []documented{ok[ackAnswer](200, "what has been acknowledged")},
			problems: []kind{k.viewBehind, k.cursorMismatch, k.conflict, k.userErased, k.erased, k.retentionExpired, k.storeFull},
		},
		"PUT /v1/apps/{app}/attachments/{attachment}": {
			id: "putAttachment", summary: "Store an attachment",
			text: "The body is the content. It is sealed as it arrives and kept for 7 days unless the configuration says otherwise. " +
				"An attachment is never changed: the same content again is 200, another under the id is 409. " +
				"An event `attachment.stored` with the id `attachment:ID` tells of it.",
			query: map[string]parameter{
				"conversation":     {about: "the conversation it belongs to", schema: text(conversationPattern)},
				"conversationtype": {about: "of which kind that is; by itself `direct` for an id with a comma, `group` for others", schema: enum("direct", "group", "room")},
			},
			headers:  []parameter{{name: "Content-Digest", about: "RFC 9530: `sha-256=:BASE64:`, which the content must have", schema: object{"type": "string"}}},
			answers:  []documented{ok[attachmentView](201, "it is stored"), ok[attachmentView](200, "it was stored before")},
			problems: []kind{k.conflict, k.erased, k.userErased, k.retentionExpired, k.storeFull},
		},
		"GET /v1/apps/{app}/attachments/{attachment}": {
			id: "attachment", summary: "An attachment's content, or a range of it",
			text: "`Range` takes one range of bytes; several are answered in full. `Repr-Digest` (RFC 9530) has the SHA-256 of the whole.",
			answers: []documented{
				{status: http.StatusOK, about: "the content", streams: map[string]string{typeAny: "the content"}},
				{status: http.StatusPartialContent, about: "the range", streams: map[string]string{typeAny: "the range"}},
				{status: http.StatusNotModified, about: "the caller has it, says If-None-Match or If-Modified-Since"},
				{status: http.StatusPreconditionFailed, about: "it is not what If-Match or If-Unmodified-Since says"},
			},
			problems: []kind{k.erased, k.retentionExpired, k.rangeUnfit},
		},
		"DELETE /v1/apps/{app}/attachments/{attachment}": {
			id: "deleteAttachment", summary: "Delete an attachment",
			answers: []documented{{status: http.StatusNoContent, about: "it is gone"}},
		},
		"GET /v1/admin/apps":       {id: "apps", summary: "The region's apps", answers: []documented{ok[list[appView]](200, "all of them")}},
		"GET /v1/admin/apps/{app}": {id: "app", summary: "One app", answers: []documented{ok[appView](200, "the app")}, problems: []kind{k.wrongRegion}},
		"POST /v1/admin/apps": {
			id: "createApp", summary: "Make an app", body: reflect.TypeFor[createAppBody](),
			answers:  []documented{ok[appView](201, "the app with, this once, its certificates")},
			problems: []kind{k.exists, k.regionForbidden, k.storeFull},
		},
		"POST /v1/admin/apps/{app}/plan": {
			id: "changePlan", summary: "Change an app's plan, or tell what that would do", body: reflect.TypeFor[planBody](),
			text: "Reading and appending go on. A plan that keeps less hides at once what is too old for it, and destroys its keys; " +
				"a plan that keeps more keeps what has not expired. Positions and cursors stay.",
			answers: []documented{
				ok[planPreview](200, "with `dry_run`: what would stay and what would go; nothing is changed"),
				ok[moveView](202, "it is durable; `Location` says how it goes"),
			},
			problems: []kind{k.wrongRegion, k.planChanging, k.storeFull},
		},
		"GET /v1/admin/apps/{app}/moves/{move}": {
			id: "move", summary: "How a plan change goes", answers: []documented{ok[moveView](200, "the plan change")}, problems: []kind{k.wrongRegion},
		},
		"GET /v1/admin/accounts": {id: "accounts", summary: "The region's accounts", answers: []documented{ok[list[accounts.Account]](200, "all of them")}},
		"POST /v1/admin/accounts": {
			id: "createAccount", summary: "Make an account", body: reflect.TypeFor[createAccountBody](),
			answers: []documented{ok[accounts.Account](201, "the account")}, problems: []kind{k.exists, k.storeFull},
		},
		"PATCH /v1/admin/apps/{app}": {
			id: "changeApp", summary: "Disable or enable an app, or say what recalls do", body: reflect.TypeFor[changeAppBody](),
			text: "A disabled app takes and serves nothing: its callers get 403 app-disabled and its live tails end. Nothing of it is lost. " +
				"With `on_recall` `erase`, the sealed bytes of what is recalled from now on are also overwritten in the journal and the views.",
			answers: []documented{ok[appView](200, "the app")}, problems: []kind{k.wrongRegion},
		},
		"POST /v1/admin/apps/{app}/certificates": {
			id: "rotateCertificate", summary: "Give an app a new certificate",
			text:    "Tokens signed with the one before stay good until it is withdrawn. While it is not, there is no further rotation.",
			answers: []documented{ok[appView](201, "the app with, this once, its new certificate")}, problems: []kind{k.rotating, k.wrongRegion},
		},
		"DELETE /v1/admin/apps/{app}/certificates/previous": {
			id: "withdrawCertificate", summary: "Accept only the newest certificate of an app",
			answers: []documented{ok[appView](200, "the app")}, problems: []kind{k.wrongRegion},
		},
		"GET /v1/apps/{app}/users/{user}/profile": {
			id: "profile", summary: "A user's profile",
			text:    "Kept until it is deleted or nobody has used it for 180 days; reading it is a use.",
			answers: []documented{ok[profileView](200, "the profile")}, problems: []kind{k.erased},
		},
		"PUT /v1/apps/{app}/users/{user}/profile": {
			id: "storeProfile", summary: "Store a user's profile in place of the one before", body: reflect.TypeFor[profileObject](),
			text:    "A JSON object of 8,192 bytes at most, with any members. It is sealed under the user's own key: erasing the user destroys it.",
			answers: []documented{ok[profileView](200, "stored"), ok[profileView](201, "stored, and the first")}, problems: []kind{k.erased, k.storeFull},
		},
		"DELETE /v1/apps/{app}/users/{user}/profile": {
			id: "deleteProfile", summary: "Delete a user's profile", answers: []documented{{status: 204, about: "deleted"}},
		},
		"DELETE /v1/admin/apps/{app}": {
			id: "deleteApp", summary: "Delete an app with everything it owns, its keys first",
			text:     "From the answer on the app answers nobody, and there is no way back. The rest is a job, which goes on after a crash.",
			answers:  []documented{ok[wouldDelete](200, "a dry run: how much there is"), ok[deletion.Job](202, "it is durable; `Location` says how it goes")},
			problems: []kind{k.wrongRegion, k.deleted},
		},
		"DELETE /v1/admin/accounts/{account}": {
			id: "deleteAccount", summary: "Delete an account with its apps",
			text:    "As deleteApp for each of them; then the account's registration data is destroyed with its key. The ids are not given again.",
			answers: []documented{ok[wouldDelete](200, "a dry run: how much there is"), ok[deletion.Job](202, "it is durable; `Location` says how it goes")},
		},
		"GET /v1/admin/deletions":            {id: "deletions", summary: "The deletions of apps and accounts, the latest first", answers: []documented{ok[list[deletion.Job]](200, "all of them")}},
		"GET /v1/admin/deletions/{deletion}": {id: "deletion", summary: "One deletion", answers: []documented{ok[deletion.Job](200, "the deletion")}, problems: []kind{k.wrongRegion}},
		"GET /v1/admin/accounts/{account}":   {id: "account", summary: "One account", answers: []documented{ok[accounts.Account](200, "the account")}},
		"PATCH /v1/admin/accounts/{account}": {
			id: "changeAccount", summary: "Change an account's registration data, disable or enable it", body: reflect.TypeFor[accounts.Change](),
			text:    "While it is disabled all its apps answer 403 app-disabled.",
			answers: []documented{ok[accounts.Account](200, "the account")}, problems: []kind{k.deleted},
		},
		"PUT /v1/admin/accounts/{account}/regions/{region}": {
			id: "grantRegion", summary: "Let an account of Mainland China use this region beside cn",
			answers: []documented{ok[accounts.Account](200, "the account")}, problems: []kind{k.deleted},
		},
		"DELETE /v1/admin/accounts/{account}/regions/{region}": {
			id: "revokeRegion", summary: "Let an account of Mainland China have no further app in this region",
			answers: []documented{ok[accounts.Account](200, "the account")}, problems: []kind{k.deleted},
		},
		"GET /v1/admin/streams": {
			id: "streams", summary: "The streams as they are, beside what the plan table says",
			answers: []documented{ok[streamsAnswer](200, "the streams, and settings that differ from what they should be")},
		},
		"GET /v1/admin/keys/status": {id: "keysStatus", summary: "How the region's keys stand", answers: []documented{ok[keys.Status](200, "the status")}},
		"GET /v1/admin/keys/inventory": {
			id: "keysInventory", summary: "What wraps every app's keys",
			query:   map[string]parameter{"app": {about: "only this app, with the epochs of its keys", schema: text("^[0-9A-Za-z_-]{1,64}$")}},
			answers: []documented{{status: http.StatusOK, about: "an app on each line, then {\"end\": {\"count\"}}", streams: map[string]string{typeNDJSON: "JSON lines"}}}, problems: []kind{k.wrongRegion},
		},
		"GET /v1/admin/keys/doctor": {id: "keysDoctor", summary: "What is wrong with the keys", answers: []documented{ok[list[keys.Finding]](200, "the findings")}},
		"POST /v1/admin/keys/rotate": {
			id: "keysRotate", summary: "Make a new version of the region's key encryption key",
			answers: []documented{ok[keysRotated](200, "the version that new wraps use")}, problems: keyProblems,
		},
		"GET /v1/admin/keys/jobs":       {id: "keysJobs", summary: "The key jobs", answers: []documented{ok[list[keys.Job]](200, "all of them")}},
		"GET /v1/admin/keys/jobs/{job}": {id: "keysJob", summary: "One key job", answers: []documented{ok[keys.Job](200, "the job")}},
		"POST /v1/admin/keys/jobs": {
			id: "keysStart", summary: "Begin a key job: rewrap, migrate, replace, verify", body: reflect.TypeFor[keysStartBody](),
			answers: []documented{ok[keys.Job](202, "it is durable; `Location` says how it goes")}, problems: append(keyProblems, k.wrongRegion),
		},
		"POST /v1/admin/keys/retire": {
			id: "keysRetire", summary: "Retire a key encryption key, or its old versions", body: reflect.TypeFor[keysRetireBody](),
			answers: []documented{ok[keys.Retirement](200, "what was found and done")}, problems: keyProblems,
		},
		"POST /v1/admin/keys/shred": {
			id: "keysShred", summary: "Destroy the keys of an app, or of one of its users", body: reflect.TypeFor[keysShredBody](),
			answers: []documented{ok[keysShredded](200, "destroyed")}, problems: append(keyProblems, k.wrongRegion, k.erased),
		},
		"GET /v1/admin/keys/backups": {id: "keysBackups", summary: "Copies of the keyring that are kept elsewhere", answers: []documented{ok[list[keys.Backup]](200, "all of them")}},
		"POST /v1/admin/keys/backups": {
			id: "keysBackup", summary: "Register a copy of the keyring, or take one off the list", body: reflect.TypeFor[keysBackupBody](),
			answers:  []documented{ok[keys.Backup](200, "taken off"), ok[keys.Backup](201, "registered")},
			problems: keyProblems,
		},
		"GET /v1/admin/audit": {
			id: "audit", summary: "The audit log",
			query:   map[string]parameter{"from": {about: "the number of the first record", schema: text(decimalPattern)}},
			answers: []documented{{status: http.StatusOK, about: "a record on each line, as it is stored", streams: map[string]string{typeNDJSON: "JSON lines"}}},
		},
		"GET /v1/admin/audit/head": {id: "auditHead", summary: "The newest record of the audit log and its hash", answers: []documented{ok[journal.AuditHead](200, "the head")}},
	}
	s.describeExports(all)
	s.describeCallbacks(all)
	s.describeErasures(all)
	s.describeResidency(all)
	s.describeMetrics(all)
	return all
}

// anyOf stands for an answer of one of two types.
type anyOf[A, B any] struct{}

func (anyOf[A, B]) types() []reflect.Type {
	return []reflect.Type{reflect.TypeFor[A](), reflect.TypeFor[B]()}
}
