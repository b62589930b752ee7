package presend

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/journal"
)

const (
	maxReason = 200 // bytes of an endpoint's reason that are passed on
	mark      = "presend"
	maxAtOnce = 16 // questions of one request
)

// Stored returns the data of the event that is stored under an id, if there is
// one; none when its content is gone.
type Stored func(ctx context.Context, id string) (data jsontext.Value, found bool, err error)

// Ask asks about events. It returns them with the data that answers have given
// them, and what is to become of each: nil, or the error that it is refused with.
// Of an app that does not ask it returns nothing.
func (a *Asker) Ask(ctx context.Context, app journal.AppID, events []journal.Event, stored Stored) ([]journal.Event, []error, error) {
	s, err := a.of(ctx, app)
	if err != nil || s == nil {
		return nil, nil, err
	}
	asked, out := slices.Clone(events), make([]error, len(events))
	turns := make(chan struct{}, maxAtOnce)
	var work sync.WaitGroup
	for i := range events {
		if !s.setting.asks(events[i].Type) {
			continue
		}
		turns <- struct{}{}
		work.Go(func() {
			defer func() { <-turns }()
			out[i] = a.one(ctx, s, app, &asked[i], stored)
		})
	}
	work.Wait()
	return asked, out, ctx.Err()
}

// Again makes an event that the journal has refused, because another content has
// its id, what is stored when that is of the same event: another process may have
// asked about it at the same time, and stored another answer. It reports whether
// the event may be appended again.
func (a *Asker) Again(ctx context.Context, app journal.AppID, e *journal.Event, stored Stored) (bool, error) {
	normal := *e
	if normal.Normalize(time.Now(), journal.Limits{}) != nil {
		return false, nil //nolint:nilerr // the journal has said what is wrong with it
	}
	mac, err := a.mac(ctx, app, &normal)
	if err != nil {
		return false, err
	}
	data, found, err := stored(ctx, e.ID)
	if err != nil || !found {
		return false, err
	}
	if marked(data) == mac {
		e.Data = data
	}
	return true, nil
}

// one asks about one event, unless it is known what was answered.
func (a *Asker) one(ctx context.Context, s *asked, app journal.AppID, e *journal.Event, stored Stored) error {
	normal := *e
	if normal.Normalize(time.Now(), journal.Limits{}) != nil {
		return nil //nolint:nilerr // the journal says what is wrong with it
	}
	if e.ID == "" {
		normal.ID = "" // the one that was made is not the one that is stored
		data, err := a.put(ctx, s, app, &normal, "")
		if data != nil {
			e.Data = data
		}
		return err
	}
	mac, err := a.mac(ctx, app, &normal)
	if err != nil {
		return err
	}
	if data, found, err := stored(ctx, e.ID); err != nil || found {
		if err == nil && marked(data) == mac {
			e.Data = data
		}
		return err
	}
	d := a.memory.decide(decisionKey{app, e.ID, mac}, func() (jsontext.Value, error) {
		// Whoever waits for the same answer must not lose it with this caller.
		return a.put(context.WithoutCancel(ctx), s, app, &normal, mac)
	})
	if d.data != nil {
		e.Data = d.data
	}
	return d.err
}

// mac identifies what a caller sent, its time apart.
func (a *Asker) mac(ctx context.Context, app journal.AppID, e *journal.Event) (string, error) {
	text := fmt.Appendf(nil, "%s\n%s\n%s\n%s\n%s\n%s\n%s\n%s", e.ID, e.Type, e.Conversation, e.ConversationType, e.Sender, e.Recipient, e.Target, e.Data)
	sum, err := a.Journal.MAC(ctx, app, mark, text)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%x", sum[:16]), nil
}

// put asks and counts.
func (a *Asker) put(ctx context.Context, s *asked, app journal.AppID, e *journal.Event, mac string) (jsontext.Value, error) {
	outcome, said := a.question(ctx, s, app, e)
	var data jsontext.Value
	if outcome == Rewritten {
		var ok bool
		if data, ok = rewrite(e.Data, said.Text, said.ext, mac); !ok || !s.setting.Rewrite {
			outcome, data = Unclear, nil
		}
	}
	s.counts.add(outcome)
	if a.Count != nil {
		a.Count(string(outcome))
	}
	switch outcome {
	case Allowed, Rewritten:
		return data, nil
	case Denied:
		return nil, &Refusal{Reason: clean(said.Reason)}
	default:
		if s.setting.Fallback == Deny {
			return nil, fmt.Errorf("%w: %s", ErrUnanswered, outcome)
		}
		return nil, nil //nolint:nilnil // nothing is replaced
	}
}

// question puts one question to the endpoint.
func (a *Asker) question(ctx context.Context, s *asked, app journal.AppID, e *journal.Event) (Outcome, answer) {
	ctx, cancel := context.WithTimeout(ctx, s.setting.Timeout)
	defer cancel()
	ep := s.current(ctx, a.Endpoints, app)
	if ep == nil {
		return Absent, answer{}
	}
	if !s.breaker.enter(time.Now()) {
		return Skipped, answer{}
	}
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-ctx.Done():
		s.breaker.giveUp() // that says nothing about the endpoint
		return Busy, answer{}
	}
	got, err := a.Post(ctx, ep, e)
	outcome, said := judge(ep.Mode, e, got, err)
	if s.breaker.leave(time.Now(), outcome != Late && outcome != Failed) && a.Failing != nil {
		a.Failing(app, ep)
	}
	return outcome, said
}

// clean keeps an endpoint's reason from acting on whoever reads it.
func clean(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < 0x20 || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, ""))
	if len(s) > maxReason {
		s = strings.ToValidUTF8(s[:maxReason], "")
	}
	return s
}
