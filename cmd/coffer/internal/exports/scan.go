package exports

import (
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/agora"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections/history"
)

// A batch of sealed records is copied from the view before they are opened and
// written: nobody who takes an export slowly holds what the view reads from.
const (
	batchEvents = 512
	batchBytes  = 256 << 10
)

// one is an event on its way into a file.
type one struct {
	position journal.Position
	time     time.Time
	line     []byte // with its line feed; nil when there is none
	leftOut  bool   // its type has no form in the format; otherwise it is gone
}

var errBatch = errors.New("the batch is full") //nolint:gochecknoglobals // a sentinel

// query selects the events of a file.
func (e *Exports) query(ctx context.Context, app journal.App, j Job, after, through journal.Position) (history.Query, error) {
	q := history.Query{After: after, Before: through + 1, From: j.From, Until: j.Until, Oldest: e.oldest(app)}
	var err error
	if q.Types, err = j.types(); err != nil {
		return q, fmt.Errorf("%w: a type that is not known", ErrCorrupt)
	}
	if q.Conversation, err = e.tag(ctx, app, kms.KindConversation, j.Conversation); err != nil {
		return q, err
	}
	q.User, err = e.tag(ctx, app, kms.KindSubject, j.User)
	return q, err
}

func (e *Exports) tag(ctx context.Context, app journal.App, kind, id string) (*kms.Tag, error) {
	if id == "" {
		return nil, nil //nolint:nilnil // no filter
	}
	tag, err := e.o.Journal.Tag(ctx, app.ID, kind, id)
	return &tag, err
}

// inHour narrows a query to one hour.
func inHour(q history.Query, hour time.Time) history.Query {
	if q.From.Before(hour) {
		q.From = hour
	}
	if end := hour.Add(time.Hour); q.Until.IsZero() || end.Before(q.Until) {
		q.Until = end
	}
	return q
}

// scan gives the events that a query selects, opened, in order.
func (e *Exports) scan(ctx context.Context, app journal.App, format Format, q history.Query, fn func(one) error) error {
	var b batch
	for {
		b.reset()
		next, err := e.o.History.Replay(ctx, app.ID, q, b.add)
		if trimmed, ok := errors.AsType[*history.TrimmedError](err); ok && trimmed.Oldest > q.After {
			q.After = trimmed.Oldest // what has expired since is not exported
			if q.Before > 0 && q.After+1 >= q.Before {
				return nil
			}
			continue
		}
		if err != nil && !errors.Is(err, errBatch) {
			return err
		}
		if oerr := e.open(ctx, app.ID, format, &b, fn); oerr != nil {
			return oerr
		}
		if err == nil {
			return nil
		}
		q.After = next
	}
}

// batch is records copied from the view.
type batch struct {
	records []byte
	items   []item
	line    []byte // scratch
	encoded []byte // scratch
}

type item struct {
	end      int // of the record in records
	position journal.Position
	recalled bool
}

func (b *batch) reset() { b.records, b.items = b.records[:0], b.items[:0] }

func (b *batch) add(i history.Item) error {
	if len(b.items) == batchEvents || len(b.items) > 0 && len(b.records)+len(i.Record) > batchBytes {
		return errBatch
	}
	b.records = append(b.records, i.Record...)
	b.items = append(b.items, item{len(b.records), i.Position, i.Recalled})
	return nil
}

func (e *Exports) open(ctx context.Context, app journal.AppID, format Format, b *batch, fn func(one) error) error {
	start := 0
	for _, i := range b.items {
		record := b.records[start:i.end]
		start = i.end
		header, err := journal.ParseHeader(record)
		if err != nil {
			return fmt.Errorf("the event at position %s: %w", i.position, err)
		}
		o := one{position: i.position, time: header.Time()}
		if !i.recalled {
			if err := e.encode(ctx, app, format, b, record, &o); err != nil {
				return fmt.Errorf("the event at position %s: %w", i.position, err)
			}
		}
		if err := fn(o); err != nil {
			return err
		}
	}
	return nil
}

