package bench

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections/history"
)

const replayCompared = "opened: %d events of one app (records of %d bytes, %d senders) read from the history view in the app's order, each opened to its plaintext, on all cores; " +
	"raw: the same messages read from the same stream by an ordered consumer with pulls of %d, in the process, opened by nobody; " +
	"Postgres: the same records in the order of their primary key, each opened, the server being a process of its own. " +
	"over HTTP: the same events as lines of JSON from the TLS listener, the reader being in the same process; raw: the replay opened in the process. " +
	"1 %%: replays of the events of one conversation, and of one user, which are a hundredth of all; raw: replays of all of them, of which the reader would drop the rest."

// pull is how many messages the ordered consumer asks for at once. More was not
// faster.
const pull = 10_000

// Replay measures reading an app's past.
func Replay(ctx context.Context, o Options) (rep Report, err error) {
	o = o.withDefaults()
	dir, remove, err := tempDir(o)
	if err != nil {
		return rep, err
	}
	defer remove()
	base, err := template(o.Size)
	if err != nil {
		return rep, err
	}
	r, err := filledServed(ctx, o, dir, base)
	if err != nil {
		return rep, err
	}
	cases, err := replayCases(ctx, o, r)
	if err = joinClose(err, r.close); err != nil {
		return rep, fmt.Errorf("measure replaying: %w", err)
	}
	compared := fmt.Sprintf(replayCompared, o.Events, o.Size, senders, pull)
	rep = report("replay", "events/s", compared, o.Rounds, cases)
	if len(o.Memory) > 0 {
		if rep.Memory, err = replayMemory(ctx, o, base); err != nil {
			return rep, fmt.Errorf("measure the memory of replaying: %w", err)
		}
	}
	return rep, nil
}

// filledRig makes a region with n events, and opens it anew, so that what
// writing them has left in memory is gone.
func filledRig(ctx context.Context, o Options, dir string, base journal.Event, n int) (*rig, error) {
	r, err := openRig(ctx, dir, true, o.Log)
	if err != nil {
		return nil, err
	}
	o.Log.InfoContext(ctx, "appending what is read afterwards", "events", n)
	if err := joinClose(r.fill(ctx, base, n, r.groups.at), r.close); err != nil {
		return nil, err
	}
	if r, err = openRig(ctx, dir, true, o.Log); err != nil {
		return nil, err
	}
	if err := r.caughtUp(ctx); err != nil {
		return nil, errors.Join(err, r.close())
	}
	return r, nil
}

// rare is every which event belongs to the conversation, and to the user, whose
// events are replayed alone.
const (
	rare             = 100
	rareConversation = "group-rare"
	rareUser         = "user-rare"
)

