package journal

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/kms"
)

// The server overwrites a message by writing its whole block anew, up to 8 MB,
// and syncing it: a few hundred a second. Where many were replaced it is cheaper
// to move the rows that stay out of the old blocks, and to have those removed.
// docs/format/keyring.md, "Erasing many rows", and docs/adr/0016.
const (
	// bulkFrom is how many replaced revisions are worth it.
	bulkFrom = 200
	// carriedAtMost is how many rows that stay may be moved for each of those.
	carriedAtMost = 20
	// rollBytes is more than a block of the server has.
	rollBytes = 9 << 20
	// fillRow and rollRow are the names of what is written to fill a block up:
	// markers, so that they are no rows.
	fillRow = "_fill."
	rollRow = "_roll"
	// bulkTries is how often a sweep does it, when rows are replaced meanwhile.
	bulkTries = 3
)

// EraseReplaced returns once no byte of a row that was replaced or deleted before
// the call is in the bucket's files.
func (r *Rows) EraseReplaced(ctx context.Context) error { return r.Sweep(ctx) }

// Sweep overwrites every revision but the last of each row: those that
// UpdateGroup has left, and those of erasures that a crash or an error
// interrupted.
func (r *Rows) Sweep(ctx context.Context) error {
	r.sweeping.Lock()
	defer r.sweeping.Unlock()
	deferred := r.takeDeferred()
	if err := r.sweep(ctx); err != nil {
		r.giveBack(deferred)
		return fmt.Errorf("sweep rows: %w", err)
	}
	r.rolling.Lock()
	defer r.rolling.Unlock()
	r.rolled = false
	return nil
}

func (r *Rows) takeDeferred() map[string]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.soon != nil {
		r.soon.Stop()
	}
	select { // this is the sweep that was asked for
	case <-r.left:
	default:
	}
	deferred := r.deferred
	r.deferred = map[string]int{}
	return deferred
}

func (r *Rows) giveBack(deferred map[string]int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for name, n := range deferred {
		r.deferred[name] += n
	}
	r.unfinished()
}

func (r *Rows) sweep(ctx context.Context) error {
	var rows []string
	for try := 0; ; try++ {
		var replaced int
		var err error
		if rows, replaced, err = r.replaced(ctx); err != nil {
			return err
		}
		if replaced < bulkFrom || try == bulkTries {
			break
		}
		if worth, err := r.eraseBlocks(ctx); err != nil {
			return err
		} else if !worth {
			break
		}
	}
	for _, name := range rows {
		if err := r.sweepRow(ctx, name); err != nil {
			return fmt.Errorf("row %s: %w", name, err)
		}
	}
	return nil
}

// replaced returns the rows with more than one revision, and how many revisions
// those have too many.
func (r *Rows) replaced(ctx context.Context) (rows []string, revisions int, err error) {
	info, err := r.subjects(ctx, "")
	if err != nil {
		return nil, 0, err
	}
	for subject, count := range info.State.Subjects {
		name := strings.TrimPrefix(subject, r.prefix)
		if count > 1 && !filler(name) {
			rows = append(rows, name)
			revisions += int(count) - 1 //nolint:gosec // far below 2^63
		}
	}
	return rows, revisions, nil
}

// filler reports whether a name is of what fills a block up.
func filler(name string) bool { return name == rollRow || strings.HasPrefix(name, fillRow) }

// sweepRow erases the revisions of a row before the one that is its last now. It
// goes by what the row has: the sequence before the last one is another row's.
func (r *Rows) sweepRow(ctx context.Context, name string) error {
	msg, err := r.last(ctx, name)
	if err != nil || msg == nil {
		return err
	}
	for {
		var first uint64
		err := retry(ctx, func(ctx context.Context) (err error) {
			first, err = r.first(ctx, name)
			return err
		})
		if err != nil || first == 0 || first >= msg.Sequence {
			return err
		}
		if err := r.erase(ctx, name, first); err != nil {
			return err
		}
	}
}

// survey is what a bucket holds.
type survey struct {
	last     map[string]uint64 // sequence of each row's last message, markers among them
	replaced []uint64          // sequences of the others, in their order
}

func (r *Rows) survey(ctx context.Context) (survey, error) {
	s := survey{last: map[string]uint64{}}
	err := r.scan(ctx, "", func(m scanned) error {
		if seq, ok := s.last[m.name]; ok && !filler(m.name) {
			s.replaced = append(s.replaced, seq)
		}
		s.last[m.name] = m.sequence
		return nil
	})
	return s, err
}

// mark returns where a block begins that holds nothing from before the first
// filler, and where the fillers begin: 0 when no fillers stand complete and in
// their order, as after a crash among them.
func (s survey) mark(fillers int) (mark, begin uint64) {
	begin = s.last[fillRow+"1"]
	previous := uint64(0)
	for i := range fillers {
		seq := s.last[fillRow+strconv.Itoa(i+1)]
		if seq <= previous {
			return 0, 0
		}
		previous = seq
	}
	if mark = s.last[rollRow]; mark <= previous {
		return 0, 0
	}
	return mark, begin
}

// staying counts the rows whose last message is before the mark.
func (s survey) staying(mark uint64) (n int) {
	for name, seq := range s.last {
		if seq < mark && !filler(name) {
			n++
		}
	}
	return n
}

