package node

import (
	"context"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/monitor"
	"github.com/cofferdb/coffer/projections"
)

// The gauges, by their place in the list.
const (
	gaugeViewLag = iota
	gaugeViewState
	gaugeExpiryLag
	gaugeStreamBytes
	gaugeStreamMessages
	gaugeViewBytes
	gaugeKeys
	gaugeKeysDegraded
	gaugeDeliveries
	gaugeOldestDue
)

func gauges() []monitor.Gauge {
	return []monitor.Gauge{
		gaugeViewLag:        {Name: "coffer_view_lag_records", Help: "Records that a projection has not applied yet.", Labels: []string{"projection"}},
		gaugeViewState:      {Name: "coffer_view_stopped_streams", Help: "Streams on which a projection has stopped.", Labels: []string{"projection"}},
		gaugeExpiryLag:      {Name: "coffer_expiry_lag_seconds", Help: "For how long the oldest thing that should be gone has been there; of accounts, profiles, exports and keys the time since the last sweep without an error.", Labels: []string{"kind"}},
		gaugeStreamBytes:    {Name: "coffer_stored_bytes", Help: "Bytes in the streams of a kind of data.", Labels: []string{"kind"}},
		gaugeStreamMessages: {Name: "coffer_stored_messages", Help: "Messages in the streams of a kind of data.", Labels: []string{"kind"}},
		gaugeViewBytes:      {Name: "coffer_view_store_bytes", Help: "Bytes of the view store on disk."},
		gaugeKeys:           {Name: "coffer_keys_in_memory", Help: "Unwrapped keys in memory: of apps, of data, and pages of subjects.", Labels: []string{"kind"}},
		gaugeKeysDegraded:   {Name: "coffer_keys_degraded", Help: "App keys that serve past their revalidation, because the key provider does not answer."},
		gaugeDeliveries:     {Name: "coffer_deliveries", Help: "Deliveries to webhook endpoints that wait, are parked or are held.", Labels: []string{"state"}},
		gaugeOldestDue:      {Name: "coffer_delivery_overdue_seconds", Help: "For how long the delivery that waits longest has been due."},
	}
}

// look looks the gauges up. What cannot be known is left out.
func (r *region) look(ctx context.Context) []monitor.Sample {
	var samples []monitor.Sample
	add := func(gauge int, value float64, labels ...string) {
		samples = append(samples, monitor.Sample{Gauge: gauge, Labels: labels, Value: value})
	}
	now := r.options.now()
	lag, stopped := make(map[string]uint64), make(map[string]int)
	for _, runner := range []*projections.Runner{r.runner, r.callbacks.runner} {
		for _, s := range runner.Status(ctx) {
			lag[s.Projection] += s.Lag
			if s.State == projections.Stopped {
				stopped[s.Projection]++
			} else {
				stopped[s.Projection] += 0
			}
		}
	}
	for name := range lag {
		add(gaugeViewLag, float64(lag[name]), name)
		add(gaugeViewState, float64(stopped[name]), name)
	}
	if kinds, err := r.journal.Stored(ctx); err == nil {
		for _, s := range kinds {
			add(gaugeStreamBytes, float64(s.Bytes), string(s.Kind))
			add(gaugeStreamMessages, float64(s.Messages), string(s.Kind))
			if s.Kind != "registry" && s.Kind != "keyring" && s.Kind != "profiles" {
				add(gaugeExpiryLag, s.Overdue.Seconds(), string(s.Kind))
			}
		}
	}
	if d, err := r.view.Overdue(now); err == nil {
		add(gaugeExpiryLag, d.Seconds(), "view_history")
	}
	if d, err := r.roaming.Overdue(now); err == nil {
		add(gaugeExpiryLag, d.Seconds(), "view_roaming")
	}
	if d, err := r.callbacks.view.Depth(ctx, now); err == nil {
		add(gaugeExpiryLag, d.Overdue.Seconds(), "view_callbacks")
		add(gaugeDeliveries, float64(d.Waiting), "waiting")
		add(gaugeDeliveries, float64(d.Parked), "parked")
		add(gaugeDeliveries, float64(d.Held), "held")
		overdue := 0.0
		if !d.OldestDue.IsZero() {
			overdue = now.Sub(d.OldestDue).Seconds()
		}
		add(gaugeOldestDue, overdue)
	}
	add(gaugeViewBytes, float64(r.store.Size()))
	keys := r.journal.Keyring().Status()
	add(gaugeKeys, float64(keys.Apps), "apps")
	add(gaugeKeys, float64(keys.DataKeys), "data")
	add(gaugeKeys, float64(keys.Pages), "pages")
	add(gaugeKeysDegraded, float64(keys.Degraded))
	for kind, at := range r.swept.all() {
		add(gaugeExpiryLag, time.Since(at).Seconds(), kind)
	}
	return samples
}
