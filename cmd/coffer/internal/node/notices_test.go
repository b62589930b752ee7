package node

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/cmd/coffer/internal/accounts"
	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/cmd/coffer/internal/shelf"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/kms"
)

// pair is a region that two processes serve.
type pair struct {
	*testing.T

	cfg   config.Config
	first *Process
	again *Process
}

func newPair(t *testing.T, adjust func(*config.Config)) *pair {
	t.Helper()
	checkLeaks(t)
	nats, err := embedded.Start(t.Context(), embedded.Options{StoreDir: t.TempDir(), Listen: "127.0.0.1:0", SyncAlways: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nats.Close() })
	p := &pair{T: t, cfg: plain(production(t, "[region.nats]\nurl = \"nats://127.0.0.1:4222\"\n"))}
	p.cfg.Regions[0].NATS.URL = nats.ClientURL()
	if adjust != nil {
		adjust(&p.cfg)
	}
	p.first, p.again = p.open("a"), p.open("b")
	t.Cleanup(func() {
		for _, process := range []*Process{p.first, p.again} {
			if err := process.Close(context.Background()); err != nil { //nolint:usetesting // it is over
				t.Error(err)
			}
		}
	})
	return p
}

func (p *pair) open(dir string) *Process {
	p.Helper()
	cfg := p.cfg
	cfg.DataDir = filepath.Join(cfg.DataDir, dir)
	process, err := Open(p.Context(), cfg, nil)
	if err != nil {
		p.Fatal(err)
	}
	return process
}

// rebuild starts the second process anew, without its views.
func (p *pair) rebuild() {
	p.Helper()
	if err := p.again.Close(p.Context()); err != nil {
		p.Fatal(err)
	}
	views := filepath.Join(regionDir(filepath.Join(p.cfg.DataDir, "b"), "eu"), "views")
	if _, err := os.Stat(views); err != nil {
		p.Fatal(err)
	}
	if err := os.RemoveAll(views); err != nil {
		p.Fatal(err)
	}
	p.again = p.open("b")
}

// both does something in both processes at the same time, twice; again where the
// journal says that it could not tell whether it was done.
func (p *pair) both(do func(r *region) error) {
	p.Helper()
	var work sync.WaitGroup
	for _, process := range []*Process{p.first, p.again, p.first, p.again} {
		work.Go(func() {
			err := do(process.regions[0])
			for deadline := time.Now().Add(time.Minute); errors.Is(err, journal.ErrUnavailable) && time.Now().Before(deadline); {
				err = do(process.regions[0])
			}
			if err != nil {
				p.Error(err)
			}
		})
	}
	work.Wait()
}

func (p *pair) app(account string) journal.App {
	p.Helper()
	app, err := p.first.regions[0].journal.CreateApp(p.Context(), journal.AppSpec{Plan: "pro", Account: account})
	if err != nil {
		p.Fatal(err)
	}
	return app
}

func (p *pair) token(app journal.App) string {
	p.Helper()
	token, err := auth.Build(auth.Spec{AppID: app.ID.String(), Certificate: app.Certificates[0].Reveal(), Issued: time.Now(), Lifetime: time.Hour})
	if err != nil {
		p.Fatal(err)
	}
	return token
}

// told returns the events of an app, all that there are: a last one is appended
// behind them.
func (p *pair) told(app journal.App) []map[string]any {
	p.Helper()
	r := p.again.regions[0]
	results, err := r.journal.Append(p.Context(), app.ID, journal.Event{
		Type: journal.MessageRecalled, Conversation: "end", ConversationType: journal.Group, Target: "end",
	})
	if err != nil || results[0].Err != nil {
		p.Fatalf("%v, %v", results, err)
	}
	status, text := call(p.T, p.again, "GET", "/v1/apps/"+app.ID.String()+"/events?min_position="+results[0].Position.String(), p.token(app), "")
	var page struct {
		Data []map[string]any `json:"data"`
	}
	if err := json.Unmarshal([]byte(text), &page); err != nil || status != http.StatusOK {
		p.Fatalf("%d %s, %v", status, text, err)
	}
	return slices.DeleteFunc(page.Data, func(e map[string]any) bool { return e["conversation"] == "end" })
}

// audited returns the records of an action, each once.
func (p *pair) audited(action string) map[string]string {
	p.Helper()
	operator, err := auth.ReadSecret(p.cfg.OperatorTokenFile)
	if err != nil {
		p.Fatal(err)
	}
	_, text := call(p.T, p.first, "GET", "/v1/admin/audit", operator, "")
	records := make(map[string]string)
	for line := range strings.Lines(text) {
		var record struct {
			Actor, Action, Target, Outcome string
			Detail                         map[string]string
		}
		if err := json.Unmarshal([]byte(line), &record); err != nil {
			p.Fatal(err)
		}
		if record.Action == action {
			records[record.Target] = fmt.Sprint(record.Actor, " ", record.Outcome, " ", record.Detail)
		}
	}
	return records
}

