package journal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"testing"
)

// seeded fails a fuzz target without seeds: a table that was emptied would
// otherwise leave it searching from nothing, and nobody would notice.
func seeded(f *testing.F, n int) {
	f.Helper()
	if n == 0 {
		f.Fatal("no seeds")
	}
}

// FuzzParseEvent: what is accepted has one canonical form, which is accepted
// again and re-encodes to the same bytes, also with its position.
func FuzzParseEvent(f *testing.F) {
	n := 0
	for _, tt := range accepted {
		f.Add([]byte(tt.in))
		f.Add([]byte(tt.want))
		n++
	}
	for _, tt := range refused {
		if len(tt.in) < 4096 {
			f.Add([]byte(tt.in))
		}
	}
	for _, v := range loadVectors(f).Records {
		f.Add([]byte(v.Plaintext))
	}
	seeded(f, n)
	f.Fuzz(func(t *testing.T, in []byte) {
		before := bytes.Clone(in)
		e, err := ParseEvent(in, testApp(), Limits{})
		if !bytes.Equal(in, before) {
			t.Fatal("the input was changed")
		}
		if err == nil {
			err = e.Normalize(testNow(), Limits{})
		}
		if err != nil {
			var input *InputError
			if !errors.As(err, &input) || !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrTooLarge) && !errors.Is(err, ErrTimeRange) {
				t.Fatalf("an error of no class: %v", err)
			}
			return
		}
		canonical := e.AppendJSON(nil, testApp())
		if len(canonical) != e.size() {
			t.Fatalf("size() is %d, the JSON has %d bytes: %s", e.size(), len(canonical), canonical)
		}
		again, err := ParseEvent(canonical, testApp(), Limits{})
		if err != nil {
			t.Fatalf("the canonical form is refused: %v\n%s", err, canonical)
		}
		if err := again.Normalize(testNow(), Limits{}); err != nil {
			t.Fatalf("the canonical form is refused: %v\n%s", err, canonical)
		}
		if second := again.AppendJSON(nil, testApp()); !bytes.Equal(canonical, second) {
			t.Fatalf("re-encodes differently\nfirst  %s\nsecond %s", canonical, second)
		}
		line := SplicePosition(nil, canonical, 1<<52|7)
		r, err := ParseReplayed(line)
		if err != nil {
			t.Fatalf("a replay's line is refused: %v\n%s", err, line)
		}
		if second := SplicePosition(nil, r.AppendJSON(nil, r.App), r.Position); !bytes.Equal(line, second) {
			t.Fatalf("a replay's line re-encodes differently\nfirst  %s\nsecond %s", line, second)
		}
		// The Go interface must agree with the wire on what data is valid.
		direct := e
		direct.checked = dataMark{}
		if err := direct.Normalize(testNow(), Limits{}); err != nil || !bytes.Equal(direct.AppendJSON(nil, testApp()), canonical) {
			t.Fatalf("normalized from Go: %v, %s", err, direct.AppendJSON(nil, testApp()))
		}
	})
}

func FuzzParseRecord(f *testing.F) {
	v := loadVectors(f)
	for _, r := range v.Records {
		f.Add([]byte(r.Record))
	}
	for _, r := range v.Refused {
		f.Add([]byte(r.Record))
	}
	seeded(f, len(v.Records))
	f.Fuzz(func(t *testing.T, record []byte) {
		h, envelope, err := ParseRecord(record)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatalf("an error of no class: %v", err)
			}
			return
		}
		if again := append(h.Append(nil), envelope...); !bytes.Equal(again, record) {
			t.Fatalf("re-encodes to %x, was %x", again, record)
		}
	})
}

