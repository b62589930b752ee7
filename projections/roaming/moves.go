package roaming

import (
	"fmt"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections"
)

// FollowsMoves is part of [projections.Mover].
func (v *View) FollowsMoves() {}

var _ projections.Mover = (*View)(nil)

// role applies a record as what it is.
func (v *View) role(w *writer, s *journal.Sealed) error {
	switch s.Role {
	case journal.RoleEvent:
		return w.apply(s)
	case journal.RoleCopy:
		before, ok := v.retention[s.From]
		if !ok {
			return fmt.Errorf("the plan %q is not in the table", s.From)
		}
		return w.copied(s, untilOf(w.stored, before))
	default:
		return nil // what is not copied is hidden by its clock or arrival
	}
}

// copied lets what a plan change has copied leave with its new plan. What is not
// there, because the old stream has let go of it, is applied as it came.
func (w *writer) copied(s *journal.Sealed, before int64) error {
	h, envelope, err := journal.ParseRecord(s.Record)
	if err != nil {
		return err
	}
	eh, err := kms.ParseHeader(envelope)
	if err != nil {
		return err
	}
	switch h.Type {
	case journal.MessageSent, journal.MessageEdited, journal.MessageRecalled, journal.MemberJoined, journal.MemberLeft:
	default:
		return w.apply(s) // again changes nothing but how long it stays
	}
	p, ok, err := w.place(s.App, h.Event)
	if err != nil {
		return err
	}
	if !ok {
		return w.apply(s)
	}
	if p.position != s.Position {
		return nil // the first event with an id stands
	}
	if h.Type == journal.MemberJoined || h.Type == journal.MemberLeft {
		return w.copiedMembership(s, &h, eh.Subject, before)
	}
	if before == w.until {
		return nil // a stub, or a plan of the same retention
	}
	end := indexEnd{before, s.App, h.Conversation}
	delete(w.ends, end)
	w.txn.Delete(w.key.expiry(before, expireIndex, s.App).tag(h.Conversation).bytes())
	end.until = w.until
	w.ends[end] = max(w.ends[end], s.Position)
	if err := w.touch(s, h.Conversation, eh.Subject, 0); err != nil {
		return err
	}
	if !isZero(h.Peer) && h.Peer != eh.Subject {
		return w.touch(s, h.Conversation, h.Peer, 0)
	}
	return nil
}

// copiedMembership lets an event of a membership stay as long as the new plan
// says.
func (w *writer) copiedMembership(s *journal.Sealed, h *journal.Header, user kms.Tag, before int64) error {
	w.txn.Delete(w.key.expiry(before, expireID, s.App).tag(h.Event).bytes())
	w.txn.Set(w.key.expiry(w.until, expireID, s.App).tag(h.Event).bytes(), nil)
	r, err := w.row(s.App, h.Conversation, user)
	if err != nil || r.member.position != s.Position {
		return err
	}
	r.member.until = max(r.member.until, w.until)
	r.note(w.until)
	return nil
}
