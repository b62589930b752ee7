package presend

import (
	"bytes"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/cmd/coffer/internal/agora"
	"github.com/cofferdb/coffer/cmd/coffer/internal/deliver"
	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/journal"
)

// answer is what an endpoint says.
type answer struct {
	Decision string `json:"decision"`
	Text     string `json:"text"`
	Reason   string `json:"reason"`

	ext jsontext.Value // replaces the message's, unless it is nil
}

// judge reads what an endpoint has answered about an event, in the form of its
// mode.
func judge(mode endpoints.Mode, e *journal.Event, got deliver.Answer, err error) (Outcome, answer) {
	var said answer
	switch {
	case err == nil && got.Cause == journal.CauseTimeout:
		return Late, said
	case err != nil, !got.Delivered():
		return Failed, said
	case mode == endpoints.Agora:
		return verdict(e, got.Body)
	case json.Unmarshal(got.Body, &said) != nil:
		return Unclear, said
	}
	switch said.Decision {
	case "allow":
		return Allowed, said
	case "deny":
		return Denied, said
	case "rewrite":
		return Rewritten, said
	}
	return Unclear, said
}

// verdict reads an answer in the form of Agora Chat. A payload that is the
// message's own changes nothing; another one is that of a message of text.
func verdict(e *journal.Event, body []byte) (Outcome, answer) {
	v, err := agora.ParseVerdict(body)
	switch {
	case err != nil:
		return Unclear, answer{}
	case !v.Valid:
		return Denied, answer{Reason: v.Code}
	}
	var own struct {
		Bodies jsontext.Value `json:"bodies"`
		Ext    jsontext.Value `json:"ext"`
	}
	if len(e.Data) > 0 && json.Unmarshal(e.Data, &own) != nil {
		return Unclear, answer{}
	}
	if alike(v.Bodies, own.Bodies) && alike(v.Ext, own.Ext) {
		return Allowed, answer{}
	}
	if v.Bodies == nil {
		v.Bodies = own.Bodies
	}
	text, ok := textOf(v.Bodies)
	if !ok {
		return Unclear, answer{}
	}
	return Rewritten, answer{Text: text, ext: v.Ext}
}

// alike reports whether a part of a payload is what the message has, or is not
// there.
func alike(given, own jsontext.Value) bool {
	if given == nil {
		return true
	}
	if own == nil {
		own = jsontext.Value("{}")
	}
	a, b := given.Clone(), own.Clone()
	return a.Canonicalize() == nil && b.Canonicalize() == nil && bytes.Equal(a, b)
}