// eraseBlocks moves the rows that stay behind a mark and has the blocks before it
// removed. Each step may be the last before a crash: the mark and the moved rows
// change nothing, the old blocks are removed once nothing in them is a row's last
// message, and what is left of them then are revisions that the next sweep finds.
// It returns false when overwriting one by one is less work.
func (r *Rows) eraseBlocks(ctx context.Context) (worth bool, err error) {
	have, err := r.survey(ctx)
	if err != nil {
		return false, err
	}
	if len(have.replaced) == 0 {
		return false, nil
	}
	mark, begin := have.mark(r.fillers())
	if 2*before(have.replaced, mark) < len(have.replaced) { // it is of an earlier time
		mark, begin = math.MaxUint64, 0
	}
	if have.staying(mark) > carriedAtMost*len(have.replaced) {
		return false, nil
	}
	if begin == 0 {
		if err := r.roll(ctx); err != nil {
			return false, err
		}
		if have, err = r.survey(ctx); err != nil {
			return false, err
		}
		if mark, begin = have.mark(r.fillers()); mark == 0 {
			return false, fmt.Errorf("%w: another sweep is under way", ErrUnavailable)
		}
	}
	if err := r.carry(ctx, have, mark); err != nil {
		return false, err
	}
	if have, err = r.survey(ctx); err != nil {
		return false, err
	}
	if have.last[rollRow] < mark {
		// On a cluster, the server that answered lags behind.
		return false, fmt.Errorf("%w: the mark is not seen", ErrUnavailable)
	}
	if n := have.staying(mark); n > 0 {
		return false, fmt.Errorf("%w: %d rows could not be moved", ErrUnavailable, n)
	}
	// Others' writes among the fillers may be in the block of the mark.
	for _, seq := range have.replaced {
		if begin < seq && seq < mark {
			if err := r.overwrite(ctx, seq); err != nil {
				return false, err
			}
		}
	}
	err = retry(ctx, func(ctx context.Context) error {
		s, err := r.handle(ctx)
		if err != nil {
			return err
		}
		return streamError(s.Purge(ctx, jetstream.WithPurgeSequence(mark)))
	})
	if err != nil {
		return false, fmt.Errorf("remove blocks: %w", err)
	}
	if r.sync != nil {
		if err := errors.Join(r.sync.Sync(r.stream), r.sync.SyncFolder(r.stream)); err != nil {
			return false, fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
	}
	return true, nil
}

// before counts the sequences before the mark.
func before(sequences []uint64, mark uint64) (n int) {
	for _, seq := range sequences {
		if seq < mark {
			n++
		}
	}
	return n
}

// overwrite erases one message that is no row's last one.
func (r *Rows) overwrite(ctx context.Context, sequence uint64) error {
	return retry(ctx, func(ctx context.Context) error {
		s, err := r.handle(ctx)
		if err != nil {
			return err
		}
		if err := s.SecureDeleteMsg(ctx, sequence); err != nil && !noSuchMessage(err) {
			return fmt.Errorf("erase revision %d: %w", sequence, streamError(err))
		}
		return nil
	})
}

// carry writes the rows whose last message is before the mark once more, and
// returns when that is durable. One that another writes meanwhile needs it no
// more.
func (r *Rows) carry(ctx context.Context, have survey, mark uint64) error {
	var names []string
	for name, seq := range have.last {
		if seq < mark && !filler(name) {
			names = append(names, name)
		}
	}
	errs := make([]error, len(names))
	inParallel(len(names), func(i int) { errs[i] = r.carryOne(ctx, names[i], mark) })
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if r.sync != nil {
		if err := r.sync.Sync(r.stream); err != nil {
			return fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
	}
	return nil
}

func (r *Rows) carryOne(ctx context.Context, name string, mark uint64) error {
	msg, err := r.last(ctx, name)
	if err == nil && msg != nil && msg.Sequence < mark {
		_, err = r.write(ctx, name, msg.Data, msg.Sequence, msg.Header.Get(kvOperation))
	}
	if err != nil && !errors.Is(err, kms.ErrRowConflict) {
		return fmt.Errorf("move row %s: %w", name, err)
	}
	return nil
}

// rollFor lets the first of many updates begin behind a mark, so that what is
// written by them need not be moved when what they replace is erased.
func (r *Rows) rollFor(ctx context.Context, updates int) error {
	if updates < bulkFrom/2 {
		return nil
	}
	r.rolling.Lock() // the others wait: what they wrote now would be among the markers
	defer r.rolling.Unlock()
	if r.rolled {
		return nil
	}
	if err := r.roll(ctx); err != nil {
		return err
	}
	r.rolled = true
	return nil
}

// roll fills the block that the server writes to, so that it begins another one,
// and sets a mark there.
func (r *Rows) roll(ctx context.Context) error {
	n := r.fillers()
	for i := range n {
		if err := r.fill(ctx, fillRow+strconv.Itoa(i+1), make([]byte, rollBytes/n)); err != nil {
			return fmt.Errorf("fill a block: %w", err)
		}
	}
	if err := r.fill(ctx, rollRow, nil); err != nil {
		return fmt.Errorf("set a mark: %w", err)
	}
	return nil
}

func (r *Rows) fill(ctx context.Context, name string, value []byte) error {
	return retry(ctx, func(ctx context.Context) error {
		_, err := r.js.PublishMsg(ctx, r.message(name, value, kvDelete), jetstream.WithRetryAttempts(0))
		return streamError(err)
	})
}

// fillers is how many messages fill a block up, each as large as the server
// takes.
func (r *Rows) fillers() int {
	size := max(min(r.js.Conn().MaxPayload(), fillAtMost), 4*fillRoom) - fillRoom
	return int((rollBytes + size - 1) / size)
}

const (
	fillAtMost = 1 << 20 // bytes of a filler
	fillRoom   = 1 << 10 // what headers need of it
)
