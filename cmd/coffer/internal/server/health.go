package server

import "net/http"

// livez says that the process answers, whatever else is wrong.
func (s *Server) livez(c *call) error {
	return s.writeJSON(c, http.StatusOK, map[string]string{"status": "ok"})
}

type readiness struct {
	Ready   bool      `json:"ready"`
	Region  string    `json:"region"`
	Reasons []Unready `json:"reasons"`
}

// readyz says whether the region can take and serve events, and if not, why.
func (s *Server) readyz(c *call) error {
	answer := readiness{Ready: true, Region: s.region.ID, Reasons: []Unready{}}
	if s.ready != nil {
		if reasons := s.ready(c.r.Context()); len(reasons) > 0 {
			answer.Ready, answer.Reasons = false, reasons
		}
	}
	if !answer.Ready {
		return s.writeJSON(c, http.StatusServiceUnavailable, answer)
	}
	return s.writeJSON(c, http.StatusOK, answer)
}