func FuzzParseSubject(f *testing.F) {
	v := loadVectors(f)
	for _, s := range v.Subjects {
		f.Add(s.Subject)
	}
	f.Add("msg.pro.03.0300000000000000000000000000007f.15")
	f.Add("msg.pro.3.0300000000000000000000000000007f.>")
	seeded(f, len(v.Subjects))
	f.Fuzz(func(t *testing.T, s string) {
		sub, err := ParseSubject(s)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("an error of no class: %v", err)
			}
			return
		}
		if sub.String() != s {
			t.Fatalf("%q re-encodes to %q", s, sub)
		}
	})
}

func FuzzParsePosition(f *testing.F) {
	v := loadVectors(f)
	for _, p := range v.Positions {
		f.Add(p.Position.String())
	}
	f.Add("018446744073709551616")
	f.Add("-1")
	seeded(f, len(v.Positions))
	f.Fuzz(func(t *testing.T, s string) {
		p, err := ParsePosition(s)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("an error of no class: %v", err)
			}
			return
		}
		if p.String() != s {
			t.Fatalf("%q re-encodes to %q", s, p)
		}
		if q, err := NewPosition(p.Generation(), p.Sequence()); err != nil || q != p {
			t.Fatalf("%v from its parts is %v, %v", p, q, err)
		}
	})
}

// FuzzIDs: an id that is accepted can stand in a path and JSON as it
// is, and the direct conversation of two users names exactly these two.
func FuzzIDs(f *testing.F) {
	n := 0
	for _, tt := range accepted {
		if e, err := ParseEvent([]byte(tt.in), testApp(), Limits{}); err == nil {
			f.Add(e.ID, e.Sender)
			n++
		}
	}
	for _, s := range []string{"../a", "a.b", "*", ">", "a b", "a\nb", "a\x00", "a\u202eb", "a\u200bb", "é", "a,b", "\xff"} {
		f.Add(s, s)
	}
	f.Add(testApp().String(), NewEventID(testNow()))
	seeded(f, n)
	f.Fuzz(func(t *testing.T, a, b string) {
		if id, err := ParseAppID(a); err == nil && id.String() != a {
			t.Fatalf("app %q re-encodes to %q", a, id)
		}
		okA, okB := CheckUserID(a) == nil, CheckUserID(b) == nil
		if okA && (bytes.ContainsAny([]byte(a), "*>/\\ \"',\n\r\t") || a[0] == '.' || len(a) > MaxID) {
			t.Fatalf("%q is accepted", a)
		}
		if (okA && !strings.Contains(a, ".")) != (CheckEventID(a) == nil) || okA && CheckConversationID(a) != nil {
			t.Fatalf("the rules disagree about %q", a)
		}
		if !okA || !okB {
			return
		}
		c := DirectConversation(a, b)
		if err := CheckConversationID(c); err != nil {
			t.Fatalf("%q: %v", c, err)
		}
		first, second, _ := bytes.Cut([]byte(c), []byte(","))
		if string(first) != min(a, b) || string(second) != max(a, b) {
			t.Fatalf("the conversation of %q and %q is %q", a, b, c)
		}
	})
}

// FuzzAAD: two places never have the same additional data.
func FuzzAAD(f *testing.F) {
	v := loadVectors(f)
	for _, r := range v.Records {
		f.Add(r.Region, []byte(r.LogID), []byte(r.Header), "us", []byte(r.LogID), []byte(r.Header))
	}
	seeded(f, len(v.Records))
	f.Fuzz(func(t *testing.T, region1 string, log1, header1 []byte, region2 string, log2, header2 []byte) {
		var l1, l2 LogID
		copy(l1[:], log1)
		copy(l2[:], log2)
		same := region1 == region2 && l1 == l2 && bytes.Equal(header1, header2)
		a := appendAAD(nil, region1, testApp(), l1, header1)
		b := appendAAD(nil, region2, testApp(), l2, header2)
		if bytes.Equal(a, b) != same {
			t.Fatalf("%x for both", a)
		}
		if n := binary.BigEndian.Uint32(a); int(n) != len(region1) {
			t.Fatalf("length of the region is %d", n)
		}
	})
}
