package journal

import (
	"bytes"
	"fmt"
	"math"
	"strconv"

	"github.com/go-json-experiment/json/jsontext"
)

const maxCustomExts = 16

// checkData checks the data of an event of the given type. The data is
// canonical JSON, or empty.
func checkData(t Type, data jsontext.Value, limits Limits) error {
	needsBodies := t == MessageSent || t == MessageEdited
	if len(data) == 0 {
		if needsBodies {
			return invalid("/data", "a message has data with bodies")
		}
		return nil
	}
	if !t.Known() || t.Reserved() {
		return nil
	}
	bodies := false
	for name, value := range members(data) {
		switch string(name) {
		case "bodies":
			bodies = true
			if err := checkBodies(value, limits); err != nil {
				return err
			}
		case "ext":
			if value[0] != '{' {
				return invalid("/data/ext", "ext must be a JSON object")
			}
		}
	}
	if needsBodies && !bodies {
		return invalid("/data/bodies", "the member is missing")
	}
	return nil
}

func checkBodies(value []byte, limits Limits) error {
	if value[0] != '[' {
		return invalid("/data/bodies", "bodies must be an array")
	}
	n := 0
	for body := range elements(value) {
		if n >= limits.Bodies {
			return tooLarge("/data/bodies", fmt.Sprintf("a message has at most %d bodies", limits.Bodies))
		}
		if field, detail, large := checkBody(body, limits); detail != "" {
			err := invalid("/data/bodies/"+strconv.Itoa(n)+field, detail)
			if large {
				err.class = ErrTooLarge
			}
			return err
		}
		n++
	}
	if n == 0 {
		return invalid("/data/bodies", "a message has at least one body")
	}
	return nil
}

// A bodyRule is what a field of a body has to be.
type bodyRule struct {
	name     string
	kind     fieldKind
	required bool
}

type fieldKind uint8

const (
	fieldString   fieldKind = iota
	fieldText               // a string of at most Limits.Text bytes
	fieldFilled             // a string that is not empty
	fieldCount              // an integer from 0 to 2^53
	fieldNumber             // a number of at least 0
	fieldLat                // a number from -90 to 90, also as a string
	fieldLng                // a number from -180 to 180, also as a string
	fieldSize               // {"width": …, "height": …}
	fieldExts               // an array or object of at most 16
	fieldExtsMap            // an object of at most 16
	fieldCombined           // the string sub_combine
)

// bodyRules returns the fields of a body type that are checked; every other
// field is kept as it is. The second result is false for an unknown type.
func bodyRules(t string) ([]bodyRule, bool) {
	switch t {
	case "txt":
		return []bodyRule{{"msg", fieldText, true}}, true
	case "img":
		return []bodyRule{
			{"url", fieldFilled, true},
			{"secret", fieldString, false},
			{"filename", fieldString, false},
			{"file_length", fieldCount, false},
			{"size", fieldSize, false},
		}, true
	case "audio":
		return []bodyRule{
			{"url", fieldFilled, true},
			{"secret", fieldString, false},
			{"filename", fieldString, false},
			{"file_length", fieldCount, false},
			{"length", fieldNumber, false},
		}, true
	case "video":
		return []bodyRule{
			{"url", fieldFilled, true},
			{"secret", fieldString, false},
			{"filename", fieldString, false},
			{"file_length", fieldCount, false},
			{"size", fieldSize, false},
			{"length", fieldNumber, false},
			{"thumb", fieldString, false},
			{"thumb_secret", fieldString, false},
		}, true
	case "file":
		return []bodyRule{
			{"url", fieldFilled, true},
			{"secret", fieldString, false},
			{"filename", fieldString, false},
			{"file_length", fieldCount, false},
		}, true
	case "loc":
		return []bodyRule{{"addr", fieldString, false}, {"lat", fieldLat, true}, {"lng", fieldLng, true}}, true
	case "cmd":
		return []bodyRule{{"action", fieldString, true}}, true
	case "custom":
		return []bodyRule{
			{"customEvent", fieldString, true},
			{"customExts", fieldExts, false},
			{"v2:customExts", fieldExtsMap, false},
		}, true
	case "combine":
		return []bodyRule{
			{"subType", fieldCombined, false},
			{"title", fieldString, false},
			{"summary", fieldString, false},
			{"combineLevel", fieldCount, false},
			{"url", fieldFilled, true},
		}, true
	}
	return nil, false
}

