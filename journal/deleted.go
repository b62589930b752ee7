package journal

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/kms"
)

const (
	// deletedRow is the prefix of the registry's rows that say which sequences
	// of a stream were deleted on purpose: "deleted.<stream>.<n>", for the
	// sequences from n*deletedSpan on, as docs/format/subjects.md has it.
	deletedRow = "deleted."
	// deletedSpan is the number of sequences that one row is about. Were every
	// other one deleted, the row would have 128 KiB.
	deletedSpan = 1 << 17

	deletedVersion = 1
)

// span is a range of sequences, both ends included.
type span struct{ First, Last uint64 }

// DeleteRecords overwrites records of a message stream on disk. Which ones is
// written to the registry first, so that a reader can tell them from lost ones.
// It may be repeated; what is gone already is no error.
func (j *Journal) DeleteRecords(ctx context.Context, name string, sequences ...uint64) error {
	if j.streams[name] == nil {
		return fmt.Errorf("delete records: %w: stream %s is none of region %s", ErrInvalid, name, j.region.ID)
	}
	spans := make([]span, len(sequences))
	for i, seq := range sequences {
		spans[i] = span{seq, seq}
	}
	if err := j.noteDeleted(ctx, name, spans); err != nil {
		return fmt.Errorf("delete records of stream %s: %w", name, err)
	}
	handle, err := j.js.Stream(ctx, name)
	if err != nil {
		return fmt.Errorf("delete records of stream %s: %w", name, streamError(err))
	}
	for _, seq := range sequences {
		if err := handle.SecureDeleteMsg(ctx, seq); err != nil && !noSuchMessage(err) {
			return fmt.Errorf("delete record %d of stream %s: %w", seq, name, streamError(err))
		}
	}
	if err := j.syncDeletion(name); err != nil {
		return fmt.Errorf("delete records of stream %s: %w", name, err)
	}
	return nil
}

func (j *Journal) syncDeletion(name string) error {
	if j.cfg.Sync == nil {
		return nil
	}
	if err := errors.Join(j.cfg.Sync.Sync(name), j.cfg.Sync.SyncFolder(name)); err != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return nil
}

// noteDeleted adds sequences to what the registry says was deleted on purpose.
func (j *Journal) noteDeleted(ctx context.Context, stream string, spans []span) error {
	for _, rest := range chunked(mergeSpans(slices.Clone(spans))) {
		name := deletedRowName(stream, rest[0].First/deletedSpan)
		for {
			have, revision, err := j.loadDeleted(ctx, name)
			if err != nil {
				return err
			}
			merged := mergeSpans(slices.Concat(have, rest))
			if slices.Equal(merged, have) {
				break
			}
			value := appendSpans(nil, merged)
			if revision == 0 {
				_, err = j.rows.Create(ctx, name, value)
			} else {
				_, err = j.rows.Update(ctx, name, value, revision)
			}
			if errors.Is(err, kms.ErrRowConflict) {
				continue
			}
			if err != nil {
				return err
			}
			break
		}
	}
	return nil
}

func deletedRowName(stream string, n uint64) string {
	return deletedRow + stream + "." + strconv.FormatUint(n, 10)
}

// chunked cuts sorted spans where one row ends and the next begins.
func chunked(spans []span) [][]span {
	var out [][]span
	row := uint64(0)
	for _, s := range spans {
		for s.First <= s.Last {
			n := s.First / deletedSpan
			part := span{s.First, min(s.Last, (n+1)*deletedSpan-1)}
			if len(out) == 0 || n != row {
				out, row = append(out, nil), n
			}
			out[len(out)-1] = append(out[len(out)-1], part)
			s.First = part.Last + 1
		}
	}
	return out
}

func (j *Journal) loadDeleted(ctx context.Context, name string) ([]span, uint64, error) {
	row, err := j.rows.Load(ctx, name)
	if errors.Is(err, kms.ErrRowNotFound) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, err
	}
	spans, err := parseSpans(row.Value)
	if err != nil {
		return nil, 0, fmt.Errorf("registry row %s: %w", name, err)
	}
	return spans, row.Revision, nil
}

// deletedSpans returns what was deleted on purpose of the sequences of missing,
// and maybe more.
func (j *Journal) deletedSpans(ctx context.Context, stream string, missing span) ([]span, error) {
	var all []span
	for n := missing.First / deletedSpan; n <= missing.Last/deletedSpan; n++ {
		spans, _, err := j.loadDeleted(ctx, deletedRowName(stream, n))
		if err != nil {
			return nil, err
		}
		all = append(all, spans...)
	}
	return all, nil
}

// appendSpans appends the row of sorted spans: a version byte, and for each span
// the sequences since the end of the last one and its length, as varints.
func appendSpans(dst []byte, spans []span) []byte {
	dst = append(dst, deletedVersion)
	end := uint64(0)
	for _, s := range spans {
		dst = binary.AppendUvarint(dst, s.First-end)
		dst = binary.AppendUvarint(dst, s.Last-s.First+1)
		end = s.Last + 1
	}
	return dst
}

