package journal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// generationHeader carries the route generation of an app that has changed
	// its plan; it is left out for generation 0.
	generationHeader = "Coffer-Generation"
	// copyHeader is that of an event that a plan change has copied.
	copyHeader = "Coffer-Copy"

	expectedSubject = "Nats-Expected-Last-Subject-Sequence-Subject"

	// askHealth is how long an acknowledgement may take before the server's
	// health is looked at.
	askHealth = 250 * time.Millisecond

	// answerShare is the part of the commit's timeout after which an answer is
	// taken to be lost: with the leader of a replicated stream, for instance,
	// while the connection to another server stays.
	answerShare = 4
)

// pubAck is the server's answer to a publish.
type pubAck struct {
	Stream string    `json:"stream"`
	Seq    uint64    `json:"seq"`
	Batch  string    `json:"batch"`
	Count  int       `json:"count"`
	Error  *apiError `json:"error"`
}

type apiError struct {
	Code        int    `json:"code"`
	ErrCode     int    `json:"err_code"`
	Description string `json:"description"`
}

// ackParser reads the usual answer without a JSON parser:
// {"stream":"NAME","seq":N}.
type ackParser struct{ head []byte }

func newAckParser(stream string) ackParser {
	return ackParser{head: []byte(`{"stream":"` + stream + `","seq":`)}
}

func (p ackParser) parse(data []byte) (pubAck, error) {
	if digits, ok := bytes.CutPrefix(data, p.head); ok && len(digits) > 1 {
		var seq uint64
		for i, c := range digits {
			if c == '}' && i == len(digits)-1 && i > 0 && i < 19 {
				return pubAck{Seq: seq}, nil
			}
			if c < '0' || c > '9' {
				break
			}
			seq = seq*10 + uint64(c-'0')
		}
	}
	var ack pubAck
	if err := json.Unmarshal(data, &ack); err != nil {
		return ack, fmt.Errorf("%w: the server's answer does not parse", ErrUnavailable)
	}
	if ack.Error != nil {
		return ack, ack.Error.classify()
	}
	if ack.Seq == 0 {
		return ack, fmt.Errorf("%w: the server's answer has no sequence", ErrUnavailable)
	}
	return ack, nil
}

// errRetry marks a refusal that passes: nothing was stored, and the same
// publish may succeed later.
var errRetry = errors.New("refused for now") //nolint:gochecknoglobals // a sentinel

// errSealed marks a refusal because the app's route was sealed, or because the
// marker is there already. Nothing was stored.
var errSealed = fmt.Errorf("%w: the app has changed its plan", ErrUnavailable) //nolint:gochecknoglobals // a sentinel

// classify turns the server's refusal into an error of this package. Nothing
// was stored.
func (e *apiError) classify() error {
	text := fmt.Errorf("NATS error %d: %s", e.ErrCode, e.Description)
	switch e.ErrCode {
	case 10054, 10097: // message, or its headers, too large
		return fmt.Errorf("%w: %w", ErrTooLarge, text)
	case 10077: // the store refused: maximum messages, bytes, message size
		if bytes.Contains([]byte(e.Description), []byte("message too large")) {
			return fmt.Errorf("%w: %w", ErrTooLarge, text)
		}
		return fmt.Errorf("%w: %w", ErrFull, text)
	case 10002, 10023, 10028, 10047: // limits of the account, resources, memory, storage
		return fmt.Errorf("%w: %w", ErrFull, text)
	case 10059: // stream not found
		return fmt.Errorf("%w: %w", ErrIncarnation, text)
	case codeWrongSequence:
		return fmt.Errorf("%w: %w", errSealed, text)
	case codeWrongSequenceRaft, codeSequenceInProgress: // another expectation of the subject is under way
		return fmt.Errorf("%w: %w: %w", ErrUnavailable, errRetry, text)
	case 10008, 10009, 10211: // no leader, no quorum, too many batches under way
		return fmt.Errorf("%w: %w: %w", ErrUnavailable, errRetry, text)
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, text)
}

