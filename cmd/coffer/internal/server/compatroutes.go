package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/cmd/coffer/internal/agora"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections/history"
)

// recallError is the code of a recall that is refused, in the other service's
// words.
const recallError = "message_recall_error"

const (
	defaultRoam = 10
	maxRoam     = 50
)

// hour reads the hour of a path: one that is over and still kept.
func (p *Compat) hour(c *call) (time.Time, error) {
	text := c.vars["hour"]
	hour, err := time.Parse(compatHour, text)
	if err != nil || hour.Format(compatHour) != text {
		return hour, p.s.invalidParameter("time", "it is an hour in UTC, yyyyMMddHH")
	}
	if hour.Add(time.Hour).After(p.s.now()) {
		return hour, p.s.kinds.notFound.problem("the hour is not over; its file is there afterwards")
	}
	if !hour.Add(time.Hour).After(p.s.oldest(c.app)) {
		return hour, p.s.kinds.retentionExpired.problem("the hour is older than the app's plan keeps")
	}
	return hour, nil
}

// historyLink answers with the address of an hour's file.
func (p *Compat) historyLink(s *Server, c *call) error {
	started := s.now()
	hour, err := p.hour(c)
	if err != nil {
		return err
	}
	link, err := p.link(c, hour)
	if err != nil {
		return err
	}
	return p.write(c, []map[string]string{{"url": link}}, started)
}

// historyFile streams the file of an hour, as it is now. An hour without messages
// has one without lines.
func (p *Compat) historyFile(s *Server, c *call) error {
	hour, err := p.hour(c)
	if err != nil {
		return err
	}
	release, err := s.holdStream(c, formNDJSON)
	if err != nil {
		return err
	}
	defer release()
	out := &fileWriter{s: s, c: c, media: typeGzip}
	if c.r.Method != http.MethodHead {
		if err := s.exports.WriteHour(c.r.Context(), out, c.app, hour); err != nil {
			return out.broken(err)
		}
	}
	return out.end()
}

// read decodes a body. Members that are not known are passed over, as the other
// service does.
func (p *Compat) read(c *call, into any) error {
	if _, err := p.s.bodyForm(c.r, c.route.bodies); err != nil {
		return err
	}
	body, release, err := p.s.readBody(c.w, c.r, c.route.limit)
	if err != nil {
		return err
	}
	defer release()
	if err := json.Unmarshal(body, into); err != nil {
		return p.s.invalidBody("", "the body is not the JSON object that is expected")
	}
	return nil
}

// conversation names the conversation of a chat type.
func (p *Compat) conversation(chatType, user, to string) (string, journal.ConversationType, error) {
	switch chatType {
	case "chat":
		return journal.DirectConversation(user, to), journal.Direct, nil
	case "groupchat":
		return to, journal.Group, nil
	case "chatroom":
		return to, journal.Room, nil
	}
	return "", 0, p.s.invalidBody("/chat_type", "it is chat, groupchat or chatroom")
}

type recallBody struct {
	ID       string `json:"msg_id"`
	To       string `json:"to"`
	ChatType string `json:"chat_type"`
	From     string `json:"from"`
	Force    bool   `json:"force"`
	Ext      string `json:"recallMessageExtensionInfo"`
}

