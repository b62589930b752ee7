package server_test

import (
	"bytes"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/exports"
	"github.com/cofferdb/coffer/cmd/coffer/internal/node"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections"
)

// shortDay is a day on which the sweeps run four times a second and the keys of
// expired epochs are destroyed once a second, while NATS lets go of nothing within
// the time of a test: reading, sweeping and destroying are seen by themselves.
const shortDay = 24 * time.Second

// retentionSite is a set-up in which something of every kind is kept, in apps of
// every plan.
type retentionSite struct {
	*site

	hooks  *hooks
	parts  node.Parts
	start  time.Time // of every event, by the server's clock
	stored time.Time // when the last of it had arrived
	apps   map[string]*planApp

	firstFile string // the name of the first file of an export
}

// planApp is an app of a plan.
type planApp struct {
	id, certificate, endpoint string
	export                    string           // of a message that is there, see exportedBefore
	epochs                    []kms.EpochState // that seal what it keeps
}

func newRetentionSite(t *testing.T, day time.Duration) *retentionSite {
	t.Helper()
	h := newHooks(t)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: h.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	r := &retentionSite{hooks: h, apps: make(map[string]*planApp)}
	r.site = newSiteWith(t, node.DevOptions{Day: day, Compat: true, Callbacks: config.Callbacks{Allow: []string{"127.0.0.0/8"}, CAFile: ca}})
	t.Cleanup(h.Close) // before the site looks for what it has left behind
	var ok bool
	if r.parts, ok = r.process.Parts("eu"); !ok {
		t.Fatal("no region eu")
	}
	return r
}

// as is a request of an app's backend, which must give the status.
func (r *retentionSite) as(a *planApp, method, path, body string, status int) answer {
	r.t.Helper()
	got := r.do(request{method: method, path: "/v1/apps/" + a.id + path, body: body, token: r.tokenOf(a.id, a.certificate)})
	if status != 0 && got.status != status {
		r.t.Fatalf("%s %s: %d %s, want %d", method, path, got.status, got.body, status)
	}
	return got
}

// app makes an app with a message, a delivery of it, and an attachment.
func (r *retentionSite) app(plan string) *planApp {
	r.t.Helper()
	made := r.admin("POST", "apps", `{"name":"x","account":"dev","plan":"`+plan+`"}`, 201)
	a := &planApp{id: made["id"].(string), certificate: made["certificates"].([]any)[0].(string)}
	r.apps[plan] = a
	r.hooks.status.Store(http.StatusServiceUnavailable)
	a.endpoint = r.as(a, "POST", "/endpoints", `{"url":"`+r.hooks.URL+`/hook"}`, 201).json(r.t)["id"].(string)
	event := fmt.Sprintf(`{"id":"m1","type":"message.sent","sender":"ann","recipient":"ben","time":%q,"data":{"bodies":[{"type":"txt","msg":"canary"}]}}`,
		r.now().UTC().Format("2006-01-02T15:04:05.000Z07:00"))
	position := r.as(a, "POST", "/events", event, 201).json(r.t)["position"].(string)
	upload := r.do(request{
		method: "PUT", path: "/v1/apps/" + a.id + "/attachments/pic", token: r.tokenOf(a.id, a.certificate),
		reader: bytes.NewReader([]byte("canary")), header: map[string]string{"Content-Type": "image/png"},
	})
	if upload.status != 201 {
		r.t.Fatalf("attachment: %d %s", upload.status, upload.body)
	}
	r.as(a, "GET", "/events?min_position="+position, "", 200)
	// A failure leaves more than a success: what was answered is kept, sealed.
	r.until("an attempt on the plan "+plan, func() bool {
		if r.stood.IsZero() {
			return len(r.callbackStreams()) > 0 // the time in which it is shown may be over soon
		}
		return strings.Contains(string(r.as(a, "GET", "/endpoints/"+a.endpoint+"/deliveries", "", 200).body), `"http_status":503`)
	})
	a.epochs = r.epochs(a.id)
	return a
}

