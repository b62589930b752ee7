package journal

import (
	"bytes"
	"context"
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
	a, err := r.expect(len(names) + 1) // and the end
	if err != nil {
		return
	}
	defer a.close()
	if stream.CachedInfo().Config.AllowDirect {
		r.loadTogether(ctx, a, names, rows, have)
	} else {
		r.loadEach(ctx, a, names, rows, have)
	}
}

// answers are those to some requests. The client library's subscriptions have
// room for 65,536 messages each, and its asynchronous publishing reads each
// answer by reflection: both cost as much as the server.
type answers struct {
	conn  *nats.Conn
	inbox string // of the answer to request i: inbox.i
	sub   *nats.Subscription
	got   chan *nats.Msg
}

// expect makes room for n answers.
func (r *Rows) expect(n int) (*answers, error) {
	a := &answers{conn: r.js.Conn(), inbox: r.js.Conn().NewInbox() + ".", got: make(chan *nats.Msg, n)}
	var err error
	if a.sub, err = a.conn.ChanSubscribe(a.inbox+"*", a.got); err != nil {
		return nil, unavailable(err)
	}
	return a, nil
}

func (a *answers) close() { _ = a.sub.Unsubscribe() }

// reply is where the answer to request i is sent.
func (a *answers) reply(i int) string { return a.inbox + strconv.Itoa(i) }

// next returns an answer and which request it is of; nil when there is none in
// time.
func (a *answers) next(ctx context.Context) (int, *nats.Msg) {
	select {
	case msg := <-a.got:
		if i, err := strconv.Atoi(strings.TrimPrefix(msg.Subject, a.inbox)); err == nil {
			return i, msg
		}
	case <-ctx.Done():
	}
	return 0, nil
}

