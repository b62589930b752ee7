package roaming

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/pebble"
	"github.com/cofferdb/coffer/projections/storetest"
)

const (
	sequences = 10_000
	// onDisk is every how many sequences run on a store on disk, which is slower.
	onDisk = 250
)

// TestModel compares the view with a model that works every answer out anew from
// the whole journal: random messages, edits, recalls, receipts, changes of
// members, acknowledgements, erasures, events that are there twice, time, expiry,
// restarts, and rebuilds from what the journal still keeps.
func TestModel(t *testing.T) {
	const parts = 4
	many := sequences
	if testing.Short() { // the race detector makes each ten times as long
		many /= 20
	}
	for part := range parts {
		t.Run(fmt.Sprint(part), func(t *testing.T) {
			t.Parallel()
			for seed := part; seed < many; seed += parts {
				s := &sequence{t: t, seed: seed, rand: rand.New(rand.NewPCG(uint64(seed), 1))}
				s.run()
				if t.Failed() {
					return
				}
			}
		})
	}
}

func modelPlan() journal.Plan { return journal.DefaultPlans()[0] }

// A happening is an event as the model sees it.
type happening struct {
	spec
	sealed journal.Sealed
	again  bool // the same event, a second time in the journal
}

func (h *happening) clock() time.Time {
	if h.stored.Before(h.time) {
		return h.stored
	}
	return h.time
}

// sequence is one run.
type sequence struct {
	t     *testing.T
	seed  int
	rand  *rand.Rand
	store projections.Store
	disk  string // the folder of a store on disk
	view  *View

	now     time.Time
	last    uint64
	all     []happening
	pending []journal.Sealed
}

func (s *sequence) fatalf(format string, args ...any) {
	s.t.Helper()
	s.t.Fatalf("sequence %d after %d events: %s", s.seed, len(s.all), fmt.Sprintf(format, args...))
}

func pick[T any](s *sequence, list ...T) T { return list[s.rand.IntN(len(list))] }

func (s *sequence) run() {
	s.now = start
	if s.seed%onDisk == 0 {
		s.disk = filepath.Join(s.t.TempDir(), "views")
		s.store = openStore(s.t, s.disk)
		defer func() { _ = s.store.(*pebble.Store).Close() }()
	} else {
		s.store = &storetest.Memory{}
	}
	s.view = newView(s.t, s.store)
	for range 3 + s.rand.IntN(4) {
		for range s.rand.IntN(12) {
			s.draw()
		}
		s.step()
		s.check(s.view)
	}
	s.rebuild()
}

// step applies what is pending, and lets something happen to the view.
func (s *sequence) step() {
	for len(s.pending) > 0 {
		n := 1 + s.rand.IntN(len(s.pending))
		apply(s.t, s.view, s.pending[:n]...)
		s.pending = s.pending[n:]
	}
	s.now = s.now.Add(pick(s, 0, 0, time.Hour, 26*time.Hour))
	switch s.rand.IntN(6) {
	case 0, 1:
		if _, err := s.view.Expire(context.Background(), s.now); err != nil {
			s.fatalf("Expire: %v", err)
		}
	case 2:
		if s.disk != "" {
			if err := s.store.(*pebble.Store).Close(); err != nil {
				s.fatalf("Close: %v", err)
			}
			s.store = openStore(s.t, s.disk)
		}
		s.view = newView(s.t, s.store)
	}
}

// rebuild fills an empty view from what the journal still keeps, and checks that
// it answers the same.
func (s *sequence) rebuild() {
	fresh := newView(s.t, &storetest.Memory{})
	var rest []journal.Sealed
	for _, h := range s.all {
		if !h.stored.Add(modelPlan().Retention).Before(s.now) {
			rest = append(rest, h.sealed)
		}
	}
	for len(rest) > 0 {
		n := 1 + s.rand.IntN(len(rest))
		apply(s.t, fresh, rest[:n]...)
		rest = rest[n:]
	}
	s.check(fresh)
}

