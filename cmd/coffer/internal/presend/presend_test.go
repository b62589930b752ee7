package presend

import (
	"errors"
	"fmt"
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
	m := memory{decided: make(map[decisionKey]*decision)}
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
		m.decide(decisionKey{app, fmt.Sprint(i), "m"}, func() (jsontext.Value, error) { return nil, nil }) //nolint:nilnil // nothing is replaced
	}
	if len(m.decided) > mostKept {
		t.Errorf("%d answers are kept", len(m.decided))
	}
}

// TestUnansweredIsAskedAgain remembers answers, and not that there was none.
func TestUnansweredIsAskedAgain(t *testing.T) {
	m := memory{decided: make(map[decisionKey]*decision)}
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