// loadTogether asks for the last messages of all names at once: a batched direct
// get, see ADR 31 of NATS.
func (r *Rows) loadTogether(ctx context.Context, a *answers, names []string, rows []kms.Row, have []bool) {
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
	if err != nil || len(places) == 0 || a.conn.PublishRequest(r.apiPrefix()+"DIRECT.GET."+r.stream, a.reply(0), body) != nil {
		return
	}
	for {
		_, msg := a.next(ctx)
		if msg == nil || msg.Header.Get("Status") != "" {
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
func (r *Rows) loadEach(ctx context.Context, a *answers, names []string, rows []kms.Row, have []bool) {
	prefix := r.apiPrefix()
	asked := 0
	for i, name := range names {
		if checkRowName(name) != nil {
			continue
		}
		ask := []byte(`{"last_by_subj":"` + r.prefix + name + `"}`)
		if err := a.conn.PublishRequest(prefix+"STREAM.MSG.GET."+r.stream, a.reply(i), ask); err != nil {
			return
		}
		asked++
	}
	for range asked {
		i, msg := a.next(ctx)
		if msg == nil {
			return
		}
		var answer storedMessage
		if json.Unmarshal(msg.Data, &answer) != nil || answer.Message.Sequence == 0 || bytes.Contains(answer.Message.Headers, []byte(kvOperation)) {
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
	g := &rowsGroup{
		Rows: r, updates: updates, messages: make([]*nats.Msg, len(updates)),
		stored: make([]bool, len(updates)), errs: make([]error, len(updates)),
	}
	err := g.update(ctx)
	for i, u := range updates {
		if g.errs[i] == nil && !g.stored[i] {
			g.errs[i] = err
		}
		if g.errs[i] != nil {
			g.errs[i] = fmt.Errorf("update row %s: %w", u.Name, g.errs[i])
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.soon == nil {
		r.soon = time.AfterFunc(sweepAfter, r.unfinished)
	} else {
		r.soon.Reset(sweepAfter)
	}
	return g.errs
}

// rowsGroup is a group of updates on their way.
type rowsGroup struct {
	*Rows

	updates  []kms.RowUpdate
	messages []*nats.Msg // those that were sent
	stored   []bool      // durable, and read again
	errs     []error
}

// update returns the error of what is neither stored nor has an error of its own.
//
// Only the last message of some asks for an answer: what the server stored is
// read again anyway, and tells what an answer would. What it does not have is
// looked after one by one.
func (g *rowsGroup) update(ctx context.Context) error {
	type part struct {
		from, to int
		last     uint64
	}
	var parts []part
	for from := 0; from < len(g.updates); from += groupAtOnce {
		to := min(from+groupAtOnce, len(g.updates))
		parts = append(parts, part{from, to, g.send(ctx, from, to)})
	}
	if err := g.durable(); err != nil {
		return err
	}
	for _, p := range parts {
		if p.last != 0 {
			g.readAgain(ctx, p.from, p.to, p.last)
		}
	}
	g.readByName(ctx)
	return g.oneByOne(ctx)
}

func (r *Rows) durable() error {
	if r.sync == nil {
		return nil
	}
	if err := r.sync.Sync(r.stream); err != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return nil
}

// send sends some rows, and returns the sequence of the last one once the server
// has stored it, and so has gone through those before; 0 when it tells none.
func (g *rowsGroup) send(ctx context.Context, from, to int) uint64 {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	var last *nats.Msg
	g.mu.Lock()
	for i := from; i < to; i++ {
		u := g.updates[i]
		if g.errs[i] = checkRowName(u.Name); g.errs[i] == nil && u.Revision == 0 {
			g.errs[i] = kms.ErrRowConflict
		}
		if g.errs[i] != nil || g.deferred[u.Name] >= maxDeferred {
			continue
		}
		g.deferred[u.Name]++
		last = g.message(u.Name, u.Value, "")
		last.Header.Set(expectedSubjectSequence, strconv.FormatUint(u.Revision, 10))
		g.messages[i] = last
	}
	g.mu.Unlock()
	if last == nil {
		return 0
	}
	a, err := g.expect(1)
	if err != nil {
		return 0
	}
	defer a.close()
	for _, msg := range g.messages[from:to] {
		if msg == nil {
			continue
		}
		if msg == last {
			msg.Reply = a.reply(0)
		}
		err := a.conn.PublishMsg(msg)
		msg.Reply = ""
		if err != nil {
			return 0
		}
	}
	_, msg := a.next(ctx)
	var ack struct {
		Sequence uint64 `json:"seq"`
	}
	if msg == nil || json.Unmarshal(msg.Data, &ack) != nil {
		return 0
	}
	return ack.Sequence // 0 in a refusal
}

// readAgain compares what the server stored up to a sequence with what was sent.
// It does not find a row that was refused, and those that others' messages in
// between have pushed out of the range.
func (g *rowsGroup) readAgain(ctx context.Context, from, to int, last uint64) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	stream, err := g.handle(ctx)
	if err != nil || !stream.CachedInfo().Config.AllowDirect {
		return // only the leader may answer, and does so by name
	}
	n := uint64(0)
	for _, msg := range g.messages[from:to] {
		if msg != nil {
			n++
		}
	}
	a, err := g.expect(int(n) + 1) //nolint:gosec // at most groupAtOnce
	if err != nil {
		return
	}
	defer a.close()
	ask := fmt.Appendf(nil, `{"seq":%d,"batch":%d,"no_hdr":true}`, last-min(n, last)+1, n)
	if a.conn.PublishRequest(g.apiPrefix()+"DIRECT.GET."+g.stream, a.reply(0), ask) != nil {
		return
	}
	for i := from; ; {
		_, msg := a.next(ctx)
		if msg == nil || msg.Header.Get("Status") != "" {
			return
		}
		// They come in the order in which they were sent.
		for j := i; j < to; j++ {
			if g.messages[j] != nil && bytes.Equal(msg.Data, g.updates[j].Value) {
				g.stored[j], i = true, j+1
				break
			}
		}
	}
}

// readByName compares the rows that readAgain did not find.
func (g *rowsGroup) readByName(ctx context.Context) {
	var names []string
	var places []int
	for i, u := range g.updates {
		if g.messages[i] != nil && !g.stored[i] {
			names, places = append(names, u.Name), append(places, i)
		}
	}
	rows, errs := g.LoadGroup(ctx, names)
	for n, i := range places {
		u := g.updates[i]
		g.stored[i] = errs[n] == nil && rows[n].Revision > u.Revision && bytes.Equal(rows[n].Value, u.Value)
	}
}

// oneByOne writes the rows that are not stored, which finds out what became of
// them, and reads them again.
func (g *rowsGroup) oneByOne(ctx context.Context) error {
	var places []int
	for i := range g.updates {
		if !g.stored[i] && g.errs[i] == nil {
			places = append(places, i)
		}
	}
	if len(places) == 0 {
		return nil
	}
	inParallel(len(places), func(n int) {
		i := places[n]
		u := g.updates[i]
		if g.messages[i] == nil { // too many revisions are left: this erases them
			g.messages[i] = g.message(u.Name, u.Value, "")
			_, g.errs[i] = g.Update(ctx, u.Name, u.Value, u.Revision)
		} else {
			_, g.errs[i] = g.publish(ctx, g.messages[i], u.Revision)
		}
	})
	if err := g.durable(); err != nil {
		return err
	}
	g.readByName(ctx)
	return fmt.Errorf("read back: %w", kms.ErrRowConflict) // another has replaced it, of what is left
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