// filledServed is filledRig with a listener. One event in a hundred is of a
// conversation of its own, and one of a user of its own.
func filledServed(ctx context.Context, o Options, dir string, base journal.Event) (*served, error) {
	s, err := serve(ctx, dir)
	if err != nil {
		return nil, err
	}
	o.Log.InfoContext(ctx, "appending what is read afterwards", "events", o.Events)
	place := func(i int) (user, conversation string) {
		user, conversation = s.users.at(i), s.groups.at(i)
		switch i % rare {
		case 0:
			conversation = rareConversation
		case rare / 2:
			user = rareUser
		}
		return user, conversation
	}
	if err := joinClose(s.fillPlaces(ctx, base, o.Events, place), s.close); err != nil {
		return nil, err
	}
	if s, err = serve(ctx, dir); err != nil {
		return nil, err
	}
	if err := s.caughtUp(ctx); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func replayCases(ctx context.Context, o Options, r *served) (cases []Case, err error) {
	ours := &side{name: "ours", round: func(ctx context.Context) (sample, error) { return r.replay(ctx, o.Events) }}
	raw := &side{name: "raw", round: func(ctx context.Context) (sample, error) { return r.consume(ctx, o.Events) }}
	allocations := math.Inf(1) // the fewest: the process does other things too
	lines := &side{name: "ours, over HTTP", round: func(ctx context.Context) (sample, error) {
		before := mallocs()
		one, err := r.replayLines(ctx, o.Events)
		allocations = min(allocations, float64(mallocs()-before)/float64(o.Events))
		return one, err
	}}
	sides := []*side{ours, raw, lines}
	var selected *side
	pg, skipped, err := startPostgres(ctx, o)
	if err != nil {
		return nil, err
	}
	if pg != nil {
		defer func() { err = joinClose(err, pg.close) }()
		if err := r.copyTo(ctx, pg, "events", "app bytea, position bigint", history.Query{}); err != nil {
			return nil, err
		}
		selected = &side{name: pg.version + ", SELECT in index order, opened", round: func(ctx context.Context) (sample, error) {
			return r.selectAll(ctx, pg, o.Events)
		}}
		sides = append(sides, selected)
	}
	if err := warmUp(ctx, o, sides...); err != nil {
		return nil, err
	}
	if err := alternate(ctx, o, 1, sides...); err != nil {
		return nil, err
	}
	c := compare(fmt.Sprintf("%d events, opened", o.Events), "events/s", ours, raw, selected)
	if skipped != "" {
		c.Beside = append(c.Beside, Beside{Name: "Postgres", Skipped: skipped})
	}
	overHTTP := compare(fmt.Sprintf("%d events over HTTP, beside the library", o.Events), "events/s", lines, ours)
	overHTTP.Allocations = rounded(allocations)
	overHTTP.Paired, overHTTP.CPU, overHTTP.RawCPU = paired(lines, ours), rounded(median(lines.cpus)), rounded(median(ours.cpus))
	c.CPU = overHTTP.RawCPU
	cases = append(cases, c, overHTTP)
	some, err := r.filtered(ctx, o)
	return append(cases, some...), err
}

// filtered measures replays of one event in a hundred.
func (s *served) filtered(ctx context.Context, o Options) ([]Case, error) {
	group, err := s.conversationTag(ctx, rareConversation)
	if err != nil {
		return nil, err
	}
	user, err := s.journal.Tag(ctx, s.app.ID, kms.KindSubject, rareUser)
	if err != nil {
		return nil, err
	}
	few := (o.Events + rare - 1) / rare
	const repeats = 20
	some := func(q history.Query, want int) func(context.Context) (sample, error) {
		return func(ctx context.Context) (sample, error) {
			sum := sample{count: repeats}
			for range repeats {
				one, err := s.replayOpened(ctx, q, want)
				if err != nil {
					return sum, err
				}
				sum.elapsed += one.elapsed
			}
			return sum, nil
		}
	}
	all := &side{name: "raw", round: func(ctx context.Context) (sample, error) {
		one, err := s.replay(ctx, o.Events)
		one.count = 1
		return one, err
	}}
	byGroup := &side{name: "by conversation", round: some(history.Query{Conversation: &group}, few)}
	byUser := &side{name: "by user", round: some(history.Query{User: &user}, (o.Events+rare/2-1)/rare)}
	sides := []*side{all, byGroup, byUser}
	if err := warmUp(ctx, o, sides...); err != nil {
		return nil, err
	}
	if err := alternate(ctx, o, 1, sides...); err != nil {
		return nil, err
	}
	return []Case{
		compare("1 % by conversation, beside all", "replays/s", byGroup, all),
		compare("1 % by user, beside all", "replays/s", byUser, all),
	}, nil
}

var errShort = errors.New("fewer events than were appended")

// replay reads events from the view and opens them.
func (r *rig) replay(ctx context.Context, events int) (sample, error) {
	return r.replayOpened(ctx, history.Query{Limit: events}, events)
}

func (r *rig) replayOpened(ctx context.Context, q history.Query, want int) (sample, error) {
	begin := time.Now()
	count := 0
	_, err := r.view.ReplayOpened(ctx, r.app.ID, q, func(dst []byte, item history.Item) ([]byte, error) {
		return r.journal.OpenRecord(ctx, dst, r.app.ID, item.Record)
	}, func(history.Item, []byte) error {
		count++
		return nil
	})
	if err != nil {
		return sample{}, err
	}
	if count != want {
		return sample{}, fmt.Errorf("%w: %d, not %d", errShort, count, want)
	}
	return sample{count: count, elapsed: time.Since(begin)}, nil
}

// replayLines reads them over HTTP.
func (s *served) replayLines(ctx context.Context, events int) (sample, error) {
	begin := time.Now()
	count, err := s.lines(ctx, "")
	if err == nil && count != events {
		err = fmt.Errorf("%w: %d, not %d", errShort, count, events)
	}
	return sample{count: count, elapsed: time.Since(begin)}, err
}

// consume reads the stream as a client of NATS would.
func (r *rig) consume(ctx context.Context, events int) (sample, error) {
	js, err := jetstream.New(r.conn)
	if err != nil {
		return sample{}, err
	}
	begin := time.Now()
	consumer, err := js.OrderedConsumer(ctx, r.stream(), jetstream.OrderedConsumerConfig{})
	if err != nil {
		return sample{}, err
	}
	done := make(chan struct{})
	count := 0
	running, err := consumer.Consume(func(m jetstream.Msg) {
		if len(m.Data()) == 0 {
			return
		}
		if count++; count == events {
			close(done)
		}
	}, jetstream.PullMaxMessages(pull))
	if err != nil {
		return sample{}, err
	}
	defer running.Stop()
	select {
	case <-done:
		return sample{count: events, elapsed: time.Since(begin)}, nil
	case <-ctx.Done():
		return sample{}, ctx.Err()
	}
}

// copyTo makes a table of the app's records. columns are those of its primary
// key.
func (r *rig) copyTo(ctx context.Context, pg *postgres, table, columns string, q history.Query) error {
	conn, err := pg.connect(ctx)
	if err != nil {
		return fmt.Errorf("connect to Postgres: %w", err)
	}
	defer func() { _ = conn.Close(ctx) }()
	key := "app, position"
	withConversation := table == "messages"
	if withConversation {
		key = "app, conversation, position"
	}
	if _, err := conn.Exec(ctx, "CREATE TABLE "+table+" ("+columns+", record bytea NOT NULL, edit bytea, PRIMARY KEY ("+key+"))"); err != nil {
		return fmt.Errorf("make the table: %w", err)
	}
	names := []string{"app", "position", "record"}
	if withConversation {
		names = append(names, "conversation")
	}
	rows := make([][]any, 0, 1000)
	flush := func() error {
		_, err := conn.CopyFrom(ctx, pgx.Identifier{table}, names, pgx.CopyFromRows(rows))
		rows = rows[:0]
		return err
	}
	_, err = r.view.Replay(ctx, r.app.ID, q, func(item history.Item) error {
		row := []any{r.app.ID[:], int64(item.Position), append([]byte(nil), item.Record...)}
		if withConversation {
			h, err := journal.ParseHeader(item.Record)
			if err != nil {
				return err
			}
			row = append(row, h.Conversation[:])
		}
		if rows = append(rows, row); len(rows) == cap(rows) {
			return flush()
		}
		return nil
	})
	if err == nil {
		err = flush()
	}
	if err == nil {
		_, err = conn.Exec(ctx, "VACUUM (ANALYZE, FREEZE) "+table)
	}
	if err == nil {
		_, err = conn.Exec(ctx, "CHECKPOINT")
	}
	if err != nil {
		return fmt.Errorf("copy the records into Postgres: %w", err)
	}
	return nil
}

// selectAll reads the records from Postgres and opens them.
func (r *rig) selectAll(ctx context.Context, pg *postgres, events int) (sample, error) {
	conn, err := pg.connect(ctx)
	if err != nil {
		return sample{}, err
	}
	defer func() { _ = conn.Close(ctx) }()
	begin := time.Now()
	// The index, as somebody would who asks for an app's events among others'.
	if _, err := conn.Exec(ctx, "SET enable_sort = off; SET enable_seqscan = off; SET enable_bitmapscan = off"); err != nil {
		return sample{}, err
	}
	count, err := r.openRows(ctx, conn, events, "SELECT record FROM events WHERE app = $1 ORDER BY position LIMIT $2", r.app.ID[:], int64(events))
	if err != nil {
		return sample{}, err
	}
	if count != events {
		return sample{}, fmt.Errorf("%w: %d", errShort, count)
	}
	return sample{count: count, elapsed: time.Since(begin)}, nil
}

// openRows opens the records that a query returns, the first so many. They are read as they come
// over the wire, in binary and without a copy.
func (r *rig) openRows(ctx context.Context, conn *pgx.Conn, most int, query string, args ...any) (int, error) {
	rows, err := conn.Query(ctx, query, append([]any{pgx.QueryResultFormats{pgx.BinaryFormatCode}}, args...)...)
	if err != nil {
		return 0, err
	}
	defer rows.Close()
	count := 0
	plain := make([]byte, 0, 8<<10)
	for rows.Next() {
		if count++; count > most {
			continue // it is only told that there is more
		}
		if plain, err = r.journal.OpenRecord(ctx, plain[:0], r.app.ID, rows.RawValues()[0]); err != nil {
			return 0, err
		}
	}
	return count, rows.Err()
}

// conversationTag returns the tag that the view knows a conversation by.
func (r *rig) conversationTag(ctx context.Context, id string) (kms.Tag, error) {
	return r.journal.Tag(ctx, r.app.ID, kms.KindConversation, id)
}