// recall recalls a message, for its sender or for the app.
func (p *Compat) recall(s *Server, c *call) error {
	started := s.now()
	var in recallBody
	if err := p.read(c, &in); err != nil {
		return err
	}
	refused := func(status int, text string) error {
		k := kind{status: status, code: recallError, title: "The message is not recalled"}
		return k.problem(text)
	}
	for _, m := range []struct{ name, value string }{{"msg_id", in.ID}, {"to", in.To}, {"chat_type", in.ChatType}} {
		if m.value == "" {
			return refused(http.StatusBadRequest, "param "+m.name+" can't be empty")
		}
	}
	if journal.ReservedID(in.ID) {
		return refused(http.StatusBadRequest, "param msg_id names no message: "+journal.CheckCallerEventID(in.ID).Error())
	}
	message, found, err := p.message(c, in.ID)
	if err != nil {
		return err
	}
	if !found {
		return refused(http.StatusForbidden, "not_found msg")
	}
	conversation, of, err := p.conversation(in.ChatType, message.Sender, in.To)
	if err != nil {
		return err
	}
	if message.Conversation != conversation || message.ConversationType != of {
		return refused(http.StatusBadRequest, "can't find msg to")
	}
	if !in.Force && s.now().Sub(message.Time) > p.o.RecallWindow {
		return refused(http.StatusForbidden, "exceed recall time limit")
	}
	e := journal.Event{
		ID: "recall-" + in.ID, Type: journal.MessageRecalled, Conversation: conversation, ConversationType: of, Target: in.ID, Sender: in.From,
	}
	if len(e.ID) > journal.MaxID {
		e.ID = ""
	}
	if in.From != "" && in.From == message.Sender {
		e.Recipient = message.Recipient
	}
	if in.Ext != "" {
		quoted, err := jsontext.AppendQuote(nil, in.Ext)
		if err != nil {
			return s.invalidBody("/recallMessageExtensionInfo", "it is not valid text")
		}
		e.Data = jsontext.Value(`{"ext":{"recallMessageExtensionInfo":` + string(quoted) + `}}`)
	}
	results, err := s.journal.Append(c.r.Context(), c.app.ID, e)
	if err == nil && errors.Is(results[0].Err, journal.ErrConflict) {
		e.ID = "" // the app has an event of its own with that id
		results, err = s.journal.Append(c.r.Context(), c.app.ID, e)
	}
	if err != nil {
		return err
	}
	if err := results[0].Err; err != nil {
		return err
	}
	from := in.From
	if from == "" {
		from = "admin"
	}
	return p.write(c, map[string]string{"recalled": "yes", "chattype": in.ChatType, "from": from, "to": in.To, "msg_id": in.ID}, started)
}

// message returns a message that stands; not one that was recalled.
func (p *Compat) message(c *call, id string) (journal.Replayed, bool, error) {
	ctx := c.r.Context()
	if journal.CheckEventID(id) != nil {
		return journal.Replayed{}, false, nil //nolint:nilerr // no message has such an id
	}
	tag, err := p.s.journal.Tag(ctx, c.app.ID, kms.KindEvent, id)
	if err != nil {
		return journal.Replayed{}, false, err
	}
	item, ok, err := p.s.history.Event(ctx, c.app.ID, tag, p.s.oldest(c.app))
	if err != nil || !ok || item.Recalled || item.Type != journal.MessageSent {
		return journal.Replayed{}, false, err
	}
	e, err := p.s.reopen(ctx, c.app.ID, item.Record, item.Position)
	if gone(err) {
		return e, false, nil
	}
	return e, err == nil, err
}

type roamBody struct {
	Username string `json:"username"`
	To       string `json:"to"`
	GroupID  string `json:"groupId"`
	Limit    int    `json:"limit"`
	Order    string `json:"order"`
	Cursor   string `json:"cursor"`
	Start    int64  `json:"startTimestamp"` // ms
	End      int64  `json:"endTimestamp"`   // ms
}

func (p *Compat) roamChat(_ *Server, c *call) error { return p.roam(c, "chat") }

func (p *Compat) roamGroup(_ *Server, c *call) error { return p.roam(c, "groupchat") }

type roamAnswer struct {
	Messages []jsontext.Value `json:"msgs"`
	Cursor   string           `json:"cursor"`
	Last     bool             `json:"is_last"`
}

