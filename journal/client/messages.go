package client

import (
	"context"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/journal"
)

// PageQuery says which page of a conversation to read. Its zero value is the
// newest page.
type PageQuery struct {
	// Before and After are cursors of a page, or positions; at most one is given.
	Before, After string
	// Limit is the number of messages on a page; 0 means the server's default.
	Limit int
	// MinPosition waits until the view has applied the event at that position,
	// so that a caller reads what it has appended.
	MinPosition journal.Position
}

// Page is a page of a conversation, newest first.
type Page struct {
	Messages []Message `json:"data"`
	// Next is the cursor of the older page, Previous that of the newer one; empty
	// where there is none.
	Next     string `json:"next"`
	Previous string `json:"previous"`
	// OldestAvailable is the time before which nothing is kept.
	OldestAvailable time.Time `json:"oldest_available"`
}

// Message is a message with its edits and its recall folded in.
type Message struct {
	Position journal.Position `json:"position"`
	// State is "sent", "edited" or "recalled".
	State string `json:"state"`
	// JSON is the CloudEvent, with the data of the newest edit; nil once the
	// message is recalled.
	JSON jsontext.Value `json:"event"`
	// Edit and Recall say who did it and when, where it was done.
	Edit   *Change `json:"edit"`
	Recall *Change `json:"recall"`
	// Receipts counts who has it and who has read it.
	Receipts *Receipts `json:"receipts,omitempty"`
}

// Event parses the message's CloudEvent. A recalled message has none.
func (m Message) Event() (journal.Replayed, error) {
	if m.JSON == nil {
		return journal.Replayed{}, fmt.Errorf("%w: the message was recalled", ErrNotFound)
	}
	return journal.ParseReplayed(m.JSON)
}

// Change is an edit or a recall of a message.
type Change struct {
	ID       string           `json:"id"`
	Position journal.Position `json:"position"`
	Time     time.Time        `json:"time"`
	Sender   string           `json:"sender"`
}

// Messages reads one page of a conversation.
func (c *Client) Messages(ctx context.Context, conversation string, q PageQuery) (Page, error) {
	v := url.Values{}
	if q.Before != "" {
		v.Set("before", q.Before)
	}
	if q.After != "" {
		v.Set("after", q.After)
	}
	if q.Limit > 0 {
		v.Set("limit", strconv.Itoa(q.Limit))
	}
	if q.MinPosition > 0 {
		v.Set("min_position", q.MinPosition.String())
	}
	var page Page
	err := c.getJSON(ctx, request{
		method: http.MethodGet, path: c.appPath("conversations", conversation, "messages"), query: v, accept: "application/json",
	}, &page)
	return page, err
}

// History gives the messages of a conversation, newest first, page by page, from
// the page that q says.
func (c *Client) History(ctx context.Context, conversation string, q PageQuery) iter.Seq2[Message, error] {
	return func(yield func(Message, error) bool) {
		for {
			page, err := c.Messages(ctx, conversation, q)
			if err != nil {
				yield(Message{}, err)
				return
			}
			for _, m := range page.Messages {
				if !yield(m, nil) {
					return
				}
			}
			if page.Next == "" {
				return
			}
			q.Before, q.After = page.Next, ""
		}
	}
}

func (c *Client) getJSON(ctx context.Context, r request, into any) error {
	return c.call(ctx, r, func(resp *http.Response) error { return decode(resp, into) })
}

func decode(resp *http.Response, into any) error {
	b, err := readBody(resp)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("%w: the answer cannot be read: %w", ErrProtocol, err)
	}
	return nil
}
