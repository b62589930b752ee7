package server

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/go-json-experiment/json"
)

// writeJSON answers with a value of our own making.
func (s *Server) writeJSON(c *call, status int, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encoding an answer: %w", err)
	}
	return s.writeBody(c, status, typeJSON, body)
}

func (s *Server) writeBody(c *call, status int, media string, body []byte) error {
	h := c.w.Header()
	h.Set("Content-Type", media)
	h.Set("Content-Length", strconv.Itoa(len(body)))
	s.extendDeadline(c)
	c.w.WriteHeader(status)
	if c.r.Method != http.MethodHead {
		_, _ = c.w.Write(body) // the caller has gone; there is nobody to tell
	}
	return nil
}

// extendDeadline gives the next write its time. Without it a reader that stops
// reading would hold its connection, and what feeds it, for ever.
func (s *Server) extendDeadline(c *call) {
	err := http.NewResponseController(c.w).SetWriteDeadline(time.Now().Add(s.limits.WriteTimeout))
	if err != nil && !errors.Is(err, http.ErrNotSupported) {
		s.log.Debug("write deadline not set", "request_id", c.id, "err", err)
	}
}
