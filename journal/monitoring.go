package journal

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// monitoringSubject is what an app's monitoring data is published on.
func monitoringSubject(app AppID) string { return "mon." + app.String() }

// AppendMonitoring appends a record of monitoring data of an app, as
// docs/format/monitoring.md has it, and returns when the server has it. It is not
// synced: monitoring data explains, and nothing is built on it. Of an app that was
// deleted nothing is appended.
func (j *Journal) AppendMonitoring(ctx context.Context, app AppID, record []byte) error {
	if _, err := j.App(ctx, app); errors.Is(err, ErrAppDeleted) {
		return nil // what was counted in the minute in which it was deleted
	}
	if _, err := j.js.Publish(ctx, monitoringSubject(app), record, jetstream.WithExpectStream(MonitoringStream(j.region.ID))); err != nil {
		return fmt.Errorf("append monitoring data: %w", streamError(err))
	}
	return nil
}

// A MonitoringRecord is a record of monitoring data as it is stored.
type MonitoringRecord struct {
	Sequence uint64
	Stored   time.Time
	Record   []byte
}

// Monitoring returns an app's monitoring data in the order of its arrival: what is
// behind the sequence and arrived at a time or later, at most limit records. What
// has left its retention is not among them. more tells whether there is more.
func (j *Journal) Monitoring(ctx context.Context, app AppID, after uint64, from time.Time, limit int) (records []MonitoringRecord, more bool, err error) {
	if oldest := j.now().Add(-j.cfg.Retention.Monitoring); from.Before(oldest) {
		from = oldest
	}
	cfg := jetstream.ConsumerConfig{
		FilterSubject: monitoringSubject(app), DeliverPolicy: jetstream.DeliverByStartTimePolicy, OptStartTime: &from,
		AckPolicy: jetstream.AckNonePolicy, MemoryStorage: true, Replicas: 1, InactiveThreshold: time.Minute, MaxDeliver: 1,
	}
	if after > 0 {
		cfg.DeliverPolicy, cfg.OptStartTime, cfg.OptStartSeq = jetstream.DeliverByStartSequencePolicy, nil, after+1
	}
	name := MonitoringStream(j.region.ID)
	consumer, err := j.js.CreateConsumer(ctx, name, cfg)
	if err != nil {
		return nil, false, fmt.Errorf("monitoring data: %w", streamError(err))
	}
	defer func() {
		// Best effort: the server drops it after a minute.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = j.js.DeleteConsumer(ctx, name, consumer.CachedInfo().Name)
	}()
	pending := int(min(consumer.CachedInfo().NumPending, 1<<30)) //nolint:gosec // bounded
	if pending == 0 {
		return nil, false, nil
	}
	batch, err := consumer.Fetch(min(limit, pending), jetstream.FetchMaxWait(requestTimeout))
	if err != nil {
		return nil, false, fmt.Errorf("monitoring data: %w", streamError(err))
	}
	for msg := range batch.Messages() {
		meta, err := msg.Metadata()
		if err != nil {
			return nil, false, fmt.Errorf("monitoring data: %w: %w", ErrCorrupt, err)
		}
		if meta.Timestamp.Before(from) {
			continue
		}
		records = append(records, MonitoringRecord{Sequence: meta.Sequence.Stream, Stored: meta.Timestamp, Record: msg.Data()})
	}
	if err := batch.Error(); err != nil {
		return nil, false, fmt.Errorf("monitoring data: %w", streamError(err))
	}
	return records, pending > limit, nil
}

// CountMonitoring returns how many records of an app's monitoring data are stored.
func (j *Journal) CountMonitoring(ctx context.Context, app AppID) (int, error) {
	s, err := j.js.Stream(ctx, MonitoringStream(j.region.ID))
	if err != nil {
		return 0, fmt.Errorf("monitoring data: %w", streamError(err))
	}
	info, err := s.Info(ctx, jetstream.WithSubjectFilter(monitoringSubject(app)))
	if err != nil {
		return 0, fmt.Errorf("monitoring data: %w", streamError(err))
	}
	return int(info.State.Subjects[monitoringSubject(app)]), nil //nolint:gosec // a count
}

// DeleteMonitoring deletes an app's monitoring data, and returns how many records
// there were.
func (j *Journal) DeleteMonitoring(ctx context.Context, app AppID) (int, error) {
	n, err := j.CountMonitoring(ctx, app)
	if err != nil || n == 0 {
		return 0, err
	}
	s, err := j.js.Stream(ctx, MonitoringStream(j.region.ID))
	if err != nil {
		return 0, fmt.Errorf("delete monitoring data: %w", streamError(err))
	}
	if err := s.Purge(ctx, jetstream.WithPurgeSubject(monitoringSubject(app))); err != nil {
		return 0, fmt.Errorf("delete monitoring data: %w", streamError(err))
	}
	return n, nil
}
