package journal

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/kms"
)

const (
	codeWrongSequence       = 10071 // one replica
	codeWrongSequenceRaft   = 10164 // replicated streams
	codeSequenceInProgress  = 10163 // replicated streams: another write of the subject is under way
	expectedSubjectSequence = "Nats-Expected-Last-Subject-Sequence"
	kvOperation             = "KV-Operation"
	kvDelete                = "DEL"
	kvPurge                 = "PURGE"
	// writeID tells a write whose answer was lost from another one's.
	writeID = "Coffer-Write"
)

// Rows keeps rows in a KV bucket: compare-and-set by the revision, which is the
// sequence in the bucket's stream, and the bytes of a replaced row overwritten.
// It implements kms.Rows.
//
// On replicated buckets the Raft log of each server keeps the replaced bytes
// until it is compacted.
type Rows struct {
	js     jetstream.JetStream
	stream string
	prefix string
	sync   Syncer
	cached atomic.Pointer[jetstream.Stream]
	// left is signalled when an erasure was not finished.
	left chan struct{}

	sweeping sync.Mutex // one sweep at a time
	rolling  sync.Mutex // guards rolled, and is held while a mark is set
	rolled   bool       // UpdateGroup writes behind a mark: see roll

	mu       sync.Mutex     // guards what follows
	deferred map[string]int // revisions of a row that UpdateGroup left to Sweep
	soon     *time.Timer    // of the sweep after groups
}

var _ kms.Rows = (*Rows)(nil)

// NewRows returns the rows of a bucket, which [Open] made. The syncer is the
// one of [Config].
func NewRows(js jetstream.JetStream, bucket string, syncer Syncer) *Rows {
	return &Rows{
		js: js, stream: "KV_" + bucket, prefix: "$KV." + bucket + ".", sync: syncer, left: make(chan struct{}, 1),
		deferred: map[string]int{},
	}
}

// Load returns the present row.
func (r *Rows) Load(ctx context.Context, name string) (kms.Row, error) {
	if err := checkRowName(name); err != nil {
		return kms.Row{}, err
	}
	msg, err := r.last(ctx, name)
	if err != nil {
		return kms.Row{}, fmt.Errorf("load row %s: %w", name, err)
	}
	if msg == nil || deleted(msg.Header) {
		return kms.Row{}, fmt.Errorf("load row %s: %w", name, kms.ErrRowNotFound)
	}
	return kms.Row{Value: msg.Data, Revision: msg.Sequence}, nil
}

// last returns the last message of a row, nil when there is none.
func (r *Rows) last(ctx context.Context, name string) (msg *jetstream.RawStreamMsg, err error) {
	err = retry(ctx, func(ctx context.Context) error {
		s, err := r.handle(ctx)
		if err != nil {
			return err
		}
		msg, err = s.GetLastMsgForSubject(ctx, r.prefix+name)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			msg = nil
			return nil
		}
		return streamError(err)
	})
	return msg, err
}

// retry repeats a request that has no effect, or the same one when repeated,
// while the server cannot be reached: a request that went down with its
// connection is never answered. A slow server gets more time each time.
func retry(ctx context.Context, request func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, defaultCommitTimeout)
	defer cancel()
	for wait := requestTimeout; ; wait *= 2 {
		attempt, done := context.WithTimeout(ctx, wait)
		err := request(attempt)
		done()
		if err == nil || !errors.Is(err, ErrUnavailable) || !pause(ctx, retryPause) {
			return err
		}
	}
}

func deleted(h nats.Header) bool {
	op := h.Get(kvOperation)
	return op == kvDelete || op == kvPurge
}

// Create makes a row.
func (r *Rows) Create(ctx context.Context, name string, value []byte) (uint64, error) {
	if err := checkRowName(name); err != nil {
		return 0, err
	}
	revision, err := r.put(ctx, name, value, 0, "")
	if errors.Is(err, kms.ErrRowConflict) {
		// It may have been deleted: then its marker is what to follow.
		msg, lerr := r.last(ctx, name)
		if lerr != nil {
			return 0, fmt.Errorf("create row %s: %w", name, lerr)
		}
		if msg != nil && deleted(msg.Header) {
			revision, err = r.put(ctx, name, value, msg.Sequence, "")
		}
	}
	if err != nil {
		return 0, fmt.Errorf("create row %s: %w", name, err)
	}
	return revision, nil
}