// encode makes the line of a record, unless its keys are meant to be gone.
func (e *Exports) encode(ctx context.Context, app journal.AppID, format Format, b *batch, record []byte, o *one) error {
	text, err := e.o.Journal.OpenRecord(ctx, b.line[:0], app, record)
	if errors.Is(err, kms.ErrSubjectErased) || errors.Is(err, kms.ErrEpochDestroyed) {
		return nil
	}
	if err != nil {
		return err
	}
	b.line = text
	b.encoded = journal.SplicePosition(b.encoded[:0], text, o.position)
	if format == Agora {
		event, err := journal.ParseReplayed(b.encoded)
		if err != nil {
			return fmt.Errorf("parsing a stored event: %w", journal.ErrCorrupt)
		}
		var ok bool
		if b.encoded, ok = agora.AppendLine(b.encoded[:0], event.Event); !ok {
			o.leftOut = true
			return nil
		}
	}
	b.encoded = append(b.encoded, '\n')
	o.line = b.encoded
	return nil
}

// content counts and hashes the lines of a file.
type content struct {
	Counts

	hash        hash.Hash
	first, last time.Time
	low, high   journal.Position
}

func newContent() *content { return &content{hash: sha256.New()} }

func (c *content) add(o one) {
	switch {
	case o.line != nil:
	case o.leftOut:
		c.LeftOut++
		return
	default:
		c.Omitted++
		return
	}
	c.Events++
	c.Bytes += int64(len(o.line))
	_, _ = c.hash.Write(o.line) // never fails
	if c.first.IsZero() || o.time.Before(c.first) {
		c.first = o.time
	}
	if o.time.After(c.last) {
		c.last = o.time
	}
	if c.low == 0 {
		c.low = o.position
	}
	c.high = o.position
}

func (c *content) file(name string, after, through journal.Position) File {
	return File{
		Name: name, Counts: c.Counts, SHA256: hex.EncodeToString(c.hash.Sum(nil)), After: after, Through: through,
		First: c.first, Last: c.last,
	}
}

// hourLayout is the time in the name of an hourly file.
const hourLayout = "2006010215"

func hourName(hour time.Time) string { return hour.UTC().Format(hourLayout) + ".gz" }

// WriteFile makes a file again and writes it. When events of it have gone since
// its entry was made, the entry is corrected. After an error what was written is
// not whole.
func (e *Exports) WriteFile(ctx context.Context, w io.Writer, app journal.App, j Job, f File) error {
	q, err := e.query(ctx, app, j, f.After, f.Through)
	if err != nil {
		return err
	}
	var packed *gzip.Writer
	if j.Format == Agora {
		hour, err := time.Parse(hourLayout, f.Name[:min(len(f.Name), len(hourLayout))])
		if err != nil {
			return fmt.Errorf("%w: file %s", ErrCorrupt, f.Name)
		}
		q = inHour(q, hour)
		packed = gzip.NewWriter(w)
		w = packed
	}
	c := newContent()
	err = e.scan(ctx, app, j.Format, q, func(o one) error {
		c.add(o)
		if o.line == nil {
			return nil
		}
		_, err := w.Write(o.line)
		return err
	})
	if err != nil {
		return err
	}
	now := c.file(f.Name, f.After, f.Through)
	if now.SHA256 != f.SHA256 {
		now.Changed = e.o.Now().UTC()
		// Before the end is written: who has the whole file finds its digest.
		if err := e.correct(ctx, j, now); err != nil {
			return err
		}
	}
	if packed != nil {
		return packed.Close()
	}
	return nil
}

// WriteHour writes the file of one hour as it is now, without an export: what
// [Agora] files are made of. After an error what was written is not whole.
func (e *Exports) WriteHour(ctx context.Context, w io.Writer, app journal.App, hour time.Time) error {
	packed := gzip.NewWriter(w)
	q := inHour(history.Query{Oldest: e.oldest(app)}, hour)
	err := e.scan(ctx, app, Agora, q, func(o one) error {
		if o.line == nil {
			return nil
		}
		_, err := packed.Write(o.line)
		return err
	})
	if err != nil {
		return err
	}
	return packed.Close()
}
