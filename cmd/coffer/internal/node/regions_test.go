package node

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/kms"
)

// recorder is a TCP proxy that keeps everything that passes, in both directions.
type recorder struct {
	net.Listener
	target string

	mu    sync.Mutex // guards what follows
	bytes []*recording
	conns []net.Conn
}

// recording is one direction of one connection.
type recording struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (r *recording) Write(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.buf.Write(b)
}

func record(t *testing.T, target string) *recorder {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &recorder{Listener: l, target: target}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			from, err := l.Accept()
			if err != nil {
				return
			}
			to, err := net.Dial("tcp", target)
			if err != nil {
				_ = from.Close()
				continue
			}
			for _, way := range [][2]net.Conn{{from, to}, {to, from}} {
				kept := p.keep(way[0])
				all.Go(func() {
					_, _ = io.Copy(io.MultiWriter(kept, way[1]), way[0])
					_ = way[0].Close()
					_ = way[1].Close()
				})
			}
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		p.mu.Lock()
		for _, c := range p.conns {
			_ = c.Close()
		}
		p.mu.Unlock()
		all.Wait()
	})
	return p
}

func (p *recorder) keep(c net.Conn) *recording {
	p.mu.Lock()
	defer p.mu.Unlock()
	kept := &recording{}
	p.bytes, p.conns = append(p.bytes, kept), append(p.conns, c)
	return kept
}

func (p *recorder) contains(needle []byte) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.ContainsFunc(p.bytes, func(r *recording) bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return bytes.Contains(r.buf.Bytes(), needle)
	})
}

// needle is something of one region that must be found in no other.
type needle struct {
	what  string
	bytes []byte
	// own is where it is found in its own region: what is never found proves
	// nothing.
	own []string
}

// fourth is one of the four regions of the test.
type fourth struct {
	t          *testing.T
	id, canary string // 24 letters, in all that is written
	url        string // of the listener, through the recorder
	app, token string
	hook       string // URL of the endpoint
	received   chan string

	listener, nats *recorder
	bodies         recording // of webhooks
	store          string    // of its NATS server
	server         *embedded.Server
	needles        []needle
}

// The places that are searched.
const (
	inHTTP  = "the traffic of its listener"
	inNATS  = "the traffic of its NATS server"
	inHooks = "its webhooks"
	inStore = "the files of its NATS server"
	inViews = "the files of its views"
	inKeys  = "the file of its key"
	inLog   = "its lines of the log"
)

// TestFourRegions serves the four regions in one process, each with a NATS server
// of its own. All TCP traffic of their listeners and NATS servers passes proxies
// that record it, the webhooks are kept as they come, and nothing of a region is
// found in another's traffic, files or log. A request for another region's app is
// told the right place, and leaves no trace either.
func TestFourRegions(t *testing.T) {
	checkLeaks(t)
	dir := t.TempDir()
	var logged recording
	process, regions := serveFour(t, dir, &logged)
	for _, r := range regions {
		r.use(process.cfg.OperatorTokenFile)
	}
	for _, r := range regions {
		r.identify(process)
	}
	// Not through the proxies: the request itself names the other's app.
	for i, r := range regions {
		for _, other := range regions {
			if r != other {
				misdirect(t, process, i, other)
			}
		}
	}
	http.DefaultClient.CloseIdleConnections()
	if err := process.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, r := range regions {
		if err := r.server.Close(); err != nil {
			t.Fatal(err)
		}
		places := map[string]func([]byte) bool{
			inHTTP: r.listener.contains, inNATS: r.nats.contains, inHooks: r.bodies.contains,
			inStore: filesOf(t, r.store), inViews: filesOf(t, filepath.Join(dir, "data", r.id)), inKeys: filesOf(t, filepath.Join(dir, r.id+".key")),
			inLog: linesOf(t, &logged, r.id),
		}
		for _, other := range regions {
			for _, n := range other.needles {
				for place, found := range places {
					switch has := found(n.bytes); {
					case r != other && has:
						t.Errorf("%s: %s have the %s of %s", r.id, place, n.what, other.id)
					case r == other && !has && slices.Contains(n.own, place):
						t.Errorf("%s: the test does not find its %s in %s", r.id, n.what, place)
					}
				}
			}
		}
	}
}

func (r *recording) contains(needle []byte) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return bytes.Contains(r.buf.Bytes(), needle)
}

