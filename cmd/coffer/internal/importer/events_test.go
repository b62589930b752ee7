package importer

import (
	"errors"
	"testing"
	"time"

	"github.com/cofferdb/coffer/journal"
)

const exported = `{"specversion":"1.0","id":"n1","source":"/apps/03000000000000000000000000000001","type":"message.sent","time":"2026-01-02T03:04:05.678Z","conversation":"ann,ben","conversationtype":"direct","sender":"ann","recipient":"ben","datacontenttype":"application/json","data":{"bodies":[{"type":"txt","msg":"hi"}]},"position":"7"}`

// others are lines that are no such event, and why.
var others = map[string]error{ //nolint:gochecknoglobals // of tests
	`{"end":{"count":1}}`: ErrNoEvent,
	`{"specversion":"1.0","id":"x","source":"/apps/03000000000000000000000000000001","type":"user.erased","time":"2026-01-02T03:04:05.678Z","recipient":"ben","position":"8"}`: ErrServer,
	`{"specversion":"1.0","id":"x"}`: journal.ErrInvalid,
	`{"msg_id":"1"}`:                 journal.ErrInvalid,
	`[`:                              journal.ErrInvalid,
}

func TestParseEvent(t *testing.T) {
	e, err := ParseEvent([]byte(exported))
	if err != nil || e.ID != "n1" || e.Sender != "ann" || e.Time.UnixMilli()%1000 != 678 {
		t.Errorf("%+v, %v", e, err)
	}
	for line, want := range others {
		if _, err := ParseEvent([]byte(line)); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", line, err, want)
		}
	}
}

// FuzzParseEvent: an event that is accepted and can be appended is the same event
// when it is exported and parsed again.
func FuzzParseEvent(f *testing.F) {
	f.Add([]byte(exported))
	for line := range others {
		f.Add([]byte(line))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		e, err := ParseEvent(line)
		if err != nil {
			return
		}
		if e.Type.Reserved() {
			t.Fatalf("an event that only a server writes: %s", line)
		}
		if e.Normalize(e.Time.Add(time.Second), journal.Limits{}) != nil {
			return
		}
		app, _ := journal.ParseAppID("03000000000000000000000000000001")
		canonical := e.AppendJSON(nil, app)
		again, err := ParseEvent(journal.SplicePosition(nil, canonical, 1))
		if err != nil {
			t.Fatalf("refused when it comes back: %v: %s", err, canonical)
		}
		if got := again.AppendJSON(nil, app); string(got) != string(canonical) {
			t.Fatalf("came back as %s, was %s", got, canonical)
		}
	})
}
