package journal

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cofferdb/coffer/kms"
)

// route is what appending to and opening from an app needs at hand. It lives as
// long as what the registry remembers of the app.
type route struct {
	text     string // the app's id
	plan     Plan
	epochs   epochs
	gen      uint16
	disabled bool
	erases   bool // what is recalled
	stream   *stream
	// open says that the stream is open to the app: see openRoute. Behind it, an
	// append waits once until the index has passed sealed in the stream before.
	open     bool
	before   *stream // nil without one
	sealed   uint64
	settled  atomic.Bool
	fence    string // the app's seal in the stream, where others may write to it too
	subjects [Buckets]string
	aad      []byte // up to the record's header, whose length it ends with

	seed          maphash.Seed
	conversations tagCache
	users         tagCache
}

// route returns the app's route, whether the app is disabled or not.
func (j *Journal) route(ctx context.Context, id AppID) (*route, error) {
	if j.closed.Load() {
		return nil, fmt.Errorf("%w: the journal is closed", ErrUnavailable)
	}
	known := j.registry.cached(id)
	if known != nil && id.Region() == j.region.Number {
		if r := known.route.Load(); r != nil {
			return r, nil
		}
	}
	return j.newRoute(ctx, id, known)
}

// newRoute makes an app's route, and keeps it with what the registry remembers
// of the app. It is apart from route because it takes much room on the stack,
// as does whatever is rare in an append: a goroutine whose stack stays small is
// not copied to a larger one.
func (j *Journal) newRoute(ctx context.Context, id AppID, known *cachedApp) (*route, error) {
	app, err := j.registry.App(ctx, id)
	if err != nil {
		return nil, err
	}
	plan, ok := j.plans[app.Plan]
	if !ok {
		return nil, fmt.Errorf("app %s: plan %q: %w", id, app.Plan, ErrUnknownPlan)
	}
	r := &route{
		text: id.String(), plan: plan, epochs: plan.epochs(app.Generation), gen: app.Generation, disabled: app.Disabled, erases: app.OnRecall == RecallErases,
		seed: maphash.MakeSeed(), conversations: tagCache{kind: kms.KindConversation}, users: tagCache{kind: kms.KindSubject},
		stream: j.streams[StreamName(j.region.ID, app.Plan, app.Shard)],
	}
	if r.stream == nil {
		return nil, fmt.Errorf("app %s: %w: shard %d of plan %s", id, ErrUnknownPlan, app.Shard, app.Plan)
	}
	r.open = !app.moving()
	if app.Previous.Plan != "" {
		r.before, r.sealed = j.streams[StreamName(j.region.ID, app.Previous.Plan, app.Previous.Shard)], app.Previous.Sealed
	}
	r.settled.Store(r.before == nil || j.cfg.Index == nil)
	if !r.stream.gated {
		r.fence = Subject{Plan: app.Plan, Shard: app.Shard, App: id, Marker: markSeal, Generation: app.Generation}.String()
	}
	for i := range r.subjects {
		r.subjects[i] = Subject{Plan: app.Plan, Shard: app.Shard, App: id, Bucket: i}.String()
	}
	aad := appendAAD(nil, j.region.ID, id, j.logID, make([]byte, HeaderSize))
	r.aad = aad[: len(aad)-HeaderSize : len(aad)-HeaderSize]
	// Only what is remembered now and was before the app was read: a change in
	// between must not keep an old route.
	if known != nil && known == j.registry.cached(id) {
		known.route.Store(r)
	}
	return r, nil
}

// scratch is room for sealing and opening.
type scratch struct {
	plain, aad []byte
}

// recordBuffer holds a record until it has been committed.
type recordBuffer struct{ b []byte }

// The pools hold no state.
var (
	scratchPool = sync.Pool{New: func() any { return &scratch{plain: make([]byte, 0, 4<<10), aad: make([]byte, 0, 256)} }} //nolint:gochecknoglobals // see above
	recordPool  = sync.Pool{New: func() any { return &recordBuffer{b: make([]byte, 0, 2<<10)} }}                           //nolint:gochecknoglobals // see above
)

func takeScratch() *scratch { return scratchPool.Get().(*scratch) } //nolint:errcheck,forcetypeassert // nothing else is put

func (s *scratch) put() {
	if cap(s.plain) > 128<<10 {
		return
	}
	clear(s.plain) // plaintext
	scratchPool.Put(s)
}