func (s *sequence) add(h happening) {
	s.last += uint64(1 + s.rand.IntN(3))
	h.position = s.last
	h.sealed = seal(h.spec)
	s.all = append(s.all, h)
	s.pending = append(s.pending, h.sealed)
}

// draw makes the next event, or two.
func (s *sequence) draw() {
	s.now = s.now.Add(time.Duration(s.rand.IntN(90)) * time.Minute)
	h := happening{spec: spec{
		app: appN(pick(s, byte(1), 1, 1, 1, 2)), stored: s.now, time: s.now, plan: modelPlan().ID,
		conversation: pick(s, "g", "g", "h", "d"), sender: pick(s, "x", "y", "z"),
		kind: pick(s, journal.MessageSent, journal.MessageSent, journal.MessageSent, journal.MessageEdited, journal.MessageRecalled,
			journal.ReceiptDelivered, journal.ReceiptRead, journal.ReceiptRead, journal.MemberJoined, journal.MemberLeft,
			journal.InboxAcked, journal.UserErased, journal.KeyRotated),
	}}
	h.id = fmt.Sprint("e", len(s.all))
	switch s.rand.IntN(8) {
	case 0:
		h.time = s.now.Add(-time.Duration(s.rand.IntN(80)) * time.Hour) // imported
	case 1:
		h.time = s.now.Add(4 * time.Minute) // a clock that runs ahead
	}
	switch h.kind {
	case journal.MessageSent:
		h.peer = pick(s, "", "", "y", "z")
	case journal.MessageEdited, journal.MessageRecalled, journal.ReceiptDelivered, journal.ReceiptRead:
		h.target = s.target(h.app)
	case journal.InboxAcked:
		h.target, h.conversation = s.target(h.app), ""
	case journal.UserErased:
		if s.rand.IntN(4) > 0 {
			return
		}
		h.conversation, h.sender, h.peer = "", "", pick(s, "x", "y", "z")
	case journal.KeyRotated:
		h.conversation, h.sender = "", ""
	default:
	}
	if h.kind == journal.MessageRecalled && s.rand.IntN(5) == 0 {
		// The recall first, then its message: they arrive together.
		message := h
		message.kind, message.id, message.conversation = journal.MessageSent, h.id+"m", pick(s, h.conversation, "h")
		h.target = message.id
		s.add(h)
		message.target = ""
		s.add(message)
		return
	}
	s.add(h)
	if s.rand.IntN(12) == 0 {
		h.again = true
		s.add(h)
	}
}

// target is an event of the app, now and then one that is not there.
func (s *sequence) target(app journal.AppID) string {
	for range 8 {
		if n := len(s.all); n > 0 {
			h := s.all[s.rand.IntN(n)]
			if h.app == app && (h.kind == journal.MessageSent || s.rand.IntN(6) == 0) {
				return h.id
			}
		}
	}
	return "nothing"
}

// What follows is the model.

// events are those of an app that count. A message or a membership that is there
// twice counts once; of the others a second one is as good as new.
func (s *sequence) events(app journal.AppID) []*happening {
	var list []*happening
	for i := range s.all {
		if h := &s.all[i]; h.app == app && !(h.again && (isMessage(h.kind) || isMembership(h.kind))) {
			list = append(list, h)
		}
	}
	return list
}

func isMessage(k journal.Type) bool {
	return k == journal.MessageSent || k == journal.MessageEdited || k == journal.MessageRecalled
}

func isMembership(k journal.Type) bool {
	return k == journal.MemberJoined || k == journal.MemberLeft
}

func isReceipt(k journal.Type) bool {
	return k == journal.ReceiptDelivered || k == journal.ReceiptRead
}

// facts is what the model knows about an app and a user.
type facts struct {
	events []*happening
	byID   map[string]*happening
	user   string
	erased uint64 // the position of the user's last erasure
	oldest time.Time
}

