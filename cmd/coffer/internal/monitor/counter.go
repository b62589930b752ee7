package monitor

import "github.com/prometheus/client_golang/prometheus"

// Counter adds a counter with one label, and returns what counts. The values of the
// label are few and known.
func (m *Metrics) Counter(name, help, label string) (count func(value string)) {
	c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{label})
	m.Register(c)
	return func(value string) { c.WithLabelValues(value).Inc() }
}
