package node

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/keyserverstest"
)

// keyRegion is a running region whose keys are with a real server.
type keyRegion struct {
	t        *testing.T
	cfg      config.Config
	process  *Process
	operator string
	log      *slog.Logger
	warm     *keyApp // its keys are in memory
	cold     *keyApp // they can be dropped
}

type keyApp struct {
	id, token string
	ids       []string // of the events that were acknowledged, in order
}

func newKeyRegion(t *testing.T, kms string, keys config.Keys) *keyRegion {
	t.Helper()
	return startKeyRegion(t, kms, keys, nil)
}

func startKeyRegion(t *testing.T, kms string, keys config.Keys, log *slog.Logger) *keyRegion {
	t.Helper()
	r := &keyRegion{t: t, cfg: plain(production(t, "")), log: log}
	r.cfg.Regions[0].KMS, r.cfg.Regions[0].Keys = kms, keys
	var err error
	if r.operator, err = auth.ReadSecret(r.cfg.OperatorTokenFile); err != nil {
		t.Fatal(err)
	}
	r.open()
	r.warm, r.cold = r.newApp(), r.newApp()
	for range 3 {
		r.mustAppend(r.warm)
		r.mustAppend(r.cold)
	}
	return r
}

func (r *keyRegion) open() {
	r.t.Helper()
	p, err := Open(r.t.Context(), r.cfg, r.log)
	if err != nil {
		r.t.Fatal(err)
	}
	r.process = p
	r.t.Cleanup(func() {
		http.DefaultClient.CloseIdleConnections()
		_ = p.Close(r.t.Context())
	})
}

func (r *keyRegion) newApp() *keyApp {
	r.t.Helper()
	status, answer := call(r.t, r.process, "POST", "/v1/admin/apps", r.operator, `{"name":"x","plan":"pro"}`)
	var app struct {
		ID           string   `json:"id"`
		Certificates []string `json:"certificates"`
	}
	if err := json.Unmarshal([]byte(answer), &app); err != nil || status != http.StatusCreated {
		r.t.Fatalf("creating an app: %d %s", status, answer)
	}
	token, err := auth.Build(auth.Spec{AppID: app.ID, Certificate: app.Certificates[0], Issued: time.Now(), Lifetime: time.Hour})
	if err != nil {
		r.t.Fatal(err)
	}
	return &keyApp{id: app.ID, token: token}
}

func (a *keyApp) events() string { return "/v1/apps/" + a.id + "/events" }

// append tries to store an event, and notes it when it was acknowledged.
func (r *keyRegion) append(a *keyApp, id string) (int, string) {
	status, answer := call(r.t, r.process, "POST", a.events(), a.token,
		fmt.Sprintf(`{"id":%q,"type":"message.sent","sender":"ann","recipient":"ben","data":{"bodies":[{"type":"txt","msg":"hello"}]}}`, id))
	if status == http.StatusCreated {
		a.ids = append(a.ids, id)
	}
	return status, answer
}

func (r *keyRegion) mustAppend(a *keyApp) {
	r.t.Helper()
	if status, answer := r.append(a, fmt.Sprint("e", len(a.ids))); status != http.StatusCreated {
		r.t.Fatalf("append: %d %s", status, answer)
	}
}

// replays checks that a replay has every acknowledged event, in order, and no
// other.
func (r *keyRegion) replays(a *keyApp) {
	r.t.Helper()
	var got []string
	r.await("a replay with every event", func() bool {
		status, answer := call(r.t, r.process, "GET", a.events()+"?limit=1000", a.token, "")
		if status == http.StatusServiceUnavailable && strings.Contains(answer, "view-behind") {
			return false // the view catches up after a start
		}
		if status != http.StatusOK {
			r.t.Fatalf("replay: %d %s", status, answer)
		}
		got = eventIDs(r.t, answer)
		return len(got) >= len(a.ids)
	})
	if strings.Join(got, " ") != strings.Join(a.ids, " ") {
		r.t.Errorf("replayed %v, want %v", got, a.ids)
	}
}

