package residency

import (
	"strings"
	"testing"
	"time"

	"github.com/cofferdb/coffer/journal"
)

func example() Manifest {
	m := New(journal.DefaultRegions()[2], journal.LogID{1}, time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC))
	m.Streams = Streams([]journal.Holding{
		{Name: "KV_coffer_eu_keyring", Storage: "file", Replicas: 1}, {Name: "coffer_eu_audit", Storage: "file", Replicas: 1},
	})
	m.Keys = []Key{{Provider: "awskms", Key: "arn:aws:kms:eu-central-1:1:key/a", Region: "eu-central-1", State: "enabled", Primary: true}}
	m.Endpoints = []Endpoint{{Kind: "api"}}
	return m
}

// says reports what is wrong unless exactly one difference says the words.
func says(t *testing.T, name string, got []Difference, words string) {
	t.Helper()
	if words == "" && len(got) == 0 {
		return
	}
	if len(got) != 1 || words == "" || !strings.Contains(got[0].String(), words) || got[0].Advice == "" {
		t.Errorf("%s: %v, want one that says %q, with advice", name, got, words)
	}
}

func TestCheck(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Manifest)
		words  string
	}{
		"as it should be":      {func(*Manifest) {}, ""},
		"of the future":        {func(m *Manifest) { m.Generated = m.Generated.Add(time.Hour) }, "future"},
		"a foreign stream":     {func(m *Manifest) { m.Streams[0].Name = "KV_coffer_us_keyring" }, `region "us"`},
		"a copied stream":      {func(m *Manifest) { m.Streams[1].Copies = []string{"republish x"} }, "copied: republish x"},
		"in memory":            {func(m *Manifest) { m.Streams[1].Storage = "memory" }, "memory"},
		"a key elsewhere":      {func(m *Manifest) { m.Keys[0].Region = "us-east-1" }, "us-east-1"},
		"a key that is silent": {func(m *Manifest) { m.Keys[0].State = "unknown" }, "did not answer"},
		"no primary key":       {func(m *Manifest) { m.Keys[0].Primary = false }, "0 keys are primary"},
		"no listener":          {func(m *Manifest) { m.Endpoints = nil }, "no listener"},
	} {
		m := example()
		now := m.Generated
		c.change(&m)
		says(t, name, Check(m, now), c.words)
	}
}

func TestCompare(t *testing.T) {
	held := func(change func([]journal.Holding) []journal.Holding) []journal.Holding {
		return change([]journal.Holding{
			{Name: "KV_coffer_eu_keyring", Storage: "file", Replicas: 1},
			{Name: "coffer_eu_audit", Storage: "file", Replicas: 1},
			{Name: "orders", Storage: "memory", Replicas: 1},
		})
	}
	for name, c := range map[string]struct {
		change func([]journal.Holding) []journal.Holding
		words  string
	}{
		"as it should be": {func(h []journal.Holding) []journal.Holding { return h }, ""},
		"gone":            {func(h []journal.Holding) []journal.Holding { return h[1:] }, "KV_coffer_eu_keyring: the manifest names it"},
		"made again":      {func(h []journal.Holding) []journal.Holding { h[1].Incarnation = "x"; return h }, "incarnation"},
		"fewer replicas":  {func(h []journal.Holding) []journal.Holding { h[1].Replicas = 3; return h }, "replicas: the manifest says 1, the server has 3"},
		"on a new server": {func(h []journal.Holding) []journal.Holding { h[1].Servers = []string{"n1"}; return h }, "servers"},
		"placed":          {func(h []journal.Holding) []journal.Holding { h[1].Tags = []string{"us"}; return h }, "placement"},
		"kept longer":     {func(h []journal.Holding) []journal.Holding { h[1].MaxAge = time.Hour; return h }, "max_age_seconds"},
		"copied":          {func(h []journal.Holding) []journal.Holding { h[1].Copies = []string{"republish x"}; return h }, "copies"},
		"mirrored": {func(h []journal.Holding) []journal.Holding {
			h[2].Copies = []string{"mirror coffer_eu_audit"}
			return h
		}, "orders: it holds a copy"},
		"another region's": {func(h []journal.Holding) []journal.Holding {
			return append(h, journal.Holding{Name: "OBJ_coffer_sg_attachments"})
		}, `region "sg"`},
		"one more": {func(h []journal.Holding) []journal.Holding { return append(h, journal.Holding{Name: "coffer_eu_x"}) }, "does not name it"},
	} {
		says(t, name, CompareStreams(example(), held(c.change)), c.words)
	}
	key := example().Keys[0]
	for name, c := range map[string]struct {
		change func(*Key)
		words  string
	}{
		"as it should be": {func(*Key) {}, ""},
		"another":         {func(k *Key) { k.Key = "arn:aws:kms:eu-central-1:1:key/b" }, "does not name it"},
		"elsewhere":       {func(k *Key) { k.Region = "us-east-1" }, `the service "us-east-1"`},
		"disabled":        {func(k *Key) { k.State = "disabled" }, "disabled"},
	} {
		asked := key
		c.change(&asked)
		says(t, name, CompareKeys(example(), []Key{asked}), c.words)
	}
}
