package bench

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/cmd/coffer/internal/deliver"
	"github.com/cofferdb/coffer/cmd/coffer/internal/egress"
	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/cmd/coffer/internal/webhook"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/callbacks"
)

// stall is how long nothing may come until a benchmark gives up.
const stall = 2 * time.Minute

// callbacksRig is a region that delivers to receivers of this process.
type callbacksRig struct {
	*rig

	apps      []journal.App
	view      *callbacks.View
	endpoints *endpoints.Store
	receiver  *receiver
	hang      *httptest.Server
	unhang    chan struct{}
	roots     *x509.CertPool
	last      journal.Position // of the stored events
	key       endpoints.Key
	stop      context.CancelFunc
	work      sync.WaitGroup
	serials   atomic.Int64

	found             Deliveries // but for what follows
	sent, lost, again int
}

// serial numbers events anew.
func (b *callbacksRig) serial() int { return int(b.serials.Add(1) % 100_000) }

func openCallbacksRig(ctx context.Context, dir string, o Options) (b *callbacksRig, err error) {
	r, err := openRig(ctx, dir, true, o.Log)
	if err != nil {
		return nil, err
	}
	b = &callbacksRig{rig: r, roots: x509.NewCertPool(), unhang: make(chan struct{})}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.close())
		}
	}()
	secret, err := webhook.NewSecret(webhook.Symmetric)
	if err != nil {
		return b, err
	}
	b.key = endpoints.Key(secret.Reveal())
	b.receiver = newReceiver(b.roots)
	b.hang = newHTTPS(b.roots, func(_ http.ResponseWriter, q *http.Request) {
		select {
		case <-b.unhang:
		case <-q.Context().Done():
		}
	})
	if err := b.deliver(ctx); err != nil {
		return b, err
	}
	base, err := template(o.Size)
	if err != nil {
		return b, err
	}
	if err := r.fill(ctx, base, o.Deliveries, func(i int) string { return r.groups.at(i) }); err != nil {
		return b, err
	}
	// More apps, so that there is room for the endpoints.
	for len(b.apps)*endpoints.MaxPerApp < o.Endpoints {
		app, err := r.journal.CreateApp(ctx, journal.AppSpec{Name: "bench", Plan: planID})
		if err != nil {
			return b, err
		}
		b.apps = append(b.apps, app)
	}
	return b, nil
}

// deliver starts the engine.
func (b *callbacksRig) deliver(ctx context.Context) error {
	js, err := jetstream.New(b.conn)
	if err != nil {
		return err
	}
	var syncer journal.Syncer
	if s := b.server.Syncer(); s != nil {
		syncer = s
	}
	rows := journal.NewRows(js, journal.RegistryBucket(b.journal.Region().ID), syncer)
	b.endpoints = endpoints.New(rows, b.journal, nil)
	if b.view, err = callbacks.New(callbacks.Config{Store: b.store}); err != nil {
		return err
	}
	outcomes, err := projections.NewRunner(projections.RunnerConfig{
		Journal: b.journal.Callbacks(), Store: b.store, Projections: []projections.Projection{b.view},
	})
	if err != nil {
		return err
	}
	policy := egress.NewPolicy([]netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")})
	engine := deliver.New(deliver.Config{
		Journal: b.journal, Events: b.rig.view, View: b.view, Endpoints: b.endpoints, Rows: rows, Changed: b.runner.Changed,
		Transport: deliver.NewHTTP(deliver.TransportOptions{Dialer: &egress.Dialer{Policy: policy}, Roots: b.roots, Timeout: hangFor}),
		Signer:    deliver.Standard{}, Encoder: deliver.Events{},
	})
	life, stop := context.WithCancel(context.WithoutCancel(ctx))
	b.stop = stop
	b.work.Go(func() { _ = outcomes.Run(life) })
	b.work.Go(func() { engine.Run(life) })
	return nil
}

func (b *callbacksRig) close() error {
	close(b.unhang)
	if b.stop != nil {
		b.stop()
		b.work.Wait()
	}
	for _, s := range []*httptest.Server{b.hang, b.receiver.server} {
		if s != nil {
			s.CloseClientConnections()
			s.Close()
		}
	}
	return b.rig.close()
}

// endpoint makes an enabled endpoint.
func (b *callbacksRig) endpoint(ctx context.Context, url string, adjust func(*endpoints.Endpoint)) (endpoints.Endpoint, error) {
	e := endpoints.Endpoint{
		App: b.app.ID, ID: endpoints.NewID(), State: endpoints.Enabled, Mode: endpoints.Thin,
		Private: endpoints.Private{URL: url, Secrets: []endpoints.Secret{{Key: b.key, Created: time.Now()}}},
	}
	adjust(&e)
	return b.endpoints.Create(ctx, e)
}

// bareLoop posts signed bodies with a plain client.
func (b *callbacksRig) bareLoop(ctx context.Context, n int) (sample, error) {
	secret, err := webhook.ParseSecret(string(b.key))
	if err != nil {
		return sample{}, err
	}
	transport := &http.Transport{
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: b.roots}, ForceAttemptHTTP2: true, MaxIdleConnsPerHost: callbackWidth,
	}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	body := []byte(strings.Repeat("m", b.receiver.size()))
	_, done := b.receiver.target(n)
	var next atomic.Int64
	var failed atomic.Pointer[error]
	start := time.Now()
	var work sync.WaitGroup
	for range callbackWidth {
		work.Go(func() {
			for i := next.Add(1); i <= int64(n) && failed.Load() == nil; i = next.Add(1) {
				if err := post(ctx, client, b.receiver.url(), fmt.Sprintf("bare_%d_%d", start.UnixNano(), i), body, secret); err != nil {
					failed.Store(&err)
				}
			}
		})
	}
	work.Wait()
	if err := failed.Load(); err != nil {
		return sample{}, *err
	}
	return sample{count: n, elapsed: time.Since(start)}, wait(ctx, done)
}

