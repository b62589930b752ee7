package agora

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
)

// MaxLine is the longest line that is read, in bytes without its newline. An
// event may be 64 KiB, so a longer line is not a message.
const MaxLine = 1 << 20

// ErrLineTooLong is reported for a line over MaxLine. The rest of the line has
// been skipped; the next call returns the following line.
var ErrLineTooLong = errors.New("the line is longer than 1 MiB")

// Lines reads JSON lines from a plain or gzip-compressed stream, told apart by
// their first bytes. Memory is bounded by MaxLine whatever the stream holds, so
// a compressed bomb costs time only.
type Lines struct {
	r    *bufio.Reader
	gz   *gzip.Reader
	line int
	buf  []byte
}

// NewLines begins to read r.
func NewLines(r io.Reader) (*Lines, error) {
	br := bufio.NewReaderSize(r, 256<<10)
	magic, err := br.Peek(2)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	l := &Lines{r: br}
	if bytes.Equal(magic, []byte{0x1f, 0x8b}) {
		l.gz, err = gzip.NewReader(br)
		if err != nil {
			return nil, fmt.Errorf("reading the gzip header: %w", err)
		}
		l.r = bufio.NewReaderSize(l.gz, 256<<10)
	}
	// A byte order mark is not JSON, but editors on Windows write one.
	if mark, err := l.r.Peek(3); err == nil && bytes.Equal(mark, []byte("\xef\xbb\xbf")) {
		_, _ = l.r.Discard(3)
	}
	return l, nil
}

// Line is the number of the line that Next returned last, from 1.
func (l *Lines) Line() int { return l.line }

// Next returns the next line without its newline, valid until the next call; at
// the end io.EOF. With ErrLineTooLong it returns the beginning of the line. Any
// other error is the stream's (a truncated or corrupt gzip) and final.
func (l *Lines) Next() ([]byte, error) {
	l.buf = l.buf[:0]
	tooLong, some := false, false
	for {
		part, err := l.r.ReadSlice('\n')
		some = some || len(part) > 0
		if !tooLong {
			l.buf = append(l.buf, part...)
			// One more byte than the limit may be the newline.
			if len(bytes.TrimRight(l.buf, "\r\n")) > MaxLine {
				tooLong = true
				l.buf = l.buf[:MaxLine]
			}
		}
		switch {
		case err == nil:
			l.line++
			return l.end(tooLong)
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case errors.Is(err, io.EOF):
			if !some {
				return nil, io.EOF
			}
			l.line++
			return l.end(tooLong) // the last line may lack its newline
		default:
			l.line++
			return nil, fmt.Errorf("reading line %d: %w", l.line, err)
		}
	}
}

func (l *Lines) end(tooLong bool) ([]byte, error) {
	if tooLong {
		return l.buf, ErrLineTooLong
	}
	return bytes.TrimRight(l.buf, "\r\n"), nil
}
