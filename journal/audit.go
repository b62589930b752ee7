package journal

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/kms"
)

const (
	auditRow     = "audit" // of the registry: the witness
	auditQueue   = 1024    // entries waiting; more wait in Audit
	auditBatch   = 256     // records committed with one sync
	auditRetries = 8       // conflicts with another process before giving up
)

// AuditEntry is what there is to record. It names accounts, apps, keys and jobs
// by their ids, and holds no personal data: the log outlives the apps.
type AuditEntry struct {
	Actor     string // operator:NAME, app:ID, process:NAME
	Action    string // word.word, the first one is the subject's
	Target    string
	Outcome   string // ok, or the class of the error
	RequestID string // of the key provider
	Detail    map[string]string
}

// auditor writes the region's audit log: what arrived while a commit was under
// way goes into the next one.
type auditor struct {
	journal *Journal
	stream  string
	queue   chan auditRequest
	done    chan struct{}

	// Of the goroutine run.
	head  AuditHead
	last  uint64 // sequence of the stream's last message
	known bool   // head and last are
}

type auditRequest struct {
	entry AuditEntry
	reply chan error // buffered; nil when nobody waits
}

func newAuditor(j *Journal) *auditor {
	a := &auditor{
		journal: j, stream: AuditStream(j.region.ID),
		queue: make(chan auditRequest, auditQueue), done: make(chan struct{}),
	}
	go a.run()
	return a
}

// Audit appends an entry to the region's audit log and returns when it is
// durable. An operation on keys that cannot be recorded must not be done: on an
// error, do not go on.
func (j *Journal) Audit(ctx context.Context, entry AuditEntry) error {
	if err := entry.check(); err != nil {
		return err
	}
	req := auditRequest{entry: entry, reply: make(chan error, 1)}
	select {
	case j.auditor.queue <- req:
	case <-j.ctx.Done():
		return fmt.Errorf("audit: %w", ErrUnavailable)
	case <-ctx.Done():
		return fmt.Errorf("audit: %w", context.Cause(ctx))
	}
	select {
	case err := <-req.reply:
		return err
	case <-j.auditor.done:
		return fmt.Errorf("audit: %w", ErrUnavailable)
	case <-ctx.Done():
		return fmt.Errorf("audit: it may have been recorded: %w", context.Cause(ctx))
	}
}

// AuditLater appends an entry without waiting for it to be durable. It waits
// while the queue is full, so that nothing is dropped. It is meant for the calls
// to a key provider, which have taken place when they are recorded.
func (j *Journal) AuditLater(entry AuditEntry) {
	if err := entry.check(); err != nil {
		j.log.Error("audit_entry_invalid", "error", err)
		return
	}
	select {
	case j.auditor.queue <- auditRequest{entry: entry}:
	case <-j.ctx.Done():
	}
}

// run commits until the journal closes, and then what is still queued.
func (a *auditor) run() {
	defer close(a.done)
	closed := false
	batch := make([]auditRequest, 0, auditBatch)
	for {
		batch = batch[:0]
		if !closed {
			select {
			case req := <-a.queue:
				batch = append(batch, req)
			case <-a.journal.ctx.Done():
				closed = true
			}
		}
		for more := true; more && len(batch) < auditBatch; {
			select {
			case req := <-a.queue:
				batch = append(batch, req)
			default:
				more = false
			}
		}
		if closed && len(batch) == 0 {
			return
		}
		a.commit(batch)
	}
}

// commit writes a batch and tells those who wait. What nobody waits for is tried
// until it is written; while the journal closes, until it has failed often
// enough.
func (a *auditor) commit(batch []auditRequest) {
	for attempt := 1; len(batch) > 0; attempt++ {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(a.journal.ctx), a.journal.cfg.CommitTimeout)
		err := a.write(ctx, &batch)
		cancel()
		if err == nil {
			return
		}
		if attempt%auditRetries == 0 || errors.Is(err, ErrAuditChain) {
			a.journal.log.Error("audit_log_unavailable", "waiting", len(batch), "error", err)
			batch = a.fail(batch, err)
			if a.journal.ctx.Err() != nil && len(batch) > 0 {
				a.journal.log.Error("audit_records_lost_at_close", "records", len(batch), "error", err)
				return
			}
			pause(a.journal.ctx, 10*retryPause)
		}
		pause(a.journal.ctx, retryPause)
	}
}