// filesOf reads every file below a path, and returns what searches them.
func filesOf(t *testing.T, root string) func([]byte) bool {
	t.Helper()
	var all [][]byte
	size := 0
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		all, size = append(all, text), size+len(text)
		return err
	})
	if err != nil || size == 0 {
		t.Fatalf("%s: %d files, %d bytes, %v", root, len(all), size, err)
	}
	return func(needle []byte) bool {
		return slices.ContainsFunc(all, func(text []byte) bool { return bytes.Contains(text, needle) })
	}
}

// linesOf returns what searches the lines that a region has logged.
func linesOf(t *testing.T, logged *recording, region string) func([]byte) bool {
	t.Helper()
	logged.mu.Lock() // a connection that ends may still say so
	defer logged.mu.Unlock()
	var own []byte
	for line := range bytes.Lines(logged.buf.Bytes()) {
		if bytes.Contains(line, []byte(`"region":"`+region+`"`)) {
			own = append(own, line...)
		}
	}
	if len(own) == 0 {
		t.Fatalf("%s has logged nothing", region)
	}
	return func(needle []byte) bool { return bytes.Contains(own, needle) }
}

func serveFour(t *testing.T, dir string, logged io.Writer) (*Process, []*fourth) {
	t.Helper()
	if err := writeSecret(filepath.Join(dir, "operator.token"), []byte(auth.NewOperatorToken())); err != nil {
		t.Fatal(err)
	}
	text := "data_dir = 'DIR/data'\noperator_token_file = 'DIR/operator.token'\n[callbacks]\nallow = ['127.0.0.0/8']\nca_file = 'DIR/hooks.pem'\n"
	var regions []*fourth
	var certificates []byte
	for _, known := range journal.DefaultRegions() {
		r := &fourth{t: t, id: known.ID, canary: strings.ToLower(rand.Text()[:24]), received: make(chan string, 64), store: filepath.Join(dir, "nats-"+known.ID)}
		server, err := embedded.Start(t.Context(), embedded.Options{StoreDir: r.store, Listen: "127.0.0.1:0", SyncAlways: true})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = server.Close() })
		hooks := httptest.NewTLSServer(http.HandlerFunc(r.receive))
		t.Cleanup(hooks.Close)
		certificates = append(certificates, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: hooks.Certificate().Raw})...)
		r.server, r.hook = server, hooks.URL+"/"+r.canary
		r.nats = record(t, strings.TrimPrefix(server.ClientURL(), "nats://"))
		text += fmt.Sprintf("[[region]]\nid = %q\nlisten = '127.0.0.1:0'\nplaintext = true\nkms = 'local:DIR/%s.key'\nnats = {url = 'nats://%s'}\n", r.id, r.id, r.nats.Addr())
		regions = append(regions, r)
	}
	for name, content := range map[string][]byte{"hooks.pem": certificates, "coffer.toml": []byte(strings.ReplaceAll(text, "DIR", dir))} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cfg, err := config.Load(filepath.Join(dir, "coffer.toml"), nil)
	if err != nil {
		t.Fatal(err)
	}
	process, err := Open(t.Context(), cfg, slog.New(slog.NewJSONHandler(logged, &slog.HandlerOptions{Level: slog.LevelDebug})))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = process.Close(t.Context()) })
	for i, r := range regions {
		r.listener = record(t, strings.TrimPrefix(process.Regions[i].URL, "http://"))
		r.url = "http://" + r.listener.Addr().String()
	}
	return process, regions
}

// receive is the region's webhook endpoint.
func (r *fourth) receive(w http.ResponseWriter, req *http.Request) {
	body, err := io.ReadAll(io.TeeReader(req.Body, &r.bodies))
	if err != nil {
		return
	}
	var event struct {
		ID, Type string
		Data     json.RawMessage
	}
	if json.Unmarshal(body, &event) == nil && event.Type == "endpoint.verification" {
		_, _ = w.Write(event.Data)
	} else {
		r.received <- event.ID
	}
}

func (r *fourth) call(method, path, token, contentType, body string, want int, into any) {
	r.t.Helper()
	status, answer := request(r.t, method, r.url+path, token, contentType, body)
	if status != want {
		r.t.Fatalf("%s: %s %s: %d %s", r.id, method, path, status, answer)
	}
	if into != nil {
		if err := json.Unmarshal(answer, into); err != nil {
			r.t.Fatalf("%s: %s", err, answer)
		}
	}
}

func request(t *testing.T, method, url, token, contentType, body string) (int, []byte) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if body != "" {
		req.Body, req.ContentLength = io.NopCloser(strings.NewReader(body)), int64(len(body))
		req.Header.Set("Content-Type", contentType)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Accept-Encoding", "identity") // what is compressed cannot be searched
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, answer
}

