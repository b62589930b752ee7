package journaltest

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
)

// links are the connections between the servers of a cluster, each through a
// proxy for its direction, so that the network can be cut between them. A cut
// loses no byte and closes nothing: it holds everything back until it heals, as
// packets that are sent again and again do.
type links struct {
	ctx    context.Context //nolint:containedctx // ends with the test
	mu     sync.Mutex
	cut    map[[2]int]bool // from, to; guarded by mu
	healed chan struct{}   // closed when a cut ends; guarded by mu
	wait   sync.WaitGroup
}

func newLinks(tb testing.TB) *links {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	l := &links{ctx: ctx, cut: make(map[[2]int]bool), healed: make(chan struct{})}
	tb.Cleanup(func() {
		cancel()
		l.wait.Wait()
	})
	return l
}

// listen returns the address by which server from reaches server to, which
// listens at target.
func (l *links) listen(tb testing.TB, from, to int, target string) string {
	tb.Helper()
	var lc net.ListenConfig
	listener, err := lc.Listen(l.ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	context.AfterFunc(l.ctx, func() { _ = listener.Close() })
	l.wait.Go(func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			l.wait.Go(func() { l.join(near, target, from, to) })
		}
	})
	return listener.Addr().String()
}

func (l *links) join(near net.Conn, target string, from, to int) {
	var d net.Dialer
	far, err := d.DialContext(l.ctx, "tcp", target)
	if err != nil {
		_ = near.Close()
		return
	}
	ctx, cancel := context.WithCancel(l.ctx)
	defer cancel()
	context.AfterFunc(ctx, func() { _, _ = near.Close(), far.Close() })
	var both sync.WaitGroup
	both.Go(func() { defer cancel(); l.carry(ctx, far, near, from, to) })
	both.Go(func() { defer cancel(); l.carry(ctx, near, far, to, from) })
	both.Wait()
}

func (l *links) carry(ctx context.Context, dst, src net.Conn, from, to int) {
	buf := make([]byte, 64<<10)
	for {
		n, err := src.Read(buf)
		if l.pass(ctx, from, to) != nil {
			return
		}
		if _, werr := dst.Write(buf[:n]); errors.Join(err, werr) != nil {
			return
		}
	}
}

// pass waits until the direction is open.
func (l *links) pass(ctx context.Context, from, to int) error {
	for {
		l.mu.Lock()
		cut, healed := l.cut[[2]int{from, to}], l.healed
		l.mu.Unlock()
		if !cut {
			return nil
		}
		select {
		case <-healed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (l *links) isolate(server int, servers int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for other := range servers {
		l.cut[[2]int{server, other}], l.cut[[2]int{other, server}] = true, true
	}
}

func (l *links) heal() {
	l.mu.Lock()
	defer l.mu.Unlock()
	clear(l.cut)
	close(l.healed)
	l.healed = make(chan struct{})
}
