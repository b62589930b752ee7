package journal

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"sync/atomic"

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
}

var _ kms.Rows = (*Rows)(nil)

// NewRows returns the rows of a bucket, which [Open] made. The syncer is the
// one of [Config].
func NewRows(js jetstream.JetStream, bucket string, sync Syncer) *Rows {
	return &Rows{js: js, stream: "KV_" + bucket, prefix: "$KV." + bucket + ".", sync: sync, left: make(chan struct{}, 1)}
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
func (r *Rows) last(ctx context.Context, name string) (*jetstream.RawStreamMsg, error) {
	s, err := r.handle(ctx)
	if err != nil {
		return nil, err
	}
	msg, err := s.GetLastMsgForSubject(ctx, r.prefix+name)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil, nil //nolint:nilnil // documented
	}
	if err != nil {
		return nil, streamError(err)
	}
	return msg, nil
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

// put writes a row's next message, given the sequence of its last one, and
// returns once it is durable.
func (r *Rows) put(ctx context.Context, name string, value []byte, last uint64, operation string) (uint64, error) {
	msg := nats.NewMsg(r.prefix + name)
	msg.Data = value
	if operation != "" {
		msg.Header.Set(kvOperation, operation)
	}
	for {
		ack, err := r.js.PublishMsg(ctx, msg, jetstream.WithExpectLastSequencePerSubject(last), jetstream.WithRetryAttempts(0))
		var api *jetstream.APIError
		if errors.As(err, &api) {
			switch api.ErrorCode {
			case codeWrongSequence, codeWrongSequenceRaft:
				return 0, kms.ErrRowConflict
			case codeSequenceInProgress:
				if pause(ctx, retryPause) {
					continue
				}
			}
		}
		if err != nil {
			return 0, streamError(err)
		}
		if r.sync != nil {
			if err := r.sync.Sync(r.stream); err != nil {
				return 0, fmt.Errorf("%w: %w", ErrUnavailable, err)
			}
		}
		return ack.Sequence, nil
	}
}

// erase overwrites the bytes of a replaced revision, and of any before it that
// an interrupted call left.
func (r *Rows) erase(ctx context.Context, name string, revision uint64) error {
	s, err := r.handle(ctx)
	if err != nil {
		return err
	}
	finished := false
	defer func() {
		if !finished {
			select {
			case r.left <- struct{}{}:
			default:
			}
		}
	}()
	for seq := revision; seq > 0; {
		if err := s.SecureDeleteMsg(ctx, seq); err != nil && !noSuchMessage(err) {
			return fmt.Errorf("erase revision %d: %w", seq, streamError(err))
		}
		// The bucket keeps several revisions, so one that was left over is the
		// first of the subject.
		first, err := s.GetMsg(ctx, 0, jetstream.WithGetMsgSubject(r.prefix+name))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			break
		}
		if err != nil {
			return fmt.Errorf("look for older revisions: %w", streamError(err))
		}
		if seq = first.Sequence; seq > revision {
			break
		}
	}
	if r.sync != nil {
		if err := r.sync.SyncFolder(r.stream); err != nil {
			return fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
	}
	finished = true
	return nil
}

// noSuchMessage reports whether a deletion failed because another one was
// faster.
func noSuchMessage(err error) bool {
	switch {
	case errors.Is(err, jetstream.ErrMsgNotFound):
		return true
	case errors.Is(err, jetstream.ErrMsgDeleteUnsuccessful):
		// Code 10057, whose description tells why. The client passes it on as
		// text only.
		return strings.Contains(err.Error(), "no message found")
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

// Sweep finishes erasures that a crash or an error interrupted: it overwrites
// every revision but the last of each row.
func (r *Rows) Sweep(ctx context.Context) error {
	s, err := r.handle(ctx)
	if err != nil {
		return fmt.Errorf("sweep rows: %w", err)
	}
	info, err := s.Info(ctx, jetstream.WithSubjectFilter(r.prefix+">"))
	if err != nil {
		return fmt.Errorf("sweep rows: %w", streamError(err))
	}
	for subject, count := range info.State.Subjects {
		if count < 2 {
			continue
		}
		name := strings.TrimPrefix(subject, r.prefix)
		msg, err := r.last(ctx, name)
		if err == nil && msg != nil && msg.Sequence > 1 {
			err = r.erase(ctx, name, msg.Sequence-1)
		}
		if err != nil {
			return fmt.Errorf("sweep row %s: %w", name, err)
		}
	}
	return nil
}

// List yields the names of the rows with the prefix.
func (r *Rows) List(ctx context.Context, prefix string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		s, err := r.handle(ctx)
		if err != nil {
			yield("", fmt.Errorf("list rows %s: %w", prefix, err))
			return
		}
		info, err := s.Info(ctx, jetstream.WithSubjectFilter(r.prefix+">"))
		if err != nil {
			yield("", fmt.Errorf("list rows %s: %w", prefix, streamError(err)))
			return
		}
		for subject := range info.State.Subjects {
			name := strings.TrimPrefix(subject, r.prefix)
			if !strings.HasPrefix(name, prefix) {
				continue
			}
			// A deleted row's marker is listed too.
			msg, err := r.last(ctx, name)
			if err != nil {
				yield("", fmt.Errorf("list rows %s: %w", prefix, err))
				return
			}
			if msg == nil || deleted(msg.Header) {
				continue
			}
			if !yield(name, nil) {
				return
			}
		}
	}
}

// Watch sends the names of rows that change from now on.
func (r *Rows) Watch(ctx context.Context, prefix string) (<-chan string, error) {
	consumer, err := r.js.OrderedConsumer(ctx, r.stream, jetstream.OrderedConsumerConfig{
		FilterSubjects: []string{r.prefix + ">"},
		DeliverPolicy:  jetstream.DeliverNewPolicy,
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