// Update replaces a row and overwrites the bytes of the one before.
func (r *Rows) Update(ctx context.Context, name string, value []byte, revision uint64) (uint64, error) {
	if err := checkRowName(name); err != nil {
		return 0, err
	}
	if revision == 0 {
		return 0, fmt.Errorf("update row %s: %w", name, kms.ErrRowConflict)
	}
	next, err := r.put(ctx, name, value, revision, "")
	if err != nil {
		return 0, fmt.Errorf("update row %s: %w", name, err)
	}
	if err := r.erase(ctx, name, revision); err != nil {
		return 0, fmt.Errorf("update row %s: %w", name, err)
	}
	return next, nil
}

// Delete removes a row and its bytes. A marker without content stays, so that
// revisions go on growing and whoever watches learns of it.
func (r *Rows) Delete(ctx context.Context, name string, revision uint64) error {
	if err := checkRowName(name); err != nil {
		return err
	}
	msg, err := r.last(ctx, name)
	switch {
	case err != nil:
		return fmt.Errorf("delete row %s: %w", name, err)
	case msg == nil || deleted(msg.Header):
		return fmt.Errorf("delete row %s: %w", name, kms.ErrRowNotFound)
	case msg.Sequence != revision:
		return fmt.Errorf("delete row %s: %w", name, kms.ErrRowConflict)
	}
	if _, err := r.put(ctx, name, nil, revision, kvDelete); err != nil {
		return fmt.Errorf("delete row %s: %w", name, err)
	}
	if err := r.erase(ctx, name, revision); err != nil {
		return fmt.Errorf("delete row %s: %w", name, err)
	}
	return nil
}

