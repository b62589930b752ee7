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
	// mostKept bounds what is remembered: an answer counts as one, and one more
	// for each KiB of a message that it has rewritten.
	mostKept = 50_000
)

// decisionKey is an event as a caller sends it.
type decisionKey struct {
	app     journal.AppID
	id, mac string
}

// A decision is what was answered.
type decision struct {
	key  decisionKey
	done chan struct{} // closed when data and err are set
	data jsontext.Value
	err  error

	// What follows is guarded by the memory's mu.
	at     time.Time
	weight int
	made   bool
}

// memory keeps decisions, so that what is sent again at once, or at the same time,
// is not asked about again. When it is full the apps that have most lose their
// oldest: one that has less than a third of an equal share loses nothing.
type memory struct {
	mu   sync.Mutex // guards what follows
	apps map[journal.AppID]*answers
	kept int // the weight of all
}

// answers are the decisions of an app.
type answers struct {
	byKey  map[decisionKey]*decision
	order  []*decision // oldest first
	weight int
}

// decide returns the decision of a key, made by put if there is none.
func (m *memory) decide(key decisionKey, put func() (jsontext.Value, error)) *decision {
	d, found := m.find(key, time.Now())
	if found {
		<-d.done
		return d
	}
	d.data, d.err = put()
	close(d.done)
	m.settle(d)
	return d
}

// find returns the decision of a key, a new one that the caller has to make if
// there is none.
func (m *memory) find(key decisionKey, now time.Time) (d *decision, found bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	of := m.apps[key.app]
	if of != nil {
		m.drop(of, func(d *decision) bool { return now.Sub(d.at) >= remembered })
		if d := of.byKey[key]; d != nil {
			return d, true
		}
	} else {
		if m.apps == nil {
			m.apps = make(map[journal.AppID]*answers)
		}
		of = &answers{byKey: make(map[decisionKey]*decision)}
		m.apps[key.app] = of
	}
	d = &decision{key: key, done: make(chan struct{}), at: now, weight: 1}
	of.byKey[key] = d
	of.order = append(of.order, d)
	of.weight++
	m.kept++
	m.trim(now)
	return d, false
}

// settle takes a decision into account that has been made. That nobody answered is
// forgotten: it may be sent again, and is asked about again then.
func (m *memory) settle(d *decision) {
	m.mu.Lock()
	defer m.mu.Unlock()
	of := m.apps[d.key.app]
	d.made = true
	if errors.Is(d.err, ErrUnanswered) {
		d.at = time.Time{} // its turn comes with the next that is dropped
		delete(of.byKey, d.key)
		return
	}
	more := len(d.data) >> 10
	d.weight += more
	of.weight += more
	m.kept += more
	m.trim(time.Now())
}

// trim makes room when there is too much. The caller holds mu.
func (m *memory) trim(now time.Time) {
	if m.kept <= mostKept {
		return
	}
	most := 0
	for app, of := range m.apps {
		m.drop(of, func(d *decision) bool { return now.Sub(d.at) >= remembered })
		if len(of.order) == 0 {
			delete(m.apps, app)
		}
		most = max(most, of.weight)
	}
	for share := most / 2; m.kept > mostKept*3/4; share /= 2 {
		for _, of := range m.apps {
			m.drop(of, func(*decision) bool { return of.weight > share })
		}
		if share == 0 {
			return // the rest is under way
		}
	}
}

// drop drops an app's decisions from the oldest on, as long as it is told to.
// Those that are not made yet stay. The caller holds mu.
func (m *memory) drop(of *answers, this func(*decision) bool) {
	n := 0
	var under []*decision // under way
	for n < len(of.order) && this(of.order[n]) {
		d := of.order[n]
		of.order[n] = nil
		n++
		if !d.made {
			under = append(under, d)
			continue
		}
		if of.byKey[d.key] == d {
			delete(of.byKey, d.key)
		}
		of.weight -= d.weight
		m.kept -= d.weight
	}
	n -= copy(of.order[n-len(under):], under)
	of.order = of.order[n:]
}
