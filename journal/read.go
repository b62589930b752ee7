package journal

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// readAhead bounds the records that a reader holds, and so its memory.
	readAhead      = 2048
	readAheadBytes = 4 << 20
	// readBatch is the largest number of records in one call.
	readBatch = 1024
)

// Read calls fn with the records of a message stream behind the sequence after,
// in their order, and goes on with new ones as they become durable. It returns
// when ctx ends, with its error, or when fn fails, with that error. Records and
// the slice are fn's only until it returns.
//
// The incarnation is the one that the reader's checkpoint belongs to; "" is
// whichever is registered. When the stream is missing or is another one, or a
// checkpoint is of another one, Read fails with [ErrIncarnation].
//
// Sequences are consecutive, and Read checks that they are. Two kinds of gap
// have a reason: what lies before the stream's first message has expired, when
// the stream is older than its retention; and what the registry has a row for
// was deleted on purpose, see [Journal.DeleteRecords]. The server's own word
// does not count: it reports the sequences of a damaged block as deleted, and
// those of a missing first block as expired. A checkpoint beyond the stream's
// end means that the stream was truncated or is an older copy. Everything else
// is [ErrGap], with the stream and the sequence, and fn is not called with what
// lies behind it.
//
// Lost connections, restarts of the server and changes of leader are bridged.
func (j *Journal) Read(ctx context.Context, name string, after uint64, incarnation string, fn func([]Sealed) error) error {
	s := j.streams[name]
	if s == nil {
		return fmt.Errorf("read: %w: stream %s is none of region %s", ErrInvalid, name, j.region.ID)
	}
	if incarnation != "" && incarnation != s.info.Incarnation {
		return fmt.Errorf("read stream %s: %w: the checkpoint is of incarnation %q, registered is %q", name, ErrIncarnation, incarnation, s.info.Incarnation)
	}
	r := &reader{j: j, s: s, next: after + 1, fn: fn}
	quiet := retryPause
	for {
		before := r.next
		err := r.session(ctx)
		switch {
		case ctx.Err() != nil:
			return fmt.Errorf("read stream %s: %w", name, ctx.Err())
		case r.failed != nil:
			return r.failed
		case j.closed.Load():
			return fmt.Errorf("read stream %s: %w: the journal is closed", name, ErrUnavailable)
		case errors.Is(err, ErrGap), errors.Is(err, ErrIncarnation), errors.Is(err, ErrCorrupt):
			return fmt.Errorf("read stream %s: %w", name, err)
		}
		if r.next > before {
			quiet = retryPause
		}
		j.log.DebugContext(ctx, "a reader starts again", "stream", name, "next", r.next, "error", err)
		pause(ctx, quiet)
		quiet = min(2*quiet, time.Second)
	}
}

// reader is one Read.
type reader struct {
	j      *Journal
	s      *stream
	next   uint64 // the sequence expected next
	fn     func([]Sealed) error
	failed error // of fn

	batch []Sealed
}

// session reads until something breaks.
func (r *reader) session(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(r.j.ctx, cancel) //nolint:contextcheck // the journal closes: the reader ends
	defer stop()
	if err := r.checkStream(ctx); err != nil {
		return err
	}
	request, done := context.WithTimeout(ctx, requestTimeout)
	defer done()
	consumer, err := r.j.js.CreateConsumer(request, r.s.info.Name, jetstream.ConsumerConfig{
		DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: r.next,
		AckPolicy: jetstream.AckNonePolicy, MemoryStorage: true, Replicas: 1,
		InactiveThreshold: time.Minute, MaxDeliver: 1,
	})
	if err != nil {
		return streamError(err)
	}
	defer func() {
		// Best effort: the server drops it after a minute.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = r.j.js.DeleteConsumer(ctx, r.s.info.Name, consumer.CachedInfo().Name)
	}()
	messages := make(chan jetstream.Msg, readAhead)
	broken := make(chan error, 1)
	report := func(err error) {
		select {
		case broken <- err:
		default:
		}
	}
	consuming, err := consumer.Consume(func(m jetstream.Msg) {
		select {
		case messages <- m:
		case <-ctx.Done():
		}
	}, jetstream.PullMaxMessagesWithBytesLimit(readAhead, readAheadBytes), jetstream.PullHeartbeat(time.Second), jetstream.PullExpiry(10*time.Second),
		jetstream.ConsumeErrHandler(func(_ jetstream.ConsumeContext, err error) { report(err) }))
	if err != nil {
		return streamError(err)
	}
	defer func() { <-consuming.Closed() }()
	defer consuming.Stop()
	defer cancel()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-broken:
			return unavailable(err)
		case m := <-messages:
			if err := r.deliver(ctx, m, messages); err != nil {
				return err
			}
		}
	}
}

