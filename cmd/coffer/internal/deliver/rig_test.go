package deliver_test

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/cmd/coffer/internal/deliver"
	"github.com/cofferdb/coffer/cmd/coffer/internal/egress"
	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/cmd/coffer/internal/webhook"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/local"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/callbacks"
	"github.com/cofferdb/coffer/projections/history"
	"github.com/cofferdb/coffer/projections/pebble"
)

// patience bounds what only a hang would reach.
const patience = 60 * time.Second

// rig is a region with an engine that delivers.
type rig struct {
	t         *testing.T
	dir       string
	retention journal.Retention
	provider  kms.Provider // nil: a local file
	now       func() time.Time

	server    *embedded.Server
	conn      *nats.Conn
	own       *local.Provider
	store     *pebble.Store
	events    *history.View
	view      *callbacks.View
	journal   *journal.Journal
	runner    *projections.Runner
	outcomes  *projections.Runner
	rows      *journal.Rows
	endpoints *endpoints.Store
	engine    *deliver.Engine
	app       journal.App

	closed     bool
	external   *external     // nil: an embedded server
	beat       time.Duration // of leases; 0: none
	leases     *deliver.LeaseTable
	stopLeases func(word bool)
	stopEngine func()
	stopViews  func()
	roots      *x509.CertPool
	timeout    time.Duration
	wrap       func(deliver.Transport) deliver.Transport
	dialer     *egress.Dialer // nil: one that may call this machine

	mu         sync.Mutex // guards what follows
	deaf       bool       // nobody can be told
	turnedAway int
	disabled   []endpoints.Endpoint
}

func newRig(t *testing.T, adjust ...func(*rig)) *rig {
	t.Helper()
	r := &rig{t: t, dir: t.TempDir(), roots: x509.NewCertPool(), timeout: 10 * time.Second}
	for _, f := range adjust {
		f(r)
	}
	r.open()
	t.Cleanup(func() { r.close() })
	if !r.app.ID.IsZero() {
		return r // another's
	}
	app, err := r.journal.CreateApp(t.Context(), journal.AppSpec{Name: "test", Plan: "enterprise"})
	if err != nil {
		t.Fatal(err)
	}
	r.app = app
	return r
}

