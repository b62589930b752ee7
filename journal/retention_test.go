package journal_test

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cofferdb/coffer/journal"
)

// TestRetentionDefaults fixes the lifetimes that the product promises.
func TestRetentionDefaults(t *testing.T) {
	const day = 24 * time.Hour
	want := map[string]time.Duration{
		"messages/free": 3 * day, "messages/basic": 7 * day, "messages/pro": 90 * day, "messages/enterprise": 180 * day,
		"views/free": 3 * day, "views/basic": 7 * day, "views/pro": 90 * day, "views/enterprise": 180 * day,
		"attachments/": 7 * day, "callbacks/": 3 * day, "monitoring/": 7 * day, "audit/": 400 * day,
		"accounts/": 180 * day, "profiles/": 180 * day, "exports/": 7 * day, "registry/": 0, "keyring/": 0,
	}
	table := journal.RetentionTable("eu", journal.DefaultPlans(), journal.Retention{})
	for _, rule := range table {
		name := string(rule.Kind) + "/" + rule.Plan
		if lifetime, ok := want[name]; !ok || lifetime != rule.Lifetime {
			t.Errorf("%s is kept %v, want %v (known: %v)", name, rule.Lifetime, lifetime, ok)
		}
		delete(want, name)
		if warned := rule.Warning == 30*day; warned != (rule.Since == journal.SinceUse) {
			t.Errorf("%s counts from its %s and warns %v before its end", name, rule.Since, rule.Warning)
		}
	}
	for _, rule := range table {
		plain := slices.Contains([]journal.Kind{
			journal.KindMonitoring, journal.KindAudit, journal.KindExports, journal.KindRegistry, journal.KindKeyring,
		}, rule.Kind)
		if ends := rule.Lifetime > 0; rule.Read != ends || rule.Key == plain || (rule.Storage == journal.ExpiryNone) == ends {
			t.Errorf("%s is kept %v; refused to readers: %v, removed by %s, its key destroyed: %v", rule.Kind, rule.Lifetime, rule.Read, rule.Storage, rule.Key)
		}
	}
	for name := range want {
		t.Errorf("the table has no row for %s", name)
	}
	if got, ok := journal.MaxAge(table, "coffer_eu_cb_3"); !ok || got != 3*day {
		t.Errorf("a shard of callbacks has MaxAge %v, %v", got, ok)
	}
	for _, stranger := range []string{"coffer_us_cb_3", "coffer_eu_msg_free_1", "coffer_eu_monitor", ""} {
		if _, ok := journal.MaxAge(table, stranger); ok {
			t.Errorf("the table of eu names %q", stranger)
		}
	}
}

func TestRetentionValidate(t *testing.T) {
	for name, r := range map[string]journal.Retention{
		"negative":        {Callbacks: -time.Hour},
		"late warning":    {Profiles: 20 * 24 * time.Hour},
		"seldom refresh":  {Refresh: 31 * 24 * time.Hour},
		"warning too far": {Warning: 180 * 24 * time.Hour},
	} {
		if err := r.Validate(); !errors.Is(err, journal.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
	if err := (journal.Retention{}).Validate(); err != nil {
		t.Error("the defaults:", err)
	}
}

// TestRetentionOfStreams holds the servers' streams against the table: all that
// are there have a row, and the row's age.
func TestRetentionOfStreams(t *testing.T) {
	w := begin(t, t.TempDir(), true, nil)
	js := jsOf(t, w)
	table := w.RetentionTable()
	var seen []string
	names := js.StreamNames(t.Context())
	for name := range names.Name() {
		seen = append(seen, name)
		age, ok := journal.MaxAge(table, name)
		s, err := js.Stream(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		if have := s.CachedInfo().Config.MaxAge; !ok || have != age {
			t.Errorf("stream %s has MaxAge %v, the table says %v (has a row: %v)", name, have, age, ok)
		}
	}
	if err := names.Err(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{journal.StreamName("eu", "pro", 0), journal.AuditStream("eu"), "KV_" + journal.ProfileBucket("eu")} {
		if !slices.Contains(seen, name) {
			t.Errorf("there is no stream %s, only %s", name, strings.Join(seen, " "))
		}
	}
	s, err := js.Stream(t.Context(), journal.AuditStream("eu"))
	if err != nil {
		t.Fatal(err)
	}
	changed := s.CachedInfo().Config
	changed.MaxAge = time.Hour
	if _, err := js.UpdateStream(t.Context(), changed); err != nil {
		t.Fatal(err)
	}
	drifts, err := w.Check(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := journal.Drift{Stream: journal.AuditStream("eu"), Field: "max_age", Want: "9600h0m0s", Have: "1h0m0s"}
	if !slices.Contains(drifts, want) {
		t.Errorf("Check tells %v, want %v among them", drifts, want)
	}
}
