package server_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
)

// stalled is a reader that has asked for a replay and takes nothing but what the
// kernel takes for it.
type stalled struct {
	conn net.Conn
	in   *bufio.Reader
}

func stall(s *site) *stalled {
	s.t.Helper()
	dialer := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { _ = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 16<<10) }) //nolint:gosec // a descriptor
	}}
	conn, err := (&tls.Dialer{NetDialer: &dialer, Config: s.transport(false).TLSClientConfig}).DialContext(s.t.Context(), "tcp", strings.TrimPrefix(s.url, "https://"))
	if err != nil {
		s.t.Fatal(err)
	}
	_, err = fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: localhost\r\nAccept: application/x-ndjson\r\nAuthorization: Bearer %s\r\n\r\n", s.events(), s.token)
	if err != nil {
		s.t.Fatal(err)
	}
	r := &stalled{conn, bufio.NewReader(conn)}
	if status, err := r.in.ReadString('\n'); err != nil || !strings.Contains(status, "200") {
		s.t.Fatalf("%q, %v", status, err)
	}
	return r
}

// bulk stores some 20 MiB, which is more than the kernel takes of a connection
// that nobody reads.
func (s *site) bulk() (events int) {
	s.t.Helper()
	const calls, each = 4, 1000
	text := strings.Repeat("x", 5000)
	for i := range calls {
		batch := make([]string, each)
		for j := range batch {
			batch[j] = sent(fmt.Sprintf("bulk-%d-%d", i, j), "ann", "ben", text)
		}
		last := s.post(batch...)
		if a := s.do(request{path: s.events() + "?limit=1&min_position=" + last[each-1]}); a.status != http.StatusOK {
			s.t.Fatalf("%d %s", a.status, a.body)
		}
	}
	return calls * each
}

// TestReadersThatStop: what a reader does not take stays in the view. Many that
// take nothing cost the server a bounded piece of memory each, and neither other
// readers nor writers notice them.
func TestReadersThatStop(t *testing.T) {
	s := newSite(t, config.Limits{})
	events := s.bulk()
	heap := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	whole := func() {
		t.Helper()
		if got, _ := s.replay(""); len(got) != events {
			t.Fatalf("a reader got %d events of %d", len(got), events)
		}
	}
	whole() // what it leaves in caches is not counted
	before := heap()
	const readers, most = 24, 3 << 20
	for range readers {
		r := stall(s)
		defer func() { _ = r.conn.Close() }()
	}
	whole()
	s.post(sent("meanwhile", "ann", "ben", "x"))
	events++
	if a := s.do(request{path: s.events() + "/bulk-0-0"}); a.status != http.StatusOK {
		t.Errorf("one event: %d %s", a.status, a.body)
	}
	after := heap()
	each := (int64(after) - int64(before)) / readers
	if each > most {
		t.Errorf("a reader that takes nothing holds %d bytes of the server", each)
	}
	t.Logf("%d bytes for a reader", each)
}

// TestReaderThatStopsIsCut: in the end the stream of a reader that takes nothing
// ends, without a trailer, and gives back what it held.
func TestReaderThatStopsIsCut(t *testing.T) {
	s := newSite(t, config.Limits{WriteTimeout: config.Duration(time.Second), AppStreams: 1})
	s.bulk()
	r := stall(s)
	defer func() { _ = r.conn.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	accept := map[string]string{"Accept": "application/x-ndjson"}
	for { // until the stream's place is free again
		if a := s.do(request{path: s.events() + "?limit=1", header: accept}); a.status == http.StatusOK {
			break
		} else if a.status != http.StatusTooManyRequests || ctx.Err() != nil {
			t.Fatalf("%d %s", a.status, a.body)
		}
	}
	rest, _ := io.ReadAll(r.in) // what the kernel had taken
	if strings.Contains(string(rest), `{"end":`) {
		t.Error("a cut stream has a trailer")
	}
}
