package server_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/cofferdb/coffer/cmd/coffer/internal/node"
	"github.com/cofferdb/coffer/journal"
)

// minutes sums up what the app's monitoring data says of an operation, over all
// pages.
func (s *site) minutes(token, path, operation string) (events, requests, refused, timed float64) {
	s.t.Helper()
	query := "?limit=1"
	for {
		a := s.do(request{path: path + query, token: token})
		if a.status != http.StatusOK {
			s.t.Fatalf("metrics: %d %s", a.status, a.body)
		}
		page := a.json(s.t)
		for _, minute := range page["data"].([]any) {
			minute := minute.(map[string]any)
			events += minute["events"].(float64)
			for _, op := range minute["operations"].([]any) {
				op := op.(map[string]any)
				if op["operation"] != operation {
					continue
				}
				requests += op["requests"].(float64)
				refused += op["refused"].(float64)
				for _, n := range op["buckets"].([]any) {
					timed += n.(float64)
				}
			}
		}
		if page["next"] == nil {
			return events, requests, refused, timed
		}
		query = "?limit=1&after=" + page["next"].(string)
	}
}

// TestMetrics: what an app is served comes to its owner by the minute, to nobody
// else, and to the operators without a name.
func TestMetrics(t *testing.T) {
	s := newSiteWith(t, node.DevOptions{Day: shortDay})
	path := "/v1/apps/" + s.app + "/metrics"
	s.post(sent("m1", "ann", "ben", "canary"), sent("m2", "ann", "ben", "canary"))
	s.post(sent("m1", "ann", "ben", "canary")) // again
	if a := s.do(request{method: "POST", path: s.events(), body: `{"type":"nothing"}`}); a.status < 400 {
		t.Fatalf("nonsense: %d", a.status)
	}
	s.replay("")
	await(t, "the appends are in the monitoring data", func() bool {
		events, requests, refused, timed := s.minutes(s.token, path, "append")
		if events > 2 || requests > 3 {
			t.Fatalf("%v events in %v requests", events, requests)
		}
		return events == 2 && requests == 3 && refused == 1 && timed == 3
	})
	await(t, "the replay is", func() bool { _, n, _, _ := s.minutes(s.token, path, "replay"); return n == 1 })
	other := s.admin("POST", "apps", `{"name":"other","plan":"free"}`, 201)
	id, certificate := other["id"].(string), other["certificates"].([]any)[0].(string)
	if events, n, _, _ := s.minutes(s.tokenOf(id, certificate), "/v1/apps/"+id+"/metrics", "append"); events != 0 || n != 0 {
		t.Errorf("another app has %v events, %v requests", events, n)
	}
	for query, code := range map[string]string{
		"?from=yesterday": "invalid-request", "?limit=0": "invalid-request", "?limit=1441": "invalid-request", "?until=2026-01-01T00:00:00Z": "invalid-request",
		"?after=abc": "invalid-request",
	} {
		if got := s.do(request{path: path + query}).code(t); got != code {
			t.Errorf("%s: %s, want %s", query, got, code)
		}
	}

	scraped := s.do(request{path: "/metrics", token: s.operator})
	if scraped.status != http.StatusOK || !strings.HasPrefix(scraped.header.Get("Content-Type"), "text/plain") {
		t.Fatalf("scraped: %d %v", scraped.status, scraped.header)
	}
	body := string(scraped.body)
	for _, line := range []string{
		`coffer_requests_total{operation="append",outcome="ok",region="eu"} 2`,
		`coffer_requests_total{operation="append",outcome="refused",region="eu"} 1`,
		`coffer_request_seconds_count{operation="append",region="eu"} 3`,
		`coffer_events_appended_total{region="eu"} 2`,
		`coffer_kms_calls_total{operation="generate",outcome="ok",region="eu"} `,
		`coffer_view_lag_records{projection="history",region="eu"} `,
		`coffer_view_stopped_streams{projection="roaming",region="eu"} 0`,
		`coffer_expiry_lag_seconds{kind="messages",region="eu"} 0`,
		`coffer_expiry_lag_seconds{kind="view_history",region="eu"} 0`,
		`coffer_expiry_lag_seconds{kind="view_callbacks",region="eu"} 0`,
		`coffer_expiry_lag_seconds{kind="keys",region="eu"} `,
		`coffer_expiry_lag_seconds{kind="accounts",region="eu"} `,
		`coffer_stored_messages{kind="messages",region="eu"} 2`,
		`coffer_stored_bytes{kind="keyring",region="eu"} `,
		`coffer_view_store_bytes{region="eu"} `,
		`coffer_keys_in_memory{kind="apps",region="eu"} `,
		`coffer_unused_records_total{kind="profiles",outcome="ended",region="eu"} 0`,
		`coffer_keys_degraded{region="eu"} 0`,
		`coffer_deliveries{region="eu",state="waiting"} 0`,
		`coffer_delivery_overdue_seconds{region="eu"} 0`,
		`go_goroutines`,
	} {
		if !strings.Contains(body, "\n"+line) {
			t.Errorf("the metrics do not have %s", line)
		}
	}
	parts, _ := s.process.Parts("eu")
	for _, rule := range parts.Journal.RetentionTable() { // what ends may come late
		names := []string{string(rule.Kind)}
		if rule.Kind == journal.KindViews {
			names = []string{"view_history", "view_roaming", "view_callbacks"}
		}
		for _, name := range names {
			if has := strings.Contains(body, `coffer_expiry_lag_seconds{kind="`+name+`"`); has != (rule.Lifetime > 0) {
				t.Errorf("%s is kept %v; has a lag: %v", name, rule.Lifetime, has)
			}
		}
	}
	for _, secret := range []string{s.app, id, "canary"} {
		if strings.Contains(body, secret) {
			t.Errorf("the metrics name %s", secret)
		}
	}
	open := s.do(request{path: "/metrics", token: s.operator, header: map[string]string{"Accept": "application/openmetrics-text; version=1.0.0"}})
	if !strings.HasPrefix(open.header.Get("Content-Type"), "application/openmetrics-text") || !strings.HasSuffix(string(open.body), "# EOF\n") {
		t.Errorf("OpenMetrics: %v", open.header)
	}

	// A deleted app's data goes with it.
	s.admin("DELETE", "apps/"+s.app, "", 202)
	s.deleted(s.app)
	gone, err := journal.ParseAppID(s.app)
	if err != nil {
		t.Fatal(err)
	}
	await(t, "its monitoring data goes", func() bool {
		n, err := parts.Journal.CountMonitoring(t.Context(), gone)
		return err == nil && n == 0
	})
}
