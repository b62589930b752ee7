package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/projections/history"
)

const (
	pageSize = 50

	// places is at how many places of a conversation pages are read. It is the
	// same for both, so that caches hold as much of the one as of the other.
	places = 20

	historyCompared = "ours: a page of 50 messages, each opened, from one of %d places all over a conversation of %d messages in the history view. " +
		"raw: the same from a conversation of %d messages: a ratio of 1 means that length costs nothing. " +
		"Records of %d bytes, the messages of both conversations mixed among each other, %d pages a round. " +
		"Anywhere: from any place of the long conversation, whose records may not fit into the view's cache. " +
		"Postgres: the same records and places, by primary key (app, conversation, position), with a column for the newest edit and a row more than the page to tell whether there are older ones, opened."
)

// talk is a conversation to page through.
type talk struct {
	tag       kms.Tag
	positions []journal.Position
}

// History measures pages of conversations.
func History(ctx context.Context, o Options) (rep Report, err error) {
	o = o.withDefaults()
	if o.Short < 2*pageSize || o.Long < o.Short {
		return rep, fmt.Errorf("measure history: the short conversation needs %d messages, and the long one no fewer than it", 2*pageSize)
	}
	dir, remove, err := tempDir(o)
	if err != nil {
		return rep, err
	}
	defer remove()
	c, err := historyCase(ctx, o, dir)
	if err != nil {
		return rep, fmt.Errorf("measure history: %w", err)
	}
	compared := fmt.Sprintf(historyCompared, places, o.Long, o.Short, o.Size, o.Pages)
	return report("history", "pages/s", compared, o.Rounds, []Case{c}), nil
}

func historyCase(ctx context.Context, o Options, dir string) (c Case, err error) {
	base, err := template(o.Size)
	if err != nil {
		return c, err
	}
	const long, short = "group-long", "group-brief"
	r, err := openRig(ctx, filepath.Join(dir, "ours"), true, o.Log)
	if err != nil {
		return c, err
	}
	defer func() { err = joinClose(err, r.close) }()
	// Every so many messages one goes to the short conversation.
	every := (o.Long + o.Short) / o.Short
	if err := r.fill(ctx, base, o.Short*every, func(i int) string {
		if i%every == 0 {
			return short
		}
		return long
	}); err != nil {
		return c, err
	}
	longTalk, err := r.talk(ctx, long)
	if err != nil {
		return c, err
	}
	shortTalk, err := r.talk(ctx, short)
	if err != nil {
		return c, err
	}

	pagesOf := func(t talk, from []journal.Position) func(context.Context) (sample, error) {
		return func(ctx context.Context) (sample, error) { return r.pages(ctx, o.Pages, t, from) }
	}
	ours := &side{name: "ours", round: pagesOf(longTalk, longTalk.places())}
	raw := &side{name: "raw", round: pagesOf(shortTalk, shortTalk.places())}
	anywhere := &side{name: "ours, anywhere in the long conversation", round: pagesOf(longTalk, longTalk.positions[pageSize:])}
	sides := []*side{ours, raw, anywhere}
	var fromLong, fromShort *side
	pg, skipped, err := startPostgres(ctx, o)
	if err != nil {
		return c, err
	}
	if pg != nil {
		defer func() { err = joinClose(err, pg.close) }()
		if err := r.copyTo(ctx, pg, "messages", "app bytea, conversation bytea, position bigint", history.Query{}); err != nil {
			return c, err
		}
		conn, err := pg.connect(ctx)
		if err != nil {
			return c, err
		}
		defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
		queriesOf := func(t talk) func(context.Context) (sample, error) {
			return func(ctx context.Context) (sample, error) { return r.queries(ctx, conn, o.Pages, t) }
		}
		fromLong = &side{name: fmt.Sprintf("%s, %d messages", pg.version, len(longTalk.positions)), round: queriesOf(longTalk)}
		fromShort = &side{name: fmt.Sprintf("%s, %d messages", pg.version, len(shortTalk.positions)), round: queriesOf(shortTalk)}
		sides = append(sides, fromLong, fromShort)
	}
	if err := warmUp(ctx, o, sides...); err != nil {
		return c, err
	}
	if err := alternate(ctx, o, 1, sides...); err != nil {
		return c, err
	}
	name := fmt.Sprintf("page of %d, %d messages beside %d", pageSize, len(longTalk.positions), len(shortTalk.positions))
	c = compare(name, "pages/s", ours, raw, anywhere, fromLong, fromShort)
	if skipped != "" {
		c.Beside = append(c.Beside, Beside{Name: "Postgres", Skipped: skipped})
	}
	return c, nil
}

// talk reads where a conversation's messages are.
func (r *rig) talk(ctx context.Context, id string) (talk, error) {
	tag, err := r.conversationTag(ctx, id)
	if err != nil {
		return talk{}, err
	}
	t := talk{tag: tag}
	_, err = r.view.Replay(ctx, r.app.ID, history.Query{Conversation: &tag}, func(item history.Item) error {
		t.positions = append(t.positions, item.Position)
		return nil
	})
	return t, err
}

// places are spread evenly, each with a whole page before it.
func (t talk) places() []journal.Position {
	out := make([]journal.Position, places)
	for i := range out {
		out[i] = t.positions[pageSize+i*(len(t.positions)-pageSize-1)/(places-1)]
	}
	return out
}

var errPage = errors.New("a page is not full")

// newRandom is the same in every round and on every side, so that all read the
// same places.
func newRandom() *rand.Rand { return rand.New(rand.NewPCG(1, 2)) } //nolint:gosec // places to read, not secrets

func (r *rig) pages(ctx context.Context, n int, t talk, from []journal.Position) (sample, error) {
	random := newRandom()
	out := sample{count: n, latencies: make([]time.Duration, 0, n)}
	plain, buffer := make([]byte, 0, 8<<10), make([]byte, pageSize*1280)
	begin := time.Now()
	for range n {
		start := time.Now()
		page, err := r.view.Messages(ctx, r.app.ID, t.tag, history.PageQuery{Before: from[random.IntN(len(from))], Limit: pageSize, Buffer: buffer})
		if err != nil {
			return out, err
		}
		if len(page.Messages) != pageSize {
			return out, fmt.Errorf("%w: %d messages", errPage, len(page.Messages))
		}
		for _, m := range page.Messages {
			if plain, err = r.journal.OpenRecord(ctx, plain[:0], r.app.ID, m.Record); err != nil {
				return out, err
			}
		}
		out.latencies = append(out.latencies, time.Since(start))
	}
	out.elapsed = time.Since(begin)
	return out, nil
}

func (r *rig) queries(ctx context.Context, conn *pgx.Conn, n int, t talk) (sample, error) {
	random, from := newRandom(), t.places()
	out := sample{count: n, latencies: make([]time.Duration, 0, n)}
	// One more tells whether there are older ones, as the view's page does.
	const query = "SELECT record, edit FROM messages WHERE app = $1 AND conversation = $2 AND position < $3 ORDER BY position DESC LIMIT 51"
	begin := time.Now()
	for range n {
		start := time.Now()
		count, err := r.openRows(ctx, conn, pageSize, query, r.app.ID[:], t.tag[:], int64(from[random.IntN(len(from))]))
		if err != nil {
			return out, err
		}
		if count < pageSize {
			return out, fmt.Errorf("%w: %d rows", errPage, count)
		}
		out.latencies = append(out.latencies, time.Since(start))
	}
	out.elapsed = time.Since(begin)
	return out, nil
}