func parseSpans(value []byte) ([]span, error) {
	if len(value) == 0 || value[0] != deletedVersion {
		return nil, fmt.Errorf("%w: not a row of deleted sequences", ErrCorrupt)
	}
	var spans []span
	end := uint64(0)
	for rest := value[1:]; len(rest) > 0; {
		gap, n := binary.Uvarint(rest)
		if n <= 0 {
			return nil, fmt.Errorf("%w: deleted sequences", ErrCorrupt)
		}
		length, m := binary.Uvarint(rest[n:])
		first := end + gap
		if m <= 0 || length == 0 || first < end || first+length < first || gap == 0 && len(spans) > 0 {
			return nil, fmt.Errorf("%w: deleted sequences", ErrCorrupt)
		}
		spans = append(spans, span{first, first + length - 1})
		end, rest = first+length, rest[n+m:]
	}
	return spans, nil
}

// mergeSpans sorts and joins spans.
func mergeSpans(spans []span) []span {
	slices.SortFunc(spans, func(a, b span) int { return cmp.Compare(a.First, b.First) })
	out := spans[:0]
	for _, s := range spans {
		if n := len(out); n > 0 && s.First <= out[n-1].Last+1 {
			out[n-1].Last = max(out[n-1].Last, s.Last)
			continue
		}
		out = append(out, s)
	}
	return out
}

// uncovered returns the first sequence of missing that no span has.
func uncovered(missing span, spans []span) (uint64, bool) {
	for _, s := range spans {
		if s.First <= missing.First && missing.First <= s.Last {
			missing.First = s.Last + 1
		}
	}
	return missing.First, missing.First <= missing.Last
}

// purgeBatch is how many messages are noted before they are purged: a process
// that ends in between has not lost more than the notes of one batch.
const purgeBatch = 1 << 16

// purgeSubject removes the messages of a stream under a subject filter, having
// noted each in the registry first, so that readers can tell them from lost ones.
// It returns how many. The newest message of the stream stays: whoever reads to
// the end must be able to come there. What a server has on disk of the others
// stays until it writes the block anew; whoever must not leave it destroys the
// keys first.
func (j *Journal) purgeSubject(ctx context.Context, stream, filter string, progress func(int)) (int, error) {
	s, err := j.js.Stream(ctx, stream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, streamError(err)
	}
	total := 0
	for {
		info, err := s.Info(ctx)
		if err != nil {
			return total, streamError(err)
		}
		spans, n, err := j.sequencesOf(ctx, s, filter, purgeBatch)
		if err != nil {
			return total, err
		}
		spans, n = spansBefore(spans, n, info.State.LastSeq)
		if n == 0 {
			return total, nil
		}
		if err := j.noteDeleted(ctx, stream, spans); err != nil {
			return total, err
		}
		// Up to a sequence, exclusive: what arrived meanwhile is not noted yet.
		err = s.Purge(ctx, jetstream.WithPurgeSubject(filter), jetstream.WithPurgeSequence(spans[len(spans)-1].Last+1))
		if err != nil {
			return total, streamError(err)
		}
		if err := j.syncDeletion(stream); err != nil {
			return total, err
		}
		total += n
		progress(n)
	}
}

// spansBefore leaves out of n sequences those from end on.
func spansBefore(spans []span, n int, end uint64) ([]span, int) {
	for len(spans) > 0 {
		last := &spans[len(spans)-1]
		if last.Last < end {
			break
		}
		if last.First < end {
			n -= int(last.Last - end + 1) //nolint:gosec // of n
			last.Last = end - 1
			break
		}
		n -= int(last.Last - last.First + 1) //nolint:gosec // of n
		spans = spans[:len(spans)-1]
	}
	return spans, n
}

// sequencesOf returns where the first messages of a filter are, and how many.
func (j *Journal) sequencesOf(ctx context.Context, s jetstream.Stream, filter string, limit int) ([]span, int, error) {
	consumer, err := s.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{
		FilterSubjects: []string{filter}, DeliverPolicy: jetstream.DeliverAllPolicy, HeadersOnly: true,
	})
	if err != nil {
		return nil, 0, streamError(err)
	}
	info, err := consumer.Info(ctx)
	if err != nil {
		return nil, 0, streamError(err)
	}
	left := min(limit, int(min(info.NumPending, uint64(limit)))) //nolint:gosec // bounded by limit
	if left == 0 {
		return nil, 0, nil
	}
	messages, err := consumer.Messages(jetstream.PullMaxMessages(1024))
	if err != nil {
		return nil, 0, streamError(err)
	}
	defer messages.Stop()
	var spans []span
	for n := 0; ; {
		msg, err := messages.Next(jetstream.NextContext(ctx))
		if err != nil {
			return nil, 0, unavailable(err)
		}
		meta, err := msg.Metadata()
		if err != nil {
			return nil, 0, fmt.Errorf("%w: %w", ErrCorrupt, err)
		}
		seq := meta.Sequence.Stream
		if k := len(spans); k > 0 && spans[k-1].Last+1 == seq {
			spans[k-1].Last = seq
		} else {
			spans = append(spans, span{seq, seq})
		}
		if n++; n == left || meta.NumPending == 0 {
			return spans, n, nil
		}
	}
}