// streamError classifies an error of the jetstream package.
func streamError(err error) error {
	var api *jetstream.APIError
	switch {
	case err == nil:
		return nil
	case errors.Is(err, jetstream.ErrStreamNotFound):
		return fmt.Errorf("%w: %w", ErrIncarnation, err)
	case errors.Is(err, nats.ErrMaxPayload):
		return fmt.Errorf("%w: %w", ErrTooLarge, err)
	case errors.As(err, &api):
		return (&apiError{Code: api.Code, ErrCode: int(api.ErrorCode), Description: api.Description}).classify()
	}
	return unavailable(err)
}

// newPublisher chooses how a stream's commits are handed over.
func (j *Journal) newPublisher(s *stream) (publisher, error) {
	plain, err := newPlain(j.cfg.Conn, s.info.Name, s.health, j.cfg.CommitTimeout/answerShare)
	if err != nil {
		return nil, err
	}
	if j.cfg.Sync != nil {
		return plain, nil
	}
	return newBatches(plain, j.cfg.Replicas), nil
}

// plain publishes each entry by itself and awaits all acknowledgements: through
// one subscription, and matched by a number in the reply's subject, which is a
// third of the cost of a future for each.
type plain struct {
	nc     *nats.Conn
	health func(context.Context) error
	// patience is how long an answer is waited for.
	patience time.Duration
	ack      ackParser
	lost     chan nats.Status
	done     chan struct{} // of capacity 1

	mu     sync.Mutex // guards what follows
	sub    *nats.Subscription
	prefix string
	first  uint64   // the number of the batch's first entry; no number is used twice
	batch  []*entry // of the round that is under way
	left   int
}

func newPlain(nc *nats.Conn, stream string, health func(context.Context) error, patience time.Duration) (*plain, error) {
	p := &plain{
		nc: nc, health: health, patience: patience, ack: newAckParser(stream), done: make(chan struct{}, 1),
		lost: nc.StatusChanged(nats.DISCONNECTED, nats.RECONNECTING, nats.CLOSED),
	}
	if err := p.renew(); err != nil {
		return nil, err
	}
	return p, nil
}

// renew makes a new inbox, so that late answers of a round that was given up
// reach nobody. The lock is not held.
func (p *plain) renew() error {
	prefix := nats.NewInbox() + "."
	sub, err := p.nc.Subscribe(prefix+"*", p.receive)
	if err != nil {
		return fmt.Errorf("subscribe to acknowledgements: %w", unavailable(err))
	}
	// The acknowledgements of a commit are small and few.
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		return fmt.Errorf("subscribe to acknowledgements: %w", unavailable(err))
	}
	p.mu.Lock()
	old := p.sub
	p.sub, p.prefix = sub, prefix
	p.mu.Unlock()
	if old != nil {
		_ = old.Unsubscribe() // the connection it belongs to may be gone
	}
	return nil
}

func (p *plain) receive(m *nats.Msg) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(m.Subject) <= len(p.prefix) || m.Subject[:len(p.prefix)] != p.prefix {
		return // of an earlier inbox
	}
	number, err := strconv.ParseUint(m.Subject[len(p.prefix):], 10, 64)
	if err != nil || number < p.first || number >= p.first+uint64(len(p.batch)) {
		return // a second answer to an earlier round: two servers may take themselves for the leader
	}
	e := p.batch[number-p.first]
	if !e.doubtful {
		return
	}
	if len(m.Data) == 0 && m.Header.Get("Status") == "503" {
		// Nobody listens: the stream has no leader. Nothing was stored.
		e.err = fmt.Errorf("%w: %w: no server has the stream", ErrUnavailable, errRetry)
	} else {
		var ack pubAck
		ack, e.err = p.ack.parse(m.Data)
		e.seq = ack.Seq
	}
	if e.err != nil {
		e.seq = 0
	}
	e.doubtful = false
	if p.left--; p.left == 0 {
		p.endLocked()
		p.done <- struct{}{}
	}
}