func (r *retentionSite) epochs(app string) []kms.EpochState {
	r.t.Helper()
	list, err := r.parts.Journal.Keyring().Epochs(r.t.Context(), app)
	if err != nil {
		r.t.Fatal(err)
	}
	return list
}

// callbackStreams are those that ever had something.
func (r *retentionSite) callbackStreams() (names []string) {
	r.t.Helper()
	for _, stream := range r.parts.Journal.Callbacks().Streams() {
		if r.lastSequence(stream.Name) > 0 {
			names = append(names, stream.Name)
		}
	}
	return names
}

// until waits for something that takes as long as it takes.
func (r *retentionSite) until(what string, done func() bool) {
	r.t.Helper()
	for end := time.Now().Add(time.Minute); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatalf("never: %s\n%s", what, r.log)
		}
	}
}

// keys waits at the end of an app's epochs of a class until their keys have been
// destroyed.
func (r *retentionSite) keys(app string, epochs []kms.EpochState, class string) {
	r.t.Helper()
	var mine []kms.EpochState
	var last time.Time
	for _, e := range epochs {
		if strings.HasPrefix(e.Class, class) {
			mine = append(mine, e)
			if e.Expires.After(last) {
				last = e.Expires
			}
		}
	}
	if len(mine) == 0 {
		r.t.Fatalf("app %s: no epoch of %s in %+v", app, class, epochs)
	}
	alive := func() (n int) {
		for _, e := range r.epochs(app) {
			if e.Destroyed.IsZero() && slices.ContainsFunc(mine, func(m kms.EpochState) bool { return m.ID == e.ID }) {
				n++
			}
		}
		return n
	}
	r.freeze(last)
	r.until("the keys of "+class+" are destroyed", func() bool { return alive() == 0 })
	for _, e := range mine {
		r.until("a copy cannot be opened", func() bool {
			_, err := r.parts.Journal.Keyring().Opener(r.t.Context(), app, e.ID, kms.Tag{})
			return errors.Is(err, kms.ErrEpochDestroyed)
		})
	}
}

