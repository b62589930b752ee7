package server

import (
	"context"
	"errors"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections/history"
)

// What a user's token may see and send is decided here, by who takes part in a
// conversation (docs/adr/0008-who-takes-part.md). The app's token is not asked.

// scope is what a cursor is bound to besides its query: one that the app's token
// was given is of no use to a user, nor one user's to another.
func (c *call) scope() string { return c.caller.user }

// noConversation is the answer for a conversation that the user takes no part
// in: the same as for one that was never there.
func (s *Server) noConversation() error {
	return s.kinds.notFound.problem("there is no such conversation")
}

// sees reports whether the caller may see a conversation.
func (s *Server) sees(c *call, conversation kms.Tag) (bool, error) {
	if c.caller.kind != endUser {
		return true, nil
	}
	return s.takesPart(c, conversation, c.caller.user)
}

// visible returns nil if the caller may see the conversation.
func (s *Server) visible(c *call, conversation kms.Tag) error {
	sees, err := s.sees(c, conversation)
	if err == nil && !sees {
		err = s.noConversation()
	}
	return err
}

// takesPart reports whether a user takes part in a conversation. No is said only
// when the view has everything that was in the journal at the request: a backend
// that was told that a member had joined may tell the member at once.
func (s *Server) takesPart(c *call, conversation kms.Tag, user string) (bool, error) {
	ctx := c.r.Context()
	tag, err := s.journal.Tag(ctx, c.app.ID, kms.KindSubject, user)
	if err != nil {
		return false, err
	}
	oldest := s.oldest(c.app)
	takes, err := s.roaming.TakesPart(ctx, c.app.ID, conversation, tag, oldest)
	if takes || err != nil {
		return takes, err
	}
	if err := s.catchUp(c); err != nil {
		return false, err
	}
	return s.roaming.TakesPart(ctx, c.app.ID, conversation, tag, oldest)
}

// catchUp waits, once per request, until the roaming view has what the journal
// had.
func (s *Server) catchUp(c *call) error {
	if c.caughtUp {
		return nil
	}
	ctx := c.r.Context()
	last, err := s.journal.Last(ctx, journal.StreamName(s.region.ID, c.app.Plan, c.app.Shard))
	if err != nil {
		return err
	}
	position, err := journal.NewPosition(c.app.Generation, last)
	if err != nil {
		return err
	}
	if err := s.waitFor(ctx, c, position, roamingView); err != nil {
		return err
	}
	c.caughtUp = true
	return nil
}

const (
	historyView = "history"
	roamingView = "roaming"
)

// waitFor waits for a view to have a position, as long as a request may.
func (s *Server) waitFor(ctx context.Context, c *call, position journal.Position, view string) error {
	ctx, cancel := context.WithTimeout(ctx, s.limits.WaitTimeout)
	defer cancel()
	err := s.runner.Wait(ctx, c.app.ID, position, view)
	if errors.Is(err, context.DeadlineExceeded) && c.r.Context().Err() == nil {
		return s.kinds.viewBehind.problem("the view of conversations has not caught up yet")
	}
	return err
}

// restrict returns nil if the caller may replay what the query selects: a user
// one conversation, which it takes part in.
func (s *Server) restrict(c *call, q history.Query) error {
	switch {
	case c.caller.kind != endUser:
		return nil
	case q.Conversation == nil:
		return s.invalidParameter("conversation", "a user's token reads one conversation at a time, which must be named")
	}
	return s.visible(c, *q.Conversation)
}

// guard returns what a stream asks before it sends events up to a position, nil
// for what needs not be asked: who is removed sees nothing that came after.
func (s *Server) guard(c *call, q history.Query) func(journal.Position) error {
	if c.caller.kind != endUser {
		return nil
	}
	return func(p journal.Position) error {
		ctx := c.r.Context()
		if err := s.waitFor(ctx, c, p, roamingView); err != nil {
			return err
		}
		tag, err := s.journal.Tag(ctx, c.app.ID, kms.KindSubject, c.caller.user)
		if err != nil {
			return err
		}
		takes, err := s.roaming.TakesPart(ctx, c.app.ID, *q.Conversation, tag, s.oldest(c.app))
		if err == nil && !takes {
			err = s.noConversation()
		}
		return err
	}
}

