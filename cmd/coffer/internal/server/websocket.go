package server

import (
	"cmp"
	"context"
	"crypto/fips140"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/coder/websocket"
)

// socketReadLimit bounds what a caller may send on a WebSocket. It has nothing
// to say: a message of its ends the stream, so only control frames come.
const socketReadLimit = 1 << 10

// wantsSocket reports whether the request asks for a WebSocket (RFC 6455).
func wantsSocket(r *http.Request) bool {
	for _, value := range r.Header.Values("Upgrade") {
		for name := range strings.SplitSeq(value, ",") {
			if strings.EqualFold(strings.TrimSpace(name), "websocket") {
				return true
			}
		}
	}
	return false
}

// socket is a stream of text messages, an event's JSON each. The reason of the
// last frame says how it ended and where to go on.
type socket struct {
	s    *Server
	c    *call
	conn *websocket.Conn
	left context.Context //nolint:containedctx // ends when the caller leaves; made by the connection
}

// newSocket checks what can be answered with a problem. The connection is taken
// over only when the first batch is there, so that a refused cursor is one too.
func (s *Server) newSocket(c *call) (*socket, error) {
	h := c.r.Header
	switch {
	case c.r.Method != http.MethodGet || c.r.ProtoMajor != 1 || c.r.ProtoMinor != 1:
		return nil, s.invalidHeader(s.kinds.invalidRequest, "Upgrade", "a WebSocket is opened with GET over HTTP/1.1")
	case !headerHas(h, "Connection", "upgrade"):
		return nil, s.invalidHeader(s.kinds.invalidRequest, "Connection", "a WebSocket is opened with Connection: Upgrade")
	case h.Get("Sec-WebSocket-Version") != "13":
		return nil, s.invalidHeader(s.kinds.invalidRequest, "Sec-WebSocket-Version", "the version must be 13")
	case !socketKey(h):
		return nil, s.invalidHeader(s.kinds.invalidRequest, "Sec-WebSocket-Key", "one key of 16 bytes is needed")
	}
	if origin := h.Get("Origin"); origin != "" {
		// A page of another site must not read with a credential that the
		// browser holds.
		u, err := url.Parse(origin)
		if err != nil || !strings.EqualFold(u.Host, c.r.Host) {
			return nil, s.invalidHeader(s.kinds.originForbidden, "Origin", "a WebSocket is opened by no page or by one of this server")
		}
	}
	return &socket{s: s, c: c}, nil
}

func socketKey(h http.Header) bool {
	values := h.Values("Sec-WebSocket-Key")
	if len(values) != 1 {
		return false
	}
	key, err := base64.StdEncoding.DecodeString(strings.TrimSpace(values[0]))
	return err == nil && len(key) == 16
}

func headerHas(h http.Header, name, token string) bool {
	for _, value := range h.Values(name) {
		for part := range strings.SplitSeq(value, ",") {
			if strings.EqualFold(strings.TrimSpace(part), token) {
				return true
			}
		}
	}
	return false
}

func (k *socket) begin() error {
	// A hijacked connection is not waited for by http.Server.Shutdown.
	k.s.sockets.Add(1)
	k.c.after = append(k.c.after, k.s.sockets.Done)
	var conn *websocket.Conn
	var err error
	// The handshake of RFC 6455 has SHA-1 as a fixed transformation, which keeps
	// nothing secret and proves nothing.
	fips140.WithoutEnforcement(func() {
		conn, err = websocket.Accept(k.c.w, k.c.r, &websocket.AcceptOptions{CompressionMode: websocket.CompressionDisabled})
	})
	if err != nil {
		return fmt.Errorf("%w: %w", errCallerGone, err)
	}
	conn.SetReadLimit(socketReadLimit)
	k.conn = conn
	// The request's context no longer ends when the caller leaves.
	ctx, leave := context.WithCancel(context.WithoutCancel(k.c.r.Context()))
	k.left = ctx
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer leave()
		k.listen(ctx)
	}()
	k.c.after = append(k.c.after, func() {
		_ = conn.CloseNow()
		<-done
	})
	return nil
}

// listen answers control frames until the connection ends, which it does when the
// caller sends a message. (Conn.CloseRead would do the same, but in v1.8.15 its
// Close waits for itself, for 15 seconds.)
func (k *socket) listen(ctx context.Context) {
	if _, _, err := k.conn.Reader(ctx); err == nil {
		_ = k.conn.Close(websocket.StatusPolicyViolation, "message-forbidden") // it is over either way
	}
}

func (k *socket) batch(b *sealedBatch) error {
	if k.conn == nil {
		if err := k.begin(); err != nil {
			return err
		}
	}
	if len(b.ends) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(k.left, k.s.limits.WriteTimeout)
	defer cancel()
	conn := k.c.gatherer()
	defer context.AfterFunc(ctx, conn.abort)() // the library does not see the last write
	conn.hold()
	var err error
	start := 0
	for _, end := range b.ends {
		if err = k.conn.Write(ctx, websocket.MessageText, b.lines[start:end-1]); err != nil {
			break
		}
		start = end
	}
	if err = cmp.Or(err, conn.send()); err != nil {
		return fmt.Errorf("%w: %w", errCallerGone, err)
	}
	k.c.w.bytes += int64(len(b.lines))
	return nil
}

func (k *socket) alive(func() (string, error), bool) error {
	ctx, cancel := context.WithTimeout(k.left, k.s.limits.WriteTimeout)
	defer cancel()
	if err := k.conn.Ping(ctx); err != nil {
		return fmt.Errorf("%w: %w", errCallerGone, err)
	}
	return nil
}

func (k *socket) gone() <-chan struct{} {
	if k.left == nil {
		return nil
	}
	return k.left.Done()
}

// end closes the connection. The reason is at most 123 bytes (RFC 6455, section
// 5.5): a code, and the cursor that goes on.
func (k *socket) end(t trailer, _ []byte) error {
	code, status := "end", websocket.StatusNormalClosure
	switch {
	case t.Problem != nil:
		code, status = t.Problem.Code, websocket.StatusInternalError
		if t.Problem.Retryable {
			status = websocket.StatusTryAgainLater
		} else if t.Problem.Status < http.StatusInternalServerError {
			status = websocket.StatusPolicyViolation
		}
	case t.cause != nil:
		code, status = "stopping", websocket.StatusGoingAway
	}
	timer := time.AfterFunc(socketGoodbye, func() { _ = k.conn.CloseNow() })
	defer timer.Stop()
	_ = k.conn.Close(status, code+" "+t.Next) // the caller may have left; there is nobody to tell
	return nil
}

// socketGoodbye is how long the caller's part of the closing handshake is waited
// for.
const socketGoodbye = 2 * time.Second