// viewKeys counts the keys of an app in the view store, of events or of deliveries.
func (r *retentionSite) viewKeys(app string, tables string) (n int) {
	r.t.Helper()
	id, err := journal.ParseAppID(app)
	if err != nil {
		r.t.Fatal(err)
	}
	err = r.parts.Views.View(func(v projections.Reader) error {
		for _, table := range []byte(tables) {
			prefix := append([]byte{table}, id[:]...)
			c := v.Iterate(prefix, append(slices.Clone(prefix), 0xff, 0xff, 0xff), false)
			for c.Next() {
				n++
			}
			if err := c.Close(); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return n
}

// The tables of the views that hold something of each event, and of each delivery:
// docs/format/views.md and docs/format/callbacks.md. What is left after them is how
// far a reader, an endpoint or a trimming has come.
const (
	eventTables    = "ECDIUGTabcdef"
	deliveryTables = "jkl"
)

// routes are the ways to a message: each answer either has it or has nothing of it.
func (r *retentionSite) routes(a *planApp) map[string]answer {
	r.t.Helper()
	app := r.tokenOf(a.id, a.certificate)
	ann := r.site.userTokenOf(a.id, a.certificate, "ann")
	ben := r.site.userTokenOf(a.id, a.certificate, "ben")
	found := make(map[string]answer)
	for name, q := range map[string]request{
		"a page":                   {path: "/events", token: app},
		"a page, newest first":     {path: "/events?order=desc", token: app},
		"lines":                    {path: "/events", token: app, header: map[string]string{"Accept": "application/x-ndjson"}},
		"lines since a time":       {path: "/events?from=2020-01-01T00:00:00Z", token: app, header: map[string]string{"Accept": "application/x-ndjson"}},
		"a conversation's events":  {path: "/events?conversation=ann,ben", token: app},
		"a user's events":          {path: "/events?user=ann", token: app},
		"one event":                {path: "/events/m1", token: app},
		"the messages":             {path: "/conversations/ann,ben/messages", token: app},
		"the sender's messages":    {path: "/conversations/ann,ben/messages", token: ann},
		"the recipient's events":   {path: "/events?conversation=ann,ben", token: ben},
		"the recipient's event":    {path: "/events/m1", token: ben},
		"the inbox":                {path: "/users/ben/inbox", token: ben},
		"the inbox, by the app":    {path: "/users/ben/inbox", token: app},
		"the conversations":        {path: "/conversations", token: ben},
		"the conversations of ann": {path: "/conversations?user=ann", token: app},
		"polled callbacks":         {path: "/callbacks?endpoint=" + a.endpoint, token: app},
	} {
		q.path = "/v1/apps/" + a.id + q.path
		found[name] = r.do(q)
	}
	maps.Copy(found, r.tails(a))
	found["roaming messages"] = r.compatible(a, "POST", "/rest/message/roaming/chat/user/ann", `{"to":"ben"}`)
	return found
}

// message checks all ways to a message.
func (r *retentionSite) message(a *planApp, when string, there bool) {
	r.t.Helper()
	for name, got := range r.routes(a) {
		has := strings.Contains(string(got.body), `"m1`) || strings.Contains(string(got.body), "canary")
		if has != there || there && got.status != 200 {
			r.t.Errorf("%s, %s: %d %s, want the message there: %v", when, name, got.status, got.body, there)
		}
	}
}

func (r *retentionSite) lastSequence(stream string) uint64 {
	r.t.Helper()
	_, last, err := r.parts.Stored(r.t.Context(), stream)
	if err != nil {
		r.t.Fatal(err)
	}
	return last
}

// unused leads an account and two profiles to the end of 180 days without use; one
// of the profiles is used a second before.
func (r *retentionSite) unused(users *planApp) {
	r.t.Helper()
	r.freeze(r.start.Add(180*shortDay - time.Second))
	if got := string(r.do(request{path: "/v1/admin/accounts/acme", token: r.operator}).body); !strings.Contains(got, "canary") || !strings.Contains(got, `"expiring":true`) {
		r.t.Errorf("the account at its end: %s", got)
	}
	r.until("its owner is warned", func() bool { return strings.Contains(r.audited("account:acme"), "account.expiring") })
	written := r.lastSequence("KV_" + journal.ProfileBucket("eu"))
	if got := r.as(users, "GET", "/users/ann/profile", "", 200); !strings.Contains(string(got.body), "canary") {
		r.t.Errorf("the profile at its end: %s", got.body)
	}
	r.until("the use is written down", func() bool { return r.lastSequence("KV_"+journal.ProfileBucket("eu")) > written })
	r.freeze(r.start.Add(180 * shortDay))
	for path, token := range map[string]string{
		"/v1/admin/accounts/acme": r.operator, "/v1/admin/accounts": r.operator,
		"/v1/apps/" + users.id + "/users/ben/profile": r.tokenOf(users.id, users.certificate),
	} {
		if got := r.do(request{path: path, token: token}); strings.Contains(string(got.body), "canary") {
			r.t.Errorf("after 180 days unused, %s: %d %s", path, got.status, got.body)
		}
	}
	if got := r.as(users, "GET", "/users/ann/profile", "", 200); !strings.Contains(string(got.body), "canary") {
		r.t.Errorf("the profile that was used: %s", got.body)
	}
}

// TestRetentionTable leads every row of the retention table through its life: what
// is kept is there to the last millisecond by every route, is nowhere a millisecond
// later, and then goes from the views and the keyring. The clock is moved; what NATS
// lets go of by its own clock is TestShortDays'.
func TestRetentionTable(t *testing.T) {
	r := newRetentionSite(t, shortDay)
	r.start = time.Now().Truncate(time.Second)
	r.freeze(r.start)
	for _, plan := range []string{"free", "basic", "pro", "enterprise"} {
		r.app(plan)
	}
	r.admin("POST", "accounts", `{"id":"acme","name":"canary","email":"canary@example.com"}`, 201)
	users := r.apps["enterprise"]
	// Of another app than the exports: that they end soon is an event of the app.
	people := r.apps["basic"]
	for _, user := range []string{"ann", "ben"} {
		r.as(people, "PUT", "/users/"+user+"/profile", `{"nickname":"canary"}`, 201)
	}
	profileEpochs := r.epochs(people.id)
	export := r.export(users, exports.NDJSON)
	r.firstFile = r.as(users, "GET", export+"/manifest", "", 200).json(t)["files"].([]any)[0].(map[string]any)["name"].(string)
	r.stored = time.Now()

	at := func(end time.Time, d time.Duration) { r.freeze(end.Add(d)) }
	first := `"until":"` + r.start.UTC().Format("2006-01-02T15:04:05")
	monitored := func(a *planApp) bool {
		t.Helper()
		return strings.Contains(string(r.as(a, "GET", "/metrics?limit=1440", "", 200).body), first)
	}
	r.until("monitoring data is there", func() bool { return monitored(r.apps["basic"]) })
	counted := time.Now()
	attachment := func(a *planApp, status int) {
		t.Helper()
		r.as(a, "GET", "/attachments/pic", "", status)
	}
	deliveries := func(a *planApp) bool {
		t.Helper()
		list := r.as(a, "GET", "/endpoints/"+a.endpoint+"/deliveries", "", 200).json(t)["data"].([]any)
		return len(list) > 0
	}
	for _, row := range []struct {
		plan string
		life time.Duration // in days
	}{{"free", 3}, {"basic", 7}, {"pro", 90}, {"enterprise", 180}} {
		a, life := r.apps[row.plan], row.life*shortDay
		if row.plan == "free" {
			// The callbacks of every app, first: they are kept three days.
			at(r.start, 3*shortDay-time.Millisecond)
			for plan, b := range r.apps {
				if !deliveries(b) || !r.failedCallbacks(b) {
					t.Errorf("callbacks of plan %s went before their end", plan)
				}
			}
		}
		if row.plan == "enterprise" {
			r.unused(people)
		}
		if row.plan == "basic" {
			at(r.start, 7*shortDay-time.Millisecond)
			for _, b := range r.apps {
				attachment(b, 200)
			}
			if !monitored(a) {
				t.Error("monitoring data went before its end")
			}
			r.exportIs(users, export, true)
			at(r.start, 7*shortDay)
			r.exportIs(users, export, false)
			for _, b := range r.apps {
				attachment(b, 404)
			}
			at(counted, 7*shortDay+time.Millisecond)
			if monitored(a) {
				t.Error("monitoring data is shown after its end")
			}
		}
		at(r.start, life-time.Millisecond)
		r.message(a, "at the end of plan "+row.plan, true)
		if !r.resent(a) {
			t.Errorf("at the end of plan %s a webhook replay brings nothing", row.plan)
		}
		if row.plan == "enterprise" && !strings.Contains(r.hourFile(a), "canary") {
			t.Error("at the end of plan enterprise the hour's file does not have it")
		}
		at(r.start, life+time.Millisecond)
		for name, got := range r.routes(a) {
			// What lists conversations goes by arrival, which was a little later.
			if strings.Contains(string(got.body), "canary") {
				t.Errorf("after the end of plan %s, %s: %d %s", row.plan, name, got.status, got.body)
			}
		}
		at(r.stored, life+time.Millisecond)
		r.message(a, "after the end of plan "+row.plan, false)
		if got := r.compatible(a, "POST", "/messages/msg_recall", `{"msg_id":"m1","to":"ben","chat_type":"chat","force":true}`); got.status != 403 {
			t.Errorf("after the end of plan %s it can be recalled: %d %s", row.plan, got.status, got.body)
		}
		if row.plan == "enterprise" && strings.Contains(r.hourFile(a), "canary") { // the others' hours are not over
			t.Error("after the end of plan enterprise the hour's file has it")
		}
		if r.resent(a) {
			t.Errorf("after the end of plan %s a webhook replay brings it", row.plan)
		}
		if row.plan == "free" {
			for plan, b := range r.apps {
				if deliveries(b) || r.failedCallbacks(b) {
					t.Errorf("callbacks of plan %s are shown after their end", plan)
				}
			}
		}
		at(r.stored, life+life/36+3*time.Second) // the views sweep by the second, or by a part of the life
		r.until("the views let go of plan "+row.plan, func() bool { return r.viewKeys(a.id, eventTables) == 0 })
		if row.plan == "free" {
			r.until("the view lets go of deliveries", func() bool { return r.viewKeys(a.id, deliveryTables) == 0 })
			r.keys(a.id, a.epochs, "callbacks")
		}
		if row.plan == "basic" {
			for _, b := range r.apps {
				r.keys(b.id, b.epochs, "attachments")
			}
		}
		if row.plan == "enterprise" {
			continue // its keys end with those of the profiles
		}
		r.keys(a.id, a.epochs, row.plan+"/")
	}

	r.until("the account's end is audited", func() bool { return strings.Contains(r.audited("account:acme"), "account.expired") })
	r.keys(people.id, profileEpochs, "profiles")
	r.keys(users.id, users.epochs, "enterprise/")
	r.until("the keys of the account's data are destroyed", func() bool {
		for _, e := range r.epochs("accounts") {
			if e.Destroyed.IsZero() && !e.Expires.After(r.now()) {
				return false
			}
		}
		return true
	})
	if got := r.as(people, "GET", "/users/ann/profile", "", 0); got.status != 200 {
		t.Errorf("the profile that was used, after the others' keys: %d %s", got.status, got.body)
	}
	r.auditEnds()
}

// TestShortDays lets NATS let go of what the server keeps there: with a day of a
// second, in seconds. With COFFER_TEST_LONG=1 it also waits for attachments.
func TestShortDays(t *testing.T) {
	r := newRetentionSite(t, time.Second)
	a := r.app("free")
	messages := func(stream string) (n uint64, ever bool) {
		n, last, err := r.parts.Stored(t.Context(), stream)
		if err != nil {
			t.Fatal(err)
		}
		return n, last > 0
	}
	left := map[string]bool{journal.StreamName("eu", "free", 0): true, "OBJ_" + journal.AttachmentBucket("eu"): true}
	for _, name := range r.callbackStreams() {
		left[name] = true
	}
	if len(left) != 3 {
		t.Fatalf("the streams with something in them: %v", slices.Sorted(maps.Keys(left)))
	}
	long := os.Getenv("COFFER_TEST_LONG")
	if long == "" {
		// Seven seconds are long; that its stream has the age of the table is
		// checked elsewhere.
		delete(left, "OBJ_"+journal.AttachmentBucket("eu"))
	}
	r.until("NATS lets go of everything", func() bool {
		for name := range left {
			if n, ever := messages(name); !ever {
				t.Fatalf("stream %s never had anything", name)
			} else if n == 0 {
				delete(left, name)
			}
		}
		return len(left) == 0
	})
	r.until("the views let go", func() bool { return r.viewKeys(a.id, eventTables+deliveryTables) == 0 })
	r.until("the keys go", func() bool {
		for _, e := range r.epochs(a.id) {
			old := slices.ContainsFunc(a.epochs, func(m kms.EpochState) bool { return m.ID == e.ID })
			if kept := strings.HasPrefix(e.Class, "attachments") && len(long) == 0; e.Destroyed.IsZero() && old && !kept {
				return false
			}
		}
		return true
	})
	r.message(a, "after all", false)
}
