package server

import (
	"net/http"
	"strconv"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/deliver"
	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections/callbacks"
)

const (
	defaultDeliveries = 50
	mostDeliveries    = 500
)

// deliveryView is an event for an endpoint, and what became of its last attempt.
type deliveryView struct {
	MessageID string           `json:"webhook_id"`
	Number    uint64           `json:"number,string"`
	Position  journal.Position `json:"position"`
	Status    string           `json:"status" doc:"delivered, waiting, held or parked"`
	Attempts  uint16           `json:"attempts"`
	Cause     string           `json:"cause,omitempty" doc:"status, connection, timeout, address, expired, ended or body"`
	HTTP      uint16           `json:"http_status,omitzero"`
	Duration  uint32           `json:"duration_ms"`
	Error     string           `json:"error,omitempty"`
	Answer    string           `json:"answer,omitempty" doc:"the beginning of what the endpoint answered"`
	Arrived   string           `json:"arrived"`
	Recorded  string           `json:"recorded" doc:"when the last attempt was"`
	Due       string           `json:"due,omitempty" doc:"of the next attempt"`
	Until     string           `json:"until,omitempty" doc:"when it is given up"`
}

func (s *Server) viewDelivery(o *deliver.Outcome) deliveryView {
	v := deliveryView{
		MessageID: o.MessageID, Number: o.Number, Position: o.Position, Status: o.State.String(), Attempts: o.Attempts,
		Cause: o.Cause.String(), HTTP: o.Status, Duration: o.Attempt.Millis, Error: o.Error, Answer: o.Answer,
		Arrived: millis(o.Arrived), Recorded: millis(o.Recorded),
	}
	if o.State == journal.DeliveryWaiting {
		v.Due = millis(o.Due)
	}
	if o.State == journal.DeliveryWaiting || o.State == journal.DeliveryHeld {
		v.Until = millis(o.Arrived + s.journal.Callbacks().Retention().Milliseconds())
	}
	return v
}

// listDeliveries gives an endpoint's deliveries, the newest first.
func (s *Server) listDeliveries(c *call) error {
	e, err := s.endpointOf(c)
	if err != nil {
		return err
	}
	q := callbacks.Query{Reverse: true}
	if q.State, err = s.deliveryState(c); err != nil {
		return err
	}
	if q.Limit, err = s.limitParameter(c, defaultDeliveries, mostDeliveries); err != nil {
		return err
	}
	if text := c.query.Get("before"); c.query.Has("before") {
		if q.Before, err = strconv.ParseUint(text, 10, 64); err != nil || q.Before == 0 {
			return s.invalidParameter("before", "it is the number of a delivery")
		}
	}
	found, err := s.callbacks.Outcomes(c.r.Context(), &e, q)
	if err != nil {
		return err
	}
	answer := list[deliveryView]{Data: []deliveryView{}}
	for i := range found {
		answer.Data = append(answer.Data, s.viewDelivery(&found[i]))
	}
	if len(found) == q.Limit {
		next := strconv.FormatUint(found[len(found)-1].Number, 10)
		answer.Next = &next
	}
	return s.writeJSON(c, http.StatusOK, answer)
}

func (s *Server) deliveryState(c *call) (journal.DeliveryState, error) {
	text := c.query.Get("status")
	if !c.query.Has("status") {
		return 0, nil
	}
	for state := journal.DeliveryDone; state <= journal.DeliveryHeld; state++ {
		if state.String() == text {
			return state, nil
		}
	}
	return 0, s.invalidParameter("status", "it is delivered, waiting, held or parked")
}

// replayView is a range of events that is sent again.
type replayView struct {
	ID       string           `json:"id"`
	Endpoint string           `json:"endpoint"`
	State    string           `json:"state" doc:"running, done or cancelled"`
	After    journal.Position `json:"after"`
	Before   journal.Position `json:"before"`
	From     string           `json:"from,omitempty"`
	Until    string           `json:"until,omitempty"`
	Rate     int              `json:"rate"`
	At       journal.Position `json:"at" doc:"how far it has come"`
	Sent     uint64           `json:"sent"`
	Failed   uint16           `json:"failed"`
	Created  string           `json:"created"`
	Finished string           `json:"finished,omitempty"`
}

func viewReplay(r *deliver.Replay) replayView {
	moment := func(t time.Time) string {
		if t.IsZero() {
			return ""
		}
		return t.UTC().Format(timeLayout)
	}
	return replayView{
		ID: r.IDText(), Endpoint: endpoints.FormatID(r.Endpoint), State: r.State, After: r.Spec.After, Before: r.Spec.Before,
		From: moment(r.Spec.From), Until: moment(r.Spec.Until), Rate: r.Spec.Rate, At: r.At, Sent: r.Sent, Failed: r.Failed,
		Created: moment(r.Created), Finished: moment(r.Finished),
	}
}

