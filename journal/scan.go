package journal

import (
	"bytes"
	"fmt"
	"iter"
	"strconv"

	"github.com/go-json-experiment/json/jsontext"
)

// inspect refuses what the grammar of JSON allows and nothing after us should
// have to cope with: nesting over depth levels (outer of them are around data
// already), NUL characters, numbers that do not fit a float64. It may be given
// text that is not valid JSON, whose errors are found elsewhere.
func inspect(data []byte, depth, outer int) error {
	level := outer
	for i := 0; i < len(data); i++ {
		switch c := data[i]; {
		case c == '{' || c == '[':
			if level++; level > depth {
				return invalid("", fmt.Sprintf("nested deeper than %d levels", depth))
			}
		case c == '}' || c == ']':
			level--
		case c == '"':
			end, nul := stringEnd(data, i+1)
			if nul {
				return invalid(pointerAt(data, i), "a NUL character is not accepted")
			}
			i = end - 1
		case c >= '0' && c <= '9':
			end := i + 1
			for end < len(data) && isNumberByte(data[end]) {
				end++
			}
			if !inRange(data[i:end]) {
				return invalid(pointerAt(data, i), "the number does not fit 64 bits of floating point")
			}
			i = end - 1
		}
	}
	return nil
}

// stringEnd returns the index after the quote that ends a string whose first
// byte is at i, and whether the string holds an escaped NUL.
func stringEnd(data []byte, i int) (end int, nul bool) {
	quote := -1
	for {
		if quote < i {
			n := bytes.IndexByte(data[min(i, len(data)):], '"')
			if n < 0 {
				return len(data), nul
			}
			quote = i + n
		}
		n := bytes.IndexByte(data[i:quote], '\\')
		if n < 0 {
			return quote + 1, nul
		}
		i += n + 1
		if bytes.HasPrefix(data[i:], []byte("u0000")) {
			nul = true
		}
		i++
	}
}

func isNumberByte(c byte) bool {
	return c >= '0' && c <= '9' || c == '.' || c == 'e' || c == 'E' || c == '+' || c == '-'
}

func inRange(number []byte) bool {
	if len(number) < 300 && bytes.IndexByte(number, 'e') < 0 && bytes.IndexByte(number, 'E') < 0 {
		return true
	}
	_, err := strconv.ParseFloat(string(number), 64)
	return err == nil
}

// pointerAt returns the JSON pointer of the value at an offset; it is made only
// for an error.
func pointerAt(data []byte, offset int) string {
	dec := jsontext.NewDecoder(bytes.NewBuffer(data))
	for dec.InputOffset() <= int64(offset) {
		if _, err := dec.ReadToken(); err != nil {
			break
		}
	}
	return pointerText(string(dec.StackPointer()))
}

// members yields the members of a canonical JSON object: each name as it stands
// between its quotes, and the value's text.
func members(object []byte) iter.Seq2[[]byte, []byte] {
	return func(yield func([]byte, []byte) bool) {
		for i := 1; i < len(object) && object[i] == '"'; {
			end, _ := stringEnd(object, i+1)
			start := end + 1 // the colon
			stop := valueEnd(object, start)
			if !yield(object[i+1:end-1], object[start:stop]) {
				return
			}
			i = stop + 1 // the comma
		}
	}
}

// elements yields the elements of a canonical JSON array.
func elements(array []byte) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		for i := 1; i < len(array) && array[i] != ']'; {
			stop := valueEnd(array, i)
			if !yield(array[i:stop]) {
				return
			}
			i = stop + 1
		}
	}
}

// valueEnd returns the index after the value that starts at i in canonical
// JSON.
func valueEnd(data []byte, i int) int {
	level := 0
	for i < len(data) {
		switch data[i] {
		case '"':
			i, _ = stringEnd(data, i+1)
			if level == 0 {
				return i
			}
			continue
		case '{', '[':
			level++
		case '}', ']':
			if level == 0 {
				return i // the end of what the value stands in
			}
			if level--; level == 0 {
				return i + 1
			}
		case ',':
			if level == 0 {
				return i
			}
		}
		i++
	}
	return i
}
