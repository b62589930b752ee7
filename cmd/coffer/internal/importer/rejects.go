package importer

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
)

// shownRejects is how many bad lines are told one by one; the file has all.
const shownRejects = 20

// maxRaw bounds how much of a line that is too long is kept.
const maxRaw = 64 << 10

// reject is a line of the rejects file.
type reject struct {
	File      string `json:"file"`
	Line      int    `json:"line"`
	Reason    string `json:"reason"`
	Raw       string `json:"raw,omitzero"`
	RawBase64 string `json:"raw_base64,omitzero"` // when the line is not UTF-8
	Truncated bool   `json:"truncated,omitzero"`
}

// rejects is the rejects file of one run. Its mode is 0600: it holds messages.
type rejects struct {
	path string
	talk io.Writer

	mu    sync.Mutex // guards what follows
	file  *os.File
	count int
	err   error // the first failure to write
}

// newRejects makes the file, so that a run that cannot keep its rejects fails
// before it has begun. A file of an earlier run is replaced.
func newRejects(path string, inputs []string, talk io.Writer) (*rejects, error) {
	if old, err := os.Stat(path); err == nil {
		for _, in := range inputs {
			if info, err := os.Stat(in); err == nil && os.SameFile(old, info) {
				return nil, fmt.Errorf("the rejects file %s is one of the files to import", path)
			}
		}
		if !old.Mode().IsRegular() {
			return nil, fmt.Errorf("the rejects file %s is not a regular file", path)
		}
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600) //nolint:gosec // the user names it
	if err != nil {
		return nil, fmt.Errorf("making the rejects file: %w", err)
	}
	if err := f.Chmod(0o600); err != nil { // it may have been there with another mode
		_ = f.Close()
		return nil, fmt.Errorf("making the rejects file: %w", err)
	}
	return &rejects{path: path, talk: talk, file: f}, nil
}

func (r *rejects) add(file string, line int, reason string, raw []byte) {
	entry := reject{File: file, Line: line, Reason: reason}
	if len(raw) > maxRaw {
		raw, entry.Truncated = raw[:maxRaw], true
		for len(raw) > 0 && !utf8.RuneStart(raw[len(raw)-1]) {
			raw = raw[:len(raw)-1] // do not cut a character in two
		}
		if len(raw) > 0 && raw[len(raw)-1] >= utf8.RuneSelf {
			raw = raw[:len(raw)-1]
		}
	}
	if utf8.Valid(raw) {
		entry.Raw = string(raw)
	} else {
		entry.RawBase64 = base64.StdEncoding.EncodeToString(raw)
	}
	text, err := json.Marshal(entry)

	r.mu.Lock()
	defer r.mu.Unlock()
	r.count++
	if err == nil {
		_, err = r.file.Write(append(text, '\n'))
	}
	if err != nil && r.err == nil {
		r.err = fmt.Errorf("writing the rejects file: %w", err)
	}
	switch {
	case r.count <= shownRejects:
		_, _ = fmt.Fprintf(r.talk, "%s:%d: %s\n", file, line, reason)
	case r.count == shownRejects+1:
		_, _ = fmt.Fprintf(r.talk, "further bad lines are in %s only\n", r.path)
	}
}

func (r *rejects) failure() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// close removes the file when nothing is in it. It reports whether it was kept.
func (r *rejects) close() (kept bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.file.Close(); err != nil && r.err == nil {
		r.err = fmt.Errorf("writing the rejects file: %w", err)
	}
	if r.count == 0 {
		if err := os.Remove(r.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, fmt.Errorf("removing the empty rejects file: %w", err)
		}
	}
	return r.count > 0, r.err
}
