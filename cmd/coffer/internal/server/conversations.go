package server

import (
	"errors"
	"fmt"
	"net/http"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections/history"
	"github.com/cofferdb/coffer/projections/roaming"
)

// conversationView is a conversation as one of its users has it.
type conversationView struct {
	Conversation     string           `json:"conversation"`
	ConversationType string           `json:"conversationtype"`
	Position         journal.Position `json:"position" doc:"what the list is sorted by: that of the newest message"`
	Last             *messageView     `json:"last,omitempty" doc:"the newest message that can be shown"`
	Unread           int              `json:"unread" doc:"counted up to 1000"`
	ReadThrough      journal.Position `json:"read_through" doc:"the position that the user has read to"`
}

type conversationsPage struct {
	Data            []conversationView `json:"data"`
	Next            *string            `json:"next"             doc:"the cursor that goes on, null at the end"`
	OldestAvailable string             `json:"oldest_available" doc:"the time before which the plan keeps nothing"`
}

// searchNewest is how many messages are looked at for one that can be shown,
// when the newest ones are of users that have been erased.
const searchNewest = 20

// conversations answers with the conversations of a user, the newest first.
func (s *Server) conversations(c *call) error {
	user, tag, err := s.userOf(c, c.query.Get("user"), "user")
	if err != nil {
		return err
	}
	b := binding{list: "conversations", user: user, scope: c.scope()}
	q := roaming.ListQuery{Oldest: s.oldest(c.app)}
	if q.Limit, err = s.limitParameter(c, defaultMessages, maxConversations); err != nil {
		return err
	}
	if q.Before, err = s.placeParameter(c, "before", b); err != nil {
		return err
	}
	if err := s.await(c); err != nil {
		return err
	}
	page, more, err := s.roaming.Conversations(c.r.Context(), c.app.ID, tag, q)
	if err != nil {
		return err
	}
	if len(page) > 0 {
		// The two views are not in step.
		if err := s.waitFor(c.r.Context(), c, page[0].Order, historyView); err != nil {
			return err
		}
	}
	answer := conversationsPage{Data: []conversationView{}, OldestAvailable: q.Oldest.UTC().Format(timeLayout)}
	for _, conversation := range page {
		view, ok, err := s.viewConversation(c, conversation, tag)
		if err != nil {
			return err
		}
		if ok {
			answer.Data = append(answer.Data, view)
		}
	}
	if more {
		cursor, err := s.cursor(c, b, page[len(page)-1].Order)
		if err != nil {
			return err
		}
		answer.Next = &cursor
	}
	return s.writeJSON(c, http.StatusOK, answer)
}

const maxConversations = 200

// userOf checks a user that a caller names and returns its tag. A user's token
// stands for its user, and knows of no other.
func (s *Server) userOf(c *call, user, parameter string) (string, kms.Tag, error) {
	if user == "" && c.caller.kind == endUser {
		user = c.caller.user
	}
	if err := journal.CheckUserID(user); err != nil {
		return "", kms.Tag{}, s.invalidParameter(parameter, err.Error())
	}
	if c.caller.kind == endUser && user != c.caller.user {
		return "", kms.Tag{}, s.kinds.notFound.problem("there is no such user")
	}
	tag, err := s.journal.Tag(c.r.Context(), c.app.ID, kms.KindSubject, user)
	return user, tag, err
}

// viewConversation opens what names the conversation, and its newest message. It
// is false for a conversation of which nothing can be opened any more.
func (s *Server) viewConversation(c *call, r roaming.Conversation, user kms.Tag) (conversationView, bool, error) {
	view := conversationView{Position: r.Order, Unread: r.Unread, ReadThrough: r.Read}
	named := false
	if r.Last > 0 {
		var err error
		if named, err = s.newest(c, r.Tag, user, &view); err != nil {
			return view, false, err
		}
	}
	if named {
		return view, true, nil
	}
	// The user's own last event names it too.
	if err := s.waitFor(c.r.Context(), c, r.Own, historyView); err != nil {
		return view, false, err
	}
	items, err := s.history.Pick(c.r.Context(), c.app.ID, []journal.Position{r.Own}, s.oldest(c.app))
	if err != nil || len(items) == 0 || items[0].Recalled {
		return view, false, err
	}
	event, err := s.reopen(c.r.Context(), c.app.ID, items[0].Record, r.Own)
	if gone(err) {
		return view, false, nil
	}
	if err != nil {
		return view, false, fmt.Errorf("opening the event at position %s: %w", r.Own, err)
	}
	view.name(event.Event)
	return view, true, nil
}

