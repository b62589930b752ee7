package journal

import (
	"context"
	"errors"
	"fmt"
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

func (a *auditor) run() {
	defer close(a.done)
	ctx := a.journal.ctx
	batch := make([]auditRequest, 0, auditBatch)
	for {
		batch = batch[:0]
		select {
		case req := <-a.queue:
			batch = append(batch, req)
		case <-ctx.Done():
			a.drain()
			return
		}
		for more := true; more && len(batch) < auditBatch; {
			select {
			case req := <-a.queue:
				batch = append(batch, req)
			default:
				more = false
			}
		}
		a.commit(ctx, batch)
	}
}

// drain writes what was queued when the journal closed, within the time of one
// commit.
func (a *auditor) drain() {
	var batch []auditRequest
	for {
		select {
		case req := <-a.queue:
			batch = append(batch, req)
			continue
		default:
		}
		break
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(a.journal.ctx), a.journal.cfg.CommitTimeout)
	defer cancel()
	a.commit(ctx, batch)
}

// commit writes a batch and tells those who wait. What nobody waits for is tried
// until it is written or the journal closes.
func (a *auditor) commit(ctx context.Context, batch []auditRequest) {
	for attempt := 0; len(batch) > 0; attempt++ {
		err := a.write(ctx, &batch)
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			a.journal.log.Error("audit_records_lost_at_close", "records", len(batch), "error", err)
			return
		}
		if attempt >= auditRetries {
			a.journal.log.Error("audit_log_unavailable", "waiting", len(batch), "error", err)
			batch = a.fail(batch, err)
			attempt = 0
			if len(batch) == 0 {
				return
			}
		}
		pause(ctx, retryPause)
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
	ctx, cancel := context.WithTimeout(ctx, a.journal.cfg.CommitTimeout)
	defer cancel()
	if !a.known {
		if err := a.load(ctx); err != nil {
			return err
		}
	}
	heads := make([]AuditHead, 0, len(*batch))
	acks := make([]jetstream.PubAckFuture, 0, len(*batch))
	head, now := a.head, a.journal.now()
	for i := 0; i < len(*batch); i++ {
		req := (*batch)[i]
		payload, next, err := req.entry.encode(head, a.journal.region.ID, now)
		if err != nil { // this entry only: it can never be written
			a.journal.log.Error("audit_entry_invalid", "error", err)
			if req.reply != nil {
				req.reply <- err
			}
			*batch = append((*batch)[:i], (*batch)[i+1:]...)
			i--
			continue
		}
		word, _, _ := strings.Cut(req.entry.Action, ".")
		msg := &nats.Msg{Subject: "audit." + word, Data: payload}
		ack, err := a.journal.js.PublishMsgAsync(msg, jetstream.WithExpectLastSequence(a.last+uint64(len(heads))))
		if err != nil {
			a.known = false
			return unavailable(err)
		}
		heads, acks, head = append(heads, next), append(acks, ack), next
	}
	written := 0
	var failure error
	for _, ack := range acks {
		select {
		case <-ack.Ok():
			if failure == nil {
				written++
			}
		case err := <-ack.Err():
			failure = errors.Join(failure, err)
		case <-ctx.Done():
			failure = context.Cause(ctx)
		}
		if failure != nil {
			break
		}
	}
	if written > 0 {
		if err := a.settle(ctx, batch, heads[written-1], written); err != nil {
			a.known = false
			return err
		}
	}
	if failure != nil {
		// What became of the rest is read from the stream: a record whose
		// acknowledgement was lost is recognised by its hash.
		a.known = false
		if err := a.load(ctx); err != nil {
			return errors.Join(unavailable(failure), err)
		}
		for i := written; i < len(heads); i++ {
			if heads[i] == a.head {
				return a.settle(ctx, batch, a.head, i+1-written)
			}
		}
		return unavailable(failure)
	}
	return nil
}

// settle makes the first n entries durable, moves the witness and answers.
func (a *auditor) settle(ctx context.Context, batch *[]auditRequest, head AuditHead, n int) error {
	if sync := a.journal.cfg.Sync; sync != nil {
		if err := sync.Sync(a.stream); err != nil {
			return fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
	}
	if a.known {
		a.head = head
		a.last += uint64(n)
	}
	if err := a.witness(ctx, head); err != nil {
		// The log itself is whole; the next commit moves the witness.
		a.journal.log.Warn("audit_witness_behind", "error", err)
	}
	for _, req := range (*batch)[:n] {
		if req.reply != nil {
			req.reply <- nil
		}
	}
	*batch = (*batch)[n:]
	return nil
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
// the first that is kept. The payload is valid during the call. It does not
// verify: give the payloads to an [AuditChain].
func (j *Journal) AuditLog(ctx context.Context, from uint64, fn func(payload []byte) error) error {
	name := AuditStream(j.region.ID)
	s, err := j.js.Stream(ctx, name)
	if err != nil {
		return fmt.Errorf("audit log: %w", streamError(err))
	}
	end := s.CachedInfo().State.LastSeq
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
		var number struct {
			N uint64 `json:"n,string"`
		}
		if from <= 1 || json.Unmarshal(msg.Data(), &number) != nil || number.N >= from {
			if err := fn(msg.Data()); err != nil {
				return err
			}
		}
		if meta.Sequence.Stream >= end {
			return nil
		}
	}
}