func (s *sequence) facts(app journal.AppID, user string) *facts {
	f := &facts{events: s.events(app), byID: make(map[string]*happening), user: user, oldest: s.now.Add(-modelPlan().Retention)}
	for _, h := range f.events {
		if isMessage(h.kind) || isMembership(h.kind) {
			f.byID[h.id] = h
		}
		if h.kind == journal.UserErased && h.peer == user {
			f.erased = h.position
		}
	}
	return f
}

// own is the newest event that speaks of the user, and whether the user takes
// part.
func (f *facts) own(conversation string) (newest uint64, takes bool) {
	var member, took *happening
	for _, h := range f.events {
		if h.conversation != conversation || h.position < f.erased || h.stored.Before(f.oldest) {
			continue
		}
		switch {
		case isMembership(h.kind) && h.sender == f.user:
			member = h
		case (isMessage(h.kind) || isReceipt(h.kind)) && (h.sender == f.user || h.peer == f.user):
			took = h
		}
	}
	if took != nil {
		newest, takes = took.position, true
	}
	if member != nil {
		newest, takes = max(newest, member.position), member.kind == journal.MemberJoined
	}
	return newest, takes
}

func (f *facts) recalled(m *happening) bool {
	return slices.ContainsFunc(f.events, func(h *happening) bool {
		return h.kind == journal.MessageRecalled && h.target == m.id && h.conversation == m.conversation
	})
}

// counts reports whether a receipt has its message.
func (f *facts) counts(h *happening) (*happening, bool) {
	m := f.byID[h.target]
	return m, m != nil && m.kind == journal.MessageSent && m.position < h.position && m.conversation == h.conversation
}

func (f *facts) list() []Conversation {
	var list []Conversation
	for _, name := range []string{"d", "g", "h"} {
		newest, takes := f.own(name)
		if !takes {
			continue
		}
		c := Conversation{Tag: tagOf("conversation", name), Own: journal.Position(newest)}
		read := uint64(0)
		for _, h := range f.events {
			if h.conversation != name || h.sender != f.user || h.position < f.erased {
				continue
			}
			if h.kind == journal.MessageSent {
				read = max(read, h.position)
			}
			if m, ok := f.counts(h); ok && h.kind == journal.ReceiptRead {
				read = max(read, m.position)
			}
		}
		for _, h := range f.events {
			if h.kind != journal.MessageSent || h.conversation != name || h.clock().Before(f.oldest) {
				continue
			}
			c.Last = journal.Position(h.position)
			if h.position > read && !f.recalled(h) {
				c.Unread++
			}
		}
		if c.Order = c.Last; c.Order == 0 {
			c.Order = c.Own
		}
		list = append(list, c)
	}
	slices.SortFunc(list, func(a, b Conversation) int { return cmp.Compare(b.Order, a.Order) })
	return list
}

func (f *facts) inbox(after uint64) []journal.Position {
	var list []journal.Position
	for _, h := range f.events {
		if !isMessage(h.kind) || h.sender == f.user || h.position <= after || h.clock().Before(f.oldest) {
			continue
		}
		if _, takes := f.own(h.conversation); takes && !(h.kind == journal.MessageSent && f.recalled(h)) {
			list = append(list, journal.Position(h.position))
		}
	}
	return list
}

func (f *facts) acked() uint64 {
	acked := uint64(0)
	for _, h := range f.events {
		if h.kind != journal.InboxAcked || h.sender != f.user || h.position < f.erased {
			continue
		}
		if target := f.byID[h.target]; target != nil && target.position < h.position {
			acked = max(acked, target.position)
		}
	}
	return acked
}

func (f *facts) receipt(m *happening) Receipt {
	delivered, read := make(map[string]bool), make(map[string]bool)
	for _, h := range f.events {
		if target, ok := f.counts(h); !ok || target != m || h.sender == m.sender || !isReceipt(h.kind) {
			continue
		}
		delivered[h.sender] = true
		if h.kind == journal.ReceiptRead {
			read[h.sender] = true
		}
	}
	return Receipt{len(delivered), len(read), delivered[f.user], read[f.user]}
}

