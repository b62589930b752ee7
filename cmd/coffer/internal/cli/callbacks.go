package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/cofferdb/coffer/journal/client"
)

type callbacksCmds struct {
	Endpoints  endpointsCmds `cmd:"" help:"Make, list, enable, disable and delete webhook endpoints."`
	Deliveries deliveriesCmd `cmd:"" help:"Show what became of deliveries, the newest first."`
	Replay     callReplayCmd `cmd:"" help:"Send events to an endpoint again."`
	Tail       callTailCmd   `cmd:"" help:"Show deliveries as they are made."`
}

type endpointsCmds struct {
	List    endpointsListCmd    `cmd:"" default:"withargs" help:"List the app's endpoints, and how far each has come."`
	Create  endpointsCreateCmd  `cmd:"" help:"Make an endpoint; its secret is printed, this once."`
	Enable  endpointsEnableCmd  `cmd:"" help:"Enable an endpoint; it is asked for a challenge first, if it has not given one back."`
	Disable endpointsDisableCmd `cmd:"" help:"Disable an endpoint; what it does not get waits, as long as callbacks are kept."`
	Delete  endpointsDeleteCmd  `cmd:"" help:"Delete an endpoint."`
}

type endpointsListCmd struct {
	JSON bool `name:"json" help:"Print each endpoint as a line of JSON."`
	appServer
}

func (c *endpointsListCmd) Run(r *runner) error {
	cl, err := c.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	list, err := cl.Endpoints(r.interrupt)
	if err != nil {
		return err
	}
	if c.JSON {
		for _, e := range list {
			if err := printJSON(r, e); err != nil {
				return err
			}
		}
		return nil
	}
	w := tabwriter.NewWriter(r.Stdout, 0, 8, 2, ' ', 0)
	unknown := false
	_, _ = fmt.Fprintln(w, "ID\tSTATE\tDELIVERED\tWAITING\tPARKED\tURL")
	for _, e := range list {
		state := e.State
		if e.Reason != "" {
			state += " (" + e.Reason + ")"
		}
		delivered, waiting, parked := "-", "-", "-"
		if p := e.Progress; p != nil {
			delivered, waiting, parked = strconv.FormatUint(p.Delivered, 10), strconv.FormatUint(p.Waiting+p.Held, 10), strconv.FormatUint(p.Parked, 10)
			if p.Paused != "" {
				state += ", paused: " + p.Paused
			}
		} else {
			unknown = true
		}
		_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", e.ID, state, delivered, waiting, parked, e.URL)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if unknown {
		r.say("-: not known: the callback view has stopped at a record that it cannot apply; see docs/operations/callbacks.md")
	}
	return nil
}

type endpointsCreateCmd struct {
	URL          string   `arg:"" help:"https://HOST[:PORT]/PATH."`
	Mode         string   `default:"thin" enum:"thin,full,sealed,agora" help:"thin: ids and positions; full: the event; sealed: the event encrypted to --encryption-file; agora: the event as Agora Chat's callbacks have it."`
	Type         []string `placeholder:"TYPE" help:"Only events of these types."`
	Conversation []string `placeholder:"ID" help:"Only events of these conversations."`
	User         []string `placeholder:"ID" help:"Only events of or to these users."`
	Ordered      bool     `help:"In order within a conversation."`
	Rate         int      `placeholder:"N" help:"Events a second, at most."`
	Signature    string   `default:"hmac" enum:"hmac,ed25519" help:"How requests are signed: ${enum}."`

	EncryptionFile string `placeholder:"FILE" help:"With --mode sealed: file with the public key, a JWK."`
	appServer
}