// fail answers those who wait, and keeps the entries of those who do not.
func (a *auditor) fail(batch []auditRequest, err error) []auditRequest {
	var rest []auditRequest
	for _, req := range batch {
		if req.reply == nil {
			rest = append(rest, req)
			continue
		}
		req.reply <- fmt.Errorf("audit: %w", err)
	}
	return rest
}

// write appends the records of batch, takes off the ones that are durable, and
// answers for them.
func (a *auditor) write(ctx context.Context, batch *[]auditRequest) error {
	if !a.known {
		if err := a.load(ctx); err != nil {
			return err
		}
	}
	var msgs []*nats.Msg
	var accepted []auditRequest
	head, now := a.head, a.journal.now()
	for _, req := range *batch {
		payload, next, err := req.entry.encode(head, a.journal.region.ID, now)
		if err != nil { // this entry only: it can never be written
			a.journal.log.Error("audit_entry_invalid", "error", err)
			if req.reply != nil {
				req.reply <- err
			}
			continue
		}
		word, _, _ := strings.Cut(req.entry.Action, ".")
		msgs = append(msgs, &nats.Msg{Subject: "audit." + word, Data: payload, Header: nats.Header{}})
		accepted, head = append(accepted, req), next
	}
	if *batch = accepted; len(msgs) == 0 {
		return nil
	}
	if err := a.publish(ctx, msgs); err != nil {
		// The batch is stored as a whole or not at all, and an answer that was
		// lost is recognised by the hash at the log's end.
		a.known = false
		if lerr := a.load(ctx); lerr != nil {
			return errors.Join(err, lerr)
		}
		if a.head != head {
			return err
		}
	} else {
		a.head = head
		a.last += uint64(len(msgs))
	}
	if sync := a.journal.cfg.Sync; sync != nil {
		if err := sync.Sync(a.stream); err != nil {
			a.known = false
			return fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
	}
	if err := a.witness(ctx, head); err != nil {
		// The log itself is whole; the next commit moves the witness.
		a.journal.log.Warn("audit_witness_behind", "error", err)
	}
	for _, req := range *batch {
		if req.reply != nil {
			req.reply <- nil
		}
	}
	*batch = nil
	return nil
}

// publish stores msgs in one atomic batch, behind the last sequence that this
// process knows: singly expected sequences would let a record of another process
// come between two of them.
func (a *auditor) publish(ctx context.Context, msgs []*nats.Msg) error {
	nc := a.journal.cfg.Conn
	msgs[0].Header.Set(jetstream.ExpectedLastSeqHeader, strconv.FormatUint(a.last, 10))
	if len(msgs) > 1 {
		id := nats.NewInbox()[len(nats.InboxPrefix):]
		for i, msg := range msgs {
			msg.Header.Set(headerBatchID, id)
			msg.Header.Set(headerBatchSeq, strconv.Itoa(i+1))
		}
		msgs[len(msgs)-1].Header.Set(headerBatchCommit, "1")
	}
	for _, msg := range msgs[:len(msgs)-1] {
		if err := nc.PublishMsg(msg); err != nil {
			return unavailable(err)
		}
	}
	answer, err := nc.RequestMsgWithContext(ctx, msgs[len(msgs)-1])
	if err != nil {
		return unavailable(err)
	}
	_, err = newAckParser(a.stream).parse(answer.Data)
	return err
}

// load finds the end of the log: its last record, or the witness when every
// record has expired.
func (a *auditor) load(ctx context.Context) error {
	s, err := a.journal.js.Stream(ctx, a.stream)
	if err != nil {
		return streamError(err)
	}
	state := s.CachedInfo().State
	head, err := a.journal.AuditHead(ctx)
	if err != nil {
		return err
	}
	if state.Msgs > 0 {
		msg, err := s.GetMsg(ctx, state.LastSeq)
		if err != nil {
			return streamError(err)
		}
		chain := &AuditChain{}
		if _, err := chain.Add(msg.Data); err != nil {
			return err
		}
		if chain.Head().N < head.N {
			return fmt.Errorf("%w: it ends with record %d, the witness is record %d", ErrAuditChain, chain.Head().N, head.N)
		}
		head = chain.Head()
	}
	a.head, a.last, a.known = head, state.LastSeq, true
	return nil
}

// AuditHead returns the witness of the region's audit log: a record not far from
// its end. It is zero for an empty log.
func (j *Journal) AuditHead(ctx context.Context) (AuditHead, error) {
	var head AuditHead
	row, err := j.rows.Load(ctx, auditRow)
	if errors.Is(err, kms.ErrRowNotFound) {
		return head, nil
	}
	if err != nil {
		return head, fmt.Errorf("audit witness: %w", err)
	}
	if err := json.Unmarshal(row.Value, &head); err != nil {
		return head, fmt.Errorf("audit witness: %w: %w", ErrCorrupt, err)
	}
	return head, nil
}

// witness moves the witness forward, never back.
func (a *auditor) witness(ctx context.Context, head AuditHead) error {
	value, err := json.Marshal(head)
	if err != nil {
		return err
	}
	rows := a.journal.rows
	row, err := rows.Load(ctx, auditRow)
	switch {
	case errors.Is(err, kms.ErrRowNotFound):
		_, err = rows.Create(ctx, auditRow, value)
	case err == nil:
		var old AuditHead
		if err := json.Unmarshal(row.Value, &old); err == nil && old.N >= head.N {
			return nil
		}
		_, err = rows.Update(ctx, auditRow, value, row.Revision)
	}
	if errors.Is(err, kms.ErrRowConflict) {
		return nil // another process has just moved it
	}
	return err
}

// AuditLog calls fn with the payload of every record kept, from number
// from on, in order, up to the log's end at the time of the call; 0 begins with
// the first that is kept. One whose time is over is not given, also when the
// server has not let go of it yet. The payload is valid during the call. It does not
// verify: give the payloads to an [AuditChain].
func (j *Journal) AuditLog(ctx context.Context, from uint64, fn func(payload []byte) error) error {
	name := AuditStream(j.region.ID)
	s, err := j.js.Stream(ctx, name)
	if err != nil {
		return fmt.Errorf("audit log: %w", streamError(err))
	}
	end, oldest := s.CachedInfo().State.LastSeq, j.now().Add(-j.cfg.Retention.Audit)
	if s.CachedInfo().State.Msgs == 0 {
		return nil
	}
	consumer, err := s.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{
		DeliverPolicy: jetstream.DeliverAllPolicy, InactiveThreshold: time.Minute,
	})
	if err != nil {
		return fmt.Errorf("audit log: %w", streamError(err))
	}
	messages, err := consumer.Messages()
	if err != nil {
		return fmt.Errorf("audit log: %w", streamError(err))
	}
	defer messages.Stop()
	for {
		msg, err := messages.Next(jetstream.NextContext(ctx))
		if err != nil {
			return fmt.Errorf("audit log: %w", unavailable(err))
		}
		meta, err := msg.Metadata()
		if err != nil {
			return fmt.Errorf("audit log: %w: %w", ErrCorrupt, err)
		}
		var record struct {
			N    uint64    `json:"n,string"`
			Time time.Time `json:"time"`
		}
		// What is no record is for whoever verifies.
		if json.Unmarshal(msg.Data(), &record) != nil || record.N >= from && record.Time.After(oldest) {
			if err := fn(msg.Data()); err != nil {
				return err
			}
		}
		// Nothing pending is the end too when the last message is not there any
		// more: expired, or taken out.
		if meta.Sequence.Stream >= end || meta.NumPending == 0 {
			return nil
		}
	}
}