// appending is one Append under way. It goes back to a pool, unless its caller
// stopped waiting: then the committer still has it.
type appending struct {
	j      *Journal
	app    AppID
	route  *route
	tagger *kms.Tagger
	now    time.Time
	ctx    context.Context //nolint:containedctx // the wait's; see stream.dismiss

	entries []entry
	left    int // entries that are not settled; the committer's
	outcome atomic.Uint32
	done    chan struct{} // of capacity 1; signalled when outcome is set

	event   Event // the one that is being added
	results []Result
	at      []int // at[i] is the index of the result of entry i
	buffers []*recordBuffer
	follow  []follower
}

var appendingPool = sync.Pool{New: func() any { return &appending{done: make(chan struct{}, 1)} }} //nolint:gochecknoglobals // holds no state

// maxPooled is the number of events over which an appending is not kept.
const maxPooled = 64

func (a *appending) put() {
	if cap(a.entries) > maxPooled {
		return
	}
	clear(a.entries)
	clear(a.buffers)
	clear(a.follow)
	a.entries, a.at, a.buffers, a.follow = a.entries[:0], a.at[:0], a.buffers[:0], a.follow[:0]
	a.j, a.route, a.tagger, a.ctx, a.results, a.event = nil, nil, nil, nil, nil, Event{}
	a.outcome.Store(waiting)
	appendingPool.Put(a)
}

// follower is an event whose id another one has that is still under way.
type follower struct {
	at    int
	event Event
	timed bool
	slot  *slot
}

// awaitOther notes that a.event, the i-th of the call, has the id of another one.
func (a *appending) awaitOther(i int, timed bool, other *slot) {
	a.follow = append(a.follow, follower{at: i, event: a.event, timed: timed, slot: other})
}

// Append stores events of an app, and returns when each is durable or has been
// refused: one result for each event, in their order. The events of one call
// are stored in that order, those of one stream that were refused left out.
//
// An event's id is its idempotency key. An event that is stored already, with
// the same content, is answered with its first position and Duplicate; with
// other content with [ErrConflict]. When the caller gave no time, the stored
// one counts as the same.
//
// When ctx ends first, the results of what is not known have [ErrUnavailable]
// and the context's error: the events may or may not have been appended. Send
// them again with the same ids.
//
// The error is not nil only when nothing could be tried: the app is unknown,
// disabled or of another region, its keys cannot be had, or the journal is
// closed. Then there are no results.
//
// While the app's plan is being changed an append may wait for some
// milliseconds; see [Journal.ChangePlan].
func (j *Journal) Append(ctx context.Context, app AppID, events ...Event) ([]Result, error) {
	r, err := j.openRoute(ctx, app)
	if err != nil {
		return nil, fmt.Errorf("append: %w", err)
	}
	results, err := j.appendOn(ctx, r, app, events)
	for tries := 0; err == nil && tries < maxReroutes; tries++ {
		again := sealedOff(results)
		if len(again) == 0 {
			return results, nil
		}
		// The plan was changed meanwhile. What was refused comes behind what was
		// stored, on the new route too.
		if r, err = j.reroute(ctx, app, r); err != nil {
			err = fmt.Errorf("%w: %w", ErrUnavailable, err)
			for _, i := range again {
				results[i].Err = err
			}
			return results, nil
		}
		rest := make([]Event, len(again))
		for n, i := range again {
			rest[n] = events[i]
			if rest[n].ID == "" {
				rest[n].ID = results[i].ID // as it was promised to nobody yet, any would do
			}
		}
		var more []Result
		if more, err = j.appendOn(ctx, r, app, rest); err != nil {
			for _, i := range again {
				results[i].Err = err
			}
			return results, nil
		}
		for n, i := range again {
			results[i] = more[n]
		}
	}
	return results, err
}

// maxReroutes bounds how often one append follows plan changes.
const maxReroutes = 16

// sealedOff returns which events were refused because their route was sealed.
func sealedOff(results []Result) []int {
	var list []int
	for i := range results {
		if results[i].Err != nil && errors.Is(results[i].Err, errSealed) {
			list = append(list, i)
		}
	}
	return list
}

