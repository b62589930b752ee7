package presend

import (
	"bytes"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// marked returns what the data of a rewritten event says of the original; "" when
// it was not rewritten.
func marked(data jsontext.Value) string {
	var v struct {
		Mark struct {
			MAC string `json:"mac"`
		} `json:"presend"`
	}
	if len(data) == 0 || json.Unmarshal(data, &v) != nil {
		return ""
	}
	return v.Mark.MAC
}

// textOf returns the text of bodies that are one, of text.
func textOf(bodies jsontext.Value) (string, bool) {
	var list []struct {
		Type string `json:"type"`
		Msg  string `json:"msg"`
	}
	if json.Unmarshal(bodies, &list) != nil || len(list) != 1 || list[0].Type != "txt" {
		return "", false
	}
	return list[0].Msg, true
}

// rewrite replaces the text of a message that has one body, of text, and its ext
// unless that is nil, and marks it with what identifies the original. Everything
// else stays as it is.
func rewrite(data jsontext.Value, text string, ext jsontext.Value, mac string) (jsontext.Value, bool) {
	quoted, err := jsontext.AppendQuote(nil, text)
	if err != nil || text == "" || ext != nil && ext.Kind() != '{' {
		return nil, false
	}
	replaced := false
	rest := ext // what has not found its place
	out, ok := each(data, func(name string, v jsontext.Value) (jsontext.Value, bool) {
		if name == mark {
			return nil, true // of a caller that knows the name
		}
		if name == "ext" && rest != nil {
			v, rest = rest, nil
			return v, true
		}
		if name != "bodies" || v.Kind() != '[' {
			return v, true
		}
		if _, ok := textOf(v); !ok {
			return nil, false
		}
		var bodies []jsontext.Value
		if json.Unmarshal(v, &bodies) != nil {
			return nil, false
		}
		body, ok := each(bodies[0], func(name string, v jsontext.Value) (jsontext.Value, bool) {
			if name == "msg" {
				replaced = true
				return quoted, true
			}
			return v, true
		})
		return jsontext.Value("[" + string(body) + "]"), ok
	})
	if !ok || !replaced {
		return nil, false
	}
	out = out[:len(out)-1]
	if rest != nil {
		out = append(append(out, `,"ext":`...), rest...)
	}
	out = append(out, `,"`+mark+`":{"mac":"`+mac+`"}}`...)
	return out, out.IsValid()
}

// each writes an object anew; with says what becomes of each member, nil leaves
// it out, false ends it.
func each(object jsontext.Value, with func(name string, v jsontext.Value) (jsontext.Value, bool)) (jsontext.Value, bool) {
	if object.Kind() != '{' {
		return nil, false
	}
	d := jsontext.NewDecoder(bytes.NewReader(object))
	if _, err := d.ReadToken(); err != nil {
		return nil, false
	}
	out := jsontext.Value{'{'}
	for d.PeekKind() != '}' {
		name, err := d.ReadToken()
		if err != nil {
			return nil, false
		}
		n := name.String()
		v, err := d.ReadValue()
		if err != nil {
			return nil, false
		}
		v, ok := with(n, v.Clone())
		if !ok {
			return nil, false
		}
		if v == nil {
			continue
		}
		if len(out) > 1 {
			out = append(out, ',')
		}
		quoted, err := jsontext.AppendQuote(nil, n)
		if err != nil {
			return nil, false
		}
		out = append(append(append(out, quoted...), ':'), v...)
	}
	return append(out, '}'), true
}
