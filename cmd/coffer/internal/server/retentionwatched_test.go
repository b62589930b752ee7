package server_test

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/server"
)

// watched says, for each route that gives an app or a user something, what
// TestRetentionTable holds against its end there; "-" begins a reason why nothing that
// ends can be read by it.
func watched() map[string]string {
	return map[string]string{
		"GET /v1/apps/{app}/events":                                "messages",
		"GET /v1/apps/{app}/events/{event}":                        "messages",
		"GET /v1/apps/{app}/conversations/{conversation}/messages": "messages",
		"GET /v1/apps/{app}/conversations":                         "messages",
		"GET /v1/apps/{app}/users/{user}/inbox":                    "messages",
		"GET /v1/apps/{app}/callbacks":                             "messages",
		"GET /v1/apps/{app}/exports":                               "exports",
		"GET /v1/apps/{app}/exports/{export}":                      "exports",
		"GET /v1/apps/{app}/exports/{export}/manifest":             "exports",
		"GET /v1/apps/{app}/exports/{export}/files/{file}":         "messages, exports",
		"GET /v1/apps/{app}/endpoints/{endpoint}/deliveries":       "callbacks",
		"GET /v1/apps/{app}/attachments/{attachment}":              "attachments",
		"GET /v1/apps/{app}/users/{user}/profile":                  "profiles",
		"GET /v1/apps/{app}/metrics":                               "monitoring",
		"GET /v1/admin/accounts":                                   "accounts",
		"GET /v1/admin/accounts/{account}":                         "accounts",
		"GET /v1/admin/audit":                                      "audit",

		"GET /v1/apps/{app}/presend":              "- a setting, kept until it is deleted",
		"GET /v1/apps/{app}/endpoints":            "- settings, kept until they are deleted",
		"GET /v1/apps/{app}/endpoints/{endpoint}": "- settings, kept until they are deleted",
		"GET /v1/apps/{app}/replays/{replay}":     "- positions and counts; what it sends is watched at the endpoint",
		"GET /v1/apps/{app}/erasures/{erasure}":   "- receipts are kept, so that restored backups stay erased",
		"GET /v1/region":                          "- says where data lies, and has none",
		"GET /v1/admin/apps":                      "- the registry, kept until it is deleted",
		"GET /v1/admin/apps/{app}":                "- the registry, kept until it is deleted",
		"GET /v1/admin/apps/{app}/moves/{move}":   "- a job of the registry, without content",
		"GET /v1/admin/deletions":                 "- jobs of the registry, without content",
		"GET /v1/admin/deletions/{deletion}":      "- a job of the registry, without content",
		"GET /v1/admin/erasures":                  "- receipts are kept, so that restored backups stay erased",
		"GET /v1/admin/streams":                   "- counts and sizes",
		"GET /v1/admin/audit/head":                "- a number and a hash",
		"GET /v1/admin/keys/status":               "- the keyring; epochs are watched there",
		"GET /v1/admin/keys/inventory":            "- the keyring; epochs are watched there",
		"GET /v1/admin/keys/doctor":               "- the keyring",
		"GET /v1/admin/keys/jobs":                 "- the keyring",
		"GET /v1/admin/keys/jobs/{job}":           "- the keyring",
		"GET /v1/admin/keys/backups":              "- the keyring",
		"GET /metrics":                            "- sums of the region",

		"GET /{org}/{app}/chatmessages/{hour}":                     "- the address of an hour's file",
		"GET /{org}/{app}/chatmessages/{hour}/history.gz":          "messages",
		"POST /{org}/{app}/messages/msg_recall":                    "messages",
		"POST /{org}/{app}/messages/recall":                        "messages",
		"GET /{org}/{app}/callbacks/storage/info":                  "callbacks",
		"POST /{org}/{app}/callbacks/storage/retry":                "callbacks",
		"POST /{org}/{app}/rest/message/roaming/chat/user/{user}":  "messages",
		"POST /{org}/{app}/rest/message/roaming/group/user/{user}": "messages",
	}
}

// TestEveryRouteIsWatched: a route that reads cannot be added without saying how what
// ends is refused there.
func TestEveryRouteIsWatched(t *testing.T) {
	want := watched()
	for _, row := range server.Table() {
		name := row.Method + " " + row.Path
		if row.Method == "GET" && !row.Anyone && want[name] == "" {
			t.Errorf("%s is not watched by TestRetentionTable", name)
		}
		delete(want, name)
	}
	for _, row := range server.CompatTable() {
		name := row.Method + " " + row.Path
		if want[name] == "" {
			t.Errorf("%s is not watched by TestRetentionTable", name)
		}
		delete(want, name)
	}
	for name := range want {
		t.Errorf("there is no route %s", name)
	}
}

// compatible asks the compatibility listener.
func (r *retentionSite) compatible(a *planApp, method, path, body string) answer {
	r.t.Helper()
	host, _ := r.compat()
	return r.do(request{url: host, method: method, path: "/dev/" + a.id + path, body: body, token: r.tokenOf(a.id, a.certificate)})
}

// failedCallbacks reports whether the compatibility listener tells of any.
func (r *retentionSite) failedCallbacks(a *planApp) bool {
	r.t.Helper()
	got := r.compatible(a, "GET", "/callbacks/storage/info", "")
	list, ok := got.json(r.t)["data"].([]any)
	if !ok {
		r.t.Fatalf("callbacks/storage/info: %d %s", got.status, got.body)
	}
	return len(list) > 0
}

// hourFile is the file of the hour in which everything began.
func (r *retentionSite) hourFile(a *planApp) string {
	r.t.Helper()
	got := r.compatible(a, "GET", "/chatmessages/"+r.start.UTC().Format("2006010215")+"/history.gz", "")
	unzip, err := gzip.NewReader(bytes.NewReader(got.body))
	if err != nil {
		r.t.Fatalf("the hour's file: %d %s", got.status, got.body)
	}
	text, err := io.ReadAll(unzip)
	if err != nil {
		r.t.Fatal(err)
	}
	return string(text)
}

// auditEnds leads the first record of the audit log to its end.
func (r *retentionSite) auditEnds() {
	r.t.Helper()
	log := func(query string) string {
		r.t.Helper()
		return string(r.do(request{path: "/v1/admin/audit" + query, token: r.operator}).body)
	}
	first, _, _ := strings.Cut(log(""), "\n")
	var record struct {
		Time time.Time `json:"time"`
	}
	if err := json.Unmarshal([]byte(first), &record); err != nil {
		r.t.Fatalf("%q: %v", first, err)
	}
	end := record.Time.Add(400 * shortDay)
	r.freeze(end.Add(-time.Millisecond))
	for _, query := range []string{"", "?from=1"} {
		if !strings.HasPrefix(log(query), first+"\n") {
			r.t.Errorf("the audit log%s at the end of its first record: %.200q", query, log(query))
		}
	}
	r.freeze(end)
	for _, query := range []string{"", "?from=1"} {
		if got := log(query); strings.Contains(got, first) || got == "" {
			r.t.Errorf("the audit log%s after the end of its first record: %.200q", query, got)
		}
	}
}
