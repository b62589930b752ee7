package server

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections/history"
)

// oneEvent answers with the event of an id.
func (s *Server) oneEvent(c *call) error {
	ctx := c.r.Context()
	if err := journal.CheckEventID(c.vars["event"]); err != nil {
		return s.invalidParameter("event", err.Error())
	}
	if err := s.await(c); err != nil {
		return err
	}
	tag, err := s.journal.Tag(ctx, c.app.ID, kms.KindEvent, c.vars["event"])
	if err != nil {
		return err
	}
	// Without the retention, so that what has expired is told from what never was.
	item, ok, err := s.history.Event(ctx, c.app.ID, tag, time.Time{})
	if err != nil {
		return err
	}
	if !ok {
		return s.kinds.notFound.problem("there is no such event")
	}
	header, err := journal.ParseHeader(item.Record)
	if err != nil {
		return err
	}
	if sees, err := s.sees(c, header.Conversation); err != nil || !sees {
		return cmp.Or(err, error(s.kinds.notFound.problem("there is no such event")))
	}
	if (journal.Plan{}).Clock(header.Time(), item.Stored).Before(s.oldest(c.app)) {
		p := s.kinds.retentionExpired.problem("the event is older than the app's plan keeps")
		p.OldestAvailable = s.oldestAvailable(c.app)
		return p
	}
	if item.Recalled {
		return s.kinds.erased.problem("the message has been recalled")
	}
	body, err := s.appendLine(ctx, nil, c.app.ID, item.Record, item.Position)
	if err != nil {
		return err
	}
	return s.writeBody(c, http.StatusOK, typeJSON, body)
}

// messageView is a message with what became of it.
type messageView struct {
	Position journal.Position `json:"position"`
	State    string           `json:"state"`           // sent, edited, recalled
	Event    jsontext.Value   `json:"event,omitempty"` // with the newest edit's data; absent when recalled
	Edit     *changeView      `json:"edit,omitempty"`
	Recall   *changeView      `json:"recall,omitempty"`
	Receipts *receiptsView    `json:"receipts,omitempty"`
}

// changeView says who changed a message, and when.
type changeView struct {
	ID       string           `json:"id"`
	Position journal.Position `json:"position"`
	Time     string           `json:"time"`
	Sender   string           `json:"sender,omitempty"`
}

type messagesPage struct {
	Data            []messageView `json:"data"`
	Next            *string       `json:"next"`     // older
	Previous        *string       `json:"previous"` // newer
	OldestAvailable string        `json:"oldest_available"`
}

// messages answers with a page of a conversation, the newest message first.
func (s *Server) messages(c *call) error {
	ctx := c.r.Context()
	conversation := c.vars["conversation"]
	if err := journal.CheckConversationID(conversation); err != nil {
		return s.invalidParameter("conversation", err.Error())
	}
	b := binding{list: "messages", conversation: conversation, scope: c.scope()}
	q := history.PageQuery{Oldest: s.oldest(c.app)}
	var err error
	if q.Limit, err = s.limitParameter(c, defaultMessages, maxPage); err != nil {
		return err
	}
	if q.Before, err = s.placeParameter(c, "before", b); err != nil {
		return err
	}
	if q.After, err = s.placeParameter(c, "after", b); err != nil {
		return err
	}
	if err := s.await(c); err != nil {
		return err
	}
	tag, err := s.journal.Tag(ctx, c.app.ID, kms.KindConversation, conversation)
	if err != nil {
		return err
	}
	if err := s.visible(c, tag); err != nil {
		return err
	}
	room, _ := s.rooms.Get().(*[]byte)
	if room == nil {
		room = new(make([]byte, roomBytes))
	}
	defer s.rooms.Put(room)
	q.Buffer = *room
	page, err := s.history.Messages(ctx, c.app.ID, tag, q)
	if err != nil {
		return s.trimmed(c, err)
	}
	answer, err := s.viewPage(c, b, page) // nothing of it points into the room
	if err != nil {
		return err
	}
	own, err := s.ownTag(c)
	if err != nil {
		return err
	}
	if err := s.addReceipts(c, tag, own, answer.Data); err != nil {
		return err
	}
	answer.OldestAvailable = q.Oldest.UTC().Format(timeLayout)
	return s.writeJSON(c, http.StatusOK, answer)
}

// roomBytes has room for the sealed records of an ordinary page.
const roomBytes = 64 << 10

func (s *Server) viewPage(c *call, b binding, page history.Page) (messagesPage, error) {
	answer := messagesPage{Data: []messageView{}}
	for _, m := range page.Messages {
		view, err := s.viewMessage(c.r.Context(), c.app.ID, m)
		if gone(err) {
			continue
		}
		if err != nil {
			return answer, fmt.Errorf("opening the message at position %s: %w", m.Position, err)
		}
		answer.Data = append(answer.Data, view)
	}
	if n := len(page.Messages); n > 0 {
		if page.Older {
			cursor, err := s.cursor(c, b, page.Messages[n-1].Position)
			if err != nil {
				return answer, err
			}
			answer.Next = &cursor
		}
		if page.Newer {
			cursor, err := s.cursor(c, b, page.Messages[0].Position)
			if err != nil {
				return answer, err
			}
			answer.Previous = &cursor
		}
	}
	return answer, nil
}

func (s *Server) viewMessage(ctx context.Context, app journal.AppID, m history.Message) (messageView, error) {
	view := messageView{Position: m.Position, State: "sent"}
	if m.Recalled {
		view.State = "recalled"
	}
	if m.Recalled && m.Recall == nil {
		return view, nil // the recall itself has expired
	}
	if m.Recall != nil {
		recall, err := s.reopen(ctx, app, m.Recall, m.Changed)
		if err != nil {
			return view, err
		}
		view.Recall = viewChange(recall)
		return view, nil
	}
	text, err := s.appendLine(ctx, nil, app, m.Record, m.Position)
	if err != nil {
		return view, err
	}
	if m.Edit == nil {
		view.Event = text
		return view, nil
	}
	view.State = "edited"
	edit, err := s.reopen(ctx, app, m.Edit, m.Changed)
	if err != nil {
		return view, err
	}
	view.Edit = viewChange(edit)
	view.Event, err = withData(text, edit.Data)
	return view, err
}

// reopen opens and parses a record.
func (s *Server) reopen(ctx context.Context, app journal.AppID, record []byte, position journal.Position) (journal.Replayed, error) {
	text, err := s.appendLine(ctx, nil, app, record, position)
	if err != nil {
		return journal.Replayed{}, err
	}
	event, err := journal.ParseReplayed(text)
	if err != nil {
		return journal.Replayed{}, fmt.Errorf("parsing a stored event: %w", journal.ErrCorrupt)
	}
	return event, nil
}

func viewChange(e journal.Replayed) *changeView {
	return &changeView{ID: e.ID, Position: e.Position, Time: e.Time.UTC().Format(timeLayout), Sender: e.Sender}
}

// withData replaces the data of an event's JSON.
func withData(text []byte, data jsontext.Value) (jsontext.Value, error) {
	event, err := journal.ParseReplayed(text)
	if err != nil {
		return nil, fmt.Errorf("parsing a stored event: %w", journal.ErrCorrupt)
	}
	event.Data = data
	return journal.SplicePosition(nil, event.AppendJSON(nil, event.App), event.Position), nil
}
