package agora

import (
	"errors"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// ErrVerdict means that what a receiver has answered to a pre-send callback cannot
// be understood. The vendor treats it as no answer.
var ErrVerdict = errors.New("the answer does not say in valid whether the message may be sent")

// A Verdict is the answer to a pre-send callback.
type Verdict struct {
	Valid bool
	// Code is what the sender of a message that is not valid is told.
	Code string
	// Bodies and Ext are what the message is to have instead; nil where it stays
	// as it is.
	Bodies, Ext jsontext.Value
}

// ParseVerdict reads an answer. Members that it does not know, such as the level of
// a chat room's message, are left aside.
func ParseVerdict(body []byte) (Verdict, error) {
	var v struct {
		Valid   *bool  `json:"valid"`
		Code    string `json:"code"`
		Payload *struct {
			Bodies jsontext.Value `json:"bodies"`
			Ext    jsontext.Value `json:"ext"`
		} `json:"payload"`
	}
	if json.Unmarshal(body, &v) != nil || v.Valid == nil {
		return Verdict{}, ErrVerdict
	}
	out := Verdict{Valid: *v.Valid, Code: v.Code}
	if v.Payload != nil {
		out.Bodies, out.Ext = v.Payload.Bodies, v.Payload.Ext
	}
	return out, nil
}