func (c *endpointsCreateCmd) Run(r *runner) error {
	if (c.Mode == "sealed") != (c.EncryptionFile != "") {
		return &failure{ExitUsage, errors.New("--mode sealed and --encryption-file go together")}
	}
	spec := client.EndpointSpec{
		URL: c.URL, Mode: c.Mode, Types: c.Type, Conversations: c.Conversation, Users: c.User, Ordered: c.Ordered, Rate: c.Rate, Signature: c.Signature,
	}
	if c.EncryptionFile != "" {
		key, err := os.ReadFile(c.EncryptionFile)
		if err != nil {
			return fmt.Errorf("--encryption-file: %w", err)
		}
		spec.Encryption = string(key)
	}
	cl, err := c.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	e, err := cl.CreateEndpoint(r.interrupt, spec)
	if err != nil {
		return err
	}
	if e.State != "enabled" {
		r.say("%s, so it gets nothing yet; when it does: coffer callbacks endpoints enable %s", unverified(&e), e.ID)
	}
	return printJSON(r, e)
}

// unverified says why an endpoint could not be verified.
func unverified(e *client.Endpoint) string {
	why := ""
	if a := e.Verification; a != nil {
		switch {
		case a.Error != "":
			why = " (" + a.Error + ")"
		case a.Status != 0:
			why = fmt.Sprintf(" (it answered %d)", a.Status)
		}
	}
	return "the endpoint did not give the challenge back" + why
}

type endpointsEnableCmd struct {
	Endpoint string `arg:"" help:"The endpoint's id."`
	appServer
}

func (c *endpointsEnableCmd) Run(r *runner) error {
	cl, err := c.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	e, err := cl.SetEndpointState(r.interrupt, c.Endpoint, "enabled")
	if err != nil {
		return err
	}
	if e.State != "enabled" {
		return errors.New(unverified(&e))
	}
	return nil
}

type endpointsDisableCmd struct {
	Endpoint string `arg:"" help:"The endpoint's id."`
	appServer
}

func (c *endpointsDisableCmd) Run(r *runner) error {
	cl, err := c.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	_, err = cl.SetEndpointState(r.interrupt, c.Endpoint, "disabled")
	return err
}

type endpointsDeleteCmd struct {
	Endpoint string `arg:"" help:"The endpoint's id."`
	appServer
}

func (c *endpointsDeleteCmd) Run(r *runner) error {
	cl, err := c.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	return cl.DeleteEndpoint(r.interrupt, c.Endpoint)
}

type deliveriesCmd struct {
	Endpoint string `arg:"" help:"The endpoint's id."`
	Status   string `enum:",delivered,waiting,held,parked" default:"" help:"Only those: delivered, waiting, held or parked."`
	Limit    int    `default:"50" help:"How many."`
	JSON     bool   `name:"json" help:"Print each as a line of JSON."`
	appServer
}

func (c *deliveriesCmd) Run(r *runner) error {
	cl, err := c.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	list, err := cl.Deliveries(r.interrupt, c.Endpoint, client.DeliveryQuery{Status: c.Status, Limit: c.Limit})
	if err != nil {
		return err
	}
	t := newDeliveryTable(r, c.JSON)
	for _, d := range list {
		if err := t.row(d); err != nil {
			return err
		}
	}
	return t.flush()
}

// deliveryTable prints deliveries.
type deliveryTable struct {
	r     *runner
	json  bool
	w     *tabwriter.Writer
	begun bool
}

func newDeliveryTable(r *runner, asJSON bool) *deliveryTable {
	return &deliveryTable{r: r, json: asJSON, w: tabwriter.NewWriter(r.Stdout, 0, 8, 2, ' ', 0)}
}

func (t *deliveryTable) row(d client.Delivery) error {
	if t.json {
		return printJSON(t.r, d)
	}
	if !t.begun {
		t.begun = true
		_, _ = fmt.Fprintln(t.w, "NUMBER\tPOSITION\tSTATUS\tATTEMPTS\tHTTP\tLAST\tNEXT\tWHY")
	}
	next := "-"
	if !d.Due.IsZero() {
		next = d.Due.Format(time.RFC3339)
	}
	why := d.Cause
	if d.Error != "" {
		why += ": " + d.Error
	}
	_, err := fmt.Fprintf(t.w, "%d\t%s\t%s\t%d\t%d\t%s\t%s\t%s\n", d.Number, d.Position, d.Status, d.Attempts, d.HTTP, d.Recorded.Format(time.RFC3339), next, why)
	return err
}