func eventIDs(t *testing.T, answer string) (ids []string) {
	t.Helper()
	var page struct {
		Data []struct {
			ID string `json:"id"`
		} `json:"data"`
	}
	if err := json.Unmarshal([]byte(answer), &page); err != nil {
		t.Fatal(err)
	}
	for _, e := range page.Data {
		ids = append(ids, e.ID)
	}
	return ids
}

func (r *keyRegion) await(what string, condition func() bool) {
	r.t.Helper()
	for end := time.Now().Add(90 * time.Second); !condition(); time.Sleep(25 * time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatalf("%s did not happen", what)
		}
	}
}

func (r *keyRegion) ready() (bool, string) {
	status, answer := call(r.t, r.process, "GET", "/readyz", "", "")
	return status == http.StatusOK, answer
}

// chill drops an app's keys from memory.
func (r *keyRegion) chill(a *keyApp) { r.process.regions[0].journal.Keyring().Evict(a.id) }

func problemOf(t *testing.T, answer string) (code string, retryable bool) {
	t.Helper()
	var p struct {
		Code      string `json:"code"`
		Retryable bool   `json:"retryable"`
	}
	if err := json.Unmarshal([]byte(answer), &p); err != nil {
		t.Fatalf("%v: %s", err, answer)
	}
	return p.Code, p.Retryable
}

// during checks what holds while the key server cannot be used: what is in
// memory serves, what is not is refused, and the region says why.
func (r *keyRegion) during(says string, retryable bool) {
	t := r.t
	t.Helper()
	r.chill(r.cold)
	r.mustAppend(r.warm)
	r.replays(r.warm)
	for what, do := range map[string]func() (int, string){
		"append": func() (int, string) { return r.append(r.cold, "refused") },
		"replay": func() (int, string) { return call(t, r.process, "GET", r.cold.events(), r.cold.token, "") },
	} {
		status, answer := do()
		code, retry := problemOf(t, answer)
		if status != http.StatusServiceUnavailable || code != "kms-unavailable" || retry != retryable || !strings.Contains(answer, says) {
			t.Errorf("%s without a key: %d %s", what, status, answer)
		}
	}
	var told string
	r.await("readiness that says why", func() bool {
		ok, answer := r.ready()
		told = answer
		return !ok
	})
	if !strings.Contains(told, `"part":"kms"`) {
		t.Errorf("readyz: %s", told)
	}
	if status, _ := call(t, r.process, "GET", "/livez", "", ""); status != http.StatusOK {
		t.Errorf("livez: %d", status)
	}
}

// after checks that everything works again, without a restart, and that what was
// refused was not stored.
func (r *keyRegion) after() {
	t := r.t
	t.Helper()
	r.await("readiness", func() bool { ok, _ := r.ready(); return ok })
	r.await("the keys of the app that had none", func() bool {
		status, answer := r.append(r.cold, fmt.Sprint("back", len(r.cold.ids)))
		if code, _ := problemOf(t, answer); status != http.StatusCreated && code != "kms-unavailable" {
			t.Fatalf("append: %d %s", status, answer)
		}
		return status == http.StatusCreated
	})
	r.mustAppend(r.warm)
	r.replays(r.warm)
	r.replays(r.cold)
}

