package history

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections"
)

const (
	defaultPage = 50
	maxPage     = 1000
)

// Messages returns a page of a conversation, the newest message first. An edit
// or a recall that has itself expired is not returned; the message of such a
// recall stays recalled.
func (v *View) Messages(ctx context.Context, app journal.AppID, conversation kms.Tag, q PageQuery) (Page, error) {
	if q.Limit <= 0 {
		q.Limit = defaultPage
	}
	q.Limit = min(q.Limit, maxPage)
	if err := v.open(); err != nil {
		return Page{}, err
	}
	if err := ctx.Err(); err != nil {
		return Page{}, err
	}
	p := pager{conversation: conversation, q: q}
	p.replay.app, p.replay.hours = app, v.hours
	if !q.Oldest.IsZero() {
		p.replay.oldest, p.replay.hides = q.Oldest.UnixMilli(), true
	}
	err := v.store.View(func(r projections.Reader) error {
		p.replay.r = r
		var err error
		if p.replay.rules, err = loadRules(r, app); err != nil {
			return err
		}
		return p.read()
	})
	if err != nil {
		return Page{}, fmt.Errorf("history: messages: %w", err)
	}
	return p.page, nil
}

// A pager is the state of one call of Messages.
type pager struct {
	replay       replay // for what it knows about retention
	conversation kms.Tag
	q            PageQuery
	page         Page
	arena        []byte
}

func (p *pager) cursor(after, before journal.Position, reverse bool) projections.Cursor {
	var prefix, from, to key
	prefix.app(tableConversations, p.replay.app).tag(p.conversation)
	lo, hi := spanOf(prefix.bytes(), after, before, &from, &to)
	return p.replay.r.Iterate(lo, hi, reverse)
}

func (p *pager) read() error {
	forward := p.q.After > 0 && p.q.Before == 0
	p.replay.low = p.q.After
	p.page.Messages = make([]Message, 0, p.q.Limit)
	if p.arena = p.q.Buffer[:0]; cap(p.arena) == 0 {
		p.arena = make([]byte, 0, p.q.Limit*1280)
	}
	more, err := p.fill(!forward)
	if errors.Is(err, errMoved) {
		p.page.Messages, p.arena = p.page.Messages[:0], p.arena[:0]
		more, err = p.fill(!forward)
	}
	if err != nil {
		return err
	}
	if forward {
		slices.Reverse(p.page.Messages)
		p.page.Newer = more
		p.page.Older, err = p.any(0, p.q.After+1, true)
		return err
	}
	p.page.Older = more
	if !more && p.q.After > 0 {
		p.page.Older, err = p.any(0, p.q.After+1, true)
	}
	if err == nil && p.q.Before > 0 && !p.page.Newer {
		p.page.Newer, err = p.any(p.q.Before, 0, false)
	}
	return err
}

// errMoved means that the lower bound has moved: see replay.skipHidden.
var errMoved = errors.New("the bounds have moved")

// fill reads a page in the cursor's direction, and reports whether there is
// more.
func (p *pager) fill(reverse bool) (more bool, err error) {
	before := p.q.Before
	if before != 0 && before != maxPosition {
		before++ // the message at Before tells that there are newer ones
	}
	c := p.cursor(p.replay.low, before, reverse)
	defer c.Close()
	for c.Next() {
		f, err := parseFolded(c.Value())
		if err != nil {
			return false, err
		}
		pos, err := lastPosition(c.Key())
		if err != nil {
			return false, err
		}
		switch {
		case p.isHidden(pos, &f):
			moved, err := p.replay.skipHidden()
			if err != nil {
				return false, err
			}
			if moved {
				return false, errMoved
			}
		case pos == p.q.Before:
			p.page.Newer = true
		case len(p.page.Messages) == p.q.Limit:
			return true, c.Close()
		default:
			p.add(pos, f)
		}
	}
	return false, c.Close()
}

func (p *pager) isHidden(pos journal.Position, f *folded) bool {
	return p.replay.isHidden(pos, &event{stored: f.stored, copied: f.copied, record: f.first})
}

func (p *pager) add(pos journal.Position, f folded) {
	m := Message{Position: pos, Stored: time.UnixMilli(f.stored).UTC(), Record: p.keep(f.first)}
	m.Recalled = f.flags&flagRecalled != 0
	// The arrival of the edit or recall is not stored with the message; it is
	// later than the message's, which is not hidden.
	if f.flags != 0 && !(p.replay.hides && millis(f.second) < p.replay.oldest) {
		m.Changed = f.changed
		if m.Recalled {
			m.Recall = p.keep(f.second)
		} else {
			m.Edit = p.keep(f.second)
		}
	}
	p.page.Messages = append(p.page.Messages, m)
}

// keep copies what is borrowed. When the arena is full, a new one is begun;
// what was kept stays where it is.
func (p *pager) keep(b []byte) []byte {
	if len(b) > cap(p.arena)-len(p.arena) {
		p.arena = make([]byte, 0, max(len(b), cap(p.arena)/2))
	}
	n := len(p.arena)
	p.arena = append(p.arena, b...)
	return p.arena[n:len(p.arena):len(p.arena)]
}

// any reports whether a visible message is the next one in the direction.
func (p *pager) any(after, before journal.Position, reverse bool) (bool, error) {
	if before != 0 && before <= after+1 {
		return false, nil
	}
	c := p.cursor(after, before, reverse)
	defer c.Close()
	if !c.Next() {
		return false, c.Close()
	}
	f, err := parseFolded(c.Value())
	if err != nil {
		return false, err
	}
	pos, err := lastPosition(c.Key())
	return err == nil && !p.isHidden(pos, &f), err
}
