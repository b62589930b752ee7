package journal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/kms"
)

const (
	copyEvents = 256
	copyBytes  = 1 << 20
)

// classGeneration reads the route generation of a class of epochs.
func classGeneration(class string) (uint16, bool) {
	_, text, ok := strings.Cut(class, "/")
	n, err := strconv.ParseUint(text, 10, 16)
	return uint16(n), ok && err == nil
}

// appFilter matches everything of an app on a route.
func appFilter(id AppID, on Route) string {
	return "msg." + on.Plan + "." + strconv.Itoa(on.Shard) + "." + id.String() + ".*"
}

// countApp returns how many messages an app has on a route.
func (j *Journal) countApp(ctx context.Context, id AppID, on Route) (uint64, error) {
	var n uint64
	err := retry(ctx, func(ctx context.Context) error {
		n = 0
		handle, err := j.js.Stream(ctx, StreamName(j.region.ID, on.Plan, on.Shard))
		if err != nil {
			return streamError(err)
		}
		info, err := handle.Info(ctx, jetstream.WithSubjectFilter(appFilter(id, on)))
		if err != nil {
			return streamError(err)
		}
		for _, count := range info.State.Subjects {
			n += count
		}
		return nil
	})
	return n, err
}

// appRecords yields an app's records on a route behind a sequence, in their order,
// up to another sequence or the present end. What is yielded is valid until the
// next. Lost connections are bridged.
func (j *Journal) appRecords(ctx context.Context, id AppID, on Route, after, until uint64) iter.Seq2[Sealed, error] {
	return func(yield func(Sealed, error) bool) {
		for failures := 0; ; {
			before := after
			done, err := j.appSession(ctx, id, on, &after, until, yield)
			if done {
				return
			}
			if after > before {
				failures = 0
			}
			if failures++; failures > 20 || ctx.Err() != nil || errors.Is(err, ErrCorrupt) || errors.Is(err, ErrIncarnation) || !pause(ctx, retryPause) {
				yield(Sealed{}, fmt.Errorf("read app %s on %s: %w", id, on.Plan, err))
				return
			}
		}
	}
}

// appSession is appRecords until something breaks; after moves with what was
// yielded. It reports whether the end was reached, or nobody wants more.
func (j *Journal) appSession(ctx context.Context, id AppID, on Route, after *uint64, until uint64, yield func(Sealed, error) bool) (bool, error) {
	name := StreamName(j.region.ID, on.Plan, on.Shard)
	request, cancel := context.WithTimeout(ctx, 5*requestTimeout)
	defer cancel()
	consumer, err := j.js.CreateConsumer(request, name, jetstream.ConsumerConfig{
		DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: *after + 1, FilterSubject: appFilter(id, on),
		AckPolicy: jetstream.AckNonePolicy, MemoryStorage: true, Replicas: 1, InactiveThreshold: time.Minute,
	})
	if err != nil {
		return false, streamError(err)
	}
	defer func() {
		// Best effort: the server drops it after a minute.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
		defer cancel()
		_ = j.js.DeleteConsumer(ctx, name, consumer.CachedInfo().Name)
	}()
	if consumer.CachedInfo().NumPending == 0 {
		return true, nil
	}
	for delivered := uint64(0); ; {
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
		batch, err := consumer.Fetch(copyEvents, jetstream.FetchMaxWait(2*requestTimeout))
		if err != nil {
			return false, streamError(err)
		}
		count := 0
		for m := range batch.Messages() {
			meta, err := m.Metadata()
			if err != nil {
				return false, unavailable(err)
			}
			if delivered++; meta.Sequence.Consumer != delivered {
				return false, unavailable(errors.New("a message was not delivered"))
			}
			count++
			if meta.Sequence.Stream > until {
				return true, nil
			}
			s, err := sealedOf(m.Subject(), m.Headers(), meta.Sequence.Stream, meta.Timestamp.UTC(), m.Data())
			if err != nil {
				return false, err
			}
			if !yield(s, nil) {
				return true, nil
			}
			*after = s.Sequence
			if s.Sequence == until || meta.NumPending == 0 {
				return true, nil
			}
		}
		if err := batch.Error(); err != nil {
			return false, unavailable(err)
		}
		if count == 0 {
			return false, unavailable(errors.New("no message came"))
		}
	}
}

