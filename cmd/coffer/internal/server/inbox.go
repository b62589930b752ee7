package server

import (
	"fmt"
	"net/http"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections/roaming"
)

const (
	defaultInbox = 100
	maxInbox     = 200
)

// inboxPage is a part of what a user has not had.
type inboxPage struct {
	Data            []jsontext.Value `json:"data"`
	Next            *string          `json:"next"             doc:"the cursor that goes on, null at the end"`
	ScannedThrough  journal.Position `json:"scanned_through"  doc:"what to acknowledge when the page has been dealt with"`
	Acked           journal.Position `json:"acked"            doc:"what has been acknowledged"`
	OldestAvailable string           `json:"oldest_available" doc:"the time before which the plan keeps nothing"`
}

// inbox answers with what others have sent, edited and recalled in the user's
// conversations since what it acknowledged, the oldest first.
func (s *Server) inbox(c *call) error {
	user, tag, err := s.userOf(c, c.vars["user"], "user")
	if err != nil {
		return err
	}
	b := binding{list: "inbox", user: user, scope: c.scope()}
	q := roaming.InboxQuery{Oldest: s.oldest(c.app)}
	if q.Limit, err = s.limitParameter(c, defaultInbox, maxInbox); err != nil {
		return err
	}
	if c.query.Has("after") {
		after, err := s.placeParameter(c, "after", b)
		if err != nil {
			return err
		}
		q.After = &after
	}
	if err := s.await(c); err != nil {
		return err
	}
	box, err := s.roaming.Inbox(c.r.Context(), c.app.ID, tag, q)
	if err != nil {
		return err
	}
	answer := inboxPage{Acked: box.Acked, ScannedThrough: box.Acked, OldestAvailable: q.Oldest.UTC().Format(timeLayout)}
	if q.After != nil {
		answer.ScannedThrough = *q.After
	}
	if n := len(box.Positions); n > 0 {
		answer.ScannedThrough = box.Positions[n-1]
	}
	if answer.Data, err = s.openPicked(c, box.Positions); err != nil {
		return err
	}
	if box.More {
		cursor, err := s.cursor(c, b, answer.ScannedThrough)
		if err != nil {
			return err
		}
		answer.Next = &cursor
	}
	return s.writeJSON(c, http.StatusOK, answer)
}

// openPicked opens the events at positions that the roaming view has given.
// What is gone is left out.
func (s *Server) openPicked(c *call, positions []journal.Position) ([]jsontext.Value, error) {
	ctx := c.r.Context()
	events := []jsontext.Value{}
	if len(positions) == 0 {
		return events, nil
	}
	// The two views are not in step.
	if err := s.waitFor(ctx, c, positions[len(positions)-1], historyView); err != nil {
		return nil, err
	}
	items, err := s.history.Pick(ctx, c.app.ID, positions, s.oldest(c.app))
	if err != nil {
		return nil, err
	}
	for _, item := range items {
		if item.Recalled {
			continue
		}
		text, err := s.appendLine(ctx, nil, c.app.ID, item.Record, item.Position)
		if gone(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("opening the event at position %s: %w", item.Position, err)
		}
		events = append(events, text)
	}
	return events, nil
}

type ackBody struct {
	Through string `json:"through" required:"" doc:"a position or a cursor of the inbox"`
}

type ackAnswer struct {
	Acked journal.Position `json:"acked" doc:"what has been acknowledged; the position of an event"`
}

// ackInbox moves the user's inbox forward. Doing it again, or to a place before,
// changes nothing.
func (s *Server) ackInbox(c *call) error {
	user, tag, err := s.userOf(c, c.vars["user"], "user")
	if err != nil {
		return err
	}
	var in ackBody
	if err := s.decode(c, &in); err != nil {
		return err
	}
	through, err := s.parsePlace(c, in.Through, binding{list: "inbox", user: user, scope: c.scope()})
	if err != nil {
		return err
	}
	if through == nil {
		return s.invalidBody("/through", "it is neither a position nor a cursor of the inbox")
	}
	acked, err := s.acknowledge(c, user, tag, *through)
	if err != nil {
		return err
	}
	return s.writeJSON(c, http.StatusOK, ackAnswer{acked})
}

// ackTries is how many events that can no longer be opened are passed over to
// find one that an acknowledgement can name. They are not shown either.
const ackTries = 64

// acknowledge appends the acknowledgement of the newest event up to a position,
// unless one stands that reaches as far.
func (s *Server) acknowledge(c *call, user string, tag kms.Tag, through journal.Position) (journal.Position, error) {
	ctx := c.r.Context()
	before := through + 1 // 0, the end, for the highest of all
	for range ackTries {
		newest, acked, err := s.roaming.Newest(ctx, c.app.ID, tag, before, s.oldest(c.app))
		if err != nil || newest == 0 {
			return acked, err
		}
		id, err := s.pickedID(c, newest)
		if err != nil {
			return 0, err
		}
		if id != "" {
			return newest, s.appendAck(c, user, tag, id, newest)
		}
		before = newest
	}
	_, acked, err := s.roaming.Newest(ctx, c.app.ID, tag, 1, s.oldest(c.app))
	return acked, err
}

// pickedID is the id of the event at a position, empty when that is gone.
func (s *Server) pickedID(c *call, position journal.Position) (string, error) {
	events, err := s.openPicked(c, []journal.Position{position})
	if err != nil || len(events) == 0 {
		return "", err
	}
	event, err := journal.ParseReplayed(events[0])
	if err != nil {
		return "", fmt.Errorf("parsing a stored event: %w", journal.ErrCorrupt)
	}
	return event.ID, nil
}

// appendAck stores the acknowledgement. Its id is made of what it says, so the
// same one is stored once.
func (s *Server) appendAck(c *call, user string, tag kms.Tag, target string, position journal.Position) error {
	ctx := c.r.Context()
	event := journal.Event{
		ID: "inbox-acked:" + tag.String() + ":" + position.String(), Type: journal.InboxAcked, Sender: user, Target: target,
	}
	results, err := s.journal.Append(ctx, c.app.ID, event)
	if err != nil {
		return err
	}
	if outcome := s.outcomeOf(c, event, results[0]); outcome.Problem != nil {
		return outcome.Problem
	}
	return s.waitFor(ctx, c, results[0].Position, roamingView)
}