// appendOn is Append on one route.
func (j *Journal) appendOn(ctx context.Context, r *route, app AppID, events []Event) ([]Result, error) {
	if r.disabled {
		return nil, fmt.Errorf("append: app %s: %w", app, ErrDisabled)
	}
	tagger, err := j.keyring.Tagger(ctx, r.text)
	if err != nil {
		return nil, fmt.Errorf("append: app %s: %w", app, err)
	}
	if err := r.stream.catchUp(ctx); err != nil {
		return nil, fmt.Errorf("append: %w", err)
	}
	if err := r.settle(ctx); err != nil {
		return nil, fmt.Errorf("append: %w", err)
	}
	if r.erases {
		if err := j.noteRecalls(ctx, r, app, tagger, events); err != nil {
			return nil, fmt.Errorf("append: %w", err)
		}
	}
	a := appendingPool.Get().(*appending) //nolint:errcheck,forcetypeassert // nothing else is put
	a.j, a.app, a.route, a.tagger, a.now = j, app, r, tagger, j.now()
	results := make([]Result, len(events))
	a.results = results
	// Entries are pointed to, so they must not move.
	a.entries = slices.Grow(a.entries, len(events))
	if len(events) > 1 {
		a.prepare(ctx, events)
	}
	for i := range events {
		a.event = events[i]
		if err := a.add(ctx, i); err != nil {
			a.results[i].Err = err
		}
	}
	settled := a.wait(ctx)
	for i := range a.follow {
		f := &a.follow[i]
		results[f.at] = a.followed(ctx, f)
	}
	if settled {
		a.put()
	}
	return results, nil
}

// prepare makes the keys of a batch in one go. What fails shows again, by
// event, when the event is sealed.
func (a *appending) prepare(ctx context.Context, events []Event) {
	epochs := make(map[kms.Epoch]map[kms.Tag]struct{}, 1)
	for i := range events {
		t := events[i].Time
		if t.IsZero() {
			t = a.now
		}
		epoch := a.route.epochs.at(a.route.plan.Clock(t, a.now))
		if a.route.plan.Admit(t, a.now) != nil || CheckUserID(events[i].Sender) != nil && events[i].Sender != "" {
			continue
		}
		if epochs[epoch] == nil {
			epochs[epoch] = make(map[kms.Tag]struct{}, 8)
		}
		epochs[epoch][a.route.users.tag(a.route.seed, a.tagger, events[i].Sender)] = struct{}{}
	}
	for epoch, set := range epochs {
		subjects := make([]kms.Tag, 0, len(set))
		for tag := range set {
			subjects = append(subjects, tag)
		}
		if err := a.j.keyring.Prepare(ctx, a.route.text, epoch, subjects); err != nil {
			a.j.log.DebugContext(ctx, "keys could not be made ahead", "app", a.route.text, "error", err)
		}
	}
}

// add checks and seals a.event, the i-th of the call, and makes it an entry of
// the call, unless it was stored before.
func (a *appending) add(ctx context.Context, i int) error {
	e := &a.event
	timed, named := !e.Time.IsZero(), e.ID != ""
	if err := e.Normalize(a.now, a.j.cfg.Limits); err != nil {
		return err
	}
	a.results[i].ID, a.results[i].Time = e.ID, e.Time
	if err := a.route.plan.Admit(e.Time, a.now); err != nil {
		return err
	}
	header := Header{Type: e.Type, Millis: e.Time.UnixMilli(), Event: a.tagger.Tag(kms.KindEvent, e.ID)}
	if e.Conversation != "" {
		header.Conversation = a.route.conversations.tag(a.route.seed, a.tagger, e.Conversation)
	}
	if e.Recipient != "" {
		header.Peer = a.route.users.tag(a.route.seed, a.tagger, e.Recipient)
	}
	if e.Target != "" {
		header.Target = a.tagger.Tag(kms.KindEvent, e.Target)
	}
	s := takeScratch()
	defer s.put()
	s.plain = e.AppendJSON(s.plain[:0], a.app)

	recent := a.route.stream.recent
	mine, ok := recent.reserve(header.Event, recent.sum(s.plain), header.Millis, a.route.gen)
	if !ok {
		a.awaitOther(i, timed, mine)
		return nil
	}
	if named && a.j.cfg.Index != nil {
		if found, err := a.lookup(ctx, i, timed, header.Event); found || err != nil {
			recent.release(mine)
			return err
		}
	}
	clock := a.route.plan.Clock(e.Time, a.now)
	key, err := a.j.keyring.Sealer(ctx, a.route.text, a.route.epochs.at(clock), a.route.users.tag(a.route.seed, a.tagger, e.Sender))
	if err != nil {
		recent.release(mine)
		if errors.Is(err, kms.ErrEpochDestroyed) && a.j.registry.moved(ctx, a.app, a.route.gen) {
			return errSealed // the keys of the old route are gone
		}
		return fmt.Errorf("key for sealing: %w", err)
	}
	buf := recordPool.Get().(*recordBuffer) //nolint:errcheck,forcetypeassert // nothing else is put
	buf.b = header.Append(buf.b[:0])
	s.aad = append(append(s.aad[:0], a.route.aad...), buf.b...)
	buf.b = key.Seal(buf.b, s.aad, s.plain)

	a.buffers = append(a.buffers, buf)
	a.at = append(a.at, i)
	a.entries = append(a.entries, entry{
		subject: a.route.subjects[BucketOf(header.Conversation)], record: buf.b, gen: a.route.gen, slot: mine, call: a,
		fence: a.route.fence,
	})
	return nil
}