// checkStream holds the stream against the registry and the reader's place.
func (r *reader) checkStream(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	handle, err := r.j.js.Stream(ctx, r.s.info.Name)
	if err != nil {
		return streamError(err)
	}
	info := handle.CachedInfo()
	if got := info.Config.Metadata[IncarnationKey]; got != r.s.info.Incarnation {
		return fmt.Errorf("%w: it has incarnation %q, registered is %q", ErrIncarnation, got, r.s.info.Incarnation)
	}
	if last := info.State.LastSeq; last+1 < r.next {
		return fmt.Errorf("%w: it ends at %d, the reader has seen %d", ErrGap, last, r.next-1)
	}
	return nil
}

// deliver calls fn with m and whatever else is there, as far as it is durable.
func (r *reader) deliver(ctx context.Context, m jetstream.Msg, more <-chan jetstream.Msg) error {
	r.batch = r.batch[:0]
	next := r.next
	for {
		sealed, err := r.decode(m)
		if err != nil {
			return errors.Join(r.flush(ctx, next), err)
		}
		if sealed.Sequence != next {
			if err := r.gap(ctx, next, sealed.Sequence); err != nil {
				return errors.Join(r.flush(ctx, next), err)
			}
		}
		next = sealed.Sequence + 1
		r.batch = append(r.batch, sealed)
		if len(r.batch) >= readBatch {
			return r.flush(ctx, next)
		}
		select {
		case m = <-more:
			continue
		default:
		}
		return r.flush(ctx, next)
	}
}

func (r *reader) flush(ctx context.Context, next uint64) error {
	if len(r.batch) == 0 {
		return nil
	}
	if r.s.gated {
		if err := r.s.durable.wait(ctx, next-1); err != nil {
			return err
		}
	}
	if err := r.fn(r.batch); err != nil {
		r.failed = err
		return err
	}
	r.next = next
	return nil
}

// gap reports an unexplained absence of the sequences from want to got-1.
func (r *reader) gap(ctx context.Context, want, got uint64) error {
	ctx, cancel := context.WithTimeout(ctx, 2*requestTimeout)
	defer cancel()
	if got < want {
		return unavailable(fmt.Errorf("sequence %d again, expected %d", got, want))
	}
	handle, err := r.j.js.Stream(ctx, r.s.info.Name)
	if err != nil {
		return streamError(err)
	}
	info := handle.CachedInfo()
	missing := span{want, got - 1}
	if info.Config.MaxAge > 0 && time.Since(info.Created) > info.Config.MaxAge {
		// What lies before the first message has expired. In a younger stream
		// nothing can have.
		missing.First = max(want, info.State.FirstSeq)
	}
	deleted, err := r.j.deletedSpans(ctx, r.s.info.Name, missing)
	if err != nil {
		return err
	}
	if hole, ok := uncovered(missing, deleted); ok {
		// It may also be that the answer was lost on the way: then the stream
		// has them.
		if _, err := handle.GetMsg(ctx, hole); err == nil {
			return unavailable(fmt.Errorf("sequence %d was not delivered", hole))
		}
		return fmt.Errorf("%w: sequence %d is missing; the reader expected %d and got %d", ErrGap, hole, want, got)
	}
	return nil
}

