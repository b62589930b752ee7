// Package journaltest starts NATS servers for tests: one embedded as in
// production, and a cluster of three that sync always. Everything lives on disk
// in the test's folder and ends with the test. A Killer ends a test's process at a
// step towards the disk.
//
// Limits: for tests only; it takes a testing.TB.
package journaltest

import (
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/cofferdb/coffer/journal/embedded"
)

// requireEnv names the variable that makes a missing requirement a failure.
const requireEnv = "COFFER_TEST_REQUIRE"

// Skip ends the test because something outside of the repository is missing,
// which it names. With COFFER_TEST_REQUIRE=all the test fails instead.
func Skip(tb testing.TB, reason string) {
	tb.Helper()
	if os.Getenv(requireEnv) == "all" { //nolint:forbidigo // only for tests
		tb.Fatalf("%s=all: %s", requireEnv, reason)
	}
	tb.Skip("skipped: " + reason)
}

// Start starts an embedded server on a folder of the test and returns it with a
// connection. Both are closed with the test.
func Start(tb testing.TB, opts embedded.Options) (*embedded.Server, *nats.Conn) {
	tb.Helper()
	if opts.StoreDir == "" {
		opts.StoreDir = tb.TempDir()
	}
	srv, err := embedded.Start(tb.Context(), opts)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := srv.Close(); err != nil {
			tb.Error(err)
		}
	})
	nc, err := srv.Connect()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(nc.Close)
	return srv, nc
}

// A Cluster is three servers of one cluster, on loopback.
type Cluster struct {
	tb      testing.TB
	links   *links
	opts    [3]*server.Options
	servers [3]*server.Server
}

// StartCluster starts three servers that sync always and waits until they have
// elected a leader.
func StartCluster(tb testing.TB) *Cluster {
	tb.Helper()
	c := &Cluster{tb: tb, links: newLinks(tb)}
	names := [3]string{"n1", "n2", "n3"}
	var ports [3]int
	for i := range ports {
		ports[i] = freePort(tb)
	}
	for i, name := range names {
		var routes []string
		for other, port := range ports {
			if other != i {
				routes = append(routes, "nats://"+c.links.listen(tb, i, other, "127.0.0.1:"+strconv.Itoa(port)))
			}
		}
		opts := &server.Options{
			ServerName: name, Host: "127.0.0.1", Port: server.RANDOM_PORT, NoSigs: true, NoLog: true,
			JetStream: true, StoreDir: tb.TempDir(), JetStreamMaxStore: 8 << 30, JetStreamMaxMemory: 256 << 20, SyncAlways: true, MaxPayload: 1<<20 + 64<<10,
			// What it tells others about itself is of no use, so that they
			// know it by their own link alone.
			Cluster: server.ClusterOpts{Name: "coffer", Host: "127.0.0.1", Port: ports[i], Advertise: "127.0.0.1:1"},
			Routes:  server.RoutesFromStr(strings.Join(routes, ",")),
		}
		c.opts[i] = opts
		c.servers[i] = c.start(i)
	}
	tb.Cleanup(func() {
		for i := range c.servers {
			c.Stop(i)
		}
	})
	c.await("a leader", func() bool {
		for _, s := range c.servers {
			if s.JetStreamIsLeader() {
				return len(s.JetStreamClusterPeers()) == len(c.servers)
			}
		}
		return false
	})
	return c
}

// freePort returns a port that nobody listens on.
func freePort(tb testing.TB) int {
	tb.Helper()
	var lc net.ListenConfig
	l, err := lc.Listen(tb.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port //nolint:errcheck,forcetypeassert // a TCP listener has no other
}

func (c *Cluster) start(i int) *server.Server {
	c.tb.Helper()
	s, err := server.NewServer(c.opts[i])
	if err != nil {
		c.tb.Fatal(err)
	}
	s.Start()
	if !s.ReadyForConnections(30 * time.Second) {
		c.tb.Fatalf("server %s does not get ready", c.opts[i].ServerName)
	}
	// A restart comes back at the same address.
	if a, ok := s.Addr().(*net.TCPAddr); ok {
		c.opts[i].Port = a.Port
	}
	return s
}

func (c *Cluster) await(what string, cond func() bool) {
	c.tb.Helper()
	for deadline := time.Now().Add(60 * time.Second); !cond(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			c.tb.Fatalf("the cluster has no %s after a minute", what)
		}
	}
}

// Stop stops server i; the other two go on.
func (c *Cluster) Stop(i int) {
	if s := c.servers[i]; s != nil {
		s.Shutdown()
		s.WaitForShutdown()
		c.servers[i] = nil
	}
}

// Restart starts server i again, on its folder.
func (c *Cluster) Restart(i int) {
	c.tb.Helper()
	if c.servers[i] == nil {
		c.servers[i] = c.start(i)
	}
}

// Isolate cuts the network between server i and the others: neither hears the
// other, and no connection is closed.
func (c *Cluster) Isolate(i int) { c.links.isolate(i, len(c.servers)) }

// Heal ends what Isolate began; what was sent meanwhile arrives.
func (c *Cluster) Heal() { c.links.heal() }

// StreamLeader returns which server leads a stream.
func (c *Cluster) StreamLeader(stream string) int {
	c.tb.Helper()
	leader := -1
	c.await("leader of stream "+stream, func() bool {
		for i, s := range c.servers {
			if s != nil && s.JetStreamIsStreamLeader(server.DEFAULT_GLOBAL_ACCOUNT, stream) {
				leader = i
				return true
			}
		}
		return false
	})
	return leader
}

// URL names whichever servers run, or those of them that are asked for, separated
// by commas.
func (c *Cluster) URL(of ...int) string {
	var urls []string
	for i, s := range c.servers {
		if s != nil && (len(of) == 0 || slices.Contains(of, i)) {
			urls = append(urls, s.ClientURL())
		}
	}
	return strings.Join(urls, ",")
}

// StoreDirs returns the folder of each server.
func (c *Cluster) StoreDirs() []string {
	dirs := make([]string, len(c.opts))
	for i, o := range c.opts {
		dirs[i] = o.StoreDir
	}
	return dirs
}

// Connect returns a connection to whichever servers run, or those of them that
// are asked for, as the journal needs it. It is closed with the test.
func (c *Cluster) Connect(of ...int) *nats.Conn {
	c.tb.Helper()
	nc, err := nats.Connect(c.URL(of...), nats.ReconnectBufSize(-1), nats.MaxReconnects(-1),
		nats.ReconnectWait(20*time.Millisecond), nats.IgnoreDiscoveredServers())
	if err != nil {
		c.tb.Fatal(err)
	}
	c.tb.Cleanup(nc.Close)
	return nc
}