// use does a little of everything in the region, with its canary in all of it.
func (r *fourth) use(operatorFile string) {
	t := r.t
	operator, err := auth.ReadSecret(operatorFile)
	if err != nil {
		t.Fatal(err)
	}
	const asJSON = "application/json"
	var app struct {
		ID           string
		Certificates []string
	}
	account := "a" + r.canary
	r.call("POST", "/v1/admin/accounts", operator, asJSON, fmt.Sprintf(`{"id":%q,"name":%q}`, account, "Name "+r.canary), 201, nil)
	r.call("POST", "/v1/admin/apps", operator, asJSON, fmt.Sprintf(`{"name":%q,"plan":"pro","account":%q}`, r.canary, account), 201, &app)
	r.app = app.ID
	if r.token, err = auth.Build(auth.Spec{AppID: app.ID, Certificate: app.Certificates[0], Issued: time.Now(), Lifetime: time.Hour}); err != nil {
		t.Fatal(err)
	}
	base := "/v1/apps/" + r.app
	r.call("POST", base+"/endpoints", r.token, asJSON, fmt.Sprintf(`{"url":%q,"mode":"full"}`, r.hook), 201, nil)
	var last struct{ Position string }
	for i := range 8 {
		body := fmt.Sprintf(`{"id":"e%d-%s","type":"message.sent","sender":"s-%s","recipient":"r-%s","data":{"bodies":[{"type":"txt","msg":"text %s"}]}}`, i, r.canary, r.canary, r.canary, r.canary)
		r.call("POST", base+"/events", r.token, asJSON, body, 201, &last)
	}
	r.call("PUT", base+"/attachments/f-"+r.canary+"?conversation=g-"+r.canary+"&sender=s-"+r.canary, r.token, "text/plain", "file "+r.canary, 201, nil)
	r.call("GET", base+"/attachments/f-"+r.canary, r.token, "", "", 200, nil)
	r.call("PUT", base+"/users/s-"+r.canary+"/profile", r.token, asJSON, fmt.Sprintf(`{"name":%q}`, r.canary), 201, nil)
	r.call("GET", base+"/events?min_position="+last.Position, r.token, "", "", 200, nil)
	r.call("GET", base+"/conversations?user=s-"+r.canary+"&min_position="+last.Position, r.token, "", "", 200, nil)
	r.call("POST", base+"/exports", r.token, asJSON, `{"format":"ndjson"}`, 202, nil)
	r.call("POST", base+"/erasures", r.token, asJSON, fmt.Sprintf(`{"user":"x-%s"}`, r.canary), 202, nil)
	r.call("POST", "/v1/admin/apps/"+r.app+"/certificates", operator, "", "", 201, nil)
	r.call("POST", "/v1/admin/apps/"+r.app+"/plan", operator, asJSON, `{"plan":"enterprise"}`, 202, nil)
	r.call("GET", "/v1/region", r.token, "", "", 200, nil)
	for range 8 {
		select {
		case <-r.received:
		case <-time.After(time.Minute):
			t.Fatalf("%s: a webhook does not come", r.id)
		}
	}
	eventually(t, "the plan change of "+r.id, func() bool {
		var app struct{ Plan string }
		r.call("GET", "/v1/admin/apps/"+r.app, operator, "", "", 200, &app)
		_, answer := request(t, "GET", r.url+"/v1/admin/apps/"+r.app+"/moves/1", operator, "", "")
		return app.Plan == "enterprise" && bytes.Contains(answer, []byte(`"state":"done"`))
	})
}

func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !done(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s does not come about", what)
		}
	}
}

