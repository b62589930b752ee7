package server

import (
	"net/http"
	"strconv"

	"github.com/cofferdb/coffer/cmd/coffer/internal/deliver"
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
