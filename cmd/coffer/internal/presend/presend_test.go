package presend

import (
	"errors"
	"fmt"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/journal"
)

// TestBreaker leaves an endpoint alone after five failures, lets one question try
// it, and closes with an answer.
func TestBreaker(t *testing.T) {
	var b breaker
	now := time.Unix(1_700_000_000, 0)
	for i := range breakAfter {
		if !b.enter(now) {
			t.Fatalf("closed to question %d", i)
		}
		if opened := b.leave(now, false); opened != (i == breakAfter-1) {
			t.Errorf("failure %d: opened %v", i, opened)
		}
	}
	for _, pause := range []time.Duration{time.Second, 2 * time.Second, 4 * time.Second} {
		if b.enter(now.Add(pause - 1)) {
			t.Errorf("asked before %s", pause)
		}
		now = now.Add(pause)
		if !b.enter(now) || b.enter(now) {
			t.Errorf("not one question after %s", pause)
		}
		b.giveUp()
		if !b.enter(now) || b.leave(now, false) {
			t.Errorf("after %s", pause)
		}
	}
	now = now.Add(time.Hour)
	if !b.enter(now) || b.leave(now, true) || !b.enter(now) || !b.enter(now) {
		t.Error("it stays open after an answer")
	}
}

func TestRewrite(t *testing.T) {
	for in, want := range map[string]string{
		`{"bodies":[{"type":"txt","msg":"a","x":1}],"ext":{"k":[1,2.50]}}`: `{"bodies":[{"type":"txt","msg":"b\"","x":1}],"ext":{"k":[1,2.50]},"presend":{"mac":"m"}}`,
		`{"presend":{"mac":"forged"},"bodies":[{"type":"txt","msg":"a"}]}`: `{"bodies":[{"type":"txt","msg":"b\""}],"presend":{"mac":"m"}}`,
		`{"bodies":[{"type":"txt","msg":"a"},{"type":"txt","msg":"c"}]}`:   "",
		`{"bodies":[{"type":"img","url":"u"}]}`:                            "",
		`{"bodies":[]}`:                                                    "", `{}`: "", `[]`: "", ``: "",
	} {
		got, ok := rewrite(jsontext.Value(in), `b"`, nil, "m")
		if string(got) != want || ok != (want != "") {
			t.Errorf("%s: %s, %v", in, got, ok)
		}
		if ok && marked(got) != "m" {
			t.Errorf("the mark of %s: %s", got, marked(got))
		}
	}
	if _, ok := rewrite(jsontext.Value(`{"bodies":[{"type":"txt","msg":"a"}]}`), "", nil, "m"); ok {
		t.Error("an empty text")
	}
}

// TestMemory: one question for what is sent at the same time, and a bound.
func TestMemory(t *testing.T) {
	var m memory
	var app journal.AppID
	var puts int
	var work sync.WaitGroup
	for range 16 {
		work.Go(func() {
			d := m.decide(decisionKey{app, "a", "m"}, func() (jsontext.Value, error) { puts++; return jsontext.Value("1"), nil })
			if string(d.data) != "1" {
				t.Error(d.data)
			}
		})
	}
	work.Wait()
	if puts != 1 {
		t.Errorf("%d questions", puts)
	}
	for i := range 2*mostKept + 10 {
		m.decide(decisionKey{app, strconv.Itoa(i), "m"}, allowed)
	}
	if m.kept > mostKept || m.kept < mostKept/4 {
		t.Errorf("%d answers are kept", m.kept)
	}
	check(t, &m)
}

func allowed() (jsontext.Value, error) { return nil, nil } //nolint:nilnil // nothing is replaced

// check compares what a memory has with what it counts.
func check(t *testing.T, m *memory) {
	t.Helper()
	total := 0
	for app, of := range m.apps {
		weight := 0
		for _, d := range of.order {
			weight += d.weight
		}
		if weight != of.weight || len(of.byKey) > len(of.order) {
			t.Errorf("app %s: counted %d of %d, %d keys of %d", app, of.weight, weight, len(of.byKey), len(of.order))
		}
		total += weight
	}
	if total != m.kept {
		t.Errorf("counted %d of %d", m.kept, total)
	}
}

// TestMemoryIsShared: an app that asks about very much forgets its own answers and
// not those of an app that asks about little, nor what is under way.
func TestMemoryIsShared(t *testing.T) {
	var m memory
	small, busy := journal.AppID{15: 1}, journal.AppID{15: 2}
	asked := 0
	ask := func() (jsontext.Value, error) { asked++; return nil, nil } //nolint:nilnil // nothing is replaced
	const few = 1000
	for i := range few {
		m.decide(decisionKey{small, strconv.Itoa(i), ""}, ask)
	}
	slow, _ := m.find(decisionKey{busy, "slow", ""}, time.Now())
	for i := range 3 * mostKept {
		m.decide(decisionKey{busy, strconv.Itoa(i), ""}, allowed)
	}
	// Long texts count for more, whoever has them.
	for i := range 100 {
		m.decide(decisionKey{busy, "long" + strconv.Itoa(i), ""}, func() (jsontext.Value, error) { return make(jsontext.Value, 1<<20), nil })
	}
	for i := range few {
		m.decide(decisionKey{small, strconv.Itoa(i), ""}, ask)
	}
	if asked != few {
		t.Errorf("asked %d times about %d events", asked, few)
	}
	if d, found := m.find(decisionKey{busy, "slow", ""}, time.Now()); !found || d != slow {
		t.Error("what was under way is asked about again")
	}
	close(slow.done)
	m.settle(slow)
	if m.kept > mostKept {
		t.Errorf("%d is kept", m.kept)
	}
	check(t, &m)
	// After five minutes nothing of it is left.
	if _, found := m.find(decisionKey{small, "0", ""}, time.Now().Add(remembered)); found {
		t.Error("an answer is remembered too long")
	}
	check(t, &m)
}

// TestUnansweredIsAskedAgain remembers answers, and not that there was none.
func TestUnansweredIsAskedAgain(t *testing.T) {
	var m memory
	key := decisionKey{id: "a"}
	asked := 0
	put := func() (jsontext.Value, error) {
		if asked++; asked == 1 {
			return nil, fmt.Errorf("%w: %s", ErrUnanswered, Late)
		}
		return nil, &Refusal{}
	}
	for i, want := range []error{ErrUnanswered, ErrRefused, ErrRefused} {
		if d := m.decide(key, put); !errors.Is(d.err, want) {
			t.Errorf("try %d: %v", i, d.err)
		}
	}
	if asked != 2 {
		t.Errorf("asked %d times, wanted 2", asked)
	}
	check(t, &m)
}

func TestClean(t *testing.T) {
	for in, want := range map[string]string{"a\nb\x1b": "a b ", "x\xff": "x"} {
		if got := clean(in); got != want {
			t.Errorf("%q: %q", in, got)
		}
	}
	if got := clean(string(make([]byte, 1000))); len(got) != maxReason {
		t.Errorf("%d bytes", len(got))
	}
}
