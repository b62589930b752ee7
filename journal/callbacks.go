package journal

import (
	"context"
	"crypto/rand"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/kms"
)

const (
	callbackShards = 1
	callbackEpochs = 12 // in the retention
	callbackClass  = "callbacks"

	// maxDetails bounds the sealed part of an attempts record.
	maxDetails = 48 << 10
)

// callbackSubject is where the attempts of an app's endpoints are published.
func callbackSubject(shard int, app AppID) string {
	return "cb." + strconv.Itoa(shard) + "." + app.String()
}

// parseCallbackSubject accepts what callbackSubject makes and nothing else.
func parseCallbackSubject(s string) (AppID, error) {
	rest, ok := strings.CutPrefix(s, "cb.")
	shard, app, found := strings.Cut(rest, ".")
	if !ok || !found {
		return AppID{}, fmt.Errorf("subject: %w: not a callback subject", ErrInvalid)
	}
	if _, err := parseSmall(shard, 1024); err != nil {
		return AppID{}, fmt.Errorf("subject shard: %w", err)
	}
	id, err := ParseAppID(app)
	if err != nil {
		return AppID{}, fmt.Errorf("subject: %w", err)
	}
	return id, nil
}

// Callbacks is the part of a journal that keeps what became of deliveries to
// webhook endpoints. It is a source for a projections.Runner.
type Callbacks struct {
	j         *Journal
	streams   []StreamInfo
	retention time.Duration
}

// Callbacks returns the callback streams of the region.
func (j *Journal) Callbacks() *Callbacks { return j.callbacks }

// Retention is how long an attempt is kept, and how long an event is sent.
func (c *Callbacks) Retention() time.Duration { return c.retention }

// Streams returns the callback streams of the region.
func (c *Callbacks) Streams() []StreamInfo { return append([]StreamInfo(nil), c.streams...) }

// Read is [Journal.Read] for callback streams: the records are [Attempts].
func (c *Callbacks) Read(ctx context.Context, stream string, after uint64, incarnation string, fn func([]Sealed) error) error {
	return c.j.Read(ctx, stream, after, incarnation, fn)
}

// Last is [Journal.Last].
func (c *Callbacks) Last(ctx context.Context, stream string) (uint64, error) {
	return c.j.Last(ctx, stream)
}

// Locate returns the app's callback stream and, as the sequence there, the
// position: callbacks have no positions of their own.
func (c *Callbacks) Locate(_ context.Context, app AppID, position Position) (stream string, sequence uint64, err error) {
	return CallbackStream(c.j.region.ID, c.shard(app)), uint64(position), nil
}

func (c *Callbacks) shard(app AppID) int {
	return int(app[len(app)-1]) % len(c.streams)
}

// wanted returns the configuration of the callback streams.
func (c *Callbacks) wanted(base jetstream.StreamConfig) []jetstream.StreamConfig {
	out := make([]jetstream.StreamConfig, 0, callbackShards)
	for shard := range callbackShards {
		s := base
		s.Name = CallbackStream(c.j.region.ID, shard)
		s.Subjects = []string{"cb." + strconv.Itoa(shard) + ".*"}
		out = append(out, s)
	}
	return out
}

// Append stores a record of attempts with its details, which are sealed, and
// returns its sequence when it is durable. It fills in the record's id and, when
// it is 0, its time. After an error it may or may not be stored; storing the same
// outcome twice does no harm.
func (c *Callbacks) Append(ctx context.Context, app AppID, a *Attempts, details []byte) (uint64, error) {
	if c.j.closed.Load() {
		return 0, fmt.Errorf("append attempts: %w: the journal is closed", ErrUnavailable)
	}
	switch {
	case len(a.Entries) > MaxAttempts:
		return 0, fmt.Errorf("append attempts: %w: %d entries", ErrTooLarge, len(a.Entries))
	case len(details) > maxDetails:
		return 0, fmt.Errorf("append attempts: %w: details of %d bytes", ErrTooLarge, len(details))
	}
	_, _ = rand.Read(a.ID[:]) // never fails; it ends the process instead
	if a.Millis == 0 {
		a.Millis = c.j.now().UnixMilli()
	}
	record := a.Append(nil)
	if len(details) > 0 {
		key, err := c.j.keyring.Sealer(ctx, app.String(), c.epoch(c.j.now()), kms.Tag{})
		if err != nil {
			return 0, fmt.Errorf("append attempts: key for sealing: %w", err)
		}
		record = key.Seal(record, appendAAD(nil, c.j.region.ID, app, c.j.logID, record), details)
	}
	shard := c.shard(app)
	call := &appending{j: c.j, app: app, done: make(chan struct{}, 1)}
	call.entries = []entry{{subject: callbackSubject(shard, app), record: record, call: call}}
	if err := c.j.streams[c.streams[shard].Name].enqueue(ctx, call); err != nil {
		return 0, fmt.Errorf("append attempts: %w", err)
	}
	if err := call.await(); err != nil {
		return 0, fmt.Errorf("append attempts: %w", err)
	}
	if err := call.entries[0].err; err != nil {
		return 0, fmt.Errorf("append attempts: %w", err)
	}
	return call.entries[0].seq, nil
}

// Details returns the opened details of a record, nil when it has none.
func (c *Callbacks) Details(ctx context.Context, app AppID, stream string, sequence uint64) ([]byte, error) {
	s, err := c.j.js.Stream(ctx, stream)
	if err != nil {
		return nil, fmt.Errorf("details of attempts: %w", streamError(err))
	}
	msg, err := s.GetMsg(ctx, sequence)
	if err != nil {
		return nil, fmt.Errorf("details of attempts: %w", streamError(err))
	}
	_, envelope, err := ParseAttempts(msg.Data)
	if err != nil || len(envelope) == 0 {
		return nil, err
	}
	h, err := kms.ParseHeader(envelope)
	if err != nil {
		return nil, fmt.Errorf("details of attempts: %w: %w", ErrCorrupt, err)
	}
	key, err := c.j.keyring.Opener(ctx, app.String(), h.Epoch, h.Subject)
	if err != nil {
		return nil, fmt.Errorf("details of attempts: %w", err)
	}
	head := msg.Data[:len(msg.Data)-len(envelope)]
	details, err := key.Open(nil, appendAAD(nil, c.j.region.ID, app, c.j.logID, head), envelope)
	if err != nil {
		return nil, fmt.Errorf("details of attempts: %w: %w", ErrCorrupt, err)
	}
	return details, nil
}

func (c *Callbacks) epoch(now time.Time) kms.Epoch {
	length := max(c.retention/callbackEpochs, time.Second).Truncate(time.Second)
	return epochs{class: callbackClass, length: length, retention: c.retention}.at(now)
}