func summary(events []map[string]any) string {
	var list []string
	for _, e := range events {
		data, _ := json.Marshal(e["data"])
		list = append(list, fmt.Sprint(e["type"], " ", e["id"], " ", e["sender"], " ", string(data)))
	}
	slices.Sort(list)
	return strings.Join(list, "\n")
}

// TestWarnings: both processes of a region come to the time to warn of an account
// and of a profile, one of them having been killed before when it had told of them;
// then a process begins without its views, and has lost how far the sweep was. Each
// app has one event of each.
func TestWarnings(t *testing.T) {
	p := newPair(t, nil)
	r, ctx := p.first.regions[0], t.Context()
	for _, id := range []string{"acme", "alone"} {
		if _, err := r.accounts.Create(ctx, accounts.Account{ID: id, Name: "x"}); err != nil {
			t.Fatal(err)
		}
	}
	used, other, foreign, disabled := p.app("acme"), p.app("acme"), p.app("alone-too"), p.app("acme")
	if _, err := r.journal.Registry().SetDisabled(ctx, disabled.ID, true); err != nil {
		t.Fatal(err)
	}
	subject := func(user string) kms.Tag {
		tag, err := r.journal.Tag(ctx, used.ID, kms.KindSubject, user)
		if err != nil {
			t.Fatal(err)
		}
		return tag
	}
	put := func(user string) time.Time {
		profile, _, err := r.profiles.Put(ctx, used.ID, user, subject(user), jsontext.Value(`{"nickname":"canary"}`))
		if err != nil {
			t.Fatal(err)
		}
		return profile.Ends
	}
	ends := put("ann")
	profile := fmt.Sprintf(`profile.expiring coffer:profile-expiring:%s:%d ann {"ends":%q}`,
		subject("ann"), ends.Add(-r.journal.Retention().Profiles).UnixMilli(), ends.UTC().Format(noticeTime))
	put("gone")
	if err := r.journal.Keyring().EraseSubject(ctx, used.ID.String(), subject("gone")); err != nil {
		t.Fatal(err)
	}
	account, err := r.accounts.Account(ctx, "acme")
	if err != nil {
		t.Fatal(err)
	}
	expiring := fmt.Sprintf(`account.expiring coffer:account-expiring:acme:%d <nil> {"account":"acme","ends":%q}`,
		account.Used.UnixMilli(), account.Ends.UTC().Format(noticeTime))

	// Killed behind the event, before anything else is written.
	if err := r.tellAccounts()(ctx, accounts.Warning{ID: "acme", Used: account.Used, Ends: account.Ends}); err != nil {
		t.Fatal(err)
	}
	soon := time.Now().Add(r.journal.Retention().Accounts - r.journal.Retention().Warning + time.Hour)
	sweeps := func(r *region) error {
		for _, sweep := range []shelf.Sweep{r.accountSweep(), r.profileSweep()} {
			for done := (shelf.Result{Untold: 1}); done.Untold > 0; {
				var err error
				if done, err = sweep.Run(ctx, soon); err != nil {
					return err
				}
			}
		}
		return nil
	}
	check := func(when string) {
		t.Helper()
		for app, events := range map[*journal.App]string{&used: expiring + "\n" + profile, &other: expiring, &foreign: ""} {
			if got := summary(p.told(*app)); got != events {
				t.Errorf("%s, app %s was told\n%s\nwant\n%s", when, app.ID, got, events)
			}
		}
		for target, action := range map[string]string{
			"account:acme": "account.expiring", "account:alone": "account.expiring", "app:" + used.ID.String(): "profile.expiring",
		} {
			if got := p.audited(action)[target]; !strings.HasPrefix(got, "process:coffer ok map[ends:") {
				t.Errorf("%s, %s of %s is audited as %q", when, action, target, got)
			}
		}
	}
	p.both(sweeps)
	check("after both")

	p.rebuild()
	for _, name := range []string{"shelf.accounts", "shelf.profiles"} {
		row, err := r.rows.Load(ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.rows.Delete(ctx, name, row.Revision); err != nil {
			t.Fatal(err)
		}
	}
	p.both(sweeps)
	check("after all was forgotten")

	if _, err := r.journal.Registry().SetDisabled(ctx, disabled.ID, false); err != nil {
		t.Fatal(err)
	}
	if got := summary(p.told(disabled)); got != "" {
		t.Errorf("a disabled app was told %s", got)
	}
}

// TestDisabledEndpoints: an endpoint's end is told once, whoever tells of it, with
// its reason; a disabled app is not told, and the audit log has both.
func TestDisabledEndpoints(t *testing.T) {
	p := newPair(t, nil)
	app, disabled := p.app(""), p.app("")
	since := time.Now().UTC().Truncate(time.Millisecond)
	ended := func(app journal.App, reason endpoints.Reason) endpoints.Endpoint {
		return endpoints.Endpoint{
			App: app.ID, ID: endpoints.NewID(), State: endpoints.Disabled, Reason: reason, Untold: &endpoints.Notice{Reason: reason, Since: since},
		}
	}
	failing, gone, quiet := ended(app, endpoints.ReasonFailing), ended(app, endpoints.ReasonGone), ended(disabled, endpoints.ReasonGone)
	if _, err := p.first.regions[0].journal.Registry().SetDisabled(t.Context(), disabled.ID, true); err != nil {
		t.Fatal(err)
	}
	list := []endpoints.Endpoint{failing, gone, quiet}
	tell := func(r *region) error {
		for _, e := range list {
			if err := r.endpointDisabled(t.Context(), e); err != nil {
				return err
			}
		}
		return nil
	}
	event := func(e endpoints.Endpoint) string {
		return fmt.Sprintf(`endpoint.disabled coffer:endpoint-disabled:%s:%d <nil> {"endpoint":"%s","reason":"%s"}`,
			e.IDText(), since.UnixMilli(), e.IDText(), e.Untold.Reason)
	}
	want := []string{event(failing), event(gone)}
	slices.Sort(want)
	check := func(when string) {
		t.Helper()
		if got := summary(p.told(app)); got != strings.Join(want, "\n") {
			t.Errorf("%s the app was told\n%s\nwant\n%s", when, got, strings.Join(want, "\n"))
		}
		records := p.audited("endpoint.disabled")
		for _, e := range list {
			if got, want := records["endpoint:"+e.IDText()], fmt.Sprintf("process:callbacks ok map[app:%s reason:%s]", e.App, e.Untold.Reason); got != want {
				t.Errorf("%s, audited as %q, want %q", when, got, want)
			}
		}
	}
	p.both(tell)
	check("after both")
	p.rebuild()
	p.both(tell)
	check("without the view")
	if _, err := p.first.regions[0].journal.Registry().SetDisabled(t.Context(), disabled.ID, false); err != nil {
		t.Fatal(err)
	}
	if got := summary(p.told(disabled)); got != "" {
		t.Errorf("the disabled app was told %s", got)
	}
	// Disabled anew, it is another time.
	again := gone
	again.Untold = &endpoints.Notice{Reason: endpoints.ReasonGone, Since: since.Add(time.Hour)}
	list = []endpoints.Endpoint{again}
	p.both(tell)
	if n := len(p.told(app)); n != 3 {
		t.Errorf("%d events after it was disabled again", n)
	}
}

// TestGoneForBoth: an endpoint that is gone is told of once, by one of the two
// processes that look after endpoints, and what was noted is removed.
func TestGoneForBoth(t *testing.T) {
	receiver := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var q struct{ Data struct{ Challenge string } }
		if err := json.NewDecoder(r.Body).Decode(&q); err == nil && q.Data.Challenge != "" {
			_ = json.NewEncoder(w).Encode(map[string]string{"challenge": q.Data.Challenge})
			return
		}
		w.WriteHeader(http.StatusGone)
	}))
	receiver.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	receiver.StartTLS()
	defer receiver.Close()
	p := newPair(t, func(cfg *config.Config) {
		ca := filepath.Join(t.TempDir(), "ca.pem")
		if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: receiver.Certificate().Raw}), 0o600); err != nil {
			t.Fatal(err)
		}
		cfg.Callbacks = config.Callbacks{Allow: []string{"127.0.0.0/8"}, CAFile: ca}
	})
	app, r := p.app(""), p.first.regions[0]
	const many = 8
	var list []endpoints.Endpoint
	for range many {
		status, made := call(t, p.first, "POST", "/v1/apps/"+app.ID.String()+"/endpoints", p.token(app), `{"url":"`+receiver.URL+`"}`)
		var e struct{ ID, State string }
		if err := json.Unmarshal([]byte(made), &e); err != nil || e.State != "enabled" {
			t.Fatalf("made: %d %s", status, made)
		}
		id, err := endpoints.ParseID(e.ID)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, endpoints.Endpoint{App: app.ID, ID: id})
	}
	p.told(app) // an event
	for _, e := range list {
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
			now, err := r.callbacks.engine.Endpoints.Endpoint(t.Context(), e.App, e.ID)
			if err == nil && now.State == endpoints.Disabled && now.Untold == nil {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%+v, %v", now, err)
			}
		}
	}
	seen := make(map[string]int)
	for _, event := range p.told(app) {
		data, ok := event["data"].(map[string]any)
		if !ok || event["type"] != "endpoint.disabled" || data["reason"] != "gone" {
			t.Errorf("told %v", event)
			continue
		}
		seen[fmt.Sprint(data["endpoint"])]++
	}
	records := p.audited("endpoint.disabled")
	for _, e := range list {
		if seen[e.IDText()] != 1 || records["endpoint:"+e.IDText()] == "" {
			t.Errorf("endpoint %s: %d events, audited %q", e.IDText(), seen[e.IDText()], records["endpoint:"+e.IDText()])
		}
	}
	if len(seen) != many {
		t.Errorf("told of %v", seen)
	}
}
