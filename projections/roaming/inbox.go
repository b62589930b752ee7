package roaming

import (
	"context"
	"slices"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections"
)

// An InboxQuery selects events of a user's inbox, the oldest first.
type InboxQuery struct {
	// After is the position after which to begin; nil stands for the
	// acknowledged one.
	After *journal.Position
	// Limit is the number of events, at most; 0 means 100.
	Limit int
	// Oldest hides what the plan no longer keeps.
	Oldest time.Time
}

// An Inbox is a page of a user's inbox.
type Inbox struct {
	// Positions are those of the events, the lowest first.
	Positions []journal.Position
	// More tells whether there are more.
	More bool
	// Acked is the position up to which the user has acknowledged.
	Acked journal.Position
}

// Inbox returns what others sent, edited and recalled in the conversations that
// the user takes part in. A recalled message is left out; its recall is not.
func (v *View) Inbox(ctx context.Context, app journal.AppID, user kms.Tag, q InboxQuery) (Inbox, error) {
	if q.Limit <= 0 {
		q.Limit = 100
	}
	if err := ctx.Err(); err != nil {
		return Inbox{}, err
	}
	var box Inbox
	err := v.view("read an inbox", func(r projections.Reader) error {
		rd := reading{r: r, app: app, oldest: millisOf(q.Oldest)}
		var err error
		if box.Acked, err = rd.acked(user); err != nil {
			return err
		}
		after := box.Acked
		if q.After != nil {
			after = *q.After
		}
		// One more than asked for tells whether there are more. Of each
		// conversation no more is read than could be among those.
		wanted := q.Limit + 1
		var list []journal.Position
		bound := journal.Position(0) // 0: none yet
		err = rd.each(user, func(conversation kms.Tag, _ row) error {
			n := 0
			err := rd.scan(conversation, after, bound, false, func(p journal.Position, e entry) bool {
				if e.sender != user && e.flags&flagRecalled == 0 {
					list = append(list, p)
					n++
				}
				return n < wanted
			})
			if len(list) > wanted {
				slices.Sort(list)
				list = list[:wanted]
				bound = list[wanted-1]
			}
			return err
		})
		slices.Sort(list)
		if box.More = len(list) > q.Limit; box.More {
			list = list[:q.Limit]
		}
		box.Positions = list
		return err
	})
	return box, err
}

func (q *reading) acked(user kms.Tag) (journal.Position, error) {
	v, ok, err := q.r.Get(q.value[:0], q.key.ack(q.app, user))
	q.value = v
	if err != nil || !ok {
		return 0, err
	}
	a, err := parseAck(v)
	return a.position, err
}

// Newest returns the position of the newest event of the user's inbox before a
// position, 0 if there is none: what an acknowledgement up to there names.
func (v *View) Newest(ctx context.Context, app journal.AppID, user kms.Tag, before journal.Position, oldest time.Time) (newest, acked journal.Position, err error) {
	if err := ctx.Err(); err != nil {
		return 0, 0, err
	}
	err = v.view("read an inbox", func(r projections.Reader) error {
		rd := reading{r: r, app: app, oldest: millisOf(oldest)}
		var err error
		if acked, err = rd.acked(user); err != nil {
			return err
		}
		newest = acked
		err = rd.each(user, func(conversation kms.Tag, _ row) error {
			return rd.scan(conversation, newest, before, true, func(p journal.Position, e entry) bool {
				if e.sender == user || e.flags&flagRecalled != 0 {
					return true
				}
				newest = p
				return false
			})
		})
		if newest == acked {
			newest = 0
		}
		return err
	})
	return newest, acked, err
}