// ownTag is the tag of the user whose token it is, nil for the app's.
func (s *Server) ownTag(c *call) (*kms.Tag, error) {
	if c.caller.kind != endUser {
		return nil, nil //nolint:nilnil // nobody's own
	}
	tag, err := s.journal.Tag(c.r.Context(), c.app.ID, kms.KindSubject, c.caller.user)
	return &tag, err
}

// maySend checks an event that a user's token sends.
func (s *Server) maySend(c *call, e *journal.Event) error {
	switch {
	case c.caller.kind != endUser:
		return nil
	case e.Sender != c.caller.user:
		return s.at(s.kinds.privilegeMissing, "/sender", "a user's token sends as its own user only", "the sender must be the token's user")
	case e.Type == journal.MemberJoined || e.Type == journal.MemberLeft:
		return s.at(s.kinds.privilegeMissing, "/type", "members are changed with the app's token (chat privilege 2)", "not with a user's token")
	}
	if err := s.maySendInto(c, e); err != nil {
		return err
	}
	if e.Type == journal.MessageEdited || e.Type == journal.MessageRecalled {
		return s.mayChange(c, e)
	}
	return nil
}

// maySendInto checks the conversation: the two users' own, or one that the user
// takes part in, and whom it names there as well.
func (s *Server) maySendInto(c *call, e *journal.Event) error {
	if e.Recipient != "" {
		own := journal.DirectConversation(e.Sender, e.Recipient)
		if e.Conversation == "" || e.Conversation == own && e.ConversationType == journal.Direct {
			return nil
		}
	}
	if e.Conversation == "" {
		return nil // it is not valid, which the journal says better
	}
	conversation, err := s.journal.Tag(c.r.Context(), c.app.ID, kms.KindConversation, e.Conversation)
	if err != nil {
		return err
	}
	takes, err := s.takesPart(c, conversation, e.Sender)
	if err != nil {
		return err
	}
	if !takes {
		return s.at(s.kinds.notFound, "/conversation", "there is no such conversation", "the user takes part in no conversation with this id")
	}
	if e.Recipient == "" || e.Recipient == e.Sender {
		return nil
	}
	// Whoever is named takes part from then on, and a user admits nobody.
	if takes, err = s.takesPart(c, conversation, e.Recipient); err == nil && !takes {
		err = s.at(s.kinds.notFound, "/recipient", "the recipient does not take part in the conversation", "it does not take part")
	}
	return err
}

// mayChange checks the target of an edit or a recall, which is the user's own.
func (s *Server) mayChange(c *call, e *journal.Event) error {
	if e.Target == "" {
		return nil // as above
	}
	ctx := c.r.Context()
	target, err := s.journal.Tag(ctx, c.app.ID, kms.KindEvent, e.Target)
	if err != nil {
		return err
	}
	place, ok, err := s.roaming.Find(ctx, c.app.ID, target)
	if err == nil && !ok {
		if err = s.catchUp(c); err == nil {
			place, ok, err = s.roaming.Find(ctx, c.app.ID, target)
		}
	}
	if err != nil {
		return err
	}
	user, err := s.journal.Tag(ctx, c.app.ID, kms.KindSubject, c.caller.user)
	if err != nil {
		return err
	}
	if !ok || place.Sender != user {
		return s.at(s.kinds.notFound, "/target", "the user has sent no such message", "it must be the user's own")
	}
	return nil
}

// at is a problem with one member of an event.
func (s *Server) at(k kind, pointer, text, detail string) error {
	p := k.problem(text)
	p.Errors = []inputError{{Pointer: pointer, Detail: detail}}
	return p
}
