package deliver_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/cmd/coffer/internal/deliver"
	"github.com/cofferdb/coffer/cmd/coffer/internal/egress"
	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections/callbacks"
)

// rebound is a host whose addresses are changed under it; every other host is this
// machine.
const rebound = "rebound.example"

// names answers look-ups.
type names struct {
	mu      sync.Mutex // guards rebound
	rebound []netip.Addr
}

func (n *names) rebind(to ...string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.rebound = nil
	for _, a := range to {
		n.rebound = append(n.rebound, netip.MustParseAddr(a))
	}
}

func (n *names) LookupNetIP(_ context.Context, _, host string) ([]netip.Addr, error) {
	if host != rebound {
		return []netip.Addr{netip.MustParseAddr("127.0.0.1")}, nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.rebound, nil
}

// tunnels is a proxy for CONNECT that notes where it connects from and to.
type tunnels struct {
	mu   sync.Mutex // guards what follows
	from map[string]bool
	to   []string
}

func (p *tunnels) start(t *testing.T) *url.URL {
	t.Helper()
	p.from = make(map[string]bool)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		target, err := net.Dial("tcp", q.Host)
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		defer target.Close()
		p.mu.Lock()
		p.from[target.LocalAddr().String()] = true
		p.to = append(p.to, q.Host)
		p.mu.Unlock()
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n")
		go func() { _, _ = io.Copy(target, conn); _ = target.Close() }()
		_, _ = io.Copy(conn, target)
	}))
	t.Cleanup(server.Close)
	return must[*url.URL](t)(url.Parse(server.URL))
}

// TestEveryDialIsJudged: whatever an endpoint is sent, an event, one again, a
// verification, a test, a question, its host is looked up and judged for the
// connection, which goes where it was judged, by the proxy where there is one.
func TestEveryDialIsJudged(t *testing.T) {
	t.Parallel()
	for _, proxied := range []bool{false, true} {
		t.Run(map[bool]string{false: "directly", true: "by a proxy"}[proxied], func(t *testing.T) {
			t.Parallel()
			host, proxy := &names{}, &tunnels{}
			dialer := &egress.Dialer{Policy: egress.NewPolicy([]netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}), Resolver: host}
			if proxied {
				dialer.Proxy = proxy.start(t)
			}
			r := newRig(t, short, func(r *rig) { r.dialer = dialer })
			var mu sync.Mutex
			arrived := make(map[string]string) // the kind of request, and where it came from
			rc := r.receive(nil, func(s *httptest.Server) {
				inner := s.Config.Handler
				s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
					mu.Lock()
					arrived[q.URL.Path] = q.RemoteAddr
					mu.Unlock()
					inner.ServeHTTP(w, q)
				})
			})
			// The certificate of a test server is of example.com too.
			good := strings.Replace(rc.URL, "127.0.0.1", "example.com", 1) + "/"
			bad := strings.Replace(rc.URL, "127.0.0.1", rebound, 1) + "/bad"
			kinds := map[string]func(ep *endpoints.Endpoint) journal.Cause{
				"verification": func(ep *endpoints.Endpoint) journal.Cause {
					a, _, err := r.engine.Verify(t.Context(), ep)
					return must[deliver.Answer](t)(a, err).Cause
				},
				"test": func(ep *endpoints.Endpoint) journal.Cause {
					return must[deliver.Answer](t)(r.engine.Test(t.Context(), ep)).Cause
				},
				"question": func(ep *endpoints.Endpoint) journal.Cause {
					return must[deliver.Answer](t)(r.engine.Ask(t.Context(), ep, &journal.Event{
						Type: journal.MessageSent, Conversation: "group-1", ConversationType: journal.Group, Sender: "alice", Time: time.Now(), Data: jsontext.Value(`{}`),
					})).Cause
				},
				"event": func(ep *endpoints.Endpoint) journal.Cause {
					r.append(1, "group-1")
					r.eventually("an outcome", func() bool { p := r.progress(*ep); return p.Done+p.Waiting > 0 })
					list := must[[]deliver.Outcome](t)(r.engine.Outcomes(t.Context(), ep, callbacks.Query{Limit: 1}))
					return list[0].Cause
				},
				"replay": func(ep *endpoints.Endpoint) journal.Cause {
					r.append(1, "group-1")
					rp := must[deliver.Replay](t)(r.engine.StartReplay(t.Context(), ep, deliver.ReplaySpec{Rate: 1000}))
					r.eventually("the end of the replay", func() bool {
						now, err := r.engine.Replay(t.Context(), ep.App, rp.IDText())
						rp = now
						return err == nil && now.State == deliver.ReplayDone && now.Sent+uint64(now.Failed) > 0
					})
					if rp.Failed > 0 {
						return journal.CauseAddress
					}
					return journal.CauseNone
				},
			}
			for kind, send := range kinds {
				e := r.endpoint(good + kind)
				if cause := send(&e); cause != journal.CauseNone {
					t.Errorf("%s to an address that is allowed: %v", kind, cause)
				}
				for _, to := range [][]string{{"127.0.0.1", "10.0.0.1"}, {"169.254.169.254"}, {"::ffff:127.0.0.2"}} {
					host.rebind(to...)
					e := r.endpoint(bad)
					if cause := send(&e); cause != journal.CauseAddress {
						t.Errorf("%s to %v: %v", kind, to, cause)
					}
				}
			}
			mu.Lock()
			defer mu.Unlock()
			proxy.mu.Lock()
			defer proxy.mu.Unlock()
			for kind := range kinds {
				from := arrived["/"+kind]
				if from == "" {
					t.Errorf("%s did not come", kind)
				}
				if proxied && !proxy.from[from] {
					t.Errorf("%s came past the proxy, from %s", kind, from)
				}
			}
			for _, to := range proxy.to {
				if to != rc.Listener.Addr().String() {
					t.Errorf("the proxy was asked for %s", to)
				}
			}
		})
	}
}