// TestVaultFaults makes each fault of a real Vault server, and takes it back.
func TestVaultFaults(t *testing.T) {
	for name, f := range map[string]struct {
		begin, end func(*keyserverstest.Vault)
		says       string
		retryable  bool
	}{
		"stopped": {func(v *keyserverstest.Vault) { v.Stop() }, (*keyserverstest.Vault).Restart, "does not answer", true},
		"sealed":  {(*keyserverstest.Vault).Seal, (*keyserverstest.Vault).Unseal, "does not answer", true},
		"500":     {func(v *keyserverstest.Vault) { v.Front.Answer(500) }, heal, "does not answer", true},
		"502":     {func(v *keyserverstest.Vault) { v.Front.Answer(502) }, heal, "does not answer", true},
		"429":     {func(v *keyserverstest.Vault) { v.Front.Answer(429) }, heal, "busy", true},
		"hangs":   {func(v *keyserverstest.Vault) { v.Front.Hang() }, heal, "does not answer", true},
		"token revoked": {
			(*keyserverstest.Vault).Revoke, (*keyserverstest.Vault).NewToken, "credentials", false,
		},
		"policy withdrawn": {(*keyserverstest.Vault).Withdraw, (*keyserverstest.Vault).Grant, "denies access", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // each waits for half a minute at most
			v := keyserverstest.NewVault(t)
			r := newKeyRegion(t, v.Setting(), config.Keys{})
			f.begin(v)
			r.during(f.says, f.retryable)
			f.end(v)
			r.after()
		})
	}
}

func heal(v *keyserverstest.Vault) { v.Front.Set(nil) }

// TestAWSFaults disables the key at an emulator of AWS KMS and schedules its
// deletion, and takes both back.
func TestAWSFaults(t *testing.T) {
	a := keyserverstest.NewAWS(t, "eu-central-1")
	r := newKeyRegion(t, a.Setting(), config.Keys{})
	a.Call("DisableKey", map[string]any{})
	r.during("disabled", false)
	a.Call("EnableKey", map[string]any{})
	r.after()
	a.Call("ScheduleKeyDeletion", map[string]any{"PendingWindowInDays": 7})
	r.during("deleted", false)
	a.Call("CancelKeyDeletion", map[string]any{})
	a.Call("EnableKey", map[string]any{})
	r.after()
}

// TestHardLimit: an outage longer than what is bridged closes the region, and it
// opens again by itself.
func TestHardLimit(t *testing.T) {
	v := keyserverstest.NewVault(t)
	r := newKeyRegion(t, v.Setting(), config.Keys{Revalidate: config.Duration(200 * time.Millisecond), Outage: config.Duration(2 * time.Second)})
	v.Stop()
	r.await("the hard limit", func() bool {
		status, answer := r.append(r.warm, fmt.Sprint("limit", len(r.warm.ids)))
		if code, _ := problemOf(t, answer); status != http.StatusCreated && code != "kms-unavailable" {
			t.Fatalf("append: %d %s", status, answer)
		}
		return status != http.StatusCreated
	})
	for range 3 {
		if status, answer := call(t, r.process, "GET", r.warm.events(), r.warm.token, ""); status != http.StatusServiceUnavailable || strings.Contains(answer, "hello") {
			t.Errorf("replay past the hard limit: %d %s", status, answer)
		}
	}
	v.Restart()
	r.await("keys", func() bool { status, _ := r.append(r.warm, "back"); return status == http.StatusCreated })
	r.replays(r.warm)
}

// TestStartWithoutKMS: a region starts while its key server is away, says so, and
// recovers by itself.
func TestStartWithoutKMS(t *testing.T) {
	v := keyserverstest.NewVault(t)
	r := newKeyRegion(t, v.Setting(), config.Keys{})
	for _, fault := range []struct{ begin, end func() }{
		{v.Stop, v.Restart},
		{v.Seal, v.Unseal},
		{func() { v.Front.Answer(503) }, func() { v.Front.Set(nil) }},
	} {
		if err := r.process.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		fault.begin()
		r.open()
		if status, _ := call(t, r.process, "GET", "/livez", "", ""); status != http.StatusOK {
			t.Errorf("livez: %d", status)
		}
		if ok, told := r.ready(); ok || !strings.Contains(told, `"part":"kms"`) {
			t.Errorf("readyz: %s", told)
		}
		status, answer := r.append(r.warm, "refused")
		if code, _ := problemOf(t, answer); status != http.StatusServiceUnavailable || code != "kms-unavailable" {
			t.Errorf("append: %d %s", status, answer)
		}
		fault.end()
		r.await("readiness", func() bool { ok, _ := r.ready(); return ok })
		r.await("keys", func() bool {
			status, _ := r.append(r.warm, fmt.Sprint("back", len(r.warm.ids)))
			return status == http.StatusCreated
		})
		r.replays(r.warm)
	}
}

