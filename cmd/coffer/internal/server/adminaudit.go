package server

import (
	"fmt"
	"net/http"
	"strconv"

	"github.com/go-json-experiment/json"
)

// auditLog streams the records of the audit log as they are stored, so that the
// caller can verify the chain.
func (s *Server) auditLog(c *call) error {
	var from uint64
	if text := c.query.Get("from"); text != "" {
		var err error
		if from, err = strconv.ParseUint(text, 10, 64); err != nil {
			return s.invalidParameter("from", "it is the number of a record")
		}
	}
	out := s.newLines(c)
	// One that stops before its end is noticed by who verifies it: it does not
	// reach the head.
	if err := s.journal.AuditLog(c.r.Context(), from, out.line); err != nil {
		return err
	}
	return out.flush()
}

func (s *Server) auditHead(c *call) error {
	head, err := s.journal.AuditHead(c.r.Context())
	if err != nil {
		return err
	}
	return s.writeJSON(c, http.StatusOK, head)
}

const linesBuffer = 32 << 10

// lines writes an answer of JSON lines.
type lines struct {
	server *Server
	call   *call
	buf    []byte
	begun  bool
}

func (s *Server) newLines(c *call) *lines { return &lines{server: s, call: c} }

func (l *lines) encode(v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encoding an answer: %w", err)
	}
	return l.line(text)
}

func (l *lines) line(text []byte) error {
	l.buf = append(append(l.buf, text...), '\n')
	if len(l.buf) < linesBuffer {
		return nil
	}
	return l.flush()
}

// flush sends what has gathered; also nothing, as a whole answer.
func (l *lines) flush() error {
	if !l.begun {
		l.begun = true
		l.call.w.Header().Set("Content-Type", typeNDJSON)
		l.call.w.WriteHeader(http.StatusOK)
	}
	l.server.extendDeadline(l.call)
	if l.call.r.Method != http.MethodHead {
		if _, err := l.call.w.Write(l.buf); err != nil {
			return errCallerGone
		}
	}
	l.buf = l.buf[:0]
	return nil
}
