package journal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/kms"
)

const (
	// groupAtOnce is how many requests of a group are under way together.
	groupAtOnce = 250
	// groupWriters is how many rows of a group are looked after one by one at a
	// time, when an answer did not come.
	groupWriters = 64
	// maxDeferred is how many revisions of a row are left to Sweep. The bucket
	// keeps eight: one that is pushed out of it could not be overwritten any more.
	maxDeferred = 3
	// sweepAfter is how long after the last of several groups the sweep comes: it
	// takes the disk that they need.
	sweepAfter = 10 * time.Second
)

var _ kms.RowsGroup = (*Rows)(nil)

// storedMessage is the server's answer to a request for a message. The client
// library's own request waits for each answer in a goroutine of its caller, and
// reads it by reflection twice.
type storedMessage struct {
	Message struct {
		Sequence uint64 `json:"seq"`
		Headers  []byte `json:"hdrs"`
		Data     []byte `json:"data"`
	} `json:"message"`
}

// LoadGroup returns the present rows of many names, each with an error as Load
// has it.
func (r *Rows) LoadGroup(ctx context.Context, names []string) ([]kms.Row, []error) {
	rows, errs := make([]kms.Row, len(names)), make([]error, len(names))
	have := make([]bool, len(names))
	for from := 0; from < len(names); from += groupAtOnce {
		to := min(from+groupAtOnce, len(names))
		r.loadSome(ctx, names[from:to], rows[from:to], have[from:to])
	}
	inParallel(len(names), func(i int) {
		if !have[i] { // it is not there, or was not answered: Load tells
			rows[i], errs[i] = r.Load(ctx, names[i])
		}
	})
	return rows, errs
}

// loadSome notes the rows that it gets: in one request where the stream has one
// replica, and one for each row where only the leader may answer.
func (r *Rows) loadSome(ctx context.Context, names []string, rows []kms.Row, have []bool) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	stream, err := r.handle(ctx)
	if err != nil {
		return
	}
	inbox := r.js.Conn().NewInbox()
	answers, err := r.js.Conn().SubscribeSync(inbox + ".*")
	if err != nil {
		return
	}
	defer func() { _ = answers.Unsubscribe() }()
	if stream.CachedInfo().Config.AllowDirect {
		r.loadTogether(ctx, answers, inbox, names, rows, have)
	} else {
		r.loadEach(ctx, answers, inbox, names, rows, have)
	}
}

// loadTogether asks for the last messages of all names at once: a batched direct
// get, see ADR 31 of NATS.
func (r *Rows) loadTogether(ctx context.Context, answers *nats.Subscription, inbox string, names []string, rows []kms.Row, have []bool) {
	places := make(map[string]int, len(names))
	ask := struct {
		Subjects []string `json:"multi_last"`
	}{make([]string, 0, len(names))}
	for i, name := range names {
		if checkRowName(name) != nil {
			continue
		}
		subject := r.prefix + name
		places[subject] = i
		ask.Subjects = append(ask.Subjects, subject)
	}
	body, err := json.Marshal(ask)
	if err != nil || len(places) == 0 || r.js.Conn().PublishRequest(r.apiPrefix()+"DIRECT.GET."+r.stream, inbox+".0", body) != nil {
		return
	}
	for {
		msg, err := answers.NextMsgWithContext(ctx)
		if err != nil || msg.Header.Get("Status") != "" {
			return // the end, or nothing is there
		}
		i, ok := places[msg.Header.Get(jetstream.SubjectHeader)]
		seq, err := strconv.ParseUint(msg.Header.Get(jetstream.SequenceHeader), 10, 64)
		if !ok || err != nil || deleted(msg.Header) {
			continue
		}
		rows[i], have[i] = kms.Row{Value: msg.Data, Revision: seq}, true
	}
}

// loadEach asks for all rows before it waits for the first answer.
func (r *Rows) loadEach(ctx context.Context, answers *nats.Subscription, inbox string, names []string, rows []kms.Row, have []bool) {
	prefix := r.apiPrefix()
	asked := map[string]int{}
	for i, name := range names {
		if checkRowName(name) != nil {
			continue
		}
		reply := fmt.Sprintf("%s.%d", inbox, i)
		ask := []byte(`{"last_by_subj":"` + r.prefix + name + `"}`)
		if err := r.js.Conn().PublishRequest(prefix+"STREAM.MSG.GET."+r.stream, reply, ask); err != nil {
			return
		}
		asked[reply] = i
	}
	for range asked {
		msg, err := answers.NextMsgWithContext(ctx)
		if err != nil {
			return
		}
		i, ok := asked[msg.Subject]
		var answer storedMessage
		if !ok || json.Unmarshal(msg.Data, &answer) != nil || answer.Message.Sequence == 0 || bytes.Contains(answer.Message.Headers, []byte(kvOperation)) {
			continue
		}
		rows[i], have[i] = kms.Row{Value: answer.Message.Data, Revision: answer.Message.Sequence}, true
	}
}