// TestHerd: a thousand requests for the keys of a few apps while the key server
// is away, and when it returns, are few calls to it.
func TestHerd(t *testing.T) {
	const apps, callers = 4, 100
	v := keyserverstest.NewVault(t)
	r := newKeyRegion(t, v.Setting(), config.Keys{})
	var cold []*keyApp
	for range apps {
		a := r.newApp()
		r.mustAppend(a)
		cold = append(cold, a)
	}
	v.Front.Answer(503)
	for _, a := range cold {
		r.chill(a)
	}
	before := v.Front.Count("/decrypt/coffer-eu")
	begun := time.Now()
	var refused atomic.Int64
	var wg sync.WaitGroup
	var healed atomic.Bool
	for i := range callers {
		wg.Go(func() {
			a := cold[i%apps]
			for {
				req, err := http.NewRequestWithContext(t.Context(), "GET", r.process.Regions[0].URL+a.events(), http.NoBody)
				if err != nil {
					t.Error(err)
					return
				}
				req.Header.Set("Authorization", "Bearer "+a.token)
				resp, err := http.DefaultClient.Do(req)
				if err != nil {
					t.Error(err)
					return
				}
				_, _ = io.Copy(io.Discard, resp.Body)
				_ = resp.Body.Close()
				if resp.StatusCode == http.StatusOK {
					if !healed.Load() {
						t.Error("served without a key")
					}
					return
				}
				refused.Add(1)
				time.Sleep(5 * time.Millisecond)
			}
		})
	}
	r.await("many refusals", func() bool { return refused.Load() > 10*callers })
	healed.Store(true)
	during := v.Front.Count("/decrypt/coffer-eu") - before
	seconds := int(time.Since(begun)/time.Second) + 1
	v.Front.Set(nil)
	wg.Wait()
	after := v.Front.Count("/decrypt/coffer-eu") - before - during
	t.Logf("%d refusals in %d s; %d calls while it was away, %d when it returned, for %d apps", refused.Load(), seconds, during, after, apps)
	if during > apps*(seconds+1) { // an app is asked for again after a second
		t.Errorf("%d calls in %d s while it was away", during, seconds)
	}
	if after > 2*apps { // one may have been under way
		t.Errorf("%d calls when it returned", after)
	}
}

