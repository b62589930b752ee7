package monitor

import (
	"context"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/cofferdb/coffer/kms"
)

// Metrics are those of a region. Its methods may be called concurrently; a nil
// Metrics counts nothing.
type Metrics struct {
	registry *prometheus.Registry
	own      prometheus.Registerer // with the region as a label
	log      *slog.Logger

	requests *prometheus.CounterVec   // operation, outcome
	seconds  *prometheus.HistogramVec // operation
	events   prometheus.Counter
	kmsCalls *prometheus.CounterVec   // operation, outcome
	kmsTime  *prometheus.HistogramVec // operation
	unused   *prometheus.CounterVec   // kind, outcome
}

// NewMetrics returns the metrics of a region, with those of the process.
func NewMetrics(region string, log *slog.Logger) *Metrics {
	m := &Metrics{registry: prometheus.NewRegistry(), log: log}
	m.own = prometheus.WrapRegistererWith(prometheus.Labels{"region": region}, m.registry)
	var seconds []float64
	for _, ms := range bounds() {
		seconds = append(seconds, ms/1000)
	}
	m.requests = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "coffer_requests_total", Help: "Requests that have ended, and requests to webhook endpoints (operation deliver).",
	}, []string{"operation", "outcome"})
	m.seconds = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "coffer_request_seconds", Help: "How long requests took, from their head to the last byte of the answer; tails are left out.", Buckets: seconds,
	}, []string{"operation"})
	m.events = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "coffer_events_appended_total", Help: "Events that were acknowledged.",
	})
	m.kmsCalls = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "coffer_kms_calls_total", Help: "Calls of the key provider; the outcome is ok or the class of the error.",
	}, []string{"operation", "outcome"})
	m.kmsTime = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "coffer_kms_seconds", Help: "How long calls of the key provider took.", Buckets: seconds,
	}, []string{"operation"})
	m.unused = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "coffer_unused_records_total", Help: "Accounts and profiles that nobody has used: warned of, and ended.",
	}, []string{"kind", "outcome"})
	m.Register(m.unused, m.requests, m.seconds, m.events, m.kmsCalls, m.kmsTime)
	m.registry.MustRegister(
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), collectors.NewBuildInfoCollector(),
	)
	return m
}

// Register adds metrics, which get the region as a label. It panics when a name is
// taken or a description makes no sense: both are known when the program is built.
func (m *Metrics) Register(all ...prometheus.Collector) { m.own.MustRegister(all...) }

func (m *Metrics) observe(op Operation, o Outcome, d time.Duration, timed bool) {
	if m == nil {
		return
	}
	m.requests.WithLabelValues(string(op), string(o)).Inc()
	if timed {
		m.seconds.WithLabelValues(string(op)).Observe(d.Seconds())
	}
}

func (m *Metrics) appended(events int) {
	if m != nil {
		m.events.Add(float64(events))
	}
}

// KMS counts a call of the key provider. The outcome is "ok" or the class of the
// error.
func (m *Metrics) KMS(c kms.Call, outcome string) {
	if m == nil {
		return
	}
	m.kmsCalls.WithLabelValues(c.Operation, outcome).Inc()
	m.kmsTime.WithLabelValues(c.Operation).Observe(c.Duration.Seconds())
}

// Unused counts records that nobody has used: those that were warned of, and those
// that have ended.
func (m *Metrics) Unused(kind string, warned, ended int) {
	if m == nil {
		return
	}
	m.unused.WithLabelValues(kind, "warned").Add(float64(warned))
	m.unused.WithLabelValues(kind, "ended").Add(float64(ended))
}

// A Gauge is a figure that is looked up when somebody scrapes.
type Gauge struct {
	Name, Help string
	Labels     []string
}

// A Sample is a value of a gauge.
type Sample struct {
	Gauge  int // which of the gauges
	Labels []string
	Value  float64
}

const (
	gatherTime = 5 * time.Second
	// gatherFresh is how long samples are given again: several scrapers, or an
	// impatient one, must not cost more than one.
	gatherFresh = 2 * time.Second
)

// Gather adds gauges whose samples look returns, within the context's time. What it
// leaves out is missing in the scrape, so that a figure that cannot be known is not
// taken for a good one.
func (m *Metrics) Gather(gauges []Gauge, look func(ctx context.Context) []Sample) {
	c := &gatherer{look: look}
	for _, g := range gauges {
		c.described = append(c.described, prometheus.NewDesc(g.Name, g.Help, g.Labels, nil))
	}
	m.Register(c)
}

type gatherer struct {
	described []*prometheus.Desc
	look      func(ctx context.Context) []Sample

	mu      sync.Mutex // guards what follows, and lets one look at a time
	looked  time.Time
	samples []Sample
}

// Describe is part of prometheus.Collector.
func (g *gatherer) Describe(out chan<- *prometheus.Desc) {
	for _, d := range g.described {
		out <- d
	}
}

// Collect is part of prometheus.Collector.
func (g *gatherer) Collect(out chan<- prometheus.Metric) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.looked.IsZero() || time.Since(g.looked) > gatherFresh {
		ctx, cancel := context.WithTimeout(context.Background(), gatherTime)
		defer cancel()
		g.samples, g.looked = g.look(ctx), time.Now()
	}
	for _, s := range g.samples {
		out <- prometheus.MustNewConstMetric(g.described[s.Gauge], prometheus.GaugeValue, s.Value, s.Labels...)
	}
}

// ServeHTTP writes the metrics, in the format of Prometheus or OpenMetrics.
func (m *Metrics) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
		ErrorLog: slog.NewLogLogger(m.log.Handler(), slog.LevelError), ErrorHandling: promhttp.ContinueOnError,
		EnableOpenMetrics: true, DisableCompression: true,
	}).ServeHTTP(w, r)
}
