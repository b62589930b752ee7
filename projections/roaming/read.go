package roaming

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections"
)

// MaxUnread is up to where unread messages are counted.
const MaxUnread = 1000

// millisOf is the earliest arrival that counts; a zero time is none.
func millisOf(oldest time.Time) int64 {
	if oldest.IsZero() {
		return -1 << 63
	}
	return oldest.UnixMilli()
}

// A reading is one question, answered from a snapshot.
type reading struct {
	r      projections.Reader
	app    journal.AppID
	oldest int64 // ms: what arrived, or is clocked, before it is hidden
	key    key
	value  []byte
}

func (q *reading) row(conversation, user kms.Tag) (row, bool, error) {
	v, ok, err := q.r.Get(q.value[:0], q.key.member(q.app, conversation, user))
	q.value = v
	if err != nil || !ok {
		return row{}, false, err
	}
	r, err := parseRow(v)
	return r, err == nil, err
}

// TakesPart reports whether the user takes part in the conversation, by events
// that arrived at oldest or later.
func (v *View) TakesPart(ctx context.Context, app journal.AppID, conversation, user kms.Tag, oldest time.Time) (bool, error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	takes := false
	err := v.view("look for a member", func(r projections.Reader) error {
		q := reading{r: r, app: app, oldest: millisOf(oldest)}
		row, ok, err := q.row(conversation, user)
		takes = ok && row.takesPart(q.oldest)
		return err
	})
	return takes && err == nil, err
}

// A Place is where an event is, and whose it is.
type Place struct {
	Type         journal.Type
	Position     journal.Position
	Conversation kms.Tag
	Sender       kms.Tag
}

// Find returns the place of a message, an edit or a recall.
func (v *View) Find(ctx context.Context, app journal.AppID, event kms.Tag) (found Place, ok bool, err error) {
	if err := ctx.Err(); err != nil {
		return Place{}, false, err
	}
	err = v.view("find an event", func(r projections.Reader) error {
		q := reading{r: r, app: app}
		b, there, err := r.Get(nil, q.key.id(app, event))
		if err != nil || !there {
			return err
		}
		p, err := parsePlace(b)
		if err != nil {
			return err
		}
		b, there, err = r.Get(b[:0], q.key.index(app, p.conversation, p.position))
		if err != nil || !there {
			return err
		}
		e, err := parseEntry(b)
		if err != nil {
			return err
		}
		found, ok = Place{p.kind, p.position, p.conversation, e.sender}, true
		return nil
	})
	return found, ok && err == nil, err
}

// each calls fn with the conversations that the user takes part in, in the order
// of their tags.
func (q *reading) each(user kms.Tag, fn func(conversation kms.Tag, r row) error) error {
	var prefix, to key
	from := prefix.table(tableOfUser).app(q.app).tag(user).bytes()
	c := q.r.Iterate(from, past(from, &to), false)
	defer c.Close()
	for c.Next() {
		if len(c.Key()) != 1+appSize+2*tagSize {
			return damaged("key", len(c.Key()))
		}
		conversation := lastTag(c.Key())
		r, ok, err := q.row(conversation, user)
		if err != nil {
			return err
		}
		if !ok || !r.takesPart(q.oldest) {
			continue
		}
		if err := fn(conversation, r); err != nil {
			return err
		}
	}
	return c.Close()
}

// scan calls fn with the entries of a conversation that are not hidden, between
// two positions (exclusive; a zero before is the end), until fn returns false.
func (q *reading) scan(conversation kms.Tag, after, before journal.Position, reverse bool, fn func(journal.Position, entry) bool) error {
	if after == maxPosition {
		return nil
	}
	var from, to, prefix key
	lo := from.index(q.app, conversation, after+1)
	hi := past(prefix.table(tableIndex).app(q.app).tag(conversation).bytes(), &to)
	if before != 0 {
		hi = to.index(q.app, conversation, max(before, after+1))
	}
	c := q.r.Iterate(lo, hi, reverse)
	defer c.Close()
	for c.Next() {
		e, err := parseEntry(c.Value())
		if err != nil {
			return err
		}
		if e.clock < q.oldest {
			continue
		}
		if !fn(lastPosition(c.Key()), e) {
			break
		}
	}
	return c.Close()
}