// decode makes a Sealed of a message, without looking into the record.
func (r *reader) decode(m jetstream.Msg) (Sealed, error) {
	sequence, stored, ok := parseAckSubject(m.Reply())
	if !ok {
		return Sealed{}, unavailable(errors.New("a message without a sequence"))
	}
	if r.s.info.Plan == "" {
		app, err := parseCallbackSubject(m.Subject())
		if err != nil {
			return Sealed{}, fmt.Errorf("%w: sequence %d has a foreign subject", ErrCorrupt, sequence)
		}
		return Sealed{App: app, Position: Position(sequence), Sequence: sequence, Stored: stored, Record: m.Data()}, nil
	}
	return sealedOf(m.Subject(), m.Headers(), sequence, stored, m.Data())
}

// sealedOf makes a Sealed of a stored message.
func sealedOf(text string, h nats.Header, sequence uint64, stored time.Time, data []byte) (Sealed, error) {
	subject, err := ParseSubject(text)
	if err != nil {
		return Sealed{}, fmt.Errorf("%w: sequence %d has a foreign subject", ErrCorrupt, sequence)
	}
	var generation uint64
	if v := h.Get(generationHeader); v != "" {
		if generation, err = strconv.ParseUint(v, 10, 16); err != nil {
			return Sealed{}, fmt.Errorf("%w: sequence %d has no readable generation", ErrCorrupt, sequence)
		}
	}
	position, err := NewPosition(uint16(generation), sequence) //nolint:gosec // parsed as 16 bits
	if err != nil {
		return Sealed{}, fmt.Errorf("sequence %d: %w: %w", sequence, ErrCorrupt, err)
	}
	s := Sealed{
		App: subject.App, Position: position, Sequence: sequence, Stored: stored, Plan: subject.Plan, Record: data,
		Generation: uint16(generation), //nolint:gosec // parsed as 16 bits
	}
	switch subject.Marker {
	case markSeal:
		s.Role = RoleSeal
	case markOpen:
		s.Role = RoleOpen
	case markClose:
		s.Role = RoleClose
	default:
		if v := h.Get(copyHeader); v != "" {
			if err := s.parseCopy(v); err != nil {
				return Sealed{}, fmt.Errorf("sequence %d: %w", sequence, err)
			}
		}
	}
	return s, nil
}

// parseAckSubject reads sequence and time from the subject that a consumer's
// message is acknowledged on: $JS.ACK.<stream>.<consumer>.<delivered>.
// <stream sequence>.<consumer sequence>.<time>.<pending>, with two more tokens
// in front of the stream where the server has a domain (ADR 15 of NATS).
func parseAckSubject(reply string) (sequence uint64, stored time.Time, ok bool) {
	rest := reply
	var tail [5]string
	for i := len(tail) - 1; i >= 0; i-- {
		dot := strings.LastIndexByte(rest, '.')
		if dot < 0 {
			return 0, time.Time{}, false
		}
		tail[i], rest = rest[dot+1:], rest[:dot]
	}
	if !strings.HasPrefix(rest, "$JS.ACK.") {
		return 0, time.Time{}, false
	}
	if strings.Count(rest, ".") > 3 {
		// The newer form ends with a random token.
		return parseLongAckSubject(reply)
	}
	return ackFields(tail[1], tail[3])
}

func parseLongAckSubject(reply string) (uint64, time.Time, bool) {
	f := strings.Split(reply, ".")
	if len(f) < 11 {
		return 0, time.Time{}, false
	}
	return ackFields(f[7], f[9])
}

func ackFields(sequence, nanos string) (uint64, time.Time, bool) {
	seq, err := strconv.ParseUint(sequence, 10, 64)
	if err != nil {
		return 0, time.Time{}, false
	}
	ns, err := strconv.ParseInt(nanos, 10, 64)
	if err != nil {
		return 0, time.Time{}, false
	}
	return seq, time.Unix(0, ns).UTC(), true
}
