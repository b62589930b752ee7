package importer

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cofferdb/coffer/cmd/coffer/internal/agora"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/client"
)

const (
	defaultBatch = 500
	defaultLanes = 4
	maxBatchSize = 8 << 20 // bytes of one request; the server takes 16 MiB
)

var (
	// ErrInterrupted means that the run was asked to stop and did: every batch
	// that was begun is stored. Run the same command again to go on.
	ErrInterrupted = errors.New("interrupted")
	// ErrUnreadable means that a file could not be read to its end, after
	// everything that could be read was imported. Repair or replace the file and
	// run again.
	ErrUnreadable = errors.New("not every file could be read")
	// ErrNoEvent is what Options.Parse returns for a line that is none and need not
	// be: it is not counted.
	ErrNoEvent = errors.New("the line is no event")
	// ErrServer is what Options.Parse returns for an event that a server would not
	// take from anybody: it is counted and left out.
	ErrServer = errors.New("only a server writes such events")
)

// Options says what to import and how.
type Options struct {
	// Files are read in this order; "-" is Stdin. Gzip is recognised by its
	// first bytes.
	Files []string
	Stdin io.Reader
	// Parse makes an event of a line; [agora.Parse] when nil. [ErrNoEvent] passes
	// over a line, [ErrServer] over one that only a server writes.
	Parse func(line []byte) (journal.Event, error)
	// Rejects is the path of the rejects file.
	Rejects string
	// Rebase shifts the times of all events alike, so that the newest is of now.
	// When events of these files are stored already, the shift is theirs. It
	// needs files that can be read twice.
	Rebase bool
	// Batch is the number of events in a request (500), Lanes how many requests
	// are under way at once (4).
	Batch, Lanes int
	// Stop asks for an orderly end when it is closed.
	Stop <-chan struct{}
	// Talk is told about bad lines, a line each.
	Talk io.Writer
	// Progress is called, never concurrently, after each batch and now and then
	// while the files are scanned.
	Progress func(Progress)
}

// Progress says how far a run is.
type Progress struct {
	Scanning bool  // the first of two passes, for Options.Rebase
	Bytes    int64 // of the files as they are on disk
	Total    int64 // 0 when unknown
	Summary
}

// Summary says what became of the lines.
type Summary struct {
	Read           int `json:"read"` // lines that are not empty
	Imported       int `json:"imported"`
	Duplicates     int `json:"duplicates"` // stored before; also by an attempt whose answer was lost
	SkippedExpired int `json:"skipped_expired"`
	SkippedServer  int `json:"skipped_server,omitzero"` // of types that only a server writes
	Rejected       int `json:"rejected"`
}

// Result is the outcome of a run.
type Result struct {
	Summary
	Shift       time.Duration // of the times, with Options.Rebase
	ShiftFound  bool          // whether it is that of an earlier run
	RejectsFile string        // empty when nothing was rejected
}

// Appender is what the importer needs of the client.
type Appender interface {
	Append(ctx context.Context, events ...journal.Event) ([]journal.Result, error)
	Event(ctx context.Context, id string) (journal.Replayed, error)
}

// Run imports. The context ends it at once; Options.Stop in order. The result
// counts what was done, whatever the error.
func Run(ctx context.Context, to Appender, o Options) (res Result, err error) {
	if o.Batch <= 0 || o.Batch > client.MaxBatch {
		o.Batch = defaultBatch
	}
	if o.Lanes <= 0 {
		o.Lanes = defaultLanes
	}
	if o.Parse == nil {
		o.Parse = agora.Parse
	}
	rej, err := newRejects(o.Rejects, o.Files, o.Talk)
	if err != nil {
		return Result{}, err
	}
	r := &run{o: o, to: to, rejects: rej}
	for _, f := range o.Files {
		if info, err := os.Stat(f); err == nil && f != "-" {
			r.total += info.Size()
		}
	}
	defer func() {
		kept, closeErr := rej.close()
		if kept {
			res.RejectsFile = rej.path
		}
		err = errors.Join(err, closeErr)
	}()

	var shift shift
	if o.Rebase {
		if shift, err = r.findShift(ctx); err != nil {
			return Result{}, err
		}
	}
	r.shift = shift.by
	err = r.importFiles(ctx)
	return Result{Summary: r.summary(), Shift: shift.by, ShiftFound: shift.found}, err
}