// kept returns the earliest retention clock that a plan change keeps: what the new
// plan does not hide, and had not expired by the old one.
func (j *Journal) kept(app App) (time.Time, error) {
	from, ok := j.plans[app.Previous.Plan]
	to, ok2 := j.plans[app.Plan]
	if !ok || !ok2 {
		return time.Time{}, fmt.Errorf("plans %q, %q: %w", app.Previous.Plan, app.Plan, ErrUnknownPlan)
	}
	return later(from.Oldest(app.Moved), to.Oldest(app.Moved)), nil
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// keeps reports whether a record is to be copied, by its clear header.
func keeps(s *Sealed, oldest time.Time) (Header, bool, error) {
	if s.Role != RoleEvent && s.Role != RoleCopy {
		return Header{}, false, nil
	}
	h, err := ParseHeader(s.Record)
	if err != nil {
		return h, false, fmt.Errorf("sequence %d: %w", s.Sequence, err)
	}
	clock := Plan{}.Clock(h.Time(), s.Stored)
	return h, !clock.Before(oldest), nil
}

// isGone reports whether a record cannot be opened because it is meant to be gone.
func isGone(err error) bool {
	return errors.Is(err, kms.ErrSubjectErased) || errors.Is(err, kms.ErrEpochDestroyed)
}

// copyAll copies what is kept behind the cursor, in its order.
func (w *moving) copyAll(ctx context.Context) error {
	app, _, err := w.j.registry.load(ctx, w.id)
	if err != nil {
		return err
	}
	oldest, err := w.j.kept(app)
	if err != nil {
		return err
	}
	s := w.j.streams[StreamName(w.j.region.ID, app.Plan, app.Shard)]
	if s == nil {
		return fmt.Errorf("%w: shard %d of plan %s", ErrUnknownPlan, app.Shard, app.Plan)
	}
	c := copier{moving: w, app: app, stream: s, plan: w.j.plans[app.Plan]}
	if !s.gated {
		c.fence = Subject{Plan: app.Plan, Shard: app.Shard, App: w.id, Marker: markSeal, Generation: app.Generation}.String()
	}
	w.Error = ""
	for sealed, err := range w.j.appRecords(ctx, w.id, app.Previous, w.Cursor, app.Previous.Sealed) {
		if err != nil {
			return err
		}
		_, keep, err := keeps(&sealed, oldest)
		if err != nil {
			return err
		}
		if keep {
			keep, err = c.add(ctx, &sealed)
		}
		if err != nil {
			return fmt.Errorf("copy position %s: %w", sealed.Position, err)
		}
		if !keep && (sealed.Role == RoleEvent || sealed.Role == RoleCopy) {
			c.skipped++
		}
		c.through = sealed.Sequence
		if len(c.entries) >= copyEvents || c.bytes >= copyBytes || c.skipped >= 100*copyEvents {
			if err := c.flush(ctx); err != nil {
				return err
			}
		}
	}
	return c.flush(ctx)
}

// A copier gathers copies and appends them.
type copier struct {
	*moving

	app     App
	stream  *stream
	plan    Plan
	fence   string
	entries []entry
	bytes   int
	skipped uint64
	through uint64 // the last sequence that was looked at
	plain   []byte
}

// add seals a record anew. It returns false for what is meant to be gone.
func (c *copier) add(ctx context.Context, s *Sealed) (bool, error) {
	h, envelope, err := ParseRecord(s.Record)
	if err != nil {
		return false, err
	}
	eh, err := kms.ParseHeader(envelope)
	if err != nil {
		return false, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	if isStub(s.Record) {
		c.entries = append(c.entries, entry{
			subject: Subject{Plan: c.app.Plan, Shard: c.app.Shard, App: c.id, Bucket: BucketOf(h.Conversation)}.String(),
			record:  bytes.Clone(s.Record), gen: c.app.Generation, copied: copyValue(s), fence: c.fence,
		})
		return true, nil
	}
	defer func() { clear(c.plain) }()
	plain, err := c.j.OpenRecord(ctx, c.plain[:0], c.id, s.Record)
	if isGone(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	c.plain = plain
	epoch := c.plan.EpochAt(c.plan.Clock(h.Time(), s.Stored), c.app.Generation)
	key, err := c.j.keyring.Sealer(ctx, c.id.String(), epoch, eh.Subject)
	if isGone(err) {
		return false, nil // erased, or expired, a moment ago
	}
	if err != nil {
		return false, fmt.Errorf("key for sealing: %w", err)
	}
	record := h.Append(make([]byte, 0, len(s.Record)+64))
	aad := appendAAD(nil, c.j.region.ID, c.id, c.j.logID, record)
	c.entries = append(c.entries, entry{
		subject: Subject{Plan: c.app.Plan, Shard: c.app.Shard, App: c.id, Bucket: BucketOf(h.Conversation)}.String(),
		record:  key.Seal(record, aad, plain), gen: c.app.Generation, copied: copyValue(s), fence: c.fence,
	})
	c.bytes += len(s.Record)
	return true, nil
}

// flush appends what was gathered, and moves the cursor behind it.
func (c *copier) flush(ctx context.Context) error {
	if n := len(c.entries); n > 0 {
		// They must not move any more, and stay the committer's when ctx ends.
		entries := c.entries
		c.entries, c.bytes = nil, 0
		if err := c.j.put(ctx, c.id, entries, c.stream.enqueue); err != nil {
			return err
		}
		for i := range entries {
			if err := entries[i].err; err != nil {
				return fmt.Errorf("append a copy: %w", err)
			}
			c.End = max(c.End, entries[i].seq)
		}
		c.Copied += uint64(n)
	}
	c.Skipped += c.skipped
	c.skipped = 0
	c.Cursor = max(c.Cursor, c.through)
	return c.tick(ctx)
}

// verify opens every copy and what it was made from, and compares them. When it
// fails the copy is made again.
func (w *moving) verify(ctx context.Context) error {
	app, _, err := w.j.registry.load(ctx, w.id)
	if err != nil {
		return err
	}
	err = w.compareAll(ctx, app)
	if errors.Is(err, errNotCopied) {
		w.Step, w.Cursor = MoveSwitched, 0
		return errors.Join(err, w.beat(ctx))
	}
	return err
}

// errNotCopied means that an event has no copy, or one that differs.
var errNotCopied = fmt.Errorf("%w: a copy is not as its original", ErrCorrupt) //nolint:gochecknoglobals // a sentinel

func (w *moving) compareAll(ctx context.Context, app App) error {
	oldest, err := w.j.kept(app)
	if err != nil {
		return err
	}
	next, stop := iterCopies(w.j.appRecords(ctx, w.id, app.current(), app.Opened, w.End))
	defer stop()
	var original, copied []byte
	defer func() { clear(original); clear(copied) }()
	w.Verified = 0
	for s, err := range w.j.appRecords(ctx, w.id, app.Previous, 0, app.Previous.Sealed) {
		if err != nil {
			return err
		}
		h, keep, err := keeps(&s, oldest)
		if err != nil {
			return err
		}
		if !keep {
			continue
		}
		if isStub(s.Record) {
			c, err := next(s.Sequence)
			if err != nil || c.Position != s.Position || !bytes.Equal(c.Record, s.Record) {
				return fmt.Errorf("position %s: %w", s.Position, errNotCopied)
			}
			w.Verified++
			continue
		}
		if original, err = w.j.OpenRecord(ctx, original[:0], w.id, s.Record); isGone(err) {
			continue
		} else if err != nil {
			return err
		}
		c, err := next(s.Sequence)
		if err != nil {
			return fmt.Errorf("position %s: %w", s.Position, err)
		}
		ch, err := ParseHeader(c.Record)
		if err != nil {
			return err
		}
		if copied, err = w.j.OpenRecord(ctx, copied[:0], w.id, c.Record); isGone(err) {
			continue
		} else if err != nil {
			return err
		}
		if ch != h || c.Position != s.Position || c.Stored.UnixMilli() != s.Stored.UnixMilli() || c.From != s.Plan || !bytes.Equal(original, copied) {
			return fmt.Errorf("position %s: %w", s.Position, errNotCopied)
		}
		w.Verified++
		if err := w.tick(ctx); err != nil {
			return err
		}
	}
	return nil
}

// iterCopies returns a function that finds the copy of a source among those that
// follow. Copies come in the order of their sources, but after a crash a run of
// them comes again.
func iterCopies(records iter.Seq2[Sealed, error]) (func(source uint64) (Sealed, error), func()) {
	pull, stop := iter.Pull2(records)
	return func(source uint64) (Sealed, error) {
		for {
			s, err, ok := pull()
			if !ok {
				return s, errNotCopied
			}
			if err != nil {
				return s, err
			}
			if s.Role == RoleCopy && s.Source == source {
				return s, nil
			}
		}
	}, stop
}

// A Preview says what a plan change would do.
type Preview struct {
	From string `json:"from"`
	To   string `json:"to"`
	// Events and Bytes are what the app has, sealed, and has not expired.
	Events uint64 `json:"events"`
	Bytes  uint64 `json:"bytes"`
	// Hidden is how many of them would be hidden at once, and their keys
	// destroyed; Oldest is the retention clock of the first of those, and Before
	// the one from which events stay.
	Hidden uint64    `json:"hidden"`
	Oldest time.Time `json:"oldest,omitzero"`
	Before time.Time `json:"before"`
}

// Preview counts what a plan change would keep and hide, and changes nothing.
func (m *Mover) Preview(ctx context.Context, id AppID, plan string) (Preview, error) {
	app, to, err := m.check(ctx, id, plan)
	if err != nil {
		return Preview{}, fmt.Errorf("preview of a plan change: %w", err)
	}
	from, ok := m.j.plans[app.Plan]
	if !ok {
		return Preview{}, fmt.Errorf("preview of a plan change: plan %q: %w", app.Plan, ErrUnknownPlan)
	}
	now := m.j.now()
	p := Preview{From: app.Plan, To: plan, Before: later(from.Oldest(now), to.Oldest(now)).UTC().Truncate(time.Millisecond)}
	for s, err := range m.j.appRecords(ctx, id, app.current(), 0, maxSequence) {
		if err != nil {
			return p, fmt.Errorf("preview of a plan change: %w", err)
		}
		h, there, err := keeps(&s, from.Oldest(now))
		if err != nil {
			return p, fmt.Errorf("preview of a plan change: %w", err)
		}
		if !there {
			continue
		}
		p.Events++
		p.Bytes += uint64(len(s.Record))
		if clock := to.Clock(h.Time(), s.Stored).UTC(); clock.Before(p.Before) {
			p.Hidden++
			if p.Oldest.IsZero() || clock.Before(p.Oldest) {
				p.Oldest = clock
			}
		}
	}
	return p, nil
}
