package monitor

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/journal"
)

// An Operation is what was asked for. The set is closed: it is a label.
type Operation string

// The operations.
const (
	Append        Operation = "append"
	Replay        Operation = "replay"
	Tail          Operation = "tail"
	Event         Operation = "event"
	Messages      Operation = "messages"
	Conversations Operation = "conversations"
	Inbox         Operation = "inbox"
	Profile       Operation = "profile"
	Attachment    Operation = "attachment"
	Endpoints     Operation = "endpoints"
	Export        Operation = "export"
	Reading       Operation = "metrics"
	Erasure       Operation = "erasure"
	Deliver       Operation = "deliver"
	Admin         Operation = "admin"
	Other         Operation = "other"
)

// An Outcome is how a request ended.
type Outcome string

// The outcomes.
const (
	OK      Outcome = "ok"
	Refused Outcome = "refused" // by what was asked
	Failed  Outcome = "failed"  // for a reason of ours, or of who should have answered
)

// OutcomeOf is the outcome of an HTTP status; 0 is no answer.
func OutcomeOf(status int) Outcome {
	switch {
	case status == 0 || status >= 500:
		return Failed
	case status >= 400:
		return Refused
	}
	return OK
}

// bounds are the upper bounds of the buckets, in milliseconds; one more bucket has
// no bound.
func bounds() [len(Count{}.Buckets) - 1]float64 {
	return [...]float64{1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000}
}

// A Count counts requests of one operation.
type Count struct {
	Count   uint64   `json:"count"`
	Refused uint64   `json:"refused,omitzero"`
	Failed  uint64   `json:"failed,omitzero"`
	Micros  uint64   `json:"micros,omitzero"`
	Buckets [14]uint `json:"buckets,omitzero"`
}

func (c *Count) observe(o Outcome, d time.Duration, timed bool) {
	c.Count++
	switch o {
	case Refused:
		c.Refused++
	case Failed:
		c.Failed++
	case OK:
	}
	if !timed {
		return
	}
	c.Micros += uint64(max(d, 0) / time.Microsecond)
	ms := float64(d) / float64(time.Millisecond)
	at := 0
	for _, bound := range bounds() {
		if ms <= bound {
			break
		}
		at++
	}
	c.Buckets[at]++
}

func (c *Count) add(o *Count) {
	c.Count += o.Count
	c.Refused += o.Refused
	c.Failed += o.Failed
	c.Micros += o.Micros
	for i, n := range o.Buckets {
		c.Buckets[i] += n
	}
}

// A Record is what an app was served in a span of time, by one process:
// docs/format/monitoring.md.
type Record struct {
	Version    int                  `json:"version"`
	From       time.Time            `json:"from"`
	Until      time.Time            `json:"until"`
	Events     uint64               `json:"events,omitzero"`
	Operations map[Operation]*Count `json:"operations,omitempty"`
}

const version = 1

// ParseRecord parses a record.
func ParseRecord(text []byte) (Record, error) {
	var r Record
	if err := json.Unmarshal(text, &r, json.RejectUnknownMembers(true)); err != nil {
		return Record{}, fmt.Errorf("monitoring record: %w: %w", journal.ErrCorrupt, err)
	}
	if r.Version != version {
		return Record{}, fmt.Errorf("monitoring record: %w: version %d", journal.ErrCorrupt, r.Version)
	}
	return r, nil
}

// A Store keeps records; a journal is one.
type Store interface {
	AppendMonitoring(ctx context.Context, app journal.AppID, record []byte) error
}

// maxApps bounds the apps that a minute counts; what others do in it is counted by
// the metrics only.
const maxApps = 50_000

// A Meter counts for each app, and for the metrics of the region. Its methods may
// be called concurrently; a nil Meter counts nothing.
type Meter struct {
	store   Store
	metrics *Metrics
	log     *slog.Logger
	now     func() time.Time

	mu   sync.Mutex // guards what follows
	from time.Time
	apps map[journal.AppID]*Record
}

// NewMeter returns a meter. Metrics may be nil.
func NewMeter(store Store, metrics *Metrics, log *slog.Logger, now func() time.Time) *Meter {
	return &Meter{store: store, metrics: metrics, log: log, now: now, from: now(), apps: make(map[journal.AppID]*Record)}
}

// Observe counts a request that has ended. An app of zeros stands for none.
func (m *Meter) Observe(app journal.AppID, op Operation, o Outcome, d time.Duration) {
	if m == nil {
		return
	}
	timed := op != Tail // it lasts as long as its reader likes
	m.metrics.observe(op, o, d, timed)
	if app.IsZero() {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.record(app)
	if r == nil {
		return
	}
	c := r.Operations[op]
	if c == nil {
		c = &Count{}
		r.Operations[op] = c
	}
	c.observe(o, d, timed)
}

// Appended counts events that were appended.
func (m *Meter) Appended(app journal.AppID, events int) {
	if m == nil || events <= 0 {
		return
	}
	m.metrics.appended(events)
	m.mu.Lock()
	defer m.mu.Unlock()
	if r := m.record(app); r != nil {
		r.Events += uint64(events)
	}
}

// record is an app's record of the minute, with m.mu held; nil if there are too
// many.
func (m *Meter) record(app journal.AppID) *Record {
	r := m.apps[app]
	if r == nil && len(m.apps) < maxApps {
		r = &Record{Version: version, Operations: make(map[Operation]*Count)}
		m.apps[app] = r
	}
	return r
}

// flushTime bounds the last flush, when the process ends.
const flushTime = 2 * time.Second

// Run appends what was counted, as often as said and when ctx ends.
func (m *Meter) Run(ctx context.Context, every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			m.Flush(ctx)
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTime)
			defer cancel()
			m.Flush(last)
			return
		}
	}
}

// Flush appends what was counted. What cannot be appended is counted on.
func (m *Meter) Flush(ctx context.Context) {
	m.mu.Lock()
	from, apps := m.from, m.apps
	m.from, m.apps = m.now(), make(map[journal.AppID]*Record)
	until := m.from
	m.mu.Unlock()
	for app, r := range apps {
		r.From, r.Until = from.UTC(), until.UTC()
		text, err := json.Marshal(r, json.Deterministic(true))
		if err == nil {
			err = m.store.AppendMonitoring(ctx, app, text)
		}
		if err != nil {
			m.log.Warn("monitoring data is kept for the next minute", "apps", len(apps), "err", err)
			m.restore(from, apps)
			return
		}
		delete(apps, app)
	}
}

// restore counts on from what was not appended.
func (m *Meter) restore(from time.Time, apps map[journal.AppID]*Record) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.from = from
	for app, r := range apps {
		now := m.record(app)
		if now == nil {
			continue
		}
		now.Events += r.Events
		for op, c := range r.Operations {
			if sum := now.Operations[op]; sum != nil {
				sum.add(c)
			} else {
				now.Operations[op] = c
			}
		}
	}
}