// wait hands the entries over and waits until all are settled, or ctx ends: then
// it returns false, and the entries are the committer's.
func (a *appending) wait(ctx context.Context) bool {
	if len(a.entries) == 0 {
		return true
	}
	if err := a.route.stream.enqueue(ctx, a); err != nil {
		for k := range a.entries {
			a.route.stream.recent.release(a.entries[k].slot)
			a.results[a.at[k]].Err = err
		}
		return true
	}
	if err := a.await(); err != nil {
		for _, i := range a.at {
			a.results[i].Err = err
		}
		return false
	}
	for k := range a.entries {
		result := &a.results[a.at[k]]
		if e := &a.entries[k]; e.err != nil {
			result.Err = e.err
		} else {
			result.Position, result.Err = NewPosition(e.gen, e.seq)
		}
		if cap(a.buffers[k].b) <= 128<<10 {
			recordPool.Put(a.buffers[k])
		}
	}
	return true
}

// lookup asks the index for an event with the same id as a.event, the i-th of
// the call, and completes the result when there is one.
func (a *appending) lookup(ctx context.Context, i int, timed bool, tag kms.Tag) (bool, error) {
	record, position, ok, err := a.j.cfg.Index.Lookup(ctx, a.app, tag)
	if err != nil {
		return false, fmt.Errorf("%w: look for an event with the same id: %w", ErrUnavailable, err)
	}
	if !ok {
		return false, nil
	}
	header, err := ParseHeader(record)
	if err != nil {
		return true, err
	}
	result := &a.results[i]
	result.Position, result.Time = position, header.Time()
	if len(record) > HeaderSize {
		same, err := a.compare(ctx, &a.event, timed, header, record)
		if err != nil {
			return true, err
		}
		if !same {
			return true, fmt.Errorf("event at position %s: %w", position, ErrConflict)
		}
	}
	result.Duplicate = true
	return true, nil
}

// compare opens the stored record: no hash of plaintext is kept anywhere.
func (a *appending) compare(ctx context.Context, e *Event, timed bool, header Header, record []byte) (bool, error) {
	s := takeScratch()
	defer s.put()
	var err error
	room := s.plain[:0]
	if s.plain, err = a.j.OpenRecord(ctx, room, a.app, record); err != nil {
		s.plain = room
		return false, fmt.Errorf("compare with the stored event: %w", err)
	}
	again := *e
	if !timed {
		again.Time = header.Time()
	}
	other := takeScratch()
	defer other.put()
	other.plain = again.AppendJSON(other.plain[:0], a.app)
	return string(other.plain) == string(s.plain), nil
}

// followed answers for an event whose id another one has that is, or just was,
// under way.
func (a *appending) followed(ctx context.Context, f *follower) Result {
	result := Result{ID: f.event.ID, Time: f.event.Time}
	recent := a.route.stream.recent
	s := takeScratch()
	same, buf := recent.same(f.slot, &f.event, a.app, f.timed, s.plain)
	s.plain = buf
	s.put()
	if !same {
		result.Err = fmt.Errorf("an event that was appended at the same time: %w", ErrConflict)
		return result
	}
	for {
		seq, failed, wait := recent.outcome(f.slot)
		switch {
		case failed:
			result.Err = fmt.Errorf("%w: the same event, appended at the same time, was not stored", ErrUnavailable)
			return result
		case seq > 0:
			result.Position, result.Err = NewPosition(f.slot.gen, seq)
			result.Time, result.Duplicate = time.UnixMilli(f.slot.millis).UTC(), true
			return result
		}
		select {
		case <-wait:
		case <-ctx.Done():
			result.Err = fmt.Errorf("%w: the event may or may not have been appended: %w", ErrUnavailable, ctx.Err())
			return result
		}
	}
}

// catchUp waits until the index knows what the stream held when the journal was
// opened: before that an event could be stored a second time.
func (s *stream) catchUp(ctx context.Context) error {
	if s.caught.Load() {
		return nil
	}
	for s.j.cfg.Index.Applied(s.info.Name) < s.started {
		if !pause(ctx, retryPause/4) {
			return fmt.Errorf("%w: the history view has not caught up with stream %s: %w", ErrUnavailable, s.info.Name, ctx.Err())
		}
		if s.j.closed.Load() {
			return fmt.Errorf("%w: the journal is closed", ErrUnavailable)
		}
	}
	s.caught.Store(true)
	return nil
}