// run is one run's state.
type run struct {
	o       Options
	to      Appender
	rejects *rejects
	shift   time.Duration
	total   int64

	scanning bool         // nothing is counted or reported
	anchored string       // the event that was appended ahead of the others
	oldest   atomic.Int64 // in ms, 0 when unknown: what is older would be refused

	mu     sync.Mutex // guards what follows
	counts Summary
	bytes  int64
}

// line is an event with where it came from.
type line struct {
	event  journal.Event
	raw    []byte
	file   string
	number int
	offset int64 // bytes of all files up to and including it
}

func (r *run) summary() Summary {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.counts
}

func (r *run) progress(offset int64, add func(*Summary)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if add != nil {
		add(&r.counts)
	}
	r.bytes = max(r.bytes, offset)
	if r.o.Progress != nil {
		r.o.Progress(Progress{Bytes: r.bytes, Total: r.total, Summary: r.counts})
	}
}

func (r *run) stopped() bool {
	select {
	case <-r.o.Stop:
		return true
	default:
		return false
	}
}

// importFiles reads everything and appends it.
func (r *run) importFiles(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	lanes := make([]*lane, r.o.Lanes)
	for i := range lanes {
		lanes[i] = &lane{batches: make(chan []line, 1)}
		g.Go(func() error {
			for batch := range lanes[i].batches {
				if err := r.append(ctx, batch); err != nil {
					return err
				}
			}
			return nil
		})
	}
	var unreadable error
	interrupted := false
	g.Go(func() error {
		defer func() {
			for _, l := range lanes {
				close(l.batches)
			}
		}()
		err := r.readFiles(func(l line, err error) error {
			if err != nil {
				unreadable = errors.Join(unreadable, err)
				return nil
			}
			return lanes[laneOf(l.event.Conversation, len(lanes))].add(ctx, l, r.o.Batch)
		})
		if errors.Is(err, ErrInterrupted) {
			// The lanes finish what they have begun: no error, which would end them.
			interrupted = true
			return nil
		}
		for _, l := range lanes {
			if err == nil {
				err = l.flush(ctx)
			}
		}
		return err
	})
	err := g.Wait()
	if err == nil && interrupted {
		err = ErrInterrupted
	}
	if err == nil && unreadable != nil {
		err = fmt.Errorf("%w: %w", ErrUnreadable, unreadable)
	}
	return err
}

// laneOf spreads conversations over lanes.
func laneOf(conversation string, lanes int) int {
	h := fnv.New32a()
	_, _ = io.WriteString(h, conversation)
	return int(h.Sum32() % uint32(lanes))
}

// lane keeps the order of the conversations that are assigned to it: it has at
// most one request under way.
type lane struct {
	batches chan []line
	filling []line
	size    int
}

func (l *lane) add(ctx context.Context, e line, batch int) error {
	l.filling = append(l.filling, e)
	l.size += len(e.event.Data) + 1024
	if len(l.filling) < batch && l.size < maxBatchSize {
		return nil
	}
	return l.flush(ctx)
}

