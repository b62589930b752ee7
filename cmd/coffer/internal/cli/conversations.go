package cli

import (
	"fmt"
	"text/tabwriter"

	"github.com/cofferdb/coffer/journal/client"
)

// conversations lists those of a user.
func (c *historyCmd) conversations(r *runner, cl *client.Client) error {
	if c.After != "" {
		return &failure{ExitUsage, fmt.Errorf("--after is for the messages of a conversation")}
	}
	q := client.ConversationQuery{User: c.User, Before: c.Before, Limit: min(c.Limit, 200)}
	w := tabwriter.NewWriter(r.Stdout, 0, 8, 2, ' ', 0)
	for first := true; ; first = false {
		page, err := cl.Conversations(r.interrupt, q)
		if err != nil {
			return err
		}
		if first && !c.JSON {
			fmt.Fprintln(w, "CONVERSATION\tUNREAD\tLAST") //nolint:errcheck // Flush says it
		}
		for _, v := range page.Conversations {
			if c.JSON {
				err = printJSON(r, v)
			} else {
				_, err = fmt.Fprintf(w, "%s\t%d\t%s\n", printable(v.ID, 0), v.Unread, lastLine(v.Last))
			}
			if err != nil {
				return err
			}
		}
		if err := w.Flush(); err != nil {
			return err
		}
		if page.Next == "" {
			return nil
		}
		if !c.All {
			r.say("older conversations: --before %s", page.Next)
			return nil
		}
		q.Before = page.Next
	}
}

// lastLine is the newest message of a conversation in a few words.
func lastLine(m *client.Message) string {
	switch {
	case m == nil:
		return ""
	case m.JSON == nil:
		return "(recalled)"
	}
	e, err := m.Event()
	if err != nil {
		return "(a message of a form this version does not know)"
	}
	return printable(e.Sender+": "+summary(e.Data), 60)
}