// check asks the view everything.
func (s *sequence) check(v *View) {
	app := appN(pick(s, byte(1), 1, 2))
	for _, user := range []string{"x", "y", "z", "nobody"} {
		f := s.facts(app, user)
		for _, name := range []string{"d", "g", "h", "none"} {
			_, want := f.own(name)
			got, err := v.TakesPart(context.Background(), app, tagOf("conversation", name), tagOf("subject", user), f.oldest)
			if err != nil || got != want {
				s.fatalf("%s in %s: %v, %v; want %v", user, name, got, err, want)
			}
		}
		s.checkList(v, app, f)
		s.checkInbox(v, app, f)
		s.checkReceipts(v, app, f)
	}
}

func (s *sequence) checkList(v *View, app journal.AppID, f *facts) {
	q := ListQuery{Limit: 1 + s.rand.IntN(4), Oldest: f.oldest}
	var got []Conversation
	for {
		page, more, err := v.Conversations(context.Background(), app, tagOf("subject", f.user), q)
		if err != nil || len(page) > q.Limit || more && len(page) == 0 {
			s.fatalf("Conversations: %d of %d, %v, %v", len(page), q.Limit, more, err)
		}
		for _, c := range page {
			c.Read = 0 // what counts of it is what is unread
			got = append(got, c)
		}
		if !more {
			break
		}
		q.Before = page[len(page)-1].Order
	}
	if want := f.list(); !slices.Equal(got, want) {
		s.fatalf("conversations of %s:\n%+v, want\n%+v", f.user, got, want)
	}
}

func (s *sequence) checkInbox(v *View, app journal.AppID, f *facts) {
	user := tagOf("subject", f.user)
	acked := f.acked()
	after := pick(s, acked, 0, s.last/2)
	q := InboxQuery{Limit: 1 + s.rand.IntN(6), Oldest: f.oldest}
	if after != acked {
		p := journal.Position(after)
		q.After = &p
	}
	want := f.inbox(after)
	var got []journal.Position
	for {
		box, err := v.Inbox(context.Background(), app, user, q)
		if err != nil || len(box.Positions) > q.Limit || box.More && len(box.Positions) == 0 {
			s.fatalf("Inbox: %+v, %v", box, err)
		}
		if uint64(box.Acked) != acked && (box.Acked != 0 || len(f.inbox(acked)) != len(f.inbox(0))) {
			s.fatalf("inbox of %s: acknowledged %d, want %d", f.user, box.Acked, acked)
		}
		got = append(got, box.Positions...)
		if !box.More {
			break
		}
		q.After = &box.Positions[len(box.Positions)-1]
	}
	if !slices.Equal(got, want) {
		s.fatalf("inbox of %s after %d: %v, want %v", f.user, after, got, want)
	}
	newest, _, err := v.Newest(context.Background(), app, user, journal.Position(s.last/2+1), f.oldest)
	expected := journal.Position(0)
	for _, p := range f.inbox(acked) {
		if uint64(p) <= s.last/2 {
			expected = p
		}
	}
	if err != nil || newest != expected {
		s.fatalf("newest of %s to %d: %d, %v; want %d", f.user, s.last/2, newest, err, expected)
	}
}

func (s *sequence) checkReceipts(v *View, app journal.AppID, f *facts) {
	user := tagOf("subject", f.user)
	for _, name := range []string{"d", "g", "h"} {
		var positions []journal.Position
		var want []Receipt
		for _, h := range f.events {
			if h.kind == journal.MessageSent && h.conversation == name && !h.clock().Before(f.oldest) {
				positions, want = append(positions, journal.Position(h.position)), append(want, f.receipt(h))
			}
		}
		got, err := v.Receipts(context.Background(), app, tagOf("conversation", name), positions, &user)
		if err != nil || !slices.Equal(got, want) {
			s.fatalf("receipts in %s for %s: %+v, %v; want %+v", name, f.user, got, err, want)
		}
	}
}

// What follows makes events.

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC) //nolint:gochecknoglobals // when the tests' events begin

func appN(n byte) journal.AppID { return journal.AppID{0: 3, 15: n} }