func (l *lane) flush(ctx context.Context) error {
	if len(l.filling) == 0 {
		return nil
	}
	select {
	case l.batches <- l.filling:
		l.filling, l.size = nil, 0
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// readFiles gives every event of every file, in order, and the errors of files
// that cannot be read to their end. Bad lines go to the rejects.
func (r *run) readFiles(each func(line, error) error) error {
	var before int64
	for _, name := range r.o.Files {
		size, err := r.readFile(name, before, each)
		if err != nil {
			return err
		}
		before += size
	}
	return nil
}

func (r *run) readFile(name string, before int64, each func(line, error) error) (int64, error) {
	in, size, err := r.open(name)
	if err != nil {
		return 0, each(line{}, err)
	}
	defer func() { _ = in.Close() }()
	counter := &counting{r: in}
	lines, err := agora.NewLines(counter)
	if err != nil {
		return size, each(line{}, fmt.Errorf("%s: %w", name, err))
	}
	for {
		if r.stopped() {
			return 0, ErrInterrupted
		}
		if err := r.rejects.failure(); err != nil {
			return 0, err
		}
		raw, err := lines.Next()
		offset := before + counter.n
		switch {
		case errors.Is(err, io.EOF):
			return size, nil
		case errors.Is(err, agora.ErrLineTooLong):
			r.reject(line{raw: raw, file: name, number: lines.Line(), offset: offset}, err.Error(), true)
			continue
		case err != nil:
			return size, each(line{}, fmt.Errorf("%s: %w", name, err))
		case len(raw) == 0:
			continue
		}
		l := line{raw: append([]byte(nil), raw...), file: name, number: lines.Line(), offset: offset}
		l.event, err = r.parse(raw)
		switch {
		case errors.Is(err, ErrNoEvent):
			continue
		case errors.Is(err, ErrServer):
			r.progress(offset, func(s *Summary) { s.Read++; s.SkippedServer++ })
			continue
		}
		if err != nil {
			r.reject(l, err.Error(), true)
			continue
		}
		if oldest := r.oldest.Load(); oldest != 0 && l.event.Time.UnixMilli() < oldest {
			r.progress(offset, func(s *Summary) { s.Read++; s.SkippedExpired++ })
			continue
		}
		if err := each(l, nil); err != nil {
			return 0, err
		}
	}
}

// parse makes the event that will be sent and checks it as the server will.
func (r *run) parse(raw []byte) (journal.Event, error) {
	e, err := r.o.Parse(raw)
	if err != nil {
		return journal.Event{}, err
	}
	if journal.ReservedID(e.ID) {
		return journal.Event{}, fmt.Errorf("/id: %w", journal.CheckCallerEventID(e.ID))
	}
	now := time.Now()
	if r.scanning {
		return scanned(e, now)
	}
	e.Time = e.Time.Add(r.shift)
	if err := e.Normalize(now, journal.Limits{}); err != nil {
		return journal.Event{}, err
	}
	return e, nil
}

func (r *run) open(name string) (io.ReadCloser, int64, error) {
	if name == "-" {
		return io.NopCloser(r.o.Stdin), 0, nil
	}
	f, err := os.Open(name) //nolint:gosec // the user names it
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err == nil && info.IsDir() {
		err = fmt.Errorf("%s is a folder; name its files", name)
	}
	if err != nil {
		_ = f.Close()
		return nil, 0, err
	}
	return f, info.Size(), nil
}

// counting counts what was taken from the disk, for the progress.
type counting struct {
	r io.Reader
	n int64
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// reject keeps a line; read says whether the line is yet to be counted as read.
func (r *run) reject(l line, reason string, read bool) {
	if r.scanning {
		return
	}
	r.rejects.add(l.file, l.number, reason, l.raw)
	r.progress(l.offset, func(s *Summary) {
		s.Rejected++
		if read {
			s.Read++
		}
	})
}

// append sends a batch and counts what became of it. Options.Stop does not end
// the request: a batch that was begun is finished.
func (r *run) append(ctx context.Context, batch []line) error {
	events := make([]journal.Event, len(batch))
	for i := range batch {
		events[i] = batch[i].event
	}
	results, err := r.to.Append(ctx, events...)
	if refusedWhole(err) {
		if len(batch) == 1 {
			r.reject(batch[0], err.Error(), true)
			return nil
		}
		// One of them is at fault, and the others are not to suffer for it.
		half := len(batch) / 2
		if err := r.append(ctx, batch[:half]); err != nil {
			return err
		}
		return r.append(ctx, batch[half:])
	}
	if err != nil {
		return err
	}
	var sum Summary
	for i, res := range results {
		sum.Read++
		switch {
		case res.Err == nil && res.Duplicate && res.ID != r.anchored:
			sum.Duplicates++
		case res.Err == nil:
			sum.Imported++
		case errors.Is(res.Err, client.ErrExpired):
			sum.SkippedExpired++
			r.learnOldest(res.Err)
		default:
			r.reject(batch[i], res.Err.Error(), false)
		}
	}
	r.progress(batch[len(batch)-1].offset, func(s *Summary) {
		s.Read += sum.Read
		s.Imported += sum.Imported
		s.Duplicates += sum.Duplicates
		s.SkippedExpired += sum.SkippedExpired
	})
	return nil
}

// learnOldest remembers what the server says is the oldest it would take, so
// that years of history need not be sent to be refused. The bound only moves on.
func (r *run) learnOldest(err error) {
	if p := (*client.Problem)(nil); errors.As(err, &p) && !p.OldestAvailable.IsZero() {
		r.oldest.Store(p.OldestAvailable.UnixMilli())
	}
}

// refusedWhole reports whether a request was refused for what is in it, rather
// than for who sent it.
func refusedWhole(err error) bool {
	p := (*client.Problem)(nil)
	if !errors.As(err, &p) {
		return false
	}
	switch p.Status {
	case 400, 409, 413, 422:
		return true
	}
	return false
}
