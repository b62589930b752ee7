package journal

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/kms"
)

const (
	// recallRow is the prefix of the registry's rows of recalled events that are
	// to be erased: "recall.<app>.<event tag>".
	recallRow     = "recall."
	recallVersion = 1

	// stubTail is what a stub has in place of nonce, content and tag.
	stubTail = kms.Overhead - stubHeader
	// stubHeader is the size of an envelope's header.
	stubHeader = 56
)

// A Recall is a recalled event whose sealed bytes are to be erased.
type Recall struct {
	App   AppID
	Event kms.Tag
	// Requested is when the recall came, Until when the event has expired in any
	// case.
	Requested, Until time.Time

	revision uint64
}

type recallRecord struct {
	Version   int       `json:"version"`
	Requested time.Time `json:"requested"`
	Until     time.Time `json:"until"`
}

// Recalled is signalled when this process has appended a recall whose event is to
// be erased.
func (j *Journal) Recalled() <-chan struct{} { return j.recalled }

// noteRecalls writes down that the targets of recalls are to be erased, before
// the recalls are appended.
func (j *Journal) noteRecalls(ctx context.Context, r *route, app AppID, tagger *kms.Tagger, events []Event) error {
	noted := false
	for i := range events {
		e := &events[i]
		if e.Type != MessageRecalled || checkID(e.Target, idOfEvent) != nil {
			continue
		}
		now := j.now().UTC().Truncate(time.Millisecond)
		value, err := json.Marshal(recallRecord{Version: recallVersion, Requested: now, Until: now.Add(r.plan.Retention + r.plan.Epoch)})
		if err != nil {
			return fmt.Errorf("note a recall: %w", err)
		}
		tag := tagger.Tag(kms.KindEvent, e.Target)
		if _, err := j.rows.Create(ctx, recallRow+app.String()+"."+tag.String(), value); err != nil && !errors.Is(err, kms.ErrRowConflict) {
			return fmt.Errorf("note a recall: %w", err)
		}
		noted = true
	}
	if noted {
		select {
		case j.recalled <- struct{}{}:
		default:
		}
	}
	return nil
}

