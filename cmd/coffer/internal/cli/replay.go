package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/client"
)

type replayCmd struct {
	From         string   `placeholder:"TIME" help:"Only events of this time or later: RFC 3339, a date, or an age such as 36h or 7d."`
	Until        string   `placeholder:"TIME" help:"Only events before this time."`
	After        string   `placeholder:"CURSOR" help:"Go on after this: the position of an event, or the next of a trailer."`
	Conversation string   `placeholder:"ID" help:"Only events of this conversation."`
	User         string   `placeholder:"ID" help:"Only events that this user sent, or was sent directly."`
	Type         []string `placeholder:"TYPE" help:"Only events of these types: message.sent, receipt.read, …"`
	Order        string   `enum:"asc,desc" default:"asc" help:"asc is oldest first, desc newest first."`
	Limit        int      `help:"End after so many events."`
	Follow       bool     `short:"f" help:"Wait for what comes next, until interrupted."`
	appServer
}

func (*replayCmd) Help() string {
	return `Writes one event a line (CloudEvents JSON with its position) and, at the end, a trailer
{"end":{"count":…,"next":…}}: without it the output is not whole. A connection that is cut is taken up again
without a gap; when that fails, standard error says how to go on.

    coffer replay --from 24h --type message.sent >today.ndjson
    coffer replay --conversation harbour --order desc --limit 10
    coffer replay --follow --after 4711`
}

func (c *replayCmd) Run(r *runner) error {
	q, err := c.query(time.Now())
	if err != nil {
		return &failure{ExitUsage, err}
	}
	cl, err := c.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	replay := cl.Replay(r.interrupt, q)
	out := bufio.NewWriterSize(r.Stdout, 128<<10)
	err = c.copy(replay, out)
	if flushErr := out.Flush(); err == nil {
		err = flushErr
	}
	cut := (*client.CutError)(nil)
	if !errors.As(err, &cut) {
		return err
	}
	r.say("%d events written; to go on: coffer replay %s", replay.Count(), c.resume(replay))
	if errors.Is(err, context.Canceled) {
		return &failure{code: ExitInterrupted}
	}
	return err
}

func (c *replayCmd) copy(replay *client.Replay, out *bufio.Writer) error {
	for e, err := range replay.Events() {
		if err != nil {
			return err
		}
		if _, err := out.Write(e.JSON); err != nil {
			return err
		}
		if err := out.WriteByte('\n'); err != nil {
			return err
		}
		if c.Follow {
			if err := out.Flush(); err != nil {
				return err
			}
		}
	}
	if _, err := out.Write(replay.End()); err != nil {
		return err
	}
	return out.WriteByte('\n')
}

// resume is the command line that goes on where the replay was cut.
func (c *replayCmd) resume(replay *client.Replay) string {
	var args []string
	add := func(flag, value string) {
		if value != "" {
			args = append(args, flag, quoteArg(value))
		}
	}
	add("--from", c.From)
	add("--until", c.Until)
	add("--conversation", c.Conversation)
	add("--user", c.User)
	for _, t := range c.Type {
		add("--type", t)
	}
	if c.Order != "asc" {
		add("--order", c.Order)
	}
	if c.Limit > 0 {
		add("--limit", fmt.Sprint(max(1, c.Limit-replay.Count())))
	}
	if c.Follow {
		args = append(args, "--follow")
	}
	add("--after", replay.Next())
	return strings.Join(args, " ")
}

// quoteArg makes a value one word for a shell. A user's or conversation's id
// needs nothing; anything else is put between quotes.
func quoteArg(s string) string {
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && !strings.ContainsRune("_@:+=,./-", rune(c)) {
			return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
		}
	}
	return s
}

func (c *replayCmd) query(now time.Time) (client.Query, error) {
	q := client.Query{
		After: c.After, Conversation: c.Conversation, User: c.User,
		Descending: c.Order == "desc", Limit: c.Limit, Follow: c.Follow,
	}
	if c.Limit < 0 {
		return q, errors.New("--limit must not be negative")
	}
	if c.Follow && (q.Descending || c.Limit > 0) {
		return q, errors.New("--follow goes with --order asc and without --limit")
	}
	var err error
	if q.From, err = moment(c.From, now); err != nil {
		return q, fmt.Errorf("--from: %w", err)
	}
	if q.Until, err = moment(c.Until, now); err != nil {
		return q, fmt.Errorf("--until: %w", err)
	}
	if !q.From.IsZero() && !q.Until.IsZero() && !q.From.Before(q.Until) {
		return q, errors.New("--from must lie before --until")
	}
	for _, list := range c.Type {
		for name := range strings.SplitSeq(list, ",") {
			t, err := journal.ParseType(name)
			if err != nil {
				return q, fmt.Errorf("--type: %q is not a type of event; there are message.sent, message.edited, message.recalled, receipt.delivered, receipt.read, …", name)
			}
			q.Types = append(q.Types, t)
		}
	}
	return q, nil
}

// moment parses a time, a date in UTC, or an age.
func moment(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	for _, layout := range []string{time.RFC3339Nano, time.DateOnly} {
		if t, err := time.Parse(layout, s); err == nil {
			return t, nil
		}
	}
	if days, ok := strings.CutSuffix(s, "d"); ok {
		if n, err := strconv.ParseUint(days, 10, 16); err == nil {
			return now.Add(-time.Duration(n) * 24 * time.Hour), nil
		}
	}
	if age, err := time.ParseDuration(s); err == nil && age >= 0 {
		return now.Add(-age), nil
	}
	return time.Time{}, fmt.Errorf("%q is no time: write 2026-01-02T15:04:05Z, 2026-01-02, or an age such as 36h or 7d", s)
}