// identify finds out what the region calls its things.
func (r *fourth) identify(process *Process) {
	parts, _ := process.Parts(r.id)
	log := parts.Journal.LogID()
	add := func(what, text string, own ...string) { r.needles = append(r.needles, needle{what, []byte(text), own}) }
	add("canary", r.canary, inHTTP, inHooks)
	add("app id", r.app, inHTTP, inNATS, inStore, inHooks)
	add("app id in bytes", string(parseApp(r.t, r.app)), inViews)
	add("log id", hex.EncodeToString(log[:]), inNATS, inStore, inHTTP)
	add("log id in bytes", string(log[:]))
	i := slices.IndexFunc(process.regions, func(x *region) bool { return x.config.ID == r.id })
	d, err := process.regions[i].provider.Describe(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	add("KEK's id", d.Key, inHTTP, inNATS, inStore, inKeys)
	for _, s := range parts.Journal.Streams() {
		add("incarnation of "+s.Name, s.Incarnation, inNATS, inStore)
		add("stream "+s.Name, s.Name, inNATS)
	}
	for kind, id := range map[string]string{kms.KindSubject: "s-" + r.canary, kms.KindEvent: "e1-" + r.canary} {
		app, err := journal.ParseAppID(r.app)
		if err != nil {
			r.t.Fatal(err)
		}
		tag, err := parts.Journal.Tag(r.t.Context(), app, kind, id)
		if err != nil {
			r.t.Fatal(err)
		}
		add("tag of a "+kind, string(tag[:]), inNATS, inStore)
	}
	// Directly from the server: the ids of the keys that its records are sealed
	// under.
	conn, err := nats.Connect(r.server.ClientURL())
	if err != nil {
		r.t.Fatal(err)
	}
	defer conn.Close()
	js, err := jetstream.New(conn)
	if err != nil {
		r.t.Fatal(err)
	}
	keys := map[[32]byte]bool{}
	for _, plan := range []string{"pro", "enterprise"} {
		stream, err := js.Stream(r.t.Context(), journal.StreamName(r.id, plan, 0))
		if err != nil {
			r.t.Fatal(err)
		}
		for seq := uint64(1); seq <= stream.CachedInfo().State.LastSeq; seq++ {
			msg, err := stream.GetMsg(r.t.Context(), seq)
			if err != nil {
				continue
			}
			if _, envelope, err := journal.ParseRecord(msg.Data); err == nil {
				if h, err := kms.ParseHeader(envelope); err == nil {
					keys[h.KeyID] = true
				}
			}
		}
	}
	if len(keys) < 2 {
		r.t.Fatalf("%s: the records are under %d keys", r.id, len(keys))
	}
	for id := range keys {
		add("key id of records", string(id[:]), inNATS, inStore)
	}
}

func parseApp(t *testing.T, text string) []byte {
	t.Helper()
	id, err := journal.ParseAppID(text)
	if err != nil {
		t.Fatal(err)
	}
	return id[:]
}

// misdirect asks a region's listener for another region's app, in every way that
// names one, and expects to be told where it lives.
func misdirect(t *testing.T, process *Process, at int, other *fourth) {
	t.Helper()
	here := process.Regions[at]
	there := process.Regions[slices.IndexFunc(process.Regions, func(r Region) bool { return r.ID == other.id })]
	operator, err := auth.ReadSecret(process.cfg.OperatorTokenFile)
	if err != nil {
		t.Fatal(err)
	}
	event := `{"id":"lost-` + other.canary + `","type":"message.sent","sender":"s-` + other.canary + `","recipient":"b","data":{"bodies":[{"type":"txt","msg":"x"}]}}`
	for _, c := range []struct{ method, path, token, body string }{
		{"POST", "/v1/apps/" + other.app + "/events", other.token, event},
		{"GET", "/v1/apps/" + other.app + "/events", other.token, ""},
		{"GET", "/v1/apps/" + other.app + "/conversations?user=s-" + other.canary, other.token, ""},
		{"GET", "/v1/apps/" + other.app + "/attachments/f-" + other.canary, other.token, ""},
		{"POST", "/v1/apps/" + other.app + "/erasures", other.token, `{"user":"s-` + other.canary + `"}`},
		{"GET", "/v1/apps/" + other.app + "/events", "nonsense", ""},
		{"GET", "/v1/admin/apps/" + other.app, operator, ""},
		{"POST", "/v1/admin/apps/" + other.app + "/plan", operator, `{"plan":"free"}`},
		{"PATCH", "/v1/admin/apps/" + other.app, operator, `{"disabled":true}`},
		{"DELETE", "/v1/admin/apps/" + other.app, operator, ""},
	} {
		status, answer := request(t, c.method, here.URL+c.path, c.token, "application/json", c.body)
		var p struct{ Code, Region, URL string }
		if err := json.Unmarshal(answer, &p); err != nil || status != http.StatusMisdirectedRequest || p.Code != "wrong-region" || p.Region != other.id || p.URL != there.URL {
			t.Errorf("%s %s at %s: %d %s", c.method, c.path, here.ID, status, answer)
		}
	}
	if status, answer := request(t, "GET", here.URL+"/v1/region", other.token, "", ""); status != http.StatusUnauthorized {
		t.Errorf("the manifest of %s for an app of %s: %d %s", here.ID, other.id, status, answer)
	}
}
