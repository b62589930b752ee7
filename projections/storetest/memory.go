package storetest

import (
	"bytes"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/cofferdb/coffer/projections"
)

// Memory is a store in memory for tests of what uses one. A commit costs the
// size of the store, nothing is durable, and Close keeps the content. The zero
// value is an empty store.
type Memory struct {
	// Fail, if it is set, is called before each View ("view") and Update
	// ("update"); its error is returned.
	Fail func(call string) error

	mu      sync.Mutex // guards what follows
	content map[string]string
	// writing serialises Update. It is a channel, because a test with synctest
	// does not see who waits for a mutex, and would wait for ever itself.
	writing chan struct{}
}

// begin waits until no other Update is under way, and returns what ends it.
func (m *Memory) begin() (end func()) {
	m.mu.Lock()
	if m.writing == nil {
		m.writing = make(chan struct{}, 1)
	}
	writing := m.writing
	m.mu.Unlock()
	writing <- struct{}{}
	return func() { <-writing }
}

func (m *Memory) current() map[string]string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.content
}

// View is part of [projections.Store].
func (m *Memory) View(fn func(projections.Reader) error) error {
	if m.Fail != nil {
		if err := m.Fail("view"); err != nil {
			return err
		}
	}
	return fn(memory{m.current()})
}

// Update is part of [projections.Store].
func (m *Memory) Update(fn func(projections.Txn) error) error {
	defer m.begin()()
	if m.Fail != nil {
		if err := m.Fail("update"); err != nil {
			return err
		}
	}
	next := maps.Clone(m.current())
	if next == nil {
		next = make(map[string]string)
	}
	if err := fn(memory{next}); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.content = next
	return nil
}

// Close is part of [projections.Store].
func (m *Memory) Close() error { return nil }

// memory is a Reader, and a Txn when the map is not shared.
type memory struct{ content map[string]string }

func (m memory) Get(dst, key []byte) ([]byte, bool, error) {
	v, ok := m.content[string(key)]
	return append(dst, v...), ok, nil
}

func (m memory) Iterate(from, to []byte, reverse bool) projections.Cursor {
	c := &memoryCursor{reverse: reverse}
	for k := range m.content {
		if k >= string(from) && (to == nil || k < string(to)) {
			c.pairs = append(c.pairs, pair{k, m.content[k]})
		}
	}
	slices.SortFunc(c.pairs, func(a, b pair) int { return strings.Compare(a.key, b.key) })
	if reverse {
		slices.Reverse(c.pairs)
	}
	return c
}

func (m memory) Set(key, value []byte) { m.content[string(key)] = string(value) }
func (m memory) Delete(key []byte)     { delete(m.content, string(key)) }

func (m memory) DeleteRange(from, to []byte) {
	maps.DeleteFunc(m.content, func(k, _ string) bool {
		return k >= string(from) && (to == nil || bytes.Compare([]byte(k), to) < 0)
	})
}

type memoryCursor struct {
	pairs   []pair
	at      int
	reverse bool
	closed  bool
}

func (c *memoryCursor) Next() bool {
	if c.at >= len(c.pairs) {
		return false
	}
	c.at++
	return true
}

func (c *memoryCursor) Seek(key []byte) bool {
	if c.closed {
		return false
	}
	before := func(p pair) bool { return p.key < string(key) }
	if c.reverse {
		before = func(p pair) bool { return p.key > string(key) }
	}
	for c.at = 0; c.at < len(c.pairs) && before(c.pairs[c.at]); c.at++ {
	}
	return c.Next()
}

func (c *memoryCursor) Key() []byte   { return []byte(c.pairs[c.at-1].key) }
func (c *memoryCursor) Value() []byte { return []byte(c.pairs[c.at-1].value) }

func (c *memoryCursor) Close() error {
	c.at, c.closed = len(c.pairs), true
	return nil
}