// put is write, and returns once the message is durable.
func (r *Rows) put(ctx context.Context, name string, value []byte, last uint64, operation string) (uint64, error) {
	sequence, err := r.write(ctx, name, value, last, operation)
	if err != nil {
		return 0, err
	}
	if r.sync != nil {
		if err := r.sync.Sync(r.stream); err != nil {
			return 0, fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
	}
	return sequence, nil
}

// write writes a row's next message, given the sequence of its last one.
func (r *Rows) write(ctx context.Context, name string, value []byte, last uint64, operation string) (uint64, error) {
	return r.publish(ctx, r.message(name, value, operation), last)
}

func (r *Rows) message(name string, value []byte, operation string) *nats.Msg {
	msg := nats.NewMsg(r.prefix + name)
	msg.Data = value
	msg.Header.Set(writeID, nats.NewInbox()[len(nats.InboxPrefix):])
	if operation != "" {
		msg.Header.Set(kvOperation, operation)
	}
	return msg
}

// publish sends a row's next message. When the answer does not come, the row is
// looked at: it has either the new message or still the last one.
func (r *Rows) publish(ctx context.Context, msg *nats.Msg, last uint64) (uint64, error) {
	var sequence uint64
	err := retry(ctx, func(ctx context.Context) error {
		ack, err := r.js.PublishMsg(ctx, msg, jetstream.WithExpectLastSequencePerSubject(last), jetstream.WithRetryAttempts(0))
		if err == nil {
			sequence = ack.Sequence
			return nil
		}
		if api, ok := errors.AsType[*jetstream.APIError](err); ok {
			switch api.ErrorCode {
			case codeWrongSequence, codeWrongSequenceRaft:
				// An attempt whose answer was lost may have been the writer.
				sequence, err = r.written(ctx, msg, last)
				return err
			case codeSequenceInProgress:
				return unavailable(err)
			default:
			}
		}
		return streamError(err)
	})
	return sequence, err
}

// written finds out why a write was refused. It returns the sequence of the
// row's last message if that is msg itself; a conflict; or, when the row is still
// as the writer expects, that it cannot be told yet: on replicated streams the
// leader refuses already while another's write is under way.
func (r *Rows) written(ctx context.Context, msg *nats.Msg, last uint64) (uint64, error) {
	s, err := r.handle(ctx)
	if err != nil {
		return 0, err
	}
	have, err := s.GetLastMsgForSubject(ctx, msg.Subject)
	switch {
	case errors.Is(err, jetstream.ErrMsgNotFound) && last == 0:
		return 0, fmt.Errorf("%w: another write is under way", ErrUnavailable)
	case errors.Is(err, jetstream.ErrMsgNotFound):
		return 0, kms.ErrRowConflict
	case err != nil:
		return 0, streamError(err)
	case have.Sequence == last:
		return 0, fmt.Errorf("%w: another write is under way", ErrUnavailable)
	case have.Sequence > last && have.Header.Get(writeID) == msg.Header.Get(writeID):
		return have.Sequence, nil
	}
	return 0, kms.ErrRowConflict
}

// erase overwrites the bytes of a replaced revision, and of any before it that
// an interrupted call left.
func (r *Rows) erase(ctx context.Context, name string, revision uint64) error {
	finished := false
	defer func() {
		if !finished {
			r.unfinished()
		}
	}()
	for seq := revision; seq > 0 && seq <= revision; {
		err := retry(ctx, func(ctx context.Context) (err error) {
			seq, err = r.eraseOne(ctx, name, seq)
			return err
		})
		if err != nil {
			return err
		}
	}
	if r.sync != nil {
		if err := r.sync.SyncFolder(r.stream); err != nil {
			return fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
	}
	finished = true
	r.settled(name)
	return nil
}

// eraseOne overwrites one revision of a row, and returns the sequence of the
// row's first one that is left, 0 for none.
func (r *Rows) eraseOne(ctx context.Context, name string, seq uint64) (uint64, error) {
	s, err := r.handle(ctx)
	if err != nil {
		return seq, err
	}
	if err := s.SecureDeleteMsg(ctx, seq); err != nil && !noSuchMessage(err) {
		return seq, fmt.Errorf("erase revision %d: %w", seq, streamError(err))
	}
	first, err := r.first(ctx, name)
	if err != nil {
		return seq, err
	}
	return first, nil
}

// first returns the sequence of a row's first revision, 0 for none. The bucket
// keeps several, so one that an interrupted call left is the first.
func (r *Rows) first(ctx context.Context, name string) (uint64, error) {
	s, err := r.handle(ctx)
	if err != nil {
		return 0, err
	}
	first, err := s.GetMsg(ctx, 0, jetstream.WithGetMsgSubject(r.prefix+name))
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("look for older revisions: %w", streamError(err))
	}
	return first.Sequence, nil
}

// noSuchMessage reports whether a deletion failed because another one was
// faster.
func noSuchMessage(err error) bool {
	switch {
	case errors.Is(err, jetstream.ErrMsgNotFound):
		return true
	case errors.Is(err, jetstream.ErrMsgDeleteUnsuccessful):
		// The client passes the codes on as text only.
		return strings.Contains(err.Error(), "err_code=10043") ||
			strings.Contains(err.Error(), "err_code=10057") && strings.Contains(err.Error(), "no message found")
	}
	return false
}

// handle returns the stream's handle, which costs a request the first time.
func (r *Rows) handle(ctx context.Context) (jetstream.Stream, error) {
	if s := r.cached.Load(); s != nil {
		return *s, nil
	}
	s, err := r.js.Stream(ctx, r.stream)
	if err != nil {
		return nil, streamError(err)
	}
	r.cached.Store(&s)
	return s, nil
}

// List yields the names of the rows with the prefix.
func (r *Rows) List(ctx context.Context, prefix string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		names, err := r.names(ctx, prefix)
		if err != nil {
			yield("", fmt.Errorf("list rows %s: %w", prefix, err))
			return
		}
		for name, there := range names {
			if there && !yield(name, nil) {
				return
			}
		}
	}
}