func post(ctx context.Context, client *http.Client, url, id string, body []byte, secret *webhook.Secret) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	if err := webhook.Sign(request.Header, id, time.Now(), body, secret); err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	_, err = io.Copy(io.Discard, response.Body)
	return err
}

// receiver records the ids of what it gets.
type receiver struct {
	server *httptest.Server

	mu      sync.Mutex // guards what follows
	seen    map[string]struct{}
	twice   int
	bytes   int
	present *target
}

// target is what a measurement waits for.
type target struct {
	receiver *receiver
	want     int
	at       map[string]time.Time
	done     chan struct{}
}

func newHTTPS(roots *x509.CertPool, handle http.HandlerFunc) *httptest.Server {
	s := httptest.NewUnstartedServer(handle)
	s.EnableHTTP2 = true
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	s.StartTLS()
	roots.AddCert(s.Certificate())
	return s
}

func newReceiver(roots *x509.CertPool) *receiver {
	r := &receiver{seen: make(map[string]struct{})}
	r.server = newHTTPS(roots, r.serve)
	return r
}

func (r *receiver) url() string { return r.server.URL }

func (r *receiver) serve(w http.ResponseWriter, q *http.Request) {
	n, err := io.Copy(io.Discard, q.Body)
	if err != nil {
		return
	}
	now, id := time.Now(), q.Header.Get(webhook.HeaderID)
	w.WriteHeader(http.StatusNoContent)
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.seen[id]; ok {
		r.twice++
		return
	}
	r.seen[id] = struct{}{}
	r.bytes = int(n)
	if t := r.present; t != nil {
		t.at[id] = now
		if len(t.at) == t.want {
			close(t.done)
		}
	}
}

// target counts from now on.
func (r *receiver) target(n int) (*target, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.seen) // ids of earlier rounds do not come again
	r.present = &target{receiver: r, want: n, at: make(map[string]time.Time, n), done: make(chan struct{})}
	return r.present, r.present.done
}

func (t *target) count() int {
	t.receiver.mu.Lock()
	defer t.receiver.mu.Unlock()
	return len(t.at)
}

// arrivals returns when each id came. Nothing may come any more.
func (r *receiver) arrivals(t *target) map[string]time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return t.at
}

func (r *receiver) again() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.twice
}

// size is that of the last body.
func (r *receiver) size() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.bytes
}

var errStall = errors.New("it took too long") //nolint:gochecknoglobals // a sentinel

func wait(ctx context.Context, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(stall):
		return errStall
	}
}

func pauseFor(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
