package agora

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"strings"
	"testing"
)

func compressed(t *testing.T, parts ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	for _, p := range parts {
		w := gzip.NewWriter(&b)
		if _, err := io.WriteString(w, p); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

// collect reads all lines; a line that is too long is noted as such.
func collect(t *testing.T, r io.Reader) ([]string, error) {
	t.Helper()
	l, err := NewLines(r)
	if err != nil {
		return nil, err
	}
	var got []string
	for {
		b, err := l.Next()
		switch {
		case errors.Is(err, io.EOF):
			return got, nil
		case errors.Is(err, ErrLineTooLong):
			if len(b) != MaxLine {
				t.Errorf("%d bytes of a line that is too long, want %d", len(b), MaxLine)
			}
			got = append(got, "too long")
		case err != nil:
			return got, err
		default:
			got = append(got, string(b))
		}
		if l.Line() != len(got) {
			t.Errorf("line number %d, want %d", l.Line(), len(got))
		}
	}
}

func TestLines(t *testing.T) {
	long := strings.Repeat("x", MaxLine)
	for _, tt := range []struct {
		name, in string
		want     []string
	}{
		{"nothing", "", nil},
		{"one byte", "a", []string{"a"}},
		{"no newline at the end", "a\nb", []string{"a", "b"}},
		{"empty lines count", "a\n\n\nb\n", []string{"a", "", "", "b"}},
		{"carriage returns", "a\r\nb\r\n", []string{"a", "b"}},
		{"byte order mark", "\xef\xbb\xbfa\n", []string{"a"}},
		{"longest", long + "\n" + long + "\r\nb", []string{long, long, "b"}},
		{"too long", "a\n" + long + "y\nb\n" + long + long + long, []string{"a", "too long", "b", "too long"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, in := range [][]byte{[]byte(tt.in), compressed(t, tt.in), compressed(t, tt.in[:len(tt.in)/2], tt.in[len(tt.in)/2:])} {
				got, err := collect(t, bytes.NewReader(in))
				if err != nil {
					t.Fatal(err)
				}
				if strings.Join(got, "|") != strings.Join(tt.want, "|") || len(got) != len(tt.want) {
					t.Errorf("got %d lines %.80q, want %d", len(got), got, len(tt.want))
				}
			}
		})
	}
}

func TestLinesOfADamagedGzip(t *testing.T) {
	whole := compressed(t, strings.Repeat("a line\n", 1000))
	if _, err := collect(t, bytes.NewReader(whole[:len(whole)-6])); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("truncated: error %v, want %v", err, io.ErrUnexpectedEOF)
	}
	damaged := bytes.Clone(whole)
	damaged[len(damaged)-8] ^= 1 // the checksum
	if got, err := collect(t, bytes.NewReader(damaged)); !errors.Is(err, gzip.ErrChecksum) {
		t.Errorf("flipped bit: error %v after %d lines, want %v", err, len(got), gzip.ErrChecksum)
	}
	if _, err := collect(t, bytes.NewReader(whole[:5])); err == nil {
		t.Error("half a header was accepted")
	}
}
