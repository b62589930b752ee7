package server

import (
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/monitor"
	"github.com/cofferdb/coffer/journal"
)

// metrics writes the region's metrics for a Prometheus.
func (s *Server) metricsOfRegion(c *call) error {
	s.metrics.ServeHTTP(c.w, c.r)
	return nil
}

const (
	defaultMinutes = 60
	mostMinutes    = 1440
)

// minuteView is what an app was served in a minute, by one process.
type minuteView struct {
	From       string          `json:"from"`
	Until      string          `json:"until"`
	Events     uint64          `json:"events" doc:"that were appended"`
	Operations []operationView `json:"operations"`
}

type operationView struct {
	Operation string `json:"operation" doc:"append, replay, tail, event, messages, conversations, inbox, profile, attachment, endpoints, export, metrics, erasure, other, or deliver: requests to the app's webhook endpoints"`
	Requests  uint64 `json:"requests"`
	Refused   uint64 `json:"refused" doc:"answered 400 to 499"`
	Failed    uint64 `json:"failed" doc:"answered 500 to 599, or not at all"`
	// A tail lasts as long as its reader likes.
	Seconds float64 `json:"seconds" doc:"that they took, together; none of a tail"`
	Buckets []uint  `json:"buckets" doc:"how many took up to 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000 ms, and longer"`
}

// appMetrics gives the app's monitoring data, the oldest first.
func (s *Server) appMetrics(c *call) error {
	from, err := s.timeParameter(c, "from")
	if err != nil {
		return err
	}
	b := binding{list: "metrics", from: from}
	after, err := s.placeParameter(c, "after", b)
	if err != nil {
		return err
	}
	limit, err := s.limitParameter(c, defaultMinutes, mostMinutes)
	if err != nil {
		return err
	}
	found, more, err := s.journal.Monitoring(c.r.Context(), c.app.ID, uint64(after), from, limit)
	if err != nil {
		return err
	}
	answer := list[minuteView]{Data: []minuteView{}}
	for _, r := range found {
		record, err := monitor.ParseRecord(r.Record)
		if err != nil {
			return err
		}
		answer.Data = append(answer.Data, viewMinute(&record))
	}
	if more && len(found) > 0 {
		next, err := s.cursor(c, b, journal.Position(found[len(found)-1].Sequence))
		if err != nil {
			return err
		}
		answer.Next = &next
	}
	return s.writeJSON(c, http.StatusOK, answer)
}

func viewMinute(r *monitor.Record) minuteView {
	v := minuteView{From: r.From.Format(timeLayout), Until: r.Until.Format(timeLayout), Events: r.Events, Operations: []operationView{}}
	for _, op := range slices.Sorted(maps.Keys(r.Operations)) {
		count := r.Operations[op]
		v.Operations = append(v.Operations, operationView{
			Operation: string(op), Requests: count.Count, Refused: count.Refused, Failed: count.Failed,
			Seconds: float64(count.Micros) / 1e6, Buckets: count.Buckets[:],
		})
	}
	return v
}

// measure counts a request that has ended.
func (s *Server) measure(c *call, started time.Time) {
	outcome := monitor.OutcomeOf(c.w.status)
	if c.w.status == 0 && c.r.Context().Err() != nil {
		outcome = monitor.Refused // by who asked, who has gone
	}
	s.meter.Observe(c.app.ID, operationOf(c), outcome, s.now().Sub(started))
}

// operationOf is what was asked for, in the words of the monitoring data.
func operationOf(c *call) monitor.Operation {
	if c.route == nil {
		return monitor.Other
	}
	if !c.route.ofApp() {
		if strings.HasPrefix(c.route.path, "/v1/admin/") {
			return monitor.Admin
		}
		return monitor.Other
	}
	rest := strings.TrimPrefix(c.route.path, "/v1/apps/{app}/")
	switch {
	case rest == "events" && c.route.method == http.MethodPost:
		return monitor.Append
	case rest == "events" && tails(c):
		return monitor.Tail
	case rest == "events":
		return monitor.Replay
	case strings.HasSuffix(rest, "/messages"):
		return monitor.Messages
	case strings.HasSuffix(rest, "/profile"):
		return monitor.Profile
	case strings.Contains(rest, "/inbox"):
		return monitor.Inbox
	}
	switch first, _, _ := strings.Cut(rest, "/"); first {
	case "events":
		return monitor.Event
	case "conversations":
		return monitor.Conversations
	case "attachments":
		return monitor.Attachment
	case "endpoints", "callbacks", "replays":
		return monitor.Endpoints
	case "exports":
		return monitor.Export
	case "erasures":
		return monitor.Erasure
	case "metrics":
		return monitor.Reading
	}
	return monitor.Other
}

// tails reports whether the answer was one that stays at the end.
func tails(c *call) bool {
	return c.w.status == http.StatusSwitchingProtocols || c.query.Get("follow") == "true" ||
		strings.HasPrefix(c.w.Header().Get("Content-Type"), typeEventStream)
}

func (s *Server) metricsRoutes() []route {
	return []route{
		{method: "GET", path: "/metrics", who: operator, handle: (*Server).metricsOfRegion},
		{method: "GET", path: "/v1/apps/{app}/metrics", who: appBackend, query: []string{"from", "after", "limit"}, handle: (*Server).appMetrics},
	}
}

// describeMetrics adds what there is to say about monitoring.
func (s *Server) describeMetrics(all map[string]description) {
	all["GET /metrics"] = description{
		id: "regionMetrics", summary: "The region's metrics, for a Prometheus with an operator's token",
		text:    "`docs/operations/metrics.md` lists them. No label names an app, a user or an endpoint.",
		answers: []documented{{status: http.StatusOK, about: "in the format of Prometheus, or of OpenMetrics when `Accept` asks for it", streams: map[string]string{"text/plain": "metrics"}}},
	}
	all["GET /v1/apps/{app}/metrics"] = description{
		id: "appMetrics", summary: "What the app was served in the last days, by the minute, the oldest first",
		text: "A record for each minute in which something was asked for, and for each process that answered: add them up. " +
			"They are kept for 7 days, and hold numbers only. The present minute comes when it is over.",
		query: map[string]parameter{
			"from":  {about: "records that were written at this time or later", schema: object{"type": "string", "format": "date-time"}},
			"after": {about: "the `next` of another page", schema: object{"type": "string"}},
			"limit": {about: "how many", schema: object{"type": "integer", "minimum": 1, "maximum": mostMinutes}},
		},
		answers:  []documented{ok[list[minuteView]](http.StatusOK, "a page")},
		problems: []kind{s.kinds.cursorMismatch, s.kinds.dataCorrupt},
	}
}
