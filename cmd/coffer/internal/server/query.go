package server

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections/history"
)

const (
	defaultPage     = 100
	defaultMessages = 50
	maxPage         = 1000
)

// replayQuery reads the parameters of a replay. The binding is what its cursors
// will belong to.
func (s *Server) replayQuery(c *call) (history.Query, binding, error) {
	b := binding{
		list: "events", conversation: c.query.Get("conversation"), user: c.query.Get("user"),
		reverse: c.query.Get("order") == "desc", scope: c.scope(),
	}
	q := history.Query{Reverse: b.reverse, Oldest: s.oldest(c.app)}
	if order := c.query.Get("order"); order != "" && order != "asc" && order != "desc" {
		return q, b, s.invalidParameter("order", "it is asc or desc")
	}
	var err error
	if b.from, err = s.timeParameter(c, "from"); err != nil {
		return q, b, err
	}
	if b.until, err = s.timeParameter(c, "until"); err != nil {
		return q, b, err
	}
	if !b.from.IsZero() && !b.until.IsZero() && !b.from.Before(b.until) {
		return q, b, s.invalidParameter("until", "it must be later than from")
	}
	if b.types, err = s.typesParameter(c); err != nil {
		return q, b, err
	}
	q.From, q.Until, q.Types = b.from, b.until, b.types
	if q.Conversation, err = s.tagParameter(c, "conversation", kms.KindConversation, journal.CheckConversationID); err != nil {
		return q, b, err
	}
	if q.User, err = s.tagParameter(c, "user", kms.KindSubject, journal.CheckUserID); err != nil {
		return q, b, err
	}
	if c.query.Get("after") == latestPlace {
		return q, b, nil // see latest
	}
	place, err := s.placeParameter(c, "after", b)
	if err != nil {
		return q, b, err
	}
	if b.reverse {
		q.Before = place
	} else {
		q.After = place
	}
	return q, b, nil
}

// oldest is the earliest retention clock that the app's plan still serves.
func (s *Server) oldest(app journal.App) time.Time {
	return s.journal.Oldest(app, s.now())
}

// oldestAvailable is oldest, to the second, for problems.
func (s *Server) oldestAvailable(app journal.App) *time.Time {
	t := s.oldest(app).UTC().Truncate(time.Second)
	return &t
}

func (s *Server) timeParameter(c *call, name string) (time.Time, error) {
	text := c.query.Get(name)
	if text == "" {
		if c.query.Has(name) {
			return time.Time{}, s.invalidParameter(name, "it is empty")
		}
		return time.Time{}, nil
	}
	var t time.Time
	if err := t.UnmarshalText([]byte(text)); err != nil {
		return time.Time{}, s.invalidParameter(name, "it is not a time as RFC 3339 has it, such as 2026-01-02T15:04:05Z")
	}
	return t.UTC(), nil
}

// typesParameter reads a list of types, with commas or repeated.
func (s *Server) typesParameter(c *call) ([]journal.Type, error) {
	var types []journal.Type
	for _, value := range c.query["type"] {
		for name := range strings.SplitSeq(value, ",") {
			t, err := journal.ParseType(name)
			if err != nil {
				return nil, s.invalidParameter("type", "it has a name that is no type of event")
			}
			types = append(types, t)
		}
	}
	return types, nil
}

func (s *Server) tagParameter(c *call, name, kind string, check func(string) error) (*kms.Tag, error) {
	id := c.query.Get(name)
	if !c.query.Has(name) {
		return nil, nil //nolint:nilnil // no filter
	}
	if err := check(id); err != nil {
		return nil, s.invalidParameter(name, err.Error())
	}
	tag, err := s.journal.Tag(c.r.Context(), c.app.ID, kind, id)
	if err != nil {
		return nil, err
	}
	return &tag, nil
}

// placeParameter reads a place in a list: a cursor that belongs to the query,
// or the decimal position of an event, which callers have from events and
// results. Zero stands for none.
func (s *Server) placeParameter(c *call, name string, b binding) (journal.Position, error) {
	if !c.query.Has(name) {
		return 0, nil
	}
	place, err := s.parsePlace(c, c.query.Get(name), b)
	if err != nil {
		return 0, err
	}
	if place == nil {
		return 0, s.invalidParameter(name, "it is neither a cursor nor a position")
	}
	return *place, nil
}

