package client

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/journal"
)

// Receipts says what became of a message with those it is for.
type Receipts struct {
	// Delivered and Read are numbers of users, the sender not among them; who has
	// read it has it.
	Delivered int `json:"delivered"`
	Read      int `json:"read"`
	// Own is "none", "delivered" or "read": of the user that was asked for, or
	// whose token it is. It is empty with the app's token.
	Own string `json:"own,omitempty"`
}

// Conversation is a conversation as one of its users has it.
type Conversation struct {
	ID   string `json:"conversation"`
	Type string `json:"conversationtype"`
	// Position is what the list is sorted by, that of the newest message.
	Position journal.Position `json:"position"`
	// Last is the newest message that can be shown, nil if there is none.
	Last *Message `json:"last,omitempty"`
	// Unread is the number of messages after ReadThrough that were not recalled,
	// counted up to 1,000.
	Unread      int              `json:"unread"`
	ReadThrough journal.Position `json:"read_through"`
}

// ConversationQuery says which conversations to list.
type ConversationQuery struct {
	// User is whose. It is needed with the app's token; a user's token stands for
	// its user.
	User string
	// Before is the cursor of a page.
	Before string
	// Limit is the number of conversations on a page; 0 means the server's
	// default.
	Limit int
	// MinPosition waits until the view has applied the event at that position.
	MinPosition journal.Position
}

// ConversationPage is a page of a user's conversations, newest first.
type ConversationPage struct {
	Conversations []Conversation `json:"data"`
	// Next is the cursor of the older page, empty at the end.
	Next string `json:"next"`
	// OldestAvailable is the time before which nothing is kept.
	OldestAvailable time.Time `json:"oldest_available"`
}

// Conversations reads one page of a user's conversations.
func (c *Client) Conversations(ctx context.Context, q ConversationQuery) (ConversationPage, error) {
	v := pageValues("before", q.Before, q.Limit, q.MinPosition)
	if q.User != "" {
		v.Set("user", q.User)
	}
	var page ConversationPage
	err := c.getJSON(ctx, request{method: http.MethodGet, path: c.appPath("conversations"), query: v, accept: "application/json"}, &page)
	return page, err
}

// InboxQuery says which part of an inbox to read. Its zero value is what follows
// the last acknowledgement.
type InboxQuery struct {
	// After is a cursor of a page, or a position.
	After string
	// Limit is the number of events on a page; 0 means the server's default.
	Limit int
	// MinPosition waits until the view has applied the event at that position.
	MinPosition journal.Position
}

// Inbox is a page of what a user has not had, oldest first.
type Inbox struct {
	// Events are CloudEvents; journal.ParseReplayed parses one.
	Events []jsontext.Value `json:"data"`
	// Next is the cursor that goes on, empty at the end.
	Next string `json:"next"`
	// ScannedThrough is what to acknowledge when the page has been dealt with.
	ScannedThrough journal.Position `json:"scanned_through"`
	// Acked is what has been acknowledged.
	Acked journal.Position `json:"acked"`
	// OldestAvailable is the time before which nothing is kept.
	OldestAvailable time.Time `json:"oldest_available"`
}

// Inbox reads what others have sent, edited and recalled in the user's
// conversations since the user's last acknowledgement.
func (c *Client) Inbox(ctx context.Context, user string, q InboxQuery) (Inbox, error) {
	var page Inbox
	err := c.getJSON(ctx, request{
		method: http.MethodGet, path: c.appPath("users", user, "inbox"),
		query: pageValues("after", q.After, q.Limit, q.MinPosition), accept: "application/json",
	}, &page)
	return page, err
}

// Ack acknowledges the user's inbox up to a position, and returns what has been
// acknowledged then. It only moves forward, and can be repeated.
func (c *Client) Ack(ctx context.Context, user string, through journal.Position) (journal.Position, error) {
	body, err := json.Marshal(map[string]string{"through": through.String()})
	if err != nil {
		return 0, fmt.Errorf("encoding an acknowledgement: %w", err)
	}
	var answer struct {
		Acked journal.Position `json:"acked"`
	}
	err = c.getJSON(ctx, request{
		method: http.MethodPost, path: c.appPath("users", user, "inbox", "ack"), body: body, mime: "application/json", accept: "application/json",
	}, &answer)
	return answer.Acked, err
}

func pageValues(name, place string, limit int, minimum journal.Position) url.Values {
	v := url.Values{}
	if place != "" {
		v.Set(name, place)
	}
	if limit > 0 {
		v.Set("limit", strconv.Itoa(limit))
	}
	if minimum > 0 {
		v.Set("min_position", minimum.String())
	}
	return v
}