// roam answers with messages of one conversation, edits folded in and without
// those that were recalled.
func (p *Compat) roam(c *call, chatType string) error {
	started := p.s.now()
	q, b, err := p.roamQuery(c, chatType)
	if err != nil {
		return err
	}
	ctx := c.r.Context()
	answer := roamAnswer{Messages: []jsontext.Value{}, Last: true}
	var positions []journal.Position
	next, err := p.s.history.Replay(ctx, c.app.ID, q, func(i history.Item) error {
		positions = append(positions, i.Position)
		return nil
	})
	if err != nil {
		return err
	}
	for _, at := range positions {
		line, err := p.line(ctx, c.app.ID, *q.Conversation, at)
		if err != nil {
			return err
		}
		if line != nil {
			answer.Messages = append(answer.Messages, line)
		}
	}
	if len(positions) == q.Limit {
		answer.Last = false
		if q.Reverse {
			next = positions[len(positions)-1]
		}
		if answer.Cursor, err = p.s.cursor(c, b, next); err != nil {
			return err
		}
	}
	return p.write(c, answer, started)
}

// line is a message as it stands now; nil when nothing is left of it.
func (p *Compat) line(ctx context.Context, app journal.AppID, conversation kms.Tag, at journal.Position) (jsontext.Value, error) {
	page, err := p.s.history.Messages(ctx, app, conversation, history.PageQuery{After: at - 1, Before: at + 1, Limit: 1})
	if err != nil || len(page.Messages) == 0 {
		return nil, err
	}
	view, err := p.s.viewMessage(ctx, app, page.Messages[0])
	if gone(err) {
		return nil, nil
	}
	if err != nil || view.Event == nil {
		return nil, err
	}
	e, err := journal.ParseReplayed(view.Event)
	if err != nil {
		return nil, fmt.Errorf("parsing a stored event: %w", journal.ErrCorrupt)
	}
	line, _ := agora.AppendLine(nil, e.Event)
	return line, nil
}

// roamQuery reads what is asked for.
func (p *Compat) roamQuery(c *call, chatType string) (history.Query, binding, error) {
	var in roamBody
	var q history.Query
	b := binding{list: "roaming"}
	if err := p.read(c, &in); err != nil {
		return q, b, err
	}
	to, name := in.To, "/to"
	if chatType != "chat" {
		to, name = in.GroupID, "/groupId"
	}
	user := c.vars["user"]
	if in.Username != "" && in.Username != user {
		return q, b, p.s.invalidBody("/username", "it is not the user of the path")
	}
	if err := journal.CheckUserID(user); err != nil {
		return q, b, p.s.invalidParameter("user", err.Error())
	}
	b.conversation, _, _ = p.conversation(chatType, user, to)
	if err := journal.CheckConversationID(b.conversation); err != nil || to == "" {
		return q, b, p.s.invalidBody(name, "it is not an id")
	}
	switch in.Order {
	case "", "down":
		b.reverse = true
	case "up":
	default:
		return q, b, p.s.invalidBody("/order", "it is up or down")
	}
	if in.Limit == 0 {
		in.Limit = defaultRoam
	}
	if in.Limit < 1 || in.Limit > maxRoam {
		return q, b, p.s.invalidBody("/limit", "it is 1 to 50")
	}
	if in.Start < 0 || in.End < 0 || in.End > 0 && in.Start >= in.End {
		return q, b, p.s.invalidBody("/endTimestamp", "it must be later than startTimestamp")
	}
	if in.Start > 0 {
		b.from = time.UnixMilli(in.Start).UTC()
	}
	if in.End > 0 {
		b.until = time.UnixMilli(in.End).UTC()
	}
	tag, err := p.s.journal.Tag(c.r.Context(), c.app.ID, kms.KindConversation, b.conversation)
	if err != nil {
		return q, b, err
	}
	q = history.Query{
		Conversation: &tag, Types: []journal.Type{journal.MessageSent}, From: b.from, Until: b.until, Reverse: b.reverse, Limit: in.Limit,
		Oldest: p.s.oldest(c.app),
	}
	if in.Cursor == "" {
		return q, b, nil
	}
	place, err := p.s.parsePlace(c, in.Cursor, b)
	if err != nil {
		return q, b, err
	}
	if place == nil {
		return q, b, p.s.invalidBody("/cursor", "it is not a cursor of this query")
	}
	if b.reverse {
		q.Before = *place
	} else {
		q.After = *place
	}
	return q, b, nil
}