// parsePlace returns nil for what is no place at all.
func (s *Server) parsePlace(c *call, text string, b binding) (*journal.Position, error) {
	if !strings.HasPrefix(text, cursorPrefix) {
		p, err := journal.ParsePosition(text)
		if err != nil {
			return nil, nil //nolint:nilnil,nilerr // not a place, which the caller says with its name
		}
		return &p, nil
	}
	p, ok, err := decodeCursor(c.r.Context(), s.journal.MAC, c.app.ID, b, text)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, s.kinds.cursorMismatch.problem("the cursor was not made for this app, these filters and this order")
	}
	return &p, nil
}

func (s *Server) cursor(c *call, b binding, p journal.Position) (string, error) {
	mac := s.journal.MAC
	if c.mac != nil {
		mac = c.mac
	}
	return encodeCursor(c.r.Context(), mac, c.app.ID, b, p)
}

// holdCursors takes what makes the call's cursors: a replay whose keys go on the
// way must still be able to say from where to go on.
func (s *Server) holdCursors(c *call) error {
	tagger, err := s.journal.Keyring().Tagger(c.r.Context(), c.app.ID.String())
	if err != nil {
		return fmt.Errorf("preparing cursors: %w", err)
	}
	c.mac = func(_ context.Context, _ journal.AppID, purpose string, message []byte) ([32]byte, error) {
		return tagger.MAC(purpose, message), nil
	}
	return nil
}

// limitParameter reads limit; 0 is returned when there is none and none is
// needed.
func (s *Server) limitParameter(c *call, without, most int) (int, error) {
	if !c.query.Has("limit") {
		return without, nil
	}
	text := c.query.Get("limit")
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 || (most > 0 && n > most) || strconv.Itoa(n) != text {
		detail := "it is a number from 1"
		if most > 0 {
			detail += fmt.Sprintf(" to %d", most)
		}
		return 0, s.invalidParameter("limit", detail)
	}
	return n, nil
}

// await lets the view catch up with min_position, so that a caller reads what
// it has written.
func (s *Server) await(c *call) error {
	if !c.query.Has("min_position") {
		return nil
	}
	p, err := journal.ParsePosition(c.query.Get("min_position"))
	if err != nil {
		return s.invalidParameter("min_position", "it is not a position")
	}
	ctx, cancel := context.WithTimeout(c.r.Context(), s.limits.WaitTimeout)
	defer cancel()
	// Most often the view is there already, or in a moment.
	soon, stop := context.WithTimeout(ctx, min(soonTimeout, s.limits.WaitTimeout))
	defer stop()
	err = s.runner.Wait(soon, c.app.ID, p)
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		if err := s.checkGiven(ctx, c, p); err != nil {
			return err
		}
		err = s.runner.Wait(ctx, c.app.ID, p)
	}
	if errors.Is(err, context.DeadlineExceeded) && c.r.Context().Err() == nil {
		return s.kinds.viewBehind.problem("the view has not reached min_position yet")
	}
	return err
}

// soonTimeout is how long the view is waited for before the position is doubted.
const soonTimeout = 100 * time.Millisecond

// checkGiven refuses a position that no event has yet: it can come from no
// answer, and waiting for it would wait for somebody else's events.
func (s *Server) checkGiven(ctx context.Context, c *call, p journal.Position) error {
	stream, sequence, err := s.journal.Locate(ctx, c.app.ID, p)
	if err != nil {
		return err
	}
	last, err := s.journal.Last(ctx, stream)
	if err != nil {
		return err
	}
	if sequence > last {
		return s.invalidParameter("min_position", "no event has this position")
	}
	return nil
}

// trimmed completes the problem of a place before what is kept.
func (s *Server) trimmed(c *call, err error) error {
	if !errors.Is(err, history.ErrTrimmed) {
		return err
	}
	p := s.problemOf(err)
	p.OldestAvailable = s.oldestAvailable(c.app)
	if t, ok := errors.AsType[*history.TrimmedError](err); ok {
		p.OldestPosition = t.Oldest.String()
	}
	return p
}
