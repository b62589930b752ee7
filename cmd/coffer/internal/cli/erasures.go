package cli

import (
	"bufio"
	"fmt"
	"os"

	"github.com/go-json-experiment/json"
)

type erasuresCmds struct {
	Request  erasuresRequestCmd  `cmd:"" help:"Erase a user: destroy its keys, for ever."`
	Show     erasuresShowCmd     `cmd:"" help:"Show an erasure, with its receipt once it is done."`
	Register erasuresRegisterCmd `cmd:"" help:"Register an erased user again, under a new key."`
	Receipts erasuresReceiptsCmd `cmd:"" help:"Print the receipts of the region's erasures (as an operator)."`
	Apply    erasuresApplyCmd    `cmd:"" help:"Do the erasures of receipts again, after a restore (as an operator)."`
}

type erasuresRequestCmd struct {
	User string `arg:"" help:"The user's id."`
	appServer
}

func (*erasuresRequestCmd) Help() string {
	return `Everything that was sealed under the user's key is unreadable afterwards: events, attachments, profile, in every
copy and backup. Nothing brings it back. The answer has a receipt, a JWS signed by the region: keep it apart from
backups. Example:

    coffer erasures request ann`
}

func (c *erasuresRequestCmd) Run(r *runner) error {
	cl, err := c.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	e, err := cl.EraseUser(r.interrupt, c.User)
	if err != nil {
		return err
	}
	return printJSON(r, e)
}

type erasuresShowCmd struct {
	ID string `arg:"" help:"The erasure's id."`
	appServer
}

func (c *erasuresShowCmd) Run(r *runner) error {
	cl, err := c.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	e, err := cl.Erasure(r.interrupt, c.ID)
	if err != nil {
		return err
	}
	return printJSON(r, e)
}

type erasuresRegisterCmd struct {
	User string `arg:"" help:"The user's id."`
	appServer
}

func (c *erasuresRegisterCmd) Run(r *runner) error {
	cl, err := c.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	registered, err := cl.RegisterUser(r.interrupt, c.User)
	if err != nil {
		return err
	}
	if !registered {
		r.say("The user has not been erased; it needs no registration.")
		return nil
	}
	r.say("The user has a new key. What was erased stays erased.")
	return nil
}

type erasuresReceiptsCmd struct{ operatorServer }

func (*erasuresReceiptsCmd) Help() string {
	return `A receipt on each line, as JSON. Keep them apart from the backups: after a restore from one that was made before an
erasure, they are what erases again. Example:

    coffer erasures receipts > receipts.ndjson`
}

func (c *erasuresReceiptsCmd) Run(r *runner) error {
	cl, err := c.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	return cl.Receipts(r.interrupt, func(line []byte) error {
		_, err := fmt.Fprintf(r.Stdout, "%s\n", line)
		return err
	})
}

type erasuresApplyCmd struct {
	File string `arg:"" help:"What coffer erasures receipts has written." type:"existingfile"`
	operatorServer
}

func (*erasuresApplyCmd) Help() string {
	return `To erase before anything is served, start the server with the setting erasures instead.`
}

// receiptsAtOnce is how many receipts go into a request.
const receiptsAtOnce = 500

func (c *erasuresApplyCmd) Run(r *runner) error {
	file, err := os.Open(c.File)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	cl, err := c.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	var receipts []string
	applied := 0
	send := func() error {
		if len(receipts) == 0 {
			return nil
		}
		n, err := cl.ApplyReceipts(r.interrupt, receipts)
		applied += n
		receipts = receipts[:0]
		return err
	}
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 1<<20)
	for n := 1; lines.Scan(); n++ {
		var line struct {
			Receipt string `json:"receipt"`
		}
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil || line.Receipt == "" {
			return fmt.Errorf("%s, line %d is not a receipt", c.File, n)
		}
		receipts = append(receipts, line.Receipt)
		if len(receipts) == receiptsAtOnce {
			if err := send(); err != nil {
				return err
			}
		}
	}
	if err := lines.Err(); err != nil {
		return err
	}
	if err := send(); err != nil {
		return err
	}
	r.say("%d receipts applied", applied)
	return nil
}