// checkBody returns the field that breaks a rule, as the end of a JSON pointer,
// and what is wrong; large is set when the fault is a size.
func checkBody(body []byte, limits Limits) (field, detail string, large bool) {
	if body[0] != '{' {
		return "", "a body must be a JSON object", false
	}
	kind := ""
	for name, value := range members(body) {
		if string(name) == "type" {
			if value[0] != '"' {
				return "/type", "the type must be a string", false
			}
			kind = string(value[1 : len(value)-1])
		}
	}
	if kind == "" {
		return "/type", "the body's type is missing", false
	}
	rules, ok := bodyRules(kind)
	if !ok {
		return "/type", "not one of txt, img, audio, video, file, loc, cmd, custom and combine", false
	}
	var seen uint32
	for name, value := range members(body) {
		for i, rule := range rules {
			if string(name) != rule.name {
				continue
			}
			seen |= 1 << i
			if detail, large := checkField(rule.kind, value, limits); detail != "" {
				return "/" + escapePointer(rule.name), detail, large
			}
		}
	}
	for i, rule := range rules {
		if rule.required && seen&(1<<i) == 0 {
			return "/" + rule.name, "the member is missing", false
		}
	}
	return "", "", false
}

func checkField(kind fieldKind, value []byte, limits Limits) (detail string, large bool) {
	switch kind {
	case fieldString, fieldFilled, fieldText, fieldCombined:
		if value[0] != '"' {
			return "the member must be a string", false
		}
		switch {
		case kind == fieldFilled && len(value) == 2:
			return "the member must not be empty", false
		case kind == fieldText && textLength(value) > limits.Text:
			return fmt.Sprintf("a text must not be longer than %d bytes", limits.Text), true
		case kind == fieldCombined && string(value) != `"sub_combine"`:
			return "a combined message has the subType sub_combine", false
		}
	case fieldCount:
		if n, ok := number(value); !ok || n < 0 || n > 1<<53 || n != math.Trunc(n) {
			return "the member must be an integer from 0 to 2^53", false
		}
	case fieldNumber:
		if n, ok := number(value); !ok || n < 0 {
			return "the member must be a number of at least 0", false
		}
	case fieldLat, fieldLng:
		limit := 90.0
		if kind == fieldLng {
			limit = 180
		}
		if value[0] == '"' {
			// The vendor's own pages have both.
			value = value[1 : len(value)-1]
		}
		if n, ok := number(value); !ok || math.Abs(n) > limit {
			return fmt.Sprintf("the member must be a number from -%g to %g", limit, limit), false
		}
	case fieldSize:
		if value[0] != '{' {
			return "size must be a JSON object with width and height", false
		}
		for name, v := range members(value) {
			if n, ok := number(v); (string(name) == "width" || string(name) == "height") && (!ok || n < 0) {
				return "width and height must be numbers of at least 0", false
			}
		}
	case fieldExts, fieldExtsMap:
		return checkExts(kind, value)
	}
	return "", false
}

func checkExts(kind fieldKind, value []byte) (detail string, large bool) {
	n := 0
	switch {
	case value[0] == '{':
		for range members(value) {
			n++
		}
	case value[0] == '[' && kind == fieldExts:
		for range elements(value) {
			n++
		}
	case kind == fieldExts:
		return "the member must be an array or a JSON object", false
	default:
		return "the member must be a JSON object", false
	}
	if n > maxCustomExts {
		return fmt.Sprintf("a custom message has at most %d extensions", maxCustomExts), true
	}
	return "", false
}

// number parses a JSON number that fits a float64.
func number(value []byte) (float64, bool) {
	if len(value) == 0 || value[0] != '-' && (value[0] < '0' || value[0] > '9') {
		return 0, false
	}
	if !jsontext.Value(value).IsValid() {
		return 0, false // ParseFloat takes 0x10 and 1_0, which come as strings
	}
	n, err := strconv.ParseFloat(string(value), 64)
	return n, err == nil
}

// textLength returns the length of a JSON string's text in bytes of UTF-8.
func textLength(quoted []byte) int {
	if bytes.IndexByte(quoted, '\\') < 0 {
		return len(quoted) - 2
	}
	text, err := jsontext.AppendUnquote(nil, quoted)
	if err != nil {
		return len(quoted)
	}
	return len(text)
}