// names returns whether each row with the prefix is there: a deleted one's marker
// is not.
func (r *Rows) names(ctx context.Context, prefix string) (map[string]bool, error) {
	info, err := r.subjects(ctx, prefix)
	if err != nil {
		return nil, err
	}
	there := map[string]bool{}
	err = r.scan(ctx, prefix, func(m scanned) error {
		if strings.HasPrefix(m.name, prefix) {
			there[m.name] = m.operation != kvDelete && m.operation != kvPurge
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for subject := range info.State.Subjects {
		name := strings.TrimPrefix(subject, r.prefix)
		if _, seen := there[name]; seen || !strings.HasPrefix(name, prefix) {
			continue
		}
		// The server that the scan was from lags behind the leader.
		msg, err := r.last(ctx, name)
		if err != nil {
			return nil, err
		}
		there[name] = msg != nil && !deleted(msg.Header)
	}
	return there, nil
}

// filter returns the subjects of the rows with the prefix: of those with its whole
// tokens. Of a prefix that ends within one they are more, and the caller chooses.
func (r *Rows) filter(prefix string) string {
	return r.prefix + prefix[:strings.LastIndexByte(prefix, '.')+1] + ">"
}

// subjects asks for the rows of filter(prefix) and how many revisions each has.
func (r *Rows) subjects(ctx context.Context, prefix string) (info *jetstream.StreamInfo, err error) {
	err = retry(ctx, func(ctx context.Context) error {
		s, err := r.handle(ctx)
		if err != nil {
			return err
		}
		info, err = s.Info(ctx, jetstream.WithSubjectFilter(r.filter(prefix)))
		return streamError(err)
	})
	return info, err
}

// Watch sends the names of rows that change from now on.
func (r *Rows) Watch(ctx context.Context, prefix string) (<-chan string, error) {
	request, done := context.WithTimeout(ctx, requestTimeout)
	defer done()
	handle, err := r.js.Stream(request, r.stream)
	if err != nil {
		return nil, fmt.Errorf("watch rows %s: %w", prefix, streamError(err))
	}
	// From a sequence, not from "new": the client makes the consumer anew when
	// it was interrupted, and what came between would not be new any more.
	consumer, err := r.js.OrderedConsumer(request, r.stream, jetstream.OrderedConsumerConfig{
		FilterSubjects: []string{r.filter(prefix)},
		DeliverPolicy:  jetstream.DeliverByStartSequencePolicy,
		OptStartSeq:    handle.CachedInfo().State.LastSeq + 1,
		HeadersOnly:    true,
	})
	if err != nil {
		return nil, fmt.Errorf("watch rows %s: %w", prefix, streamError(err))
	}
	messages, err := consumer.Messages(jetstream.PullMaxMessages(256))
	if err != nil {
		return nil, fmt.Errorf("watch rows %s: %w", prefix, streamError(err))
	}
	names := make(chan string, 64)
	go func() {
		defer close(names)
		defer messages.Stop()
		for {
			msg, err := messages.Next(jetstream.NextContext(ctx))
			if err != nil {
				return // ctx ended, or names may have been missed: the reader asks again
			}
			name := strings.TrimPrefix(msg.Subject(), r.prefix)
			if !strings.HasPrefix(name, prefix) {
				continue
			}
			select {
			case names <- name:
			case <-ctx.Done():
				return
			}
		}
	}()
	return names, nil
}

// checkRowName refuses what would be another subject than meant, or several.
func checkRowName(name string) error {
	ok := name != "" && len(name) <= 128 && name[0] != '.' && name[len(name)-1] != '.' && !strings.Contains(name, "..")
	for i := 0; ok && i < len(name); i++ {
		c := name[i]
		ok = 'A' <= c && c <= 'Z' || 'a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '_' || c == '-' || c == '.'
	}
	if !ok {
		return fmt.Errorf("%w: row name %q", ErrInvalid, name)
	}
	return nil
}
