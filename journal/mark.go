package journal

import (
	"context"
	"sync"
	"sync/atomic"
)

// mark is a sequence that only grows, and can be waited for.
type mark struct {
	seq atomic.Uint64

	mu    sync.Mutex // guards moved
	moved chan struct{}
}

func (m *mark) load() uint64 { return m.seq.Load() }

func (m *mark) store(seq uint64) {
	if seq <= m.seq.Load() {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.seq.Store(seq)
	if m.moved != nil {
		close(m.moved)
		m.moved = nil
	}
}

// wait returns once the mark has reached seq.
func (m *mark) wait(ctx context.Context, seq uint64) error {
	for {
		if m.seq.Load() >= seq {
			return nil
		}
		m.mu.Lock()
		if m.seq.Load() >= seq {
			m.mu.Unlock()
			return nil
		}
		if m.moved == nil {
			m.moved = make(chan struct{})
		}
		moved := m.moved
		m.mu.Unlock()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-moved:
		}
	}
}