func (v *conversationView) name(e journal.Event) {
	v.Conversation, v.ConversationType = e.Conversation, e.ConversationType.String()
}

// newest sets the newest message that can be shown, and the conversation's name
// from it or an older one. It reports whether it has found a name.
func (s *Server) newest(c *call, conversation, user kms.Tag, view *conversationView) (named bool, err error) {
	ctx := c.r.Context()
	for _, limit := range []int{1, searchNewest} {
		page, err := s.history.Messages(ctx, c.app.ID, conversation, history.PageQuery{Limit: limit, Oldest: s.oldest(c.app)})
		if err != nil {
			return false, err
		}
		for _, m := range page.Messages {
			message, err := s.viewMessage(ctx, c.app.ID, m)
			if gone(err) {
				continue
			}
			if err != nil {
				return false, fmt.Errorf("opening the message at position %s: %w", m.Position, err)
			}
			if view.Last == nil {
				if view.Last, err = s.withReceipt(c, conversation, user, message); err != nil {
					return false, err
				}
			}
			if named, err = s.nameFrom(c, m, message, view); named || err != nil {
				return named, err
			}
		}
		if !page.Older {
			break
		}
	}
	return false, nil
}

// withReceipt adds the receipts of one message.
func (s *Server) withReceipt(c *call, conversation, user kms.Tag, m messageView) (*messageView, error) {
	list := []messageView{m}
	err := s.addReceipts(c, conversation, &user, list)
	return &list[0], err
}

// nameFrom takes the conversation's name from a message, or from its recall.
func (s *Server) nameFrom(c *call, m history.Message, message messageView, view *conversationView) (bool, error) {
	if message.Event != nil {
		event, err := journal.ParseReplayed(message.Event)
		if err != nil {
			return false, fmt.Errorf("parsing a stored event: %w", errors.Join(journal.ErrCorrupt, err))
		}
		view.name(event.Event)
		return true, nil
	}
	if m.Recall == nil {
		return false, nil
	}
	recall, err := s.reopen(c.r.Context(), c.app.ID, m.Recall, m.Changed)
	if err != nil {
		if gone(err) {
			err = nil
		}
		return false, err
	}
	view.name(recall.Event)
	return true, nil
}

// receiptsView is what became of a message with those it is for.
type receiptsView struct {
	Delivered int    `json:"delivered" doc:"how many users have it"`
	Read      int    `json:"read" doc:"how many of them have read it"`
	Own       string `json:"own,omitempty" doc:"the user's own: none, delivered or read"`
}

// addReceipts adds the receipts to messages; own is of the user, if there is one.
func (s *Server) addReceipts(c *call, conversation kms.Tag, user *kms.Tag, messages []messageView) error {
	positions := make([]journal.Position, len(messages))
	for i := range messages {
		positions[i] = messages[i].Position
	}
	receipts, err := s.roaming.Receipts(c.r.Context(), c.app.ID, conversation, positions, user)
	if err != nil {
		return err
	}
	for i, r := range receipts {
		view := &receiptsView{Delivered: r.Delivered, Read: r.Read}
		switch {
		case user == nil:
		case r.OwnRead:
			view.Own = "read"
		case r.OwnDelivered:
			view.Own = "delivered"
		default:
			view.Own = "none"
		}
		messages[i].Receipts = view //nolint:gosec // one for each message, see the call
	}
	return nil
}
