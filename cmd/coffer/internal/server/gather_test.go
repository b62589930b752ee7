package server

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
)

// countedListener notes the sizes of the writes to its connections.
type countedListener struct {
	net.Listener

	mu     sync.Mutex
	writes []int
	fail   error
}

type countedConn struct {
	net.Conn

	l *countedListener
}

func (l *countedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return countedConn{c, l}, err
}

func (c countedConn) Write(b []byte) (int, error) {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	if c.l.fail != nil {
		return 0, c.l.fail
	}
	c.l.writes = append(c.l.writes, len(b))
	return c.Conn.Write(b)
}

func (l *countedListener) sizes() []int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.writes
}

// TestGather: what is written between hold and send is one write, in its order
// with what comes before and after, however much it is; and after a failed one
// nothing is written any more.
func TestGather(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // closed below
	if err != nil {
		t.Fatal(err)
	}
	counted := &countedListener{Listener: inner}
	l := Gather(counted)
	defer func() { _ = l.Close() }()
	accepted := make(chan net.Conn, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			t.Error(err)
		}
		accepted <- c
	}()
	reader, err := net.Dial("tcp", l.Addr().String()) //nolint:noctx // of this machine
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = reader.Close() }()
	conn := <-accepted
	defer func() { _ = conn.Close() }()
	read := make(chan []byte, 1)
	go func() {
		all, err := io.ReadAll(reader)
		if err != nil {
			t.Error(err)
		}
		read <- all
	}()

	r, err := http.NewRequestWithContext(GatherContext(t.Context(), conn), http.MethodGet, "/", nil)
	if err != nil {
		t.Fatal(err)
	}
	g := (&call{r: r}).gatherer()
	var want []byte
	write := func(b byte, n int) {
		t.Helper()
		part := bytes.Repeat([]byte{b}, n)
		want = append(want, part...)
		if wrote, err := conn.Write(part); err != nil || wrote != n {
			t.Fatalf("writing %d bytes: %d, %v", n, wrote, err)
		}
	}
	write('a', 10)
	g.hold()
	for range 5 {
		write('b', 16<<10)
	}
	if got := counted.sizes(); len(got) != 1 {
		t.Fatalf("writes while they are held back: %v", got)
	}
	if err := g.send(); err != nil {
		t.Fatal(err)
	}
	if got := counted.sizes(); len(got) != 2 || got[1] != 80<<10 {
		t.Fatalf("writes after sending: %v", got)
	}
	write('c', 10)
	g.hold()
	write('d', gatherBytes-1)
	write('e', 2)             // no room: what is held goes first
	write('f', gatherBytes+1) // more than there can be room for
	write('g', 3)
	if err := g.send(); err != nil {
		t.Fatal(err)
	}
	if err := g.send(); err != nil {
		t.Errorf("nothing to send: %v", err)
	}

	broken := errors.New("broken")
	counted.mu.Lock()
	counted.fail = broken
	counted.mu.Unlock()
	g.hold()
	if _, err := conn.Write([]byte("lost")); err != nil {
		t.Errorf("a write that is held back: %v", err)
	}
	if err := g.send(); !errors.Is(err, broken) {
		t.Errorf("sending what cannot be written: %v", err)
	}
	counted.mu.Lock()
	counted.fail = nil
	counted.mu.Unlock()
	if _, err := conn.Write([]byte("out of place")); !errors.Is(err, broken) {
		t.Errorf("a write after a failed one: %v", err)
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	if got := <-read; !bytes.Equal(got, want) {
		t.Errorf("the reader has got %d bytes, not the %d that were sent in their order", len(got), len(want))
	}

	r.ProtoMajor = 2 // its connection is others' too
	if g := (&call{r: r}).gatherer(); g != nil {
		t.Error("a connection of HTTP/2 is held back")
	}
}