// Recalls returns the recalled events that are still to be erased, of all apps.
func (j *Journal) Recalls(ctx context.Context) ([]Recall, error) {
	var out []Recall
	for name, err := range j.rows.List(ctx, recallRow) {
		if err != nil {
			return nil, fmt.Errorf("list recalls: %w", err)
		}
		row, err := j.rows.Load(ctx, name)
		if errors.Is(err, kms.ErrRowNotFound) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list recalls: %w", err)
		}
		r, err := parseRecall(name, row)
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

func parseRecall(name string, row kms.Row) (Recall, error) {
	app, tag, _ := strings.Cut(strings.TrimPrefix(name, recallRow), ".")
	r := Recall{revision: row.Revision}
	var err error
	if r.App, err = ParseAppID(app); err == nil {
		r.Event, err = kms.ParseTag(tag)
	}
	var rec recallRecord
	if err == nil {
		err = json.Unmarshal(row.Value, &rec, json.RejectUnknownMembers(true))
	}
	if err != nil || rec.Version != recallVersion {
		return r, fmt.Errorf("registry row %s: %w", name, ErrCorrupt)
	}
	r.Requested, r.Until = rec.Requested, rec.Until
	return r, nil
}

// EndRecall takes a recall off what is to be done.
func (j *Journal) EndRecall(ctx context.Context, r Recall) error {
	err := j.rows.Delete(ctx, recallRow+r.App.String()+"."+r.Event.String(), r.revision)
	if err != nil && !errors.Is(err, kms.ErrRowNotFound) {
		return fmt.Errorf("end a recall: %w", err)
	}
	return nil
}

// EraseRecords overwrites the records of an app at positions, and leaves stubs of
// them, from which a rebuilt view knows that they were there. Every record must be
// a tombstone in the views already. It returns how many were overwritten now, and
// [ErrMoving] while the app's plan is being changed. It can be repeated, and must
// be after an error.
func (j *Journal) EraseRecords(ctx context.Context, id AppID, positions ...Position) (int, error) {
	app, _, err := j.registry.load(ctx, id)
	if err != nil {
		return 0, fmt.Errorf("erase records: %w", err)
	}
	if app.Previous.Plan != "" && app.Closed == 0 {
		return 0, fmt.Errorf("erase records: app %s: %w", id, ErrMoving)
	}
	e := eraser{j: j, app: app, doomed: map[string][]uint64{}, stubs: map[Position]entry{}, stubbed: map[Position]bool{}}
	if err := e.find(ctx, positions); err != nil {
		return 0, fmt.Errorf("erase records of app %s: %w", id, err)
	}
	if err := e.stub(ctx); err != nil {
		return 0, fmt.Errorf("erase records of app %s: %w", id, err)
	}
	n := 0
	for stream, sequences := range e.doomed {
		if err := j.DeleteRecords(ctx, stream, sequences...); err != nil {
			return n, err
		}
		n += len(sequences)
	}
	// A plan change that has begun meanwhile may have read what is gone now.
	after, _, err := j.registry.load(ctx, id)
	if err == nil && after.Generation != app.Generation {
		err = ErrMoving
	}
	if err != nil {
		return n, fmt.Errorf("erase records: app %s: %w", id, err)
	}
	return n, nil
}

// eraser is one EraseRecords.
type eraser struct {
	j       *Journal
	app     App
	doomed  map[string][]uint64 // sequences by stream
	stubs   map[Position]entry  // that are to be published
	stubbed map[Position]bool   // that have a stub
}

// find looks for the records in the streams of the app's present route and of the
// one before. Of those of earlier routes only copies are left that can be opened.
func (e *eraser) find(ctx context.Context, positions []Position) error {
	var older []Position
	for _, p := range positions {
		if p.Generation() == e.app.Generation {
			if err := e.look(ctx, e.app.current(), p); err != nil {
				return err
			}
			continue
		}
		older = append(older, p)
	}
	if len(older) == 0 {
		return nil
	}
	// Copies lie between two markers.
	for s, err := range e.j.appRecords(ctx, e.app.ID, e.app.current(), e.app.Opened, e.app.Closed) {
		if err != nil {
			return err
		}
		if s.Role == RoleCopy && slices.Contains(older, s.Position) {
			if err := e.doom(&s, e.app.current()); err != nil {
				return err
			}
		}
	}
	for _, p := range older {
		if p.Generation() == e.app.Previous.Generation {
			if err := e.look(ctx, e.app.Previous, p); err != nil {
				return err
			}
		}
	}
	return nil
}

// look finds a record at its first place.
func (e *eraser) look(ctx context.Context, on Route, p Position) error {
	name := StreamName(e.j.region.ID, on.Plan, on.Shard)
	if e.j.streams[name] == nil {
		return nil // its plan is no longer in the table
	}
	return retry(ctx, func(ctx context.Context) error {
		handle, err := e.j.js.Stream(ctx, name)
		if err != nil {
			return streamError(err)
		}
		msg, err := handle.GetMsg(ctx, p.Sequence())
		if noSuchMessage(err) {
			return nil // expired, or overwritten before
		}
		if err != nil {
			return streamError(err)
		}
		s, err := sealedOf(msg.Subject, msg.Header, msg.Sequence, msg.Time, msg.Data)
		if err != nil {
			return err
		}
		if s.App != e.app.ID || s.Position != p || s.Role != RoleEvent {
			return fmt.Errorf("%w: position %s is not there", ErrCorrupt, p)
		}
		return e.doom(&s, on)
	})
}

// doom notes that a record of a route is to be overwritten, and its stub.
func (e *eraser) doom(s *Sealed, on Route) error {
	if isStub(s.Record) {
		e.stubbed[s.Position] = true
		return nil
	}
	h, err := ParseHeader(s.Record)
	if err != nil {
		return fmt.Errorf("position %s: %w", s.Position, err)
	}
	stream := StreamName(e.j.region.ID, on.Plan, on.Shard)
	if !slices.Contains(e.doomed[stream], s.Sequence) {
		e.doomed[stream] = append(e.doomed[stream], s.Sequence)
	}
	if e.stubs[s.Position].record != nil {
		return nil // its copy has one
	}
	source := *s
	source.Plan = e.app.Plan // its expiry is that of the present plan already
	e.stubs[s.Position] = entry{
		subject: Subject{Plan: e.app.Plan, Shard: e.app.Shard, App: e.app.ID, Bucket: BucketOf(h.Conversation)}.String(),
		record:  append(slices.Clone(s.Record[:HeaderSize+stubHeader]), make([]byte, stubTail)...),
		gen:     e.app.Generation, copied: copyValue(&source),
	}
	return nil
}

// stub publishes the stubs, in the order of their positions.
func (e *eraser) stub(ctx context.Context) error {
	s := e.j.streams[StreamName(e.j.region.ID, e.app.Plan, e.app.Shard)]
	if s == nil {
		return fmt.Errorf("%w: shard %d of plan %s", ErrUnknownPlan, e.app.Shard, e.app.Plan)
	}
	var entries []entry
	positions := make([]Position, 0, len(e.stubs))
	for p := range e.stubs {
		positions = append(positions, p)
	}
	slices.Sort(positions)
	for _, p := range positions {
		if e.stubbed[p] {
			continue
		}
		one := e.stubs[p]
		if !s.gated {
			one.fence = Subject{Plan: e.app.Plan, Shard: e.app.Shard, App: e.app.ID, Marker: markSeal, Generation: e.app.Generation}.String()
		}
		entries = append(entries, one)
	}
	if len(entries) == 0 {
		return nil
	}
	if err := e.j.put(ctx, e.app.ID, entries, s.enqueue); err != nil {
		return err
	}
	for i := range entries {
		if err := entries[i].err; err != nil {
			if errors.Is(err, errSealed) {
				return ErrMoving
			}
			return fmt.Errorf("publish a stub: %w", err)
		}
	}
	return nil
}

// isStub reports whether a record is what an erasure has left.
func isStub(record []byte) bool {
	if len(record) != HeaderSize+kms.Overhead {
		return false
	}
	for _, b := range record[HeaderSize+stubHeader:] {
		if b != 0 {
			return false
		}
	}
	return true
}