// TestReplayStops: the keys go in the middle of a replay. It ends before the first
// event that it cannot open, with a cursor from which nothing is missing.
func TestReplayStops(t *testing.T) {
	const events = 400
	v := keyserverstest.NewVault(t)
	r := newKeyRegion(t, v.Setting(), config.Keys{})
	a := r.newApp()
	long := strings.TrimSuffix(strings.Repeat(`{"type":"txt","msg":"`+strings.Repeat("x", 5000)+`"},`, 10), ",")
	for i := range events {
		status, answer := call(t, r.process, "POST", a.events(), a.token, fmt.Sprintf(
			`{"id":"%d","type":"message.sent","sender":"ann","recipient":"ben","data":{"bodies":[%s]}}`, i, long))
		if status != http.StatusCreated {
			t.Fatalf("append: %d %s", status, answer)
		}
	}
	r.await("the view", func() bool {
		_, answer := call(t, r.process, "GET", a.events()+"?order=desc&limit=1", a.token, "")
		ids := eventIDs(t, answer)
		return len(ids) == 1 && ids[0] == strconv.Itoa(events-1)
	})
	stream := func(after string) *bufio.Reader {
		path := r.process.Regions[0].URL + a.events()
		if after != "" {
			path += "?after=" + after
		}
		req, err := http.NewRequestWithContext(t.Context(), "GET", path, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+a.token)
		req.Header.Set("Accept", "application/x-ndjson")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = resp.Body.Close() })
		return bufio.NewReaderSize(resp.Body, 4096)
	}
	type end struct {
		Count   int    `json:"count"`
		Next    string `json:"next"`
		Omitted int    `json:"omitted"`
		Problem *struct {
			Code string `json:"code"`
		} `json:"problem"`
	}
	next := 0 // the event that must come
	read := func(in *bufio.Reader, some int) *end {
		for n := 0; some == 0 || n < some; n++ {
			line, err := in.ReadBytes('\n')
			if err != nil {
				t.Fatalf("after %d events: %v", next, err)
			}
			if bytes.HasPrefix(line, []byte(`{"end":`)) {
				var trailer struct {
					End end `json:"end"`
				}
				if err := json.Unmarshal(line, &trailer); err != nil {
					t.Fatal(err)
				}
				return &trailer.End
			}
			var e struct {
				ID string `json:"id"`
			}
			if err := json.Unmarshal(line, &e); err != nil || e.ID != strconv.Itoa(next) {
				t.Fatalf("event %q, want %d: %v", e.ID, next, err)
			}
			next++
		}
		return nil
	}
	in := stream("")
	read(in, 3)
	v.Stop()
	r.chill(a)
	trailer := read(in, 0)
	if trailer.Problem == nil || trailer.Problem.Code != "kms-unavailable" || trailer.Count != next || trailer.Omitted != 0 || next == events {
		t.Fatalf("after %d events: %+v", next, trailer)
	}
	t.Logf("the replay stopped after %d of %d events", next, events)
	v.Restart()
	r.await("keys", func() bool {
		status, _ := call(t, r.process, "GET", a.events()+"?limit=1", a.token, "")
		return status == http.StatusOK
	})
	if trailer = read(stream(trailer.Next), 0); trailer.Problem != nil || next != events {
		t.Errorf("after going on: %d events, %+v", next, trailer)
	}
}

// TestRotationUnderLoad rotates the KEK in Vault in a loop while apps are written
// to, read, dropped from memory and made: nothing fails.
func TestRotationUnderLoad(t *testing.T) {
	const writers, rotations = 8, 25
	v := keyserverstest.NewVault(t)
	r := newKeyRegion(t, v.Setting(), config.Keys{Revalidate: config.Duration(200 * time.Millisecond)})
	keyring := r.process.regions[0].journal.Keyring()
	var apps []*keyApp
	for range writers {
		apps = append(apps, r.newApp())
	}
	done := make(chan struct{})
	var wg sync.WaitGroup
	for _, a := range apps {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-done:
					return
				default:
				}
				if status, answer := r.append(a, fmt.Sprint("e", i)); status != http.StatusCreated {
					t.Errorf("append while rotating: %d %s", status, answer)
					return
				}
				if i%16 == 0 {
					if status, answer := call(t, r.process, "GET", a.events()+"?limit=100", a.token, ""); status != http.StatusOK {
						t.Errorf("replay while rotating: %d %s", status, answer)
						return
					}
				}
			}
		})
	}
	id, err := keyring.AddProvider(t.Context(), r.process.regions[0].provider)
	if err != nil {
		t.Fatal(err)
	}
	for i := range rotations {
		v.Rotate()
		r.chill(apps[i%writers])
		if i%5 == 0 {
			a := r.newApp()
			r.mustAppend(a)
			results, err := keyring.RewrapApps(t.Context(), id, []string{apps[0].id, apps[1].id, a.id})
			if err != nil {
				t.Error(err)
			}
			for _, result := range results {
				if result.Err != nil {
					t.Errorf("rewrap: %v", result.Err)
				}
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	close(done)
	wg.Wait()
	total := 0
	for _, a := range apps {
		total += len(a.ids)
		keyring.Evict(a.id)
		page := a.ids
		if len(page) > 1000 {
			page = page[:1000]
		}
		r.await("every event", func() bool {
			_, answer := call(t, r.process, "GET", a.events()+"?limit=1000", a.token, "")
			got := eventIDs(t, answer)
			return strings.Join(got, " ") == strings.Join(page, " ")
		})
	}
	t.Logf("%d events in %d apps during %d rotations", total, writers, rotations)
}