func must[T any](t *testing.T) func(T, error) T {
	t.Helper()
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// open starts everything on the rig's folder.
func (r *rig) open() {
	t := r.t
	r.closed = false
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	ctx := context.Background()
	var syncer journal.Syncer
	var health func(context.Context) error
	if r.external != nil {
		r.conn = must[*nats.Conn](t)(nats.Connect(r.external.server.ClientURL(),
			nats.ReconnectBufSize(-1), nats.MaxReconnects(-1), nats.ReconnectWait(20*time.Millisecond)))
	} else {
		r.server = must[*embedded.Server](t)(embedded.Start(ctx, embedded.Options{StoreDir: filepath.Join(r.dir, "nats"), Log: log}))
		r.conn = must[*nats.Conn](t)(r.server.Connect())
		health = r.server.Check
		if s := r.server.Syncer(); s != nil {
			syncer = s
		}
	}
	provider := r.provider
	if provider == nil {
		r.own = must[*local.Provider](t)(local.Open(ctx, local.Options{Path: filepath.Join(r.dir, "key.json"), Create: true}))
		provider = r.own
	}
	r.store = must[*pebble.Store](t)(pebble.Open(pebble.Options{Dir: filepath.Join(r.dir, "views"), Log: log}))
	r.events = must[*history.View](t)(history.New(history.Config{Store: r.store}))
	r.journal = must[*journal.Journal](t)(journal.Open(ctx, journal.Config{
		Region: journal.DefaultRegions()[2], Conn: r.conn, KMS: provider, Sync: syncer, Index: r.events, Log: log,
		Retention: r.retention, Health: health, Now: r.now,
	}))
	r.view = must[*callbacks.View](t)(callbacks.New(callbacks.Config{Store: r.store, Retention: r.journal.Callbacks().Retention()}))
	r.runner = must[*projections.Runner](t)(projections.NewRunner(projections.RunnerConfig{
		Journal: r.journal, Store: r.store, Projections: []projections.Projection{r.events},
	}))
	r.outcomes = must[*projections.Runner](t)(projections.NewRunner(projections.RunnerConfig{
		Journal: r.journal.Callbacks(), Store: r.store, Projections: []projections.Projection{r.view}, CloseStopped: true,
	}))
	views, stop := context.WithCancel(ctx)
	var work sync.WaitGroup
	work.Go(func() { _ = r.runner.Run(views) })
	work.Go(func() { _ = r.outcomes.Run(views) })
	r.stopViews = func() { stop(); work.Wait() }
	js := must[jetstream.JetStream](t)(jetstream.New(r.conn))
	r.rows = journal.NewRows(js, journal.RegistryBucket("eu"), syncer)
	r.endpoints = endpoints.New(r.rows, r.journal, nil)
	r.start()
}

// again starts another engine in place of one that has ended. The view is open, and
// may not have the last outcomes of that one, which a process that starts waits for.
func (r *rig) again() {
	r.eventually("the last outcomes in the view", func() bool {
		return !slices.ContainsFunc(r.outcomes.Status(context.Background()), func(s projections.Status) bool { return s.Lag > 0 || s.LastErr != nil })
	})
	r.start()
}

// trust has the rig trust the certificates of a file.
func (r *rig) trust(file string) {
	r.roots = x509.NewCertPool()
	if !r.roots.AppendCertsFromPEM(must[[]byte](r.t)(os.ReadFile(file))) {
		r.t.Fatal("no certificate")
	}
}

// start starts an engine.
func (r *rig) start() {
	if r.dialer == nil {
		r.dialer = &egress.Dialer{Policy: egress.NewPolicy([]netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")})}
	}
	var transport deliver.Transport = deliver.NewHTTP(deliver.TransportOptions{Dialer: r.dialer, Roots: r.roots, Timeout: r.timeout})
	if r.wrap != nil {
		transport = r.wrap(transport)
	}
	r.engine = deliver.New(deliver.Config{
		Leases:  r.startLeases(),
		Journal: r.journal, Events: r.events, View: r.view, Endpoints: r.endpoints, Rows: r.rows, Changed: r.runner.Changed,
		Transport: transport, Signer: deliver.Standard{}, Encoder: deliver.Events{}, Now: r.now,
		Disabled: func(_ context.Context, e endpoints.Endpoint) error {
			r.mu.Lock()
			defer r.mu.Unlock()
			if r.deaf {
				r.turnedAway++
				return journal.ErrUnavailable
			}
			r.disabled = append(r.disabled, e)
			return nil
		},
	})
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); r.engine.Run(ctx) }()
	r.stopEngine = func() { stop(); <-done }
}

func (r *rig) close() {
	if r.closed {
		return
	}
	r.closed = true
	r.stopEngine()
	if r.stopLeases != nil {
		r.stopLeases(true)
	}
	r.stopViews()
	for _, close := range []func() error{r.journal.Close, r.store.Close} {
		if err := close(); err != nil {
			r.t.Error(err)
		}
	}
	if r.own != nil {
		_ = r.own.Close()
	}
	r.conn.Close()
	if r.server == nil {
		return
	}
	if err := r.server.Close(); err != nil {
		r.t.Error(err)
	}
}

// restart ends everything and starts it again on the same folder.
func (r *rig) restart() {
	r.close()
	r.open()
}

// endpoint makes an enabled endpoint for a receiver.
func (r *rig) endpoint(url string, adjust ...func(*endpoints.Endpoint)) endpoints.Endpoint {
	r.t.Helper()
	secret := must[*webhook.Secret](r.t)(webhook.NewSecret(webhook.Symmetric))
	e := endpoints.Endpoint{
		App: r.app.ID, ID: endpoints.NewID(), State: endpoints.Enabled, Mode: endpoints.Thin,
		Private: endpoints.Private{URL: url, Secrets: []endpoints.Secret{{Key: endpoints.Key(secret.Reveal()), Created: time.Now()}}},
	}
	for _, f := range adjust {
		f(&e)
	}
	return must[endpoints.Endpoint](r.t)(r.endpoints.Create(r.t.Context(), e))
}

// append appends n messages of a conversation and returns their positions.
func (r *rig) append(n int, conversation string) []journal.Position {
	r.t.Helper()
	var positions []journal.Position
	for len(positions) < n {
		var batch []journal.Event
		for i := range min(n-len(positions), 500) {
			batch = append(batch, journal.Event{
				Type: journal.MessageSent, Conversation: conversation, ConversationType: journal.Group, Sender: "alice",
				Data: jsontext.Value(`{"bodies":[{"type":"txt","msg":"` + strconv.Itoa(i) + `"}]}`),
			})
		}
		results := must[[]journal.Result](r.t)(r.journal.Append(r.t.Context(), r.app.ID, batch...))
		for _, res := range results {
			if res.Err != nil {
				r.t.Fatal(res.Err)
			}
			positions = append(positions, res.Position)
		}
	}
	return positions
}

// eventually waits for a condition.
func (r *rig) eventually(what string, ok func() bool) {
	r.t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			r.t.Fatalf("%s did not come", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// progress is what the view has of an endpoint.
func (r *rig) progress(e endpoints.Endpoint) callbacks.Progress {
	p, err := r.view.Progress(context.Background(), e.App, e.ID)
	if err != nil {
		return callbacks.Progress{}
	}
	return p
}

// A got is a request as a receiver had it.
type got struct {
	id     string
	header http.Header
	body   []byte
	bodies []received
}

type received struct {
	ID           string `json:"id"`
	Type         string `json:"type"`
	Position     string `json:"position"`
	Number       string `json:"number"`
	Conversation string `json:"conversation"`
	Gone         string `json:"gone"`
}

// receiver is an HTTPS server that records what it gets.
type receiver struct {
	*httptest.Server

	mu     sync.Mutex // guards what follows
	got    []got
	times  map[string]int // of each event's position
	answer func(w http.ResponseWriter, g got) bool
}

// receive starts a receiver; answer may write an answer, and returns false for
// the usual one, 204.
func (r *rig) receive(answer func(w http.ResponseWriter, g got) bool, adjust ...func(*httptest.Server)) *receiver {
	rc := &receiver{times: make(map[string]int), answer: answer}
	rc.Server = httptest.NewUnstartedServer(http.HandlerFunc(rc.serve))
	rc.EnableHTTP2 = true
	rc.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	for _, f := range adjust {
		f(rc.Server)
	}
	rc.StartTLS()
	r.roots.AddCert(rc.Certificate())
	r.t.Cleanup(rc.Close)
	return rc
}

func (rc *receiver) serve(w http.ResponseWriter, q *http.Request) {
	body, err := io.ReadAll(q.Body)
	if err != nil {
		return
	}
	g := got{id: q.Header.Get("Webhook-Id"), header: q.Header.Clone(), body: body}
	if len(body) > 0 && body[0] == '[' {
		_ = json.Unmarshal(body, &g.bodies)
	} else {
		var one received
		_ = json.Unmarshal(body, &one)
		g.bodies = []received{one}
	}
	rc.mu.Lock()
	answer := rc.answer
	rc.mu.Unlock()
	handled := answer != nil && answer(w, g)
	rc.mu.Lock()
	rc.got = append(rc.got, g)
	for _, b := range g.bodies {
		rc.times[b.Position]++
	}
	rc.mu.Unlock()
	if !handled {
		w.WriteHeader(http.StatusNoContent)
	}
}

// answers changes what is answered.
func (rc *receiver) answers(f func(w http.ResponseWriter, g got) bool) {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	rc.answer = f
}

func (rc *receiver) all() []got {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	return append([]got(nil), rc.got...)
}

func (rc *receiver) requests() int {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	return len(rc.got)
}

// counts returns how many of the positions came, and how many requests beyond
// the first one of each.
func (rc *receiver) counts(positions []journal.Position) (found, again int) {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	for _, p := range positions {
		if n := rc.times[p.String()]; n > 0 {
			found++
			again += n - 1
		}
	}
	return found, again
}
