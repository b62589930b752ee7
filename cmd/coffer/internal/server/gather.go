package server

import (
	"context"
	"crypto/tls"
	"net"
	"sync"
)

// Gather returns a listener whose connections can gather what a stream writes.
//
// crypto/tls makes a call of the system of each record, of 16 KiB at most, and
// net/http has a record of its own for the few bytes between two chunks. On a
// replay that is six calls for each batch of 64 KiB, and at the other end as many
// awakenings; gathered it is one.
func Gather(l net.Listener) net.Listener { return gatherListener{l} }

// GatherContext is for http.Server.ConnContext: streams find their connection by
// it.
func GatherContext(ctx context.Context, c net.Conn) context.Context {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	if g, ok := c.(*gatherConn); ok {
		return context.WithValue(ctx, gatherKey{}, g)
	}
	return ctx
}

type gatherKey struct{}

// gatherer returns the call's connection, on which what is written can be held
// back. Over HTTP/2, whose connections belong to several calls, there is none, and
// the methods of nil do nothing.
func (c *call) gatherer() *gatherConn {
	if c.r.ProtoMajor != 1 {
		return nil
	}
	g, _ := c.r.Context().Value(gatherKey{}).(*gatherConn)
	return g
}

type gatherListener struct{ net.Listener }

func (l gatherListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &gatherConn{Conn: c}, nil
}

// gatherConn holds back what is written between hold and send. Without a hold it
// has no memory of its own.
type gatherConn struct {
	net.Conn

	mu   sync.Mutex // guards what follows, and keeps writes in order
	held *[]byte    // nil: nothing is held back
	err  error      // of a write of what was held back: what follows would be out of place
}

// gatherBytes is what is held back at most: a batch with what TLS and a form of
// stream put around it.
const gatherBytes = 128 << 10

var gatherRoom = sync.Pool{New: func() any { //nolint:gochecknoglobals // holds no state
	b := make([]byte, 0, gatherBytes)
	return &b
}}

func (g *gatherConn) hold() {
	if g == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.held == nil {
		g.held, _ = gatherRoom.Get().(*[]byte)
	}
}

// send writes what was held back, and from then on nothing is.
func (g *gatherConn) send() error {
	if g == nil {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.held == nil {
		return g.err
	}
	g.flush()
	gatherRoom.Put(g.held)
	g.held = nil
	return g.err
}

// abort ends a send that waits for the reader.
func (g *gatherConn) abort() {
	if g != nil {
		_ = g.Conn.Close() // the writer gets the error
	}
}

// flush is called with g.mu held.
func (g *gatherConn) flush() {
	if len(*g.held) > 0 && g.err == nil {
		_, g.err = g.Conn.Write(*g.held)
	}
	*g.held = (*g.held)[:0]
}

func (g *gatherConn) Write(b []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err != nil {
		return 0, g.err
	}
	if g.held == nil {
		return g.Conn.Write(b)
	}
	if len(*g.held)+len(b) > cap(*g.held) {
		g.flush()
	}
	if len(b) > cap(*g.held) {
		return g.Conn.Write(b)
	}
	*g.held = append(*g.held, b...)
	return len(b), g.err
}