func (p *plain) limit() int { return maxCommitEvents }

func (p *plain) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	_ = p.sub.Unsubscribe() // the connection may be gone
	p.nc.RemoveStatusListener(p.lost)
}

func (p *plain) publish(ctx context.Context, batch []*entry) error {
	for {
		if err := p.round(ctx, batch); err != nil {
			return err
		}
		batch = retriable(batch)
		if len(batch) == 0 || !pause(ctx, retryPause) {
			return nil
		}
	}
}

// retriable returns the entries that were refused for now.
func retriable(batch []*entry) []*entry {
	var out []*entry
	for _, e := range batch {
		if e.err != nil && errors.Is(e.err, errRetry) {
			out = append(out, e)
		}
	}
	return out
}

func (p *plain) round(ctx context.Context, batch []*entry) error {
	p.mu.Lock()
	prefix, first := p.prefix, p.first
	p.batch, p.left = batch, len(batch)
	for _, e := range batch {
		e.doubtful, e.err = true, nil
	}
	p.mu.Unlock()
	p.drain()
	for i, e := range batch {
		if err := sendEntry(p.nc, e, prefix+strconv.FormatUint(first+uint64(i), 10)); err != nil {
			return p.abort(err)
		}
	}
	return p.await(ctx)
}

// endLocked ends the round: its entries belong to the committer again, and no
// answer that is still on its way reaches them.
func (p *plain) endLocked() {
	p.first += uint64(len(p.batch))
	p.batch = nil
}

// drain forgets losses of the connection before a round.
func (p *plain) drain() {
	for {
		select {
		case <-p.lost:
		default:
			return
		}
	}
}

// sendEntry publishes one entry.
func sendEntry(nc *nats.Conn, e *entry, reply string) error {
	bare := e.gen == 0 && e.copied == "" && e.fence == ""
	switch {
	case bare && reply == "":
		return nc.Publish(e.subject, e.record)
	case bare:
		return nc.PublishRequest(e.subject, reply, e.record)
	}
	msg := &nats.Msg{Subject: e.subject, Reply: reply, Data: e.record, Header: nats.Header{}}
	e.describe(msg.Header)
	e.guard(msg.Header)
	return nc.PublishMsg(msg)
}

// describe sets the headers that readers need.
func (e *entry) describe(h nats.Header) {
	if e.gen > 0 {
		h[generationHeader] = []string{strconv.Itoa(int(e.gen))}
	}
	if e.copied != "" {
		h[copyHeader] = []string{e.copied}
	}
}

// guard sets the headers by which the server refuses an entry whose fence is not
// empty.
func (e *entry) guard(h nats.Header) {
	if e.fence == "" {
		return
	}
	h[expectedSubjectSequence] = []string{"0"}
	if e.fence != e.subject {
		h[expectedSubject] = []string{e.fence}
	}
}

func (p *plain) await(ctx context.Context) error {
	ask := time.NewTimer(askHealth)
	defer ask.Stop()
	for began := time.Now(); ; {
		select {
		case <-p.done:
			return nil
		case <-p.lost:
			return p.abort(nats.ErrDisconnected)
		case <-ctx.Done():
			return p.abort(ctx.Err())
		case <-ask.C:
			if err := p.overdue(ctx, began); err != nil {
				return p.abort(err)
			}
			ask.Reset(askHealth)
		}
	}
}

// overdue says why an answer is not waited for any longer.
func (p *plain) overdue(ctx context.Context, began time.Time) error {
	if err := p.health(ctx); err != nil {
		return err
	}
	if time.Since(began) > p.patience {
		return errors.New("no answer")
	}
	return nil
}

// abort gives a round up. Answers that are there already count.
func (p *plain) abort(err error) error {
	p.mu.Lock()
	p.endLocked()
	left := p.left
	select {
	case <-p.done:
	default:
	}
	p.mu.Unlock()
	if left == 0 {
		return nil
	}
	if rerr := p.renew(); rerr != nil {
		return errors.Join(err, rerr)
	}
	return err
}
