package cli

import (
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/go-json-experiment/json"
	"golang.org/x/term"

	"github.com/cofferdb/coffer/journal/client"
)

type historyCmd struct {
	Conversation string `arg:"" optional:"" help:"The conversation's id; of two users: their ids, the smaller first, joined by a comma. Without it, a user's conversations."`
	User         string `placeholder:"USER" help:"Whose conversations, with the app's token."`
	Limit        int    `default:"50" help:"Messages on a page."`
	Before       string `placeholder:"CURSOR" help:"The page of older messages: the next of a page, or a position."`
	After        string `placeholder:"CURSOR" help:"The page of newer messages: the previous of a page, or a position."`
	All          bool   `help:"Go on to the oldest message."`
	JSON         bool   `name:"json" help:"Print each message as a line of JSON, with its edits and recall."`
	appServer
}

func (*historyCmd) Help() string {
	return `Edits and recalls are folded into their messages. Without a conversation, the conversations of a user are
listed, newest first, with what is unread. Examples:

    coffer history --user alice

    coffer history harbour --limit 10
    coffer history alice,bob --all --json | wc -l`
}

func (c *historyCmd) Run(r *runner) error {
	if c.Before != "" && c.After != "" {
		return &failure{ExitUsage, fmt.Errorf("--before and --after exclude each other")}
	}
	if c.Limit < 1 || c.Limit > 1000 {
		return &failure{ExitUsage, fmt.Errorf("--limit must be 1 to 1000")}
	}
	if c.User != "" && c.Conversation != "" {
		return &failure{ExitUsage, fmt.Errorf("--user lists conversations; it goes with none")}
	}
	cl, err := c.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	if c.Conversation == "" {
		return c.conversations(r, cl)
	}
	q := client.PageQuery{Before: c.Before, After: c.After, Limit: c.Limit}
	table := newTable(r.Stdout)
	for {
		page, err := cl.Messages(r.interrupt, c.Conversation, q)
		if err != nil {
			return err
		}
		for _, m := range page.Messages {
			if c.JSON {
				err = printJSON(r, m)
			} else {
				err = table.row(m)
			}
			if err != nil {
				return err
			}
		}
		if err := table.flush(); err != nil {
			return err
		}
		if page.Next == "" {
			return nil
		}
		if !c.All {
			r.say("older messages: coffer history %s --limit %d --before %s", quoteArg(c.Conversation), c.Limit, page.Next)
			return nil
		}
		q.Before, q.After = page.Next, ""
	}
}

// table prints messages for people.
type table struct {
	w     *tabwriter.Writer
	width int // of the text; 0 is no limit
	begun bool
}

func newTable(out io.Writer) *table {
	t := &table{w: tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)}
	if f, ok := out.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		if columns, _, err := term.GetSize(int(f.Fd())); err == nil {
			t.width = max(20, columns-50)
		}
	}
	return t
}

func (t *table) flush() error { return t.w.Flush() }

func (t *table) row(m client.Message) error {
	if !t.begun {
		t.begun = true
		if _, err := fmt.Fprintln(t.w, "POSITION\tTIME\tSENDER\tMESSAGE"); err != nil {
			return err
		}
	}
	if m.State == "recalled" {
		who, when := "", time.Time{}
		if m.Recall != nil {
			who, when = m.Recall.Sender, m.Recall.Time
		}
		_, err := fmt.Fprintf(t.w, "%s\t%s\t%s\t%s\n", m.Position, clock(when), printable(who, 0), "(recalled)")
		return err
	}
	e, err := m.Event()
	if err != nil {
		return fmt.Errorf("the message at position %s: %w", m.Position, err)
	}
	text := summary(e.Data)
	if m.State == "edited" {
		text += " (edited)"
	}
	_, err = fmt.Fprintf(t.w, "%s\t%s\t%s\t%s\n", m.Position, clock(e.Time), printable(e.Sender, 0), printable(text, t.width))
	return err
}

func clock(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.Local().Format(time.DateTime)
}

// summary is a message in a few words.
func summary(data []byte) string {
	var d struct {
		Bodies []struct {
			Type, Msg, Filename, Addr, Action, Title string
			CustomEvent                              string `json:"customEvent"`
		} `json:"bodies"`
	}
	if err := json.Unmarshal(data, &d, json.MatchCaseInsensitiveNames(true)); err != nil {
		return "(a message of a form this version does not know)"
	}
	parts := make([]string, 0, len(d.Bodies))
	for _, b := range d.Bodies {
		detail := b.Filename + b.Addr + b.Action + b.CustomEvent + b.Title
		switch {
		case b.Type == "txt":
			parts = append(parts, b.Msg)
		case detail == "":
			parts = append(parts, "["+b.Type+"]")
		default:
			parts = append(parts, "["+b.Type+" "+detail+"]")
		}
	}
	return strings.Join(parts, " ")
}

// printable keeps what users wrote from acting on the terminal: control
// characters, and those that change the direction of text, become a dot. Beyond
// width characters it is cut.
func printable(s string, width int) string {
	var b strings.Builder
	n := 0
	for _, c := range s {
		if n++; width > 0 && n > width {
			b.WriteRune('…')
			break
		}
		if c == ' ' || unicode.IsPrint(c) {
			b.WriteRune(c)
		} else {
			b.WriteRune('·')
		}
	}
	return b.String()
}
