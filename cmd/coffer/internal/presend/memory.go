package presend

import (
	"errors"
	"sync"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/journal"
)

const (
	remembered = 5 * time.Minute
	mostKept   = 20_000 // answers
)

// decisionKey is an event as a caller sends it.
type decisionKey struct {
	app     journal.AppID
	id, mac string
}

// A decision is what was answered.
type decision struct {
	done chan struct{} // closed when what follows is set
	at   time.Time
	data jsontext.Value
	err  error
}

// memory keeps decisions, so that what is sent again at once, or at the same time,
// is not asked about again.
type memory struct {
	mu      sync.Mutex // guards decided
	decided map[decisionKey]*decision
}

// decide returns the decision of a key, made by put if there is none.
func (m *memory) decide(key decisionKey, put func() (jsontext.Value, error)) *decision {
	now := time.Now()
	m.mu.Lock()
	d := m.decided[key]
	if d != nil && now.Sub(d.at) < remembered {
		m.mu.Unlock()
		<-d.done
		return d
	}
	if len(m.decided) >= mostKept {
		m.forget(now)
	}
	d = &decision{done: make(chan struct{}), at: now}
	m.decided[key] = d
	m.mu.Unlock()
	d.data, d.err = put()
	close(d.done)
	if errors.Is(d.err, ErrUnanswered) {
		// It may be sent again, and is asked about again then.
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.decided[key] == d {
			delete(m.decided, key)
		}
	}
	return d
}

// forget drops the old half of what is kept, and everything that is too old. The
// caller holds mu.
func (m *memory) forget(now time.Time) {
	for _, age := range []time.Duration{remembered, remembered / 2, remembered / 8, remembered / 64, 0} {
		for key, d := range m.decided {
			if now.Sub(d.at) >= age {
				delete(m.decided, key)
			}
		}
		if len(m.decided) <= mostKept/2 {
			return
		}
	}
}