// apiPrefix is where the server takes requests.
func (r *Rows) apiPrefix() string {
	o := r.js.Options()
	switch {
	case o.Domain != "":
		return "$JS." + o.Domain + ".API."
	case o.APIPrefix != "":
		return strings.TrimSuffix(o.APIPrefix, ".") + "."
	}
	return jetstream.DefaultAPIPrefix
}

// UpdateGroup replaces rows, makes them durable together and reads them again.
// The bytes of those before are overwritten by [Rows.EraseReplaced], by Sweep,
// and by the next Update of the row.
func (r *Rows) UpdateGroup(ctx context.Context, updates []kms.RowUpdate) []error {
	if err := r.rollFor(ctx, len(updates)); err != nil {
		// The erasure takes longer then; the writing need not fail for it.
		r.unfinished()
	}
	errs := make([]error, len(updates))
	sequences := make([]uint64, len(updates))
	for from := 0; from < len(updates); from += groupAtOnce {
		to := min(from+groupAtOnce, len(updates))
		r.updateSome(ctx, updates[from:to], sequences[from:to], errs[from:to])
	}
	var failed error
	if r.sync != nil {
		if err := r.sync.Sync(r.stream); err != nil {
			failed = fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
	}
	if failed == nil {
		failed = r.readAgain(ctx, updates, sequences, errs)
	}
	for i, u := range updates {
		if errs[i] == nil {
			errs[i] = failed
		}
		if errs[i] != nil {
			errs[i] = fmt.Errorf("update row %s: %w", u.Name, errs[i])
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.soon == nil {
		r.soon = time.AfterFunc(sweepAfter, r.unfinished)
	} else {
		r.soon.Reset(sweepAfter)
	}
	return errs
}

// updateSome writes rows that are synced later. It sends all before it waits
// for the first answer; whose answer does not come, or is not plain, is written
// again, which finds out what became of it.
func (r *Rows) updateSome(ctx context.Context, updates []kms.RowUpdate, sequences []uint64, errs []error) {
	wait, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	messages := make([]*nats.Msg, len(updates))
	answers := make([]jetstream.PubAckFuture, len(updates))
	for i, u := range updates {
		if errs[i] = checkRowName(u.Name); errs[i] == nil && u.Revision == 0 {
			errs[i] = kms.ErrRowConflict
		}
		if errs[i] != nil || r.full(u.Name) {
			continue
		}
		messages[i] = r.message(u.Name, u.Value, "")
		sent := *messages[i] // a late answer's message is the library's
		sent.Header = nats.Header{writeID: messages[i].Header[writeID]}
		answers[i], _ = r.js.PublishMsgAsync(&sent, jetstream.WithExpectLastSequencePerSubject(u.Revision), jetstream.WithRetryAttempts(0))
	}
	for i, answer := range answers {
		if answer == nil {
			continue
		}
		select {
		case ack := <-answer.Ok():
			sequences[i] = ack.Sequence
		case <-answer.Err(): //nolint:errcheck // the row itself is asked below
		case <-wait.Done():
		}
	}
	inParallel(len(updates), func(i int) {
		switch {
		case errs[i] != nil || sequences[i] != 0:
		case messages[i] == nil:
			sequences[i], errs[i] = r.Update(ctx, updates[i].Name, updates[i].Value, updates[i].Revision)
		default:
			sequences[i], errs[i] = r.publish(ctx, messages[i], updates[i].Revision)
		}
	})
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, u := range updates {
		if errs[i] == nil && messages[i] != nil {
			r.deferred[u.Name]++
		}
	}
}

// full reports whether too many revisions of a row are left already.
func (r *Rows) full(name string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.deferred[name] >= maxDeferred
}

// readAgain compares what the server has with what was written.
func (r *Rows) readAgain(ctx context.Context, updates []kms.RowUpdate, sequences []uint64, errs []error) error {
	names := make([]string, 0, len(updates))
	places := make([]int, 0, len(updates))
	for i, u := range updates {
		if errs[i] == nil {
			names, places = append(names, u.Name), append(places, i)
		}
	}
	rows, failed := r.LoadGroup(ctx, names)
	for n, i := range places {
		switch {
		case failed[n] != nil && !errors.Is(failed[n], kms.ErrRowNotFound):
			return fmt.Errorf("read back: %w", failed[n])
		case failed[n] != nil, rows[n].Revision != sequences[i], !bytes.Equal(rows[n].Value, updates[i].Value):
			// Another one may have replaced it in the meantime.
			errs[i] = fmt.Errorf("read back: %w", kms.ErrRowConflict)
		}
	}
	return nil
}

// inParallel runs f for 0 to n-1, some at a time.
func inParallel(n int, f func(i int)) {
	var wg sync.WaitGroup
	next := make(chan int)
	for range min(groupWriters, n) {
		wg.Go(func() {
			for i := range next {
				f(i)
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
}

// settled notes that nothing of a row is left to overwrite.
func (r *Rows) settled(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.deferred, name)
}

// unfinished lets the next Sweep come soon.
func (r *Rows) unfinished() {
	select {
	case r.left <- struct{}{}:
	default:
	}
}
