package cli

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/client"
)

type auditCmd struct {
	From   uint64 `placeholder:"N" help:"Begin with this record."`
	Verify bool   `help:"Only verify, and print what was found."`
	Head   bool   `help:"Print the witness: keep it elsewhere to hold the log against it."`
	JSON   bool   `name:"json" help:"Print the records as they are stored, a line each."`
	operatorServer
}

func (*auditCmd) Help() string {
	return `Prints who did what to accounts, apps and keys, from the region's audit log. The chain of hashes is verified here,
not by the server, and held against the region's witness. A log that does not verify ends the command with exit code
1, after the records that do.

    coffer audit --from 100
    coffer audit --verify
    coffer audit --head >witness-$(date +%F)`
}

func (c *auditCmd) Run(r *runner) error {
	cl, err := c.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	// Before the log: what is written meanwhile is behind it.
	head, err := cl.AuditHead(r.interrupt)
	if err != nil {
		return err
	}
	if c.Head {
		return printJSON(r, head)
	}
	chain := journal.NewAuditChain(head)
	if c.From > head.N {
		chain = &journal.AuditChain{}
	}
	count := 0
	err = c.read(r, cl, chain, &count)
	if err == nil {
		err = chain.Close()
	}
	if err != nil {
		return fmt.Errorf("%w (%d records were verified before; keep the server's files as they are)", err, count)
	}
	if !c.Verify {
		return nil
	}
	if c.JSON {
		return printJSON(r, struct {
			Verified bool              `json:"verified"`
			Records  int               `json:"records"`
			First    uint64            `json:"first"`
			Head     journal.AuditHead `json:"head"`
			Witness  journal.AuditHead `json:"witness"`
		}{true, count, chain.First(), chain.Head(), head})
	}
	_, err = fmt.Fprintf(r.Stdout, "%d records verified, %d to %d; the witness is record %d\n", count, chain.First(), chain.Head().N, head.N)
	return err
}

func (c *auditCmd) read(r *runner, cl *client.Client, chain *journal.AuditChain, count *int) error {
	return cl.AuditLog(r.interrupt, c.From, func(payload []byte) error {
		record, err := chain.Add(payload)
		if err != nil {
			return err
		}
		*count++
		switch {
		case c.Verify:
			return nil
		case c.JSON:
			_, err = r.Stdout.Write(append(slices.Clip(payload), '\n'))
			return err
		}
		var detail strings.Builder
		for _, name := range slices.Sorted(maps.Keys(record.Detail)) {
			detail.WriteString(" " + name + "=" + printable(record.Detail[name], 0))
		}
		if record.RequestID != "" {
			detail.WriteString(" request_id=" + printable(record.RequestID, 0))
		}
		_, err = fmt.Fprintf(r.Stdout, "%d  %s  %s  %s  %s  %s%s\n", record.N, record.Time.Format(time.RFC3339), printable(record.Actor, 0),
			record.Action, printable(record.Target, 0), record.Outcome, detail.String())
		return err
	})
}