// A ListQuery selects conversations of a user, the newest first.
type ListQuery struct {
	// Before asks for those whose order lies before it; 0 begins with the newest.
	Before journal.Position
	// Limit is the number of conversations, at most; 0 means 50.
	Limit int
	// Oldest hides what the plan no longer keeps.
	Oldest time.Time
}

// A Conversation is one that the user takes part in.
type Conversation struct {
	Tag kms.Tag
	// Order is what the list is sorted by: the position of the newest message, or
	// of the newest event that speaks of the user if there is no message.
	Order journal.Position
	// Last is the position of the newest message, 0 if there is none. A message
	// that was recalled counts.
	Last journal.Position
	// Own is the position of the newest event that speaks of the user.
	Own journal.Position
	// Read is the position that the user has read to.
	Read journal.Position
	// Unread is the number of messages after Read that were not recalled, at
	// most [MaxUnread].
	Unread int
}

// Conversations returns a page of the user's conversations; more tells whether
// the list goes on.
func (v *View) Conversations(ctx context.Context, app journal.AppID, user kms.Tag, q ListQuery) (page []Conversation, more bool, err error) {
	if q.Limit <= 0 {
		q.Limit = 50
	}
	if err := ctx.Err(); err != nil {
		return nil, false, err
	}
	err = v.view("list conversations", func(r projections.Reader) error {
		rd := reading{r: r, app: app, oldest: millisOf(q.Oldest)}
		err := rd.each(user, func(conversation kms.Tag, m row) error {
			c := Conversation{Tag: conversation, Own: m.newest(), Read: m.read}
			err := rd.scan(conversation, 0, 0, true, func(p journal.Position, e entry) bool {
				if e.kind == journal.MessageSent {
					c.Last = p
				}
				return c.Last == 0
			})
			if c.Order = c.Last; c.Order == 0 {
				c.Order = c.Own
			}
			if q.Before == 0 || c.Order < q.Before {
				page = append(page, c)
			}
			return err
		})
		if err != nil {
			return err
		}
		slices.SortFunc(page, func(a, b Conversation) int { return cmp.Compare(b.Order, a.Order) })
		if more = len(page) > q.Limit; more {
			page = page[:q.Limit]
		}
		for i := range page {
			if err := rd.count(&page[i]); err != nil {
				return err
			}
		}
		return nil
	})
	return page, more, err
}

// count counts what is unread.
func (q *reading) count(c *Conversation) error {
	if c.Last <= c.Read {
		return nil
	}
	return q.scan(c.Tag, c.Read, 0, true, func(_ journal.Position, e entry) bool {
		if e.message() {
			c.Unread++
		}
		return c.Unread < MaxUnread
	})
}

// A Receipt is what became of a message.
type Receipt struct {
	// Delivered and Read are numbers of users; read counts as delivered.
	Delivered, Read int
	// OwnDelivered and OwnRead tell of the user that was asked for.
	OwnDelivered, OwnRead bool
}

// Receipts returns the receipts of messages of a conversation, in the order of
// their positions given, and of a user's own unless user is nil.
func (v *View) Receipts(ctx context.Context, app journal.AppID, conversation kms.Tag, positions []journal.Position, user *kms.Tag) ([]Receipt, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	list := make([]Receipt, len(positions))
	err := v.view("read receipts", func(r projections.Reader) error {
		q := reading{r: r, app: app}
		for i, p := range positions {
			b, ok, err := r.Get(q.value[:0], q.key.index(app, conversation, p))
			q.value = b
			if err != nil {
				return err
			}
			if !ok {
				continue
			}
			e, err := parseEntry(b)
			if err != nil {
				return err
			}
			list[i].Delivered, list[i].Read = int(e.delivered), int(e.read)
			if user == nil || e.delivered == 0 {
				continue
			}
			if b, ok, err = r.Get(q.value[:0], q.key.receipts(app, conversation, p).tag(*user).bytes()); err != nil {
				return err
			}
			q.value = b
			if ok && len(b) == 1 {
				list[i].OwnDelivered, list[i].OwnRead = b[0]&bitDelivered != 0, b[0]&bitRead != 0
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return list, nil
}
