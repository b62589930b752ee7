package journal

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/kms"
)

// deletedRow is the prefix of the registry's rows that say which sequences of a
// stream were deleted on purpose: "deleted.<stream>".
const deletedRow = "deleted."

// span is a range of sequences, both ends included.
type span struct {
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
}

// DeleteRecords overwrites records of a message stream on disk. Which ones is
// written to the registry first, so that a reader can tell them from lost ones.
// It may be repeated; what is gone already is no error.
func (j *Journal) DeleteRecords(ctx context.Context, name string, sequences ...uint64) error {
	if j.streams[name] == nil {
		return fmt.Errorf("delete records: %w: stream %s is none of region %s", ErrInvalid, name, j.region.ID)
	}
	for {
		spans, revision, err := j.loadDeleted(ctx, name)
		if err != nil {
			return fmt.Errorf("delete records of stream %s: %w", name, err)
		}
		for _, seq := range sequences {
			spans = append(spans, span{seq, seq})
		}
		value, err := json.Marshal(mergeSpans(spans))
		if err != nil {
			return fmt.Errorf("delete records of stream %s: %w", name, err)
		}
		if revision == 0 {
			_, err = j.rows.Create(ctx, deletedRow+name, value)
		} else {
			_, err = j.rows.Update(ctx, deletedRow+name, value, revision)
		}
		if errors.Is(err, kms.ErrRowConflict) {
			continue
		}
		if err != nil {
			return fmt.Errorf("delete records of stream %s: %w", name, err)
		}
		break
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
	if j.cfg.Sync != nil {
		if err := errors.Join(j.cfg.Sync.Sync(name), j.cfg.Sync.SyncFolder(name)); err != nil {
			return fmt.Errorf("delete records of stream %s: %w: %w", name, ErrUnavailable, err)
		}
	}
	return nil
}

func (j *Journal) loadDeleted(ctx context.Context, name string) ([]span, uint64, error) {
	row, err := j.rows.Load(ctx, deletedRow+name)
	if errors.Is(err, kms.ErrRowNotFound) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, err
	}
	var spans []span
	if err := json.Unmarshal(row.Value, &spans); err != nil {
		return nil, 0, fmt.Errorf("registry row %s: %w: %w", deletedRow+name, ErrCorrupt, err)
	}
	return spans, row.Revision, nil
}

func (j *Journal) deletedSpans(ctx context.Context, name string) ([]span, error) {
	spans, _, err := j.loadDeleted(ctx, name)
	return spans, err
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
