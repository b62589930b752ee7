package kms

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
)

// pageLimit is the size in bytes at which a page splits.
const pageLimit = 16 << 10

// maxDepth is the length of the longest path of a page: all digits of a tag.
const maxDepth = 2 * len(Tag{})

// page is a row sub.<app>.<path>: docs/format/keyring.md. Once it was decoded or
// written it is not changed.
type page struct {
	Format int `json:"format"`
	// Generation is of the app key that the last writer had. A writer with an
	// older one may not write: the app key was replaced, and this page is done.
	Generation uint32       `json:"generation,omitzero"`
	Split      bool         `json:"split,omitzero"` // its subjects are in the pages one digit longer
	From       uint64       `json:"from,omitzero"`  // revision of the page that this one was split from
	Subjects   []subjectRow `json:"subjects,omitempty"`

	revision uint64 // 0: there is no row
}

type subjectRow struct {
	Tag Tag    `json:"tag"`
	Key []byte `json:"key,omitempty"`
	// Erased is when a key of the subject was last destroyed. With a Key beside
	// it the subject was registered again since.
	Erased time.Time `json:"erased_at,omitzero"`
}

// pageRowName names the page of a path of hex digits; the first page has none.
func pageRowName(app, path string) string {
	if path == "" {
		path = "_"
	}
	return "sub." + app + "." + path
}

// splitPageName is the inverse of pageRowName.
func splitPageName(name string) (app, path string, ok bool) {
	rest, ok := strings.CutPrefix(name, "sub.")
	if !ok {
		return "", "", false
	}
	app, path, ok = strings.Cut(rest, ".")
	if path == "_" {
		path = ""
	}
	return app, path, ok
}

func encodePage(p *page) ([]byte, error) {
	b, err := json.Marshal(p, json.Deterministic(true))
	if err != nil {
		return nil, fmt.Errorf("encode page of subject keys: %w", err)
	}
	return b, nil
}

func decodePage(path string, row Row) (*page, error) {
	p := page{revision: row.Revision}
	if err := json.Unmarshal(row.Value, &p, json.RejectUnknownMembers(true)); err != nil || p.Format != rowFormat {
		return nil, fmt.Errorf("%w: page %q of subject keys", ErrKeyringCorrupt, path)
	}
	for i, s := range p.Subjects {
		if !strings.HasPrefix(s.Tag.String(), path) || len(s.Key) == 0 && s.Erased.IsZero() || p.Split ||
			i > 0 && bytes.Compare(p.Subjects[i-1].Tag[:], s.Tag[:]) >= 0 {
			return nil, fmt.Errorf("%w: page %q of subject keys", ErrKeyringCorrupt, path)
		}
	}
	return &p, nil
}

func compareSubject(s subjectRow, tag Tag) int { return bytes.Compare(s.Tag[:], tag[:]) }

func (p *page) find(tag Tag) (subjectRow, bool) {
	i, ok := slices.BinarySearchFunc(p.Subjects, tag, compareSubject)
	if !ok {
		return subjectRow{}, false
	}
	return p.Subjects[i], true
}

// with returns a page in which the subjects are added or replaced.
func (p *page) with(subjects ...subjectRow) *page {
	c := *p
	c.Format = rowFormat
	c.Subjects = slices.Clone(p.Subjects)
	for _, s := range subjects {
		i, ok := slices.BinarySearchFunc(c.Subjects, s.Tag, compareSubject)
		if ok {
			c.Subjects[i] = s
		} else {
			c.Subjects = append(c.Subjects, s)
			if i < len(c.Subjects)-1 {
				slices.SortFunc(c.Subjects, func(a, b subjectRow) int { return compareSubject(a, b.Tag) })
			}
		}
	}
	return &c
}

// child returns what belongs to the page one digit longer.
func (p *page) child(path string, digit byte) *page {
	c := &page{Format: rowFormat, Generation: p.Generation, From: p.revision}
	for _, s := range p.Subjects {
		if nibble(s.Tag, len(path)) == digit {
			c.Subjects = append(c.Subjects, s)
		}
	}
	return c
}

const hexDigits = "0123456789abcdef"

// nibble returns the hex digit of a tag at a depth.
func nibble(tag Tag, depth int) byte {
	b := tag[depth/2]
	if depth%2 == 0 {
		b >>= 4
	}
	return hexDigits[b&0xf]
}