func (t *deliveryTable) flush() error { return t.w.Flush() }

type callReplayCmd struct {
	Endpoint string    `arg:"" help:"The endpoint's id."`
	Parked   bool      `help:"The parked deliveries instead of a range; --from: of events that have arrived since."`
	From     time.Time `placeholder:"TIME" help:"Events of this time (RFC 3339) and later."`
	Until    time.Time `placeholder:"TIME" help:"Events before this time."`
	Rate     int       `placeholder:"N" help:"Events a second (100)."`
	NoWait   bool      `help:"Do not wait for the end."`
	appServer
}

func (*callReplayCmd) Help() string {
	return `Each event has the webhook-id that it had the first time. An interrupt cancels the replay. Examples:

    coffer callbacks replay ID --from 2026-01-01T00:00:00Z
    coffer callbacks replay ID --parked`
}

func (c *callReplayCmd) Run(r *runner) error {
	if !c.Parked && c.From.IsZero() && c.Until.IsZero() {
		return &failure{ExitUsage, errors.New("say what to send again: --from, --until or --parked")}
	}
	cl, err := c.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	spec := client.CallbackReplaySpec{From: c.From, Until: c.Until, Rate: c.Rate}
	if c.Parked {
		spec.Status = "parked"
	}
	replay, err := cl.StartCallbackReplay(r.interrupt, c.Endpoint, spec)
	if err != nil {
		return err
	}
	if c.Parked {
		r.say("%d deliveries are sent again", replay.Requeued)
		return nil
	}
	id := replay.ID
	for replay.State == "running" && !c.NoWait {
		select {
		case <-r.interrupt.Done():
			return c.cancel(r, cl, id)
		case <-time.After(500 * time.Millisecond):
		}
		if replay, err = cl.CallbackReplay(r.interrupt, id); err != nil {
			if r.interrupt.Err() != nil {
				return c.cancel(r, cl, id)
			}
			return err
		}
	}
	return printJSON(r, replay)
}

// cancel ends a replay after an interrupt.
func (c *callReplayCmd) cancel(r *runner, cl *client.Client, id string) error {
	ctx, stop := context.WithTimeout(context.WithoutCancel(r.interrupt), 10*time.Second)
	defer stop()
	replay, err := cl.CancelCallbackReplay(ctx, id)
	if err != nil {
		return fmt.Errorf("the replay %s goes on: %w", id, err)
	}
	r.say("cancelled after %d events", replay.Sent)
	return r.interrupt.Err()
}

type callTailCmd struct {
	Endpoint string `arg:"" help:"The endpoint's id."`
	JSON     bool   `name:"json" help:"Print each as a line of JSON."`
	appServer
}

func (*callTailCmd) Help() string {
	return `Every delivery is printed when it is first seen, and again when its attempts or status have changed.`
}

// tailPage is how many deliveries are looked at.
const tailPage = 200

func (c *callTailCmd) Run(r *runner) error {
	cl, err := c.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	t := newDeliveryTable(r, c.JSON)
	type seen struct {
		status   string
		attempts int
	}
	known := make(map[uint64]seen)
	for first := true; ; first = false {
		list, err := cl.Deliveries(r.interrupt, c.Endpoint, client.DeliveryQuery{Limit: tailPage})
		if err != nil {
			return err
		}
		now := make(map[uint64]seen, len(list))
		for _, d := range slices.Backward(list) {
			now[d.Number] = seen{d.Status, d.Attempts}
			if first || known[d.Number] == now[d.Number] {
				continue
			}
			if err := t.row(d); err != nil {
				return err
			}
		}
		if err := t.flush(); err != nil {
			return err
		}
		known = now
		select {
		case <-r.interrupt.Done():
			return r.interrupt.Err()
		case <-time.After(time.Second):
		}
	}
}