type startReplayBody struct {
	Status  string   `json:"status" doc:"parked: the parked deliveries, instead of a range"`
	Numbers []uint64 `json:"numbers" doc:"of parked deliveries; all without"`
	From    string   `json:"from" doc:"RFC 3339: events of this time and later; of parked ones, that have arrived since"`
	Until   string   `json:"until" doc:"RFC 3339: events before this time"`
	After   string   `json:"after" doc:"events after this position"`
	Before  string   `json:"before" doc:"events before this position; the end at present without"`
	Rate    int      `json:"rate" doc:"events a second, 100 without, at most 10,000"`
}

type requeued struct {
	Requeued int `json:"requeued" doc:"parked deliveries that are sent again"`
}

// startReplay sends a range of events again, or what was parked.
func (s *Server) startReplay(c *call) error {
	var in startReplayBody
	if err := s.decode(c, &in); err != nil {
		return err
	}
	e, err := s.endpointOf(c)
	if err != nil {
		return err
	}
	spec, err := s.replaySpec(&in)
	if err != nil {
		return err
	}
	if in.Status == "parked" {
		n, err := s.callbacks.Requeue(c.r.Context(), &e, spec.From, in.Numbers...)
		if err != nil {
			return err
		}
		return s.writeJSON(c, http.StatusOK, requeued{n})
	}
	r, err := s.callbacks.StartReplay(c.r.Context(), &e, spec)
	if err != nil {
		return err
	}
	c.w.Header().Set("Location", "/v1/apps/"+c.app.ID.String()+"/replays/"+r.IDText())
	return s.writeJSON(c, http.StatusAccepted, viewReplay(&r))
}

func (s *Server) replaySpec(in *startReplayBody) (deliver.ReplaySpec, error) {
	var spec deliver.ReplaySpec
	if in.Status != "" && in.Status != "parked" || in.Status == "" && len(in.Numbers) > 0 {
		return spec, s.invalidBody("/status", "it is parked, or not there for a range")
	}
	for _, p := range []struct {
		pointer, text string
		to            *journal.Position
	}{{"/after", in.After, &spec.After}, {"/before", in.Before, &spec.Before}} {
		if p.text == "" {
			continue
		}
		var err error
		if *p.to, err = journal.ParsePosition(p.text); err != nil {
			return spec, s.invalidBody(p.pointer, "it is a position")
		}
	}
	for _, t := range []struct {
		pointer, text string
		to            *time.Time
	}{{"/from", in.From, &spec.From}, {"/until", in.Until, &spec.Until}} {
		if t.text == "" {
			continue
		}
		var err error
		if *t.to, err = time.Parse(time.RFC3339Nano, t.text); err != nil {
			return spec, s.invalidBody(t.pointer, "it is a time of RFC 3339")
		}
	}
	if spec.Rate = in.Rate; spec.Rate < 0 || spec.Rate > deliver.MaxReplayRate {
		return spec, s.invalidBody("/rate", "it is 1 to 10000 events a second")
	}
	return spec, nil
}

func (s *Server) showReplay(c *call) error {
	r, err := s.callbacks.Replay(c.r.Context(), c.app.ID, c.vars["replay"])
	if err != nil {
		return err
	}
	return s.writeJSON(c, http.StatusOK, viewReplay(&r))
}

func (s *Server) cancelReplay(c *call) error {
	r, err := s.callbacks.CancelReplay(c.r.Context(), c.app.ID, c.vars["replay"])
	if err != nil {
		return err
	}
	return s.writeJSON(c, http.StatusOK, viewReplay(&r))
}

// polledView is an event as an endpoint gets it.
type polledView struct {
	MessageID   string           `json:"webhook_id"`
	Position    journal.Position `json:"position"`
	ContentType string           `json:"content_type"`
	Body        string           `json:"body" doc:"what is posted, as text"`
}

// pollCallbacks gives what an endpoint is sent, to who asks.
func (s *Server) pollCallbacks(c *call) error {
	id, err := endpoints.ParseID(c.query.Get("endpoint"))
	if err != nil {
		return s.invalidParameter("endpoint", "it is an endpoint's id")
	}
	ctx := c.r.Context()
	e, err := s.callbacks.Endpoints.Endpoint(ctx, c.app.ID, id)
	if err != nil {
		return err
	}
	b := binding{list: "callbacks", user: e.IDText()}
	after, err := s.placeParameter(c, "after", b)
	if err != nil {
		return err
	}
	limit, err := s.limitParameter(c, defaultPage, maxPage)
	if err != nil {
		return err
	}
	found, next, err := s.callbacks.Poll(ctx, &e, max(after, e.After), limit, s.oldest(c.app))
	if err != nil {
		return s.trimmed(c, err)
	}
	answer := list[polledView]{Data: []polledView{}}
	for _, p := range found {
		answer.Data = append(answer.Data, polledView{p.MessageID, p.Position, p.ContentType, string(p.Body)})
	}
	cursor, err := s.cursor(c, b, next)
	if err != nil {
		return err
	}
	answer.Next = &cursor
	return s.writeJSON(c, http.StatusOK, answer)
}
